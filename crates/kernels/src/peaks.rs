//! The loops that measure the machine's limits.

/// A loop of products and sums, and nothing else.
#[derive(Clone, Copy)]
pub(crate) struct PeakLoop {
    /// Does that many iterations on factors of 1, and returns the sum of all products: exact as long as an
    /// iteration's count is below 2^13. Needs the level's instructions, and those that [`Peaks`] names.
    pub(crate) run: unsafe fn(usize) -> f64,
    /// Multiplications and additions of one iteration.
    pub(crate) operations: u64,
}

/// One level's loops.
pub(crate) struct Peaks {
    /// Each reads all words, in order, and returns their exclusive or. Needs the level's instructions. Which
    /// is the fastest depends on how well the CPU by itself foresees what will be read.
    pub(crate) reads: &'static [unsafe fn(&[u64]) -> u64],
    /// Bytes, summed in at least 16 bits.
    pub(crate) int8: PeakLoop,
    /// bfloat16, summed in float32, if this CPU has an instruction for it.
    pub(crate) bf16: fn() -> Option<PeakLoop>,
    pub(crate) f32: PeakLoop,
}
