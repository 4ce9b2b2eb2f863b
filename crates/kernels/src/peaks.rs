//! Loops that measure the highest throughput of an ISA; `roofline.rs` times them.

/// A loop that does nothing but multiply and add.
#[derive(Clone, Copy)]
pub struct PeakLoop {
    /// Runs this many iterations on factors of 1 and returns the sum of all products. The sum is exact while
    /// the count of iterations is below 2^13. Needs the ISA's instructions, and those that [`Peaks`] names.
    pub run: unsafe fn(usize) -> f64,
    /// Multiplications plus additions of one iteration.
    pub operations: u64,
}

/// The loops of one ISA.
pub struct Peaks {
    /// Each reads all words in order and returns their exclusive or. Needs the ISA's instructions. The loops
    /// differ in how they prefetch; which is fastest depends on the CPU's own prefetcher.
    pub reads: &'static [unsafe fn(&[u64]) -> u64],
    /// Products of bytes, summed in at least 16 bits.
    pub int8: PeakLoop,
    /// Products of bf16, summed in f32. None if this CPU has no instruction for them.
    pub bf16: fn() -> Option<PeakLoop>,
    pub f32: PeakLoop,
}
