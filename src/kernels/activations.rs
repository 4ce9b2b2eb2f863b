//! Activations in 8 bits, one scale for each 32 of a row: what products with packed weights read.
//!
//! A row is one line, or two: the second is what rounding the first has lost, rounded in the same way, so that
//! together they are nearly as good as the row itself. Lines lie in panels, up to 8 together, so that a
//! kernel which takes some at once reads one stream. A panel of `m` lines has for each 32 columns, in words of
//! 32 bits:
//!
//! | words | contents |
//! |---|---|
//! | 8 m | `(8 groups, m)`: 4 signed bytes, elements `4g..4g + 4` of the line |
//! | m | the scale, f32: an element is its byte times it; its last two bits are 0 |
//! | m | [`FLOAT_START`] less 8 times the sum of the line's 32 bytes, i32: what sums of products begin with if weights are stored 8 above what they stand for |
//! | m | the same with 128 |
//! | m | [`FLOAT_OFFSET`] times the scale, f32: what is subtracted from a sum that began so, taken for a float and scaled |
//! | m | the sum of the line's 32 elements, f32: what a minimum is multiplied by |
//!
//! Source of the format: one scale per 32 rounds 2 to 7 times finer than one per row (docs/kernels.md).

use super::pack::TILE_COLS;

/// Groups of 4 elements in 32.
pub(super) const GROUPS: usize = TILE_COLS / 4;
/// Where the words of 32 columns are, in lines, behind their groups.
pub(super) const SCALE: usize = GROUPS;
pub(super) const START_8: usize = GROUPS + 1;
pub(super) const START_128: usize = GROUPS + 2;
pub(super) const OFFSET: usize = GROUPS + 3;
pub(super) const TOTAL: usize = GROUPS + 4;
/// Words for each line and 32 columns.
pub(super) const BLOCK_WORDS: usize = GROUPS + 5;
/// 1.5 * 2^23. A float of that size counts in ones: an integer of 23 bits, signed, that is added to its bits is added
/// to its value. So it takes no instruction to make a float of a sum, and none to multiply it: `sum as f32 * scale`
/// is `(FLOAT_OFFSET + sum) * scale - FLOAT_OFFSET * scale` in one that rounds once, if the last product is exact.
/// It is where the scale leaves room for the factor of 3.
pub(super) const FLOAT_OFFSET: f32 = 12_582_912.0;
/// Its bits.
pub(super) const FLOAT_START: i32 = FLOAT_OFFSET.to_bits() as i32;
/// The most lines of a panel.
pub(super) const MOST_PANEL_LINES: usize = 8;

/// How activations are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// One line of 8 bits a row.
    #[default]
    Bits8,
    /// Two: at twice the work, and a hundredth of the error.
    Bits16,
}

impl Precision {
    /// Lines of a row.
    #[inline(always)]
    pub(super) const fn lines(self) -> usize {
        match self {
            Precision::Bits8 => 1,
            Precision::Bits16 => 2,
        }
    }
}

/// Rows of activations in 8 bits; made by [`super::Kernels::quantize`], reused for the next.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) precision: Precision,
    /// Lines of a panel; the last has what is left. Those of a row are never parted.
    pub(super) panel_lines: usize,
    pub(super) words: Vec<u32>,
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

    /// Lines of all rows.
    pub(super) fn lines(&self) -> usize {
        self.rows * self.precision.lines()
    }

    /// Words of one line.
    pub(super) fn line_words(&self) -> usize {
        self.cols / TILE_COLS * BLOCK_WORDS
    }

    /// The panels, each with the number of its first line and how many it has.
    #[inline(always)]
    pub(super) fn panels(&self) -> impl Iterator<Item = (usize, usize, &[u32])> {
        let panels = self.words.chunks(self.panel_lines * self.line_words());
        panels.enumerate().map(|(index, words)| {
            let first = index * self.panel_lines;
            (first, self.panel_lines.min(self.lines() - first), words)
        })
    }
}
