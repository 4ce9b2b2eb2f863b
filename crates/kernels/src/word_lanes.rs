//! What attention in 16-bit integers needs beside [`Lanes`]. A word is two neighbouring 16-bit integers.

use crate::lanes::{LANES, Lanes};
use crate::rows16::Rows16;

/// A vector of 32 f32 lanes that can be rounded to words.
///
/// An implementation may be used only inside functions that enable its ISA: the `#[target_feature]` functions
/// in the ISA's folder.
pub(super) trait WordLanes: Lanes {
    /// A word for each lane, or a sum of their products, which has 32 bits.
    type Words: Copy;
    /// The type that transposes on this ISA.
    type Rows: Rows16;
    /// Rows of words that the microkernel takes at a time, a divisor of 16. More need fewer branches.
    const UNROLLED: usize;

    fn splat_word(word: i32) -> Self::Words;
    fn load_words(words: &[i32; LANES]) -> Self::Words;
    fn store_words(words: Self::Words, out: &mut [i32; LANES]);
    /// Adds to each sum both products of its lane's words. Exact, if the sum does not overflow.
    fn add_word_products(sums: Self::Words, a: Self::Words, b: Self::Words) -> Self::Words;
    /// Sums as numbers, rounded to f32.
    fn from_sums(sums: Self::Words) -> Self;
    /// Rounds to integers, ties to even: `low` to the low half of each word, `high` to the other. Numbers are
    /// at most 32,767 in magnitude.
    fn round_pairs(low: Self, high: Self) -> Self::Words;
    /// Rounds to integers, ties to even. Two neighbours form a word. Numbers are at most 32,767 in magnitude;
    /// what becomes of NaN is not defined.
    fn round(self, words: &mut [i32; LANES / 2]);

    fn abs(self) -> Self;
    fn sqrt(self) -> Self;
    /// 1 / x.
    fn inverse(self) -> Self;
    /// The nearest integers, ties to even.
    fn nearest(self) -> Self;
    /// `self * 2^n` for integers n of at most 1. It may be 0 instead of a number below 2^-125.
    fn times_two_to(self, n: Self) -> Self;
    /// The larger ones of lanes i and i + 16. No lane is NaN.
    fn largest_of_halves(self, out: &mut [f32; LANES / 2]);
    /// The sums of lanes i and i + 16.
    fn sums_of_halves(self, out: &mut [f32; LANES / 2]);
}
