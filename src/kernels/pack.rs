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

use super::WeightType;
use super::blocks::f16_at;
use std::collections::TryReserveError;

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
    pub(super) wide: bool,
    /// What a stored number is above the number it stands for.
    pub(super) zero_point: i32,
}

const fn layout(mins: bool, high_bits: bool, wide: bool, zero_point: i32) -> TileLayout {
    let scales = 2 * TILE_ROWS;
    let before_bits = if mins { 2 * scales } else { scales };
    let groups = if high_bits { before_bits + 64 } else { before_bits };
    TileLayout {
        bytes: groups + if wide { 512 } else { 256 },
        mins: if mins { Some(scales) } else { None },
        high_bits: if high_bits { Some(before_bits) } else { None },
        groups,
        wide,
        zero_point,
    }
}

pub(super) const Q8_0: TileLayout = layout(false, false, true, 128);
pub(super) const Q4_0: TileLayout = layout(false, false, false, 8);
pub(super) const Q4_1: TileLayout = layout(true, false, false, 0);
pub(super) const Q5_0: TileLayout = layout(false, true, false, 16);
pub(super) const Q5_1: TileLayout = layout(true, true, false, 0);

impl TileLayout {
    /// That of `dtype`, if it can be packed.
    fn of(dtype: WeightType) -> Option<Self> {
        match dtype {
            WeightType::Q8_0 => Some(Q8_0),
            WeightType::Q4_0 => Some(Q4_0),
            WeightType::Q4_1 => Some(Q4_1),
            WeightType::Q5_0 => Some(Q5_0),
            WeightType::Q5_1 => Some(Q5_1),
            _ => None,
        }
    }

    /// Moves one block into lane `lane` of a tile.
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
                let byte = (0..8).fold(0, |byte, group| byte | (bits >> (4 * group + j) & 1) << group);
                tile[plane + 4 * lane + j] = byte as u8;
            }
            at += 4;
        }
        let quants = &block[at..];
        let mut put = |index: usize, word: u32| {
            tile[self.groups + 64 * index + 4 * lane..][..4].copy_from_slice(&word.to_le_bytes());
        };
        if self.wide {
            (0..8).for_each(|group| put(group, word(quants, 4 * group) ^ 0x8080_8080));
        } else {
            // Elements 0..16 stand in the low, 16..32 in the high halves of a block's bytes.
            let group = |g: usize| word(quants, 4 * (g % 4)) >> (4 * (g / 4)) & 0x0f0f_0f0f;
            (0..4).for_each(|pair| put(pair, group(2 * pair) | group(2 * pair + 1) << 4));
        }
    }

    /// Element `i` of lane `lane` of a tile, widened as ggml's reference does.
    fn element(&self, tile: &[u8], lane: usize, i: usize) -> f32 {
        let (group, j) = (i / 4, i % 4);
        let mut quant = if self.wide {
            i32::from(tile[self.groups + 64 * group + 4 * lane + j])
        } else {
            i32::from(tile[self.groups + 64 * (group / 2) + 4 * lane + j] >> (4 * (group % 2)) & 15)
        };
        if let Some(plane) = self.high_bits {
            quant |= i32::from(tile[plane + 4 * lane + j] >> group & 1) << 4;
        }
        let scaled = (quant - self.zero_point) as f32 * f16_at(tile, 2 * lane);
        self.mins.map_or(scaled, |mins| scaled + f16_at(tile, mins + 2 * lane))
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// A cache line: tiles begin at one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A weight matrix in tiles, `(rows, cols)`.
pub struct PackedRows {
    dtype: WeightType,
    layout: TileLayout,
    rows: usize,
    cols: usize,
    lines: Vec<Line>,
}

impl PackedRows {
    /// Whether weights of this type can be packed.
    pub fn can_hold(dtype: WeightType) -> bool {
        TileLayout::of(dtype).is_some()
    }

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
        dtype: WeightType,
        rows: usize,
        cols: usize,
    ) -> Result<Option<Self>, TryReserveError> {
        let layout = TileLayout::of(dtype);
        let (Some(layout), Some(bytes)) = (layout, Self::bytes_for(dtype, rows, cols)) else {
            return Ok(None);
        };
        let mut lines = Vec::new();
        lines.try_reserve_exact(bytes.div_ceil(64))?;
        lines.resize(bytes.div_ceil(64), Line([0; 64]));
        Ok(Some(PackedRows { dtype, layout, rows, cols, lines }))
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

    fn bytes(&self) -> &[u8] {
        // SAFETY: lines are initialised bytes without padding; `zeroed` made as many as the strips need.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len_bytes()) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.len_bytes();
        // SAFETY: as in `bytes`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }

    /// The tiles of rows `16 * strip` on.
    #[inline(always)]
    pub(super) fn strip(&self, strip: usize) -> &[u8] {
        let len = self.strip_bytes();
        &self.bytes()[strip * len..][..len]
    }

    /// Rearranges up to 16 rows of blocks, `(lanes, cols)`, into a strip.
    pub(super) fn pack_strip(dtype: WeightType, blocks: &[u8], strip: &mut [u8]) {
        let layout = TileLayout::of(dtype).expect("only what can be packed has strips");
        let block_bytes = dtype.block_bytes();
        let row_bytes = strip.len() / layout.bytes * block_bytes;
        for (lane, row) in blocks.chunks_exact(row_bytes).enumerate() {
            for (block, tile) in row.chunks_exact(block_bytes).zip(strip.chunks_exact_mut(layout.bytes)) {
                layout.put_block(block, tile, lane);
            }
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
