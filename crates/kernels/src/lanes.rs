//! The vector that the algorithms in `generic/` are written over: 32 lanes of f32.
//!
//! 32 is the block length of ggml's small types and two registers of AVX-512 (four of AVX2), so a
//! dot product of one row has enough independent chains to hide the latency of its FMAs. An output
//! is always summed in the same order, lane by lane, then across lanes in a fixed tree: a row's
//! result depends neither on the other rows nor on how the work was cut.

/// Elements per vector.
pub(super) const LANES: usize = 32;

/// 32 lanes of f32.
///
/// An implementation for an instruction set may be used only inside functions that enable it: the
/// `#[target_feature]` instances in that set's folder.
pub(super) trait Lanes: Copy {
    fn splat(value: f32) -> Self;
    fn load(values: &[f32; LANES]) -> Self;
    fn store(self, out: &mut [f32; LANES]);
    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `self * factor + addend`; rounded once where the instruction set has FMA.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The larger of both, lane by lane; `self` where either is NaN.
    fn max(self, other: Self) -> Self;
    /// 2^n, for lanes that hold `1.5 * 2^23 + n`; 0 for n = -127, which is the least.
    fn two_to(self) -> Self;
    /// The largest lane; there is no NaN.
    fn largest(self) -> f32;
    /// The sum over the lanes, halving: lanes i and i + 16, then i + 8, and so on.
    fn sum(self) -> f32;
    /// Brings the cache line at `address` nearer; never faults.
    fn prefetch(address: *const u8);
    /// As [`Lanes::prefetch`], no nearer than the second-level cache: more lines can be on their way there.
    fn prefetch_far(address: *const u8);
    /// Asks for the lines that a stream of weights, now at `address`, will come to; never faults. Processors' own
    /// prefetchers lose a tenth of the speed without it, some a third or half.
    fn prefetch_stream(address: *const u8);

    // 32 stored weights, as documented in `blocks.rs`. Dequantising rounds after the product and
    // after the sum, as ggml's reference does, so every instruction set yields the same weights.
    fn f32(block: &[u8; 128]) -> Self;
    fn f16(block: &[u8; 64]) -> Self;
    fn bf16(block: &[u8; 64]) -> Self;
    fn q8_0(block: &[u8; 34]) -> Self;
    fn q4_0(block: &[u8; 18]) -> Self;
    fn q4_1(block: &[u8; 20]) -> Self;
}

/// Fewer than `LANES` values, with zeros behind.
#[inline(always)]
pub(super) fn padded(values: &[f32]) -> [f32; LANES] {
    let mut padded = [0.0; LANES];
    padded[..values.len()].copy_from_slice(values);
    padded
}

/// `values` in the first lanes, zeros behind.
#[inline(always)]
pub(super) fn load_partial<L: Lanes>(values: &[f32]) -> L {
    L::load(&padded(values))
}
