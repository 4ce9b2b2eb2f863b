//! Packs weights: rearranges ggml's blocks into tiles (`tile.rs`), once, when a model is loaded.

use crate::blocks::WeightType;
use crate::generic::strip::for_each_group;
use crate::packable::{Packable, Words, every_byte, with_packable};
use crate::pages::{Arena, Piece};
use crate::tile::{self, SubScales, TILE_COLS, TILE_ROWS, TileLayout};
use std::fmt;
use std::ops::Range;

/// The layout of `dtype`, if it can be packed.
fn layout_of(dtype: WeightType) -> Option<TileLayout> {
    fn layout<P: Packable>() -> Option<TileLayout> {
        Some(P::LAYOUT)
    }
    with_packable!(dtype, layout::<_>(), None)
}

/// Rearranges the blocks of up to 16 rows, `(lanes, cols)`, into a strip.
fn pack_strip<P: Packable>(blocks: &[u8], strip: &mut [u8]) {
    let layout = const { P::LAYOUT };
    let row_blocks = strip.len() / layout.block_bytes();
    for (index, out) in strip.chunks_exact_mut(layout.block_bytes()).enumerate() {
        for (lane, row) in blocks.chunks_exact(row_blocks * P::BLOCK_BYTES).enumerate() {
            put_block::<P>(&row[index * P::BLOCK_BYTES..][..P::BLOCK_BYTES], out, lane);
        }
    }
}

/// Rearranges one block into row `lane` of a block of tiles.
fn put_block<P: Packable>(block: &[u8], out: &mut [u8], lane: usize) {
    let layout = const { P::LAYOUT };
    let (header, tiles) = out.split_at_mut(layout.header_bytes());
    header[2 * lane..][..2].copy_from_slice(&block[P::D..][..2]);
    if layout.has_mins {
        let m = &mut header[2 * (TILE_ROWS + lane)..][..2];
        m.copy_from_slice(&block[P::M..][..2]);
        if layout.sub_scales != SubScales::None {
            m[1] ^= 0x80; // the sign
        }
    }
    for (index, tile) in tiles.chunks_exact_mut(layout.tile_bytes()).enumerate() {
        if layout.sub_scales != SubScales::None {
            for half in 0..layout.scales {
                tile[TILE_ROWS * half + lane] = P::sub_scale(block, index, half);
            }
        }
        if layout.has_mins && layout.sub_scales == SubScales::Unsigned {
            for half in 0..layout.scales {
                tile[layout.sub_mins() + TILE_ROWS * half + lane] = P::sub_min(block, index, half);
            }
        }
        put_weights::<P>(P::weights(block, index), tile, lane);
    }
}

/// Writes the stored numbers of row `lane` into a tile.
#[inline(always)]
fn put_weights<P: Packable>(words: Words, tile: &mut [u8], lane: usize) {
    if const { P::LAYOUT.is_paired() } {
        return put_pairs::<P>(words, tile, lane);
    }
    let mut units = [0_u32; 8];
    for_each_group!([0 1 2 3 4 5 6 7], GROUP, {
        for_each_group!([0 1 2], PIECE, {
            let tile::Piece { unit, from, to, count } = const { P::LAYOUT.piece(GROUP, PIECE) };
            if count > 0 {
                units[unit] |= (words[GROUP] >> to & every_byte((1 << count) - 1)) << from;
            }
        });
    });
    for (unit, word) in units[..P::LAYOUT.bits].iter().enumerate() {
        tile[P::LAYOUT.unit(unit) + 4 * lane..][..4].copy_from_slice(&word.to_le_bytes());
    }
}

/// The same for a type whose bytes have numbers of two rows.
#[inline(always)]
fn put_pairs<P: Packable>(words: Words, tile: &mut [u8], lane: usize) {
    for (group, word) in words.into_iter().enumerate() {
        let (at, shift) = P::LAYOUT.pair(group, lane);
        let out = &mut tile[at..][..4];
        let stored = u32::from_le_bytes([out[0], out[1], out[2], out[3]]);
        // In 4 bits, x ^ 8 is x - 8.
        let word = if shift == 0 { word } else { stored | (word ^ every_byte(8)) << shift };
        out.copy_from_slice(&word.to_le_bytes());
    }
}

/// Dequantises row `lane` of a strip. A function for each type, so that the layout is a constant.
fn row_to_f32<P: Packable>(strip: &[u8], lane: usize, out: &mut [f32]) {
    for (index, out) in out.chunks_exact_mut(TILE_COLS).enumerate() {
        P::LAYOUT.dequantize(P::LAYOUT.tile(strip, index), lane, out);
    }
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
        let layout =
            layout_of(dtype).filter(|layout| cols > 0 && cols.is_multiple_of(layout.block_cols()))?;
        rows.div_ceil(TILE_ROWS).checked_mul(cols / layout.block_cols())?.checked_mul(layout.block_bytes())
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
        let layout = layout_of(dtype);
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
        self.cols / self.layout.block_cols() * self.layout.block_bytes()
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

    /// Some strips, which follow each other in memory.
    pub(super) fn strips_bytes(&self, strips: Range<usize>) -> &[u8] {
        let len = self.strip_bytes();
        &self.bytes[strips.start * len..strips.end * len]
    }

    /// Rearranges the blocks of up to 16 rows, `(lanes, cols)`, into a strip.
    pub(super) fn pack_strip(dtype: WeightType, blocks: &[u8], strip: &mut [u8]) {
        with_packable!(dtype, pack_strip::<_>(blocks, strip));
    }

    /// Dequantises row `row` to `out`, `(cols,)`: the same bits as [`dequantize`](crate::dequantize) of its
    /// blocks.
    ///
    /// # Panics
    /// If `row` or the length of `out` is out of range.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "out is one row");
        with_packable!(self.dtype, row_to_f32::<_>(self.strip(row / TILE_ROWS), row % TILE_ROWS, out));
    }
}
