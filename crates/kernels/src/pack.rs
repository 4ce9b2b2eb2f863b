//! Packed weights: weights in tiles of 16 rows by 32 columns, which products with 8-bit activations read.
//!
//! Types with blocks of 32 are rearranged once, when a model is loaded. A tile consists of 16 blocks, one of
//! each of 16 rows. The tiles of the same 16 rows follow each other and form a strip. So a thread reads one
//! increasing stream of addresses. A lane is a row, so no sum goes across lanes.
//!
//! | type | bytes of a tile | contents, in order |
//! |---|---|---|
//! | Q8_0 | 544 | 16 d; 8 groups of bytes `q + 128` |
//! | Q4_0 | 288 | 16 d; 4 pairs of groups of nibbles |
//! | Q4_1 | 320 | 16 d; 16 m; 4 pairs of groups of nibbles |
//! | Q5_0 | 352 | 16 d; the high bits; 4 pairs of groups of nibbles |
//! | Q5_1 | 384 | 16 d; 16 m; the high bits; 4 pairs of groups of nibbles |
//!
//! Group `g` consists of elements `4g..4g + 4` of each row: 64 bytes, `(16 rows, 4)`. In a pair of groups of
//! nibbles, group `2p` is in the low halves of the bytes and group `2p + 1` in the high halves. In the high
//! bits, bit `g` of byte `(row, j)` belongs to element `4g + j`. d and m are f16. The numbers are the same as
//! in `blocks.rs`, and a tile takes as many bytes as its 16 blocks. Rows after the last one are zeros.

use crate::blocks::{WeightType, f16_at};
use crate::pages::{Arena, Piece};
use std::fmt;

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Columns of a tile.
pub(super) const TILE_COLS: usize = 32;

/// The layout of a type's tiles.
#[derive(Clone, Copy)]
pub(super) struct TileLayout {
    /// Bytes of a tile.
    pub(super) bytes: usize,
    /// Where the minimums begin, if there are any.
    pub(super) mins: Option<usize>,
    /// Where the high bits begin, if there are any.
    pub(super) high_bits: Option<usize>,
    /// Where the groups begin.
    pub(super) groups: usize,
    /// Whether the groups are bytes instead of nibbles.
    pub(super) stores_bytes: bool,
    /// The stored number minus the number that it means.
    pub(super) zero_point: i32,
}

const fn layout(has_mins: bool, has_high_bits: bool, stores_bytes: bool, zero_point: i32) -> TileLayout {
    let scales = 2 * TILE_ROWS;
    let before_bits = if has_mins { 2 * scales } else { scales };
    let groups = if has_high_bits { before_bits + 64 } else { before_bits };
    TileLayout {
        bytes: groups + if stores_bytes { 512 } else { 256 },
        mins: if has_mins { Some(scales) } else { None },
        high_bits: if has_high_bits { Some(before_bits) } else { None },
        groups,
        stores_bytes,
        zero_point,
    }
}

/// A layout that is known at compile time.
pub(super) trait Layout {
    const LAYOUT: TileLayout;
}

macro_rules! layouts {
    ($($name:ident: $layout:expr;)*) => {$(
        #[allow(non_camel_case_types)] // ggml's spelling
        pub(super) enum $name {}
        impl Layout for $name {
            const LAYOUT: TileLayout = $layout;
        }
    )*};
}

layouts! {
    Q8_0: layout(false, false, true, 128);
    Q4_0: layout(false, false, false, 8);
    Q4_1: layout(true, false, false, 0);
    Q5_0: layout(false, true, false, 16);
    Q5_1: layout(true, true, false, 0);
}

/// Calls `$function::<Layout, ...>($args)` for the type of packed weights.
macro_rules! with_layout {
    ($dtype:expr, $function:ident::<_ $(, $generic:ident)*>($($arg:expr),* $(,)?)) => {{
        use $crate::{blocks::WeightType, pack};
        match $dtype {
            WeightType::Q8_0 => $function::<pack::Q8_0 $(, $generic)*>($($arg),*),
            WeightType::Q4_0 => $function::<pack::Q4_0 $(, $generic)*>($($arg),*),
            WeightType::Q4_1 => $function::<pack::Q4_1 $(, $generic)*>($($arg),*),
            WeightType::Q5_0 => $function::<pack::Q5_0 $(, $generic)*>($($arg),*),
            WeightType::Q5_1 => $function::<pack::Q5_1 $(, $generic)*>($($arg),*),
            _ => unreachable!("the type cannot be packed"),
        }
    }};
}
pub(super) use with_layout;

impl TileLayout {
    /// The layout of `dtype`, if it can be packed.
    fn of(dtype: WeightType) -> Option<Self> {
        match dtype {
            WeightType::Q8_0 => Some(Q8_0::LAYOUT),
            WeightType::Q4_0 => Some(Q4_0::LAYOUT),
            WeightType::Q4_1 => Some(Q4_1::LAYOUT),
            WeightType::Q5_0 => Some(Q5_0::LAYOUT),
            WeightType::Q5_1 => Some(Q5_1::LAYOUT),
            _ => None,
        }
    }

    /// See [`PackedRows::pack_strip`]. Inlined, so that the layout is a constant.
    #[inline(always)]
    fn pack_strip<const BLOCK_BYTES: usize>(self, blocks: &[u8], strip: &mut [u8]) {
        let (blocks, _) = blocks.as_chunks::<BLOCK_BYTES>();
        let row_blocks = strip.len() / self.bytes;
        for (index, tile) in strip.chunks_exact_mut(self.bytes).enumerate() {
            for lane in 0..blocks.len() / row_blocks {
                self.put_block(&blocks[lane * row_blocks + index], tile, lane);
            }
        }
    }

    /// Copies one block into lane `lane` of a tile.
    #[inline(always)]
    fn put_block(&self, block: &[u8], tile: &mut [u8], lane: usize) {
        tile[2 * lane..][..2].copy_from_slice(&block[..2]);
        let mut at = 2;
        if let Some(mins) = self.mins {
            tile[mins + 2 * lane..][..2].copy_from_slice(&block[at..at + 2]);
            at += 2;
        }
        if let Some(plane) = self.high_bits {
            let bits = word(block, at);
            for j in 0..4 {
                tile[plane + 4 * lane + j] = every_fourth_bit(bits >> j);
            }
            at += 4;
        }
        let quants = &block[at..];
        let mut put = |index: usize, word: u32| {
            tile[self.groups + 64 * index + 4 * lane..][..4].copy_from_slice(&word.to_le_bytes());
        };
        if self.stores_bytes {
            for group in 0..8 {
                put(group, word(quants, 4 * group) ^ 0x8080_8080);
            }
            return;
        }
        for pair in 0..4 {
            // A block has elements 0..16 in the low halves of its bytes and 16..32 in the high halves.
            let group = |g: usize| word(quants, 4 * (g % 4)) >> (4 * (g / 4)) & 0x0f0f_0f0f;
            put(pair, group(2 * pair) | group(2 * pair + 1) << 4);
        }
    }

    /// The integer that element `i` of lane `lane` means, before scale and minimum are applied.
    pub(super) fn quant(&self, tile: &[u8], lane: usize, i: usize) -> i32 {
        let (group, j) = (i / 4, i % 4);
        let mut quant = if self.stores_bytes {
            i32::from(tile[self.groups + 64 * group + 4 * lane + j])
        } else {
            i32::from(tile[self.groups + 64 * (group / 2) + 4 * lane + j] >> (4 * (group % 2)) & 15)
        };
        if let Some(plane) = self.high_bits {
            quant |= i32::from(tile[plane + 4 * lane + j] >> group & 1) << 4;
        }
        quant - self.zero_point
    }

    /// The scale of lane `lane`.
    pub(super) fn scale(&self, tile: &[u8], lane: usize) -> f32 {
        f16_at(tile, 2 * lane)
    }

    /// The minimum of lane `lane`, if the type has one.
    pub(super) fn min(&self, tile: &[u8], lane: usize) -> Option<f32> {
        self.mins.map(|mins| f16_at(tile, mins + 2 * lane))
    }

    /// Element `i` of lane `lane` of a tile, dequantised as ggml's reference does.
    fn element(&self, tile: &[u8], lane: usize, i: usize) -> f32 {
        let scaled = self.quant(tile, lane, i) as f32 * self.scale(tile, lane);
        self.min(tile, lane).map_or(scaled, |min| scaled + min)
    }
}

/// The `LEN` bytes from `at` on.
#[inline(always)]
pub(super) fn bytes_at<const LEN: usize>(tile: &[u8], at: usize) -> &[u8; LEN] {
    tile[at..][..LEN].try_into().expect("the slice has this length")
}

/// Bits 0, 4, 8, ..., 28 of a word, as one byte.
#[inline(always)]
fn every_fourth_bit(bits: u32) -> u8 {
    let pairs = bits & 0x1111_1111;
    let fours = (pairs | pairs >> 3) & 0x0303_0303;
    let eights = (fours | fours >> 6) & 0x000f_000f;
    (eights | eights >> 12) as u8
}

#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// There is no memory for this many bytes.
#[derive(Clone, Copy, Debug)]
pub struct NoMemory(pub usize);

impl fmt::Display for NoMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no memory for {} bytes", self.0)
    }
}

impl std::error::Error for NoMemory {}

/// A packed weight matrix, `(rows, cols)`.
pub struct PackedRows {
    dtype: WeightType,
    layout: TileLayout,
    rows: usize,
    cols: usize,
    /// The strips.
    bytes: Piece,
}

impl PackedRows {
    /// Bytes of `rows` x `cols` packed weights. None if they cannot be packed, or if the size overflows.
    pub fn bytes_for(dtype: WeightType, rows: usize, cols: usize) -> Option<usize> {
        let layout = TileLayout::of(dtype).filter(|_| cols > 0 && cols.is_multiple_of(TILE_COLS))?;
        rows.div_ceil(TILE_ROWS).checked_mul(cols / TILE_COLS)?.checked_mul(layout.bytes)
    }

    /// Memory for `rows` x `cols` packed weights. None if they cannot be packed.
    ///
    /// # Errors
    /// If there is no memory.
    pub(super) fn zeroed(
        arena: &Arena,
        dtype: WeightType,
        rows: usize,
        cols: usize,
    ) -> Result<Option<Self>, NoMemory> {
        let layout = TileLayout::of(dtype);
        let (Some(layout), Some(len)) = (layout, Self::bytes_for(dtype, rows, cols)) else {
            return Ok(None);
        };
        let bytes = arena.piece(len).ok_or(NoMemory(len))?;
        Ok(Some(PackedRows { dtype, layout, rows, cols, bytes }))
    }

    /// The storage type of the weights.
    pub fn dtype(&self) -> WeightType {
        self.dtype
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The size in bytes.
    pub fn len_bytes(&self) -> usize {
        self.strips() * self.strip_bytes()
    }

    /// Bytes of a strip.
    pub(super) fn strip_bytes(&self) -> usize {
        self.cols / TILE_COLS * self.layout.bytes
    }

    /// The number of strips. The last may have fewer than 16 rows.
    pub(super) fn strips(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// All strips.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// The layout of the tiles.
    pub(super) fn layout(&self) -> TileLayout {
        self.layout
    }

    /// The tiles of rows `16 * strip..16 * strip + 16`.
    #[inline(always)]
    pub(super) fn strip(&self, strip: usize) -> &[u8] {
        let len = self.strip_bytes();
        &self.bytes[strip * len..][..len]
    }

    /// Rearranges the blocks of up to 16 rows, `(lanes, cols)`, into a strip.
    pub(super) fn pack_strip(dtype: WeightType, blocks: &[u8], strip: &mut [u8]) {
        match dtype {
            WeightType::Q8_0 => Q8_0::LAYOUT.pack_strip::<34>(blocks, strip),
            WeightType::Q4_0 => Q4_0::LAYOUT.pack_strip::<18>(blocks, strip),
            WeightType::Q4_1 => Q4_1::LAYOUT.pack_strip::<20>(blocks, strip),
            WeightType::Q5_0 => Q5_0::LAYOUT.pack_strip::<22>(blocks, strip),
            WeightType::Q5_1 => Q5_1::LAYOUT.pack_strip::<24>(blocks, strip),
            _ => unreachable!("the type cannot be packed"),
        }
    }

    /// Dequantises row `row` to `out`, `(cols,)`: the same bits as [`dequantize`](crate::dequantize) of its
    /// blocks.
    ///
    /// # Panics
    /// If `row` or the length of `out` is out of range.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "out is one row");
        let tiles = self.strip(row / TILE_ROWS).chunks_exact(self.layout.bytes);
        for (tile, out) in tiles.zip(out.chunks_exact_mut(TILE_COLS)) {
            for (i, out) in out.iter_mut().enumerate() {
                *out = self.layout.element(tile, row % TILE_ROWS, i);
            }
        }
    }
}
