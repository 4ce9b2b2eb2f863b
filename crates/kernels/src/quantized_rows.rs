//! Activations in 8 bits, with one scale for every 32 columns of a row: the input of products with packed
//! weights.
//!
//! The rounding residual of a block (value minus rounded value) can be quantised to 8 bits too and multiplied
//! as a second term. Both together have about 16 bits. Whether a block has a residual depends only on its
//! row.
//!
//! Rows lie in panels of up to 8, so that a kernel which computes several rows at once reads one stream. A
//! panel begins with the number of its blocks. A block holds 32 columns of the panel's `m` rows. A block of
//! residuals follows the block of the same columns if any row needs one; it is zero for the other rows. A
//! block consists of 32-bit words:
//!
//! | words | contents |
//! |---|---|
//! | 1 | the index of the 32 columns |
//! | 8 m | `(4 pairs of groups, m, 2)`: 4 signed bytes, elements `4g..4g + 4` of the row |
//! | m | scale, f32: an element is its byte times the scale. The scale's last two bits are 0 |
//! | m | start for weights stored 8 too large, i32: [`FLOAT_START`] minus 8 times the sum of the 32 bytes |
//! | m | start for weights stored 128 too large, i32: the same with 128 |
//! | m | offset, f32: [`FLOAT_OFFSET`] times the scale. It is subtracted from the scaled sum |
//! | m | total, f32: the sum of the row's 32 elements. It is multiplied by the weights' minimum |
//! | m | half sum, i32: the sum of the first 16 bytes, for weights with a scale for every 16 columns |
//!
//! One scale per 32 columns rounds 2 to 7 times more finely than one per row.

use crate::tile::TILE_COLS;
use std::ops::Range;

/// Groups of 4 elements in 32 columns.
pub const GROUPS: usize = TILE_COLS / 4;
/// Where each other kind of word begins in a block, in units of `m` words: the scales.
pub const SCALE: usize = GROUPS;
/// The starts for weights stored 8 too large.
pub const START_8: usize = GROUPS + 1;
/// The starts for weights stored 128 too large.
pub const START_128: usize = GROUPS + 2;
/// The offsets.
pub const OFFSET: usize = GROUPS + 3;
/// The totals.
pub const TOTAL: usize = GROUPS + 4;
/// The half sums.
pub const HALF_SUM: usize = GROUPS + 5;
/// Words of a block per row, without the index.
pub(super) const ROW_WORDS: usize = GROUPS + 6;
/// 1.5 * 2^23, which turns an integer sum into a float without an instruction.
///
/// The last bit of a float of this size counts ones. So adding a signed integer of up to 23 bits to the
/// float's bits adds the integer to its value. An integer sum that starts at [`FLOAT_START`] can therefore be
/// reinterpreted as the float `FLOAT_OFFSET + sum`, and `sum * scale` is
/// `(FLOAT_OFFSET + sum) * scale - FLOAT_OFFSET * scale`: one instruction that rounds once. It is exact
/// because the last two bits of the scale are 0, which leaves room for the factor 3 in
/// `FLOAT_OFFSET * scale`.
pub const FLOAT_OFFSET: f32 = 12_582_912.0;
/// The bits of [`FLOAT_OFFSET`].
pub const FLOAT_START: i32 = FLOAT_OFFSET.to_bits() as i32;
/// The most rows of a panel.
pub(super) const MAX_PANEL_ROWS: usize = 8;

/// How precisely activations are quantised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// 8 bits, without residuals.
    #[default]
    Bits8,
    /// 8 bits, and a residual for blocks with an outlier: a number so much larger than the rest of its row
    /// that the other 31 would be rounded coarsely. Costs a tenth more work and leaves two fifths of the
    /// error.
    Mixed,
    /// 8 bits and a residual for every block, about 16 bits: twice the work, a hundredth of the error.
    Bits16,
}

/// Quantised rows of activations. [`Kernels::quantize`](crate::Kernels::quantize) fills them; they can be
/// reused.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// The number of panels. Their rows are as even as possible: the first panels may have one more.
    pub(super) panel_count: usize,
    /// All panels. Each takes as many words as [`panel_words`] says.
    pub(super) words: Vec<u32>,
}

/// A panel: the rows from `first` on.
pub struct Panel<'a> {
    /// The index of its first row.
    pub first: usize,
    /// How many it has.
    pub rows: usize,
    /// Its blocks, [`block_words`] each.
    pub blocks: &'a [u32],
}

/// Where a block of `rows` rows has the word of group `group` of row `row`.
pub const fn group_word(group: usize, rows: usize, row: usize) -> usize {
    group / 2 * 2 * rows + 2 * row + group % 2
}

/// Words of a block of `rows` rows.
pub const fn block_words(rows: usize) -> usize {
    1 + ROW_WORDS * rows
}

/// Words of a panel if every block has a residual: the space that is reserved.
pub(super) const fn panel_words(rows: usize, cols: usize) -> usize {
    1 + 2 * (cols / TILE_COLS) * block_words(rows)
}

impl QuantizedRows {
    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The most bytes per row, for many rows of `cols` columns.
    pub const fn row_bytes(cols: usize) -> usize {
        size_of::<u32>() * panel_words(1, cols)
    }

    /// The panels.
    #[inline(always)]
    pub fn panels(&self) -> impl Iterator<Item = Panel<'_>> {
        (0..self.panel_count).map(|index| {
            let (rows, words) = self.panel(index);
            let words = &self.words[words];
            let blocks = &words[1..][..words[0] as usize * block_words(rows.len())];
            Panel { first: rows.start, rows: rows.len(), blocks }
        })
    }

    /// The rows of panel `index`, and where its words are.
    #[inline(always)]
    pub(super) fn panel(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let (rows, larger) = (self.rows / self.panel_count, self.rows % self.panel_count);
        let (words, larger_words) = (panel_words(rows, self.cols), panel_words(rows + 1, self.cols));
        let begins = |index: usize| {
            let before = index.min(larger);
            (index * rows + before, (index - before) * words + before * larger_words)
        };
        let ((row, word), (row_end, word_end)) = (begins(index), begins(index + 1));
        (row..row_end, word..word_end)
    }
}
