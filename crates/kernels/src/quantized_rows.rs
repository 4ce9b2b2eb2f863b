//! Activations in 8 bits, one scale for each 32 of a row: what products with packed weights read.
//!
//! What rounding 32 of them has lost, the rest, may be rounded in the same way, and multiplied as well: together they
//! are nearly as good as the row itself. Whether it is, the row alone decides.
//!
//! Rows lie in panels, up to 8 together, so that a kernel which takes some at once reads one stream. A panel begins with
//! the number of its blocks. A block is 32 columns of its `m` rows; one of rests follows that of the same columns, if any
//! row has one; it is zero in those that have none. In words of 32 bits:
//!
//! | words | contents |
//! |---|---|
//! | 1 | which 32 columns |
//! | 8 m | `(8 groups, m)`: 4 signed bytes, elements `4g..4g + 4` of the row |
//! | m | the scale, f32: an element is its byte times it; its last two bits are 0 |
//! | m | [`FLOAT_START`] less 8 times the sum of the row's 32 bytes, i32: what sums of products begin with if weights are stored 8 above what they stand for |
//! | m | the same with 128 |
//! | m | [`FLOAT_OFFSET`] times the scale, f32: what is subtracted from a sum that began so, taken for a float and scaled |
//! | m | the sum of the row's 32 elements, f32: what a minimum is multiplied by |
//!
//! Source of the format: one scale per 32 rounds 2 to 7 times finer than one per row (docs/kernels.md).

use crate::pack::TILE_COLS;

/// Groups of 4 elements in 32.
pub(super) const GROUPS: usize = TILE_COLS / 4;
/// Where the words of 32 columns are, in rows, behind their groups.
pub(super) const SCALE: usize = GROUPS;
pub(super) const START_8: usize = GROUPS + 1;
pub(super) const START_128: usize = GROUPS + 2;
pub(super) const OFFSET: usize = GROUPS + 3;
pub(super) const TOTAL: usize = GROUPS + 4;
/// Words for each row and 32 columns.
pub(super) const ROW_WORDS: usize = GROUPS + 5;
/// 1.5 * 2^23. A float of that size counts in ones: an integer of 23 bits, signed, that is added to its bits is added
/// to its value. So it takes no instruction to make a float of a sum, and none to multiply it: `sum as f32 * scale`
/// is `(FLOAT_OFFSET + sum) * scale - FLOAT_OFFSET * scale` in one that rounds once, if the last product is exact.
/// It is where the scale leaves room for the factor of 3.
pub(super) const FLOAT_OFFSET: f32 = 12_582_912.0;
/// Its bits.
pub(super) const FLOAT_START: i32 = FLOAT_OFFSET.to_bits() as i32;
/// The most rows of a panel.
pub(super) const MAX_PANEL_ROWS: usize = 8;

/// How activations are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// To 8 bits.
    #[default]
    Bits8,
    /// With rests where one of 32 is so far from the row's others that all 32 would be rounded coarsely: at a tenth
    /// more work, and two fifths of the error.
    Mixed,
    /// With all rests: at twice the work, and a hundredth of the error.
    Bits16,
}

/// Rows of activations in 8 bits; made by [`super::Kernels::quantize`], reused for the next.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Rows of a panel; the last has what is left.
    pub(super) panel_rows: usize,
    /// As many for each panel as [`panel_words`] says.
    pub(super) words: Vec<u32>,
}

/// Some rows.
pub(super) struct Panel<'a> {
    /// The number of the first.
    pub(super) first: usize,
    pub(super) rows: usize,
    /// [`block_words`] each.
    pub(super) blocks: &'a [u32],
}

/// Words of a block of so many rows.
pub(super) const fn block_words(rows: usize) -> usize {
    1 + ROW_WORDS * rows
}

/// The words that a panel takes, at most.
pub(super) const fn panel_words(rows: usize, cols: usize) -> usize {
    1 + 2 * (cols / TILE_COLS) * block_words(rows)
}

impl QuantizedRows {
    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many columns there are.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The most bytes that each of many rows of so many columns takes.
    pub const fn row_bytes(cols: usize) -> usize {
        size_of::<u32>() * panel_words(1, cols)
    }

    #[inline(always)]
    pub(super) fn panels(&self) -> impl Iterator<Item = Panel<'_>> {
        let panels = self.words.chunks(panel_words(self.panel_rows, self.cols));
        panels.enumerate().map(|(index, words)| {
            let first = index * self.panel_rows;
            let rows = self.panel_rows.min(self.rows - first);
            Panel { first, rows, blocks: &words[1..][..words[0] as usize * block_words(rows)] }
        })
    }
}
