//! Weights in tiles of 16 rows: the layout that products with 8-bit activations read.
//!
//! The types with blocks of 32 are rearranged, once, when a model is loaded: 16 blocks, one of each of 16
//! rows, become one tile, and the tiles of the same 16 rows follow each other. So a thread reads one
//! increasing stream of addresses, and no sum goes across the lanes of a register: a lane is a row.
//!
//! | type | bytes of a tile | contents, in order |
//! |---|---|---|
//! | Q8_0 | 544 | 16 d; 8 groups of bytes `q + 128` |
//! | Q4_0 | 288 | 16 d; 4 pairs of groups of nibbles |
//! | Q4_1 | 320 | 16 d; 16 m; 4 pairs of groups of nibbles |
//! | Q5_0 | 352 | 16 d; the high bits; 4 pairs of groups of nibbles |
//! | Q5_1 | 384 | 16 d; 16 m; the high bits; 4 pairs of groups of nibbles |
//!
//! A group `g` is elements `4g..4g + 4` of each row: 64 bytes, `(16 rows, 4)`. A pair holds group `2p` in the low
//! and group `2p + 1` in the high halves of its bytes. Of the high bits, bit `g` of byte `(row, j)` is that of
//! element `4g + j`. d and m are f16. The numbers are those of `blocks.rs`, none is changed: a tile takes
//! the bytes of its 16 blocks. Rows behind the last are zeros.

use crate::blocks::{WeightType, f16_at};
use crate::pages::{Arena, Piece};
use std::fmt;

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Elements of a row in a tile.
pub(super) const TILE_COLS: usize = 32;

/// How a type is laid out in tiles.
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
    /// Whether the groups are bytes, not nibbles.
    pub(super) stores_bytes: bool,
    /// What a stored number is above the number it stands for.
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

/// A layout at compile time.
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
            _ => unreachable!("only what can be packed has strips"),
        }
    }};
}
pub(super) use with_layout;

impl TileLayout {
    /// That of `dtype`, if it can be packed.
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

    /// As [`PackedRows::pack_strip`]. Everything but the bytes is known where this is inlined.
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

    /// Moves one block into lane `lane` of a tile.
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
            // Elements 0..16 stand in the low, 16..32 in the high halves of a block's bytes.
            let group = |g: usize| word(quants, 4 * (g % 4)) >> (4 * (g / 4)) & 0x0f0f_0f0f;
            put(pair, group(2 * pair) | group(2 * pair + 1) << 4);
        }
    }

    /// The integer that element `i` of lane `lane` stands for, before its scale and minimum.
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

/// `LEN` bytes of a tile.
#[inline(always)]
pub(super) fn bytes_at<const LEN: usize>(tile: &[u8], at: usize) -> &[u8; LEN] {
    tile[at..][..LEN].try_into().expect("cut to its length")
}

/// Bits 0, 4, 8, ..., 28, moved together.
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

/// There is no memory for so many bytes.
#[derive(Clone, Copy, Debug)]
pub struct NoMemory(pub usize);

impl fmt::Display for NoMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no memory for {} bytes", self.0)
    }
}

impl std::error::Error for NoMemory {}

/// A weight matrix in tiles, `(rows, cols)`.
pub struct PackedRows {
    dtype: WeightType,
    layout: TileLayout,
    rows: usize,
    cols: usize,
    /// The strips.
    bytes: Piece,
}

impl PackedRows {
    /// Bytes of `rows` x `cols` weights when packed; None if they cannot be, or that overflows.
    pub fn bytes_for(dtype: WeightType, rows: usize, cols: usize) -> Option<usize> {
        let layout = TileLayout::of(dtype).filter(|_| cols > 0 && cols.is_multiple_of(TILE_COLS))?;
        rows.div_ceil(TILE_ROWS).checked_mul(cols / TILE_COLS)?.checked_mul(layout.bytes)
    }

    /// Room for `rows` x `cols` weights; None if they cannot be packed.
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

    /// The type of the blocks.
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

    /// How many bytes that is.
    pub fn len_bytes(&self) -> usize {
        self.strips() * self.strip_bytes()
    }

    /// Bytes of the tiles of the same 16 rows.
    pub(super) fn strip_bytes(&self) -> usize {
        self.cols / TILE_COLS * self.layout.bytes
    }

    /// How many times 16 rows there are, the last perhaps not whole.
    pub(super) fn strips(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// All strips.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// How the tiles are laid out.
    pub(super) fn layout(&self) -> TileLayout {
        self.layout
    }

    /// The tiles of rows `16 * strip` on.
    #[inline(always)]
    pub(super) fn strip(&self, strip: usize) -> &[u8] {
        let len = self.strip_bytes();
        &self.bytes[strip * len..][..len]
    }

    /// Rearranges up to 16 rows of blocks, `(lanes, cols)`, into a strip.
    pub(super) fn pack_strip(dtype: WeightType, blocks: &[u8], strip: &mut [u8]) {
        match dtype {
            WeightType::Q8_0 => Q8_0::LAYOUT.pack_strip::<34>(blocks, strip),
            WeightType::Q4_0 => Q4_0::LAYOUT.pack_strip::<18>(blocks, strip),
            WeightType::Q4_1 => Q4_1::LAYOUT.pack_strip::<20>(blocks, strip),
            WeightType::Q5_0 => Q5_0::LAYOUT.pack_strip::<22>(blocks, strip),
            WeightType::Q5_1 => Q5_1::LAYOUT.pack_strip::<24>(blocks, strip),
            _ => unreachable!("only what can be packed has strips"),
        }
    }

    /// Writes row `row` as f32 to `out`, `(cols,)`: the same numbers as [`super::dequantize`] of its blocks.
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
