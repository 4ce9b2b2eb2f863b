//! The vector that the algorithms in `generic/` are written over: 32 lanes of f32.
//!
//! 32 is the block length of ggml's small types. It is also two registers of AVX-512 or four of AVX2, so that
//! a dot product has enough independent sums to hide the latency of FMA. Every output is summed in the same
//! order: lane by lane, then across the lanes in a fixed tree. So a row's result depends neither on other
//! rows nor on how the work was divided.

use crate::prefetch::StreamPrefetch;

/// Lanes of a vector.
pub const LANES: usize = 32;

/// A vector of 32 f32 lanes.
///
/// An implementation may be used only inside functions that enable its ISA: the `#[target_feature]` functions
/// in the ISA's folder.
pub(super) trait Lanes: Copy {
    /// The number of sums of [`Lanes::add_row_products`]; 0 if the ISA has no such function.
    const ROW_PRODUCT_SUMS: usize = 0;

    fn splat(value: f32) -> Self;
    fn load(values: &[f32; LANES]) -> Self;
    fn store(self, out: &mut [f32; LANES]);
    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `self * factor + addend`; rounded once where the ISA has FMA.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The larger of both, lane by lane; `self` where either is NaN.
    fn max(self, other: Self) -> Self;
    /// 2^n in lanes that hold `1.5 * 2^23 + n`; 0 for n = -127, the smallest n allowed.
    fn two_to(self) -> Self;
    /// The largest lane. No lane is NaN.
    fn largest(self) -> f32;
    /// The sum of the lanes, in halves: lanes i and i + 16, then i and i + 8, and so on.
    fn sum(self) -> f32;
    /// How streams of float weights are prefetched. Loops ask before they begin, because the answer may be in
    /// memory.
    fn stream_prefetch() -> StreamPrefetch;
    /// Whether few queries prefetch the keys and values that they read later into L1, not into L2.
    #[inline(always)]
    fn prefetches_kv_into_l1() -> bool {
        false
    }

    /// Adds to each sum the products of vectors with its factors: one for each row of `rows`, 32 f32 from
    /// byte `start` of the row on. Adds them row by row, like [`Lanes::mul_add`].
    ///
    /// # Panics
    /// If there are not [`Lanes::ROW_PRODUCT_SUMS`] sums with as many factors each, or fewer rows than
    /// factors.
    #[inline(always)]
    fn add_row_products(
        _sums: &mut [Self],
        _rows: &[u8],
        _row_bytes: usize,
        _start: usize,
        _factors: &[&[f32]],
    ) {
        unreachable!("the ISA has no such function")
    }

    // Dequantises a block of 32 weights (layouts: `blocks.rs`). Products and sums are rounded separately, as
    // in ggml's reference, so every ISA gives the same weights.
    fn f32(block: &[u8; 128]) -> Self;
    fn f16(block: &[u8; 64]) -> Self;
    fn bf16(block: &[u8; 64]) -> Self;
    fn q8_0(block: &[u8; 34]) -> Self;
    fn q4_0(block: &[u8; 18]) -> Self;
    fn q4_1(block: &[u8; 20]) -> Self;
    /// Converts i8, which have no scale.
    fn i8(numbers: &[u8; 32]) -> Self;
}

/// Fewer than `LANES` values, padded with zeros.
#[inline(always)]
pub(super) fn padded(values: &[f32]) -> [f32; LANES] {
    let mut padded = [0.0; LANES];
    padded[..values.len()].copy_from_slice(values);
    padded
}

/// Loads fewer than `LANES` values; the other lanes are zero.
#[inline(always)]
pub(super) fn load_partial<L: Lanes>(values: &[f32]) -> L {
    L::load(&padded(values))
}
