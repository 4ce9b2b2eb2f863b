//! Throughput of the instructions for matrices of bytes, and for bf16; all else is that of NEON.

use crate::aarch64::dotprod;
use crate::peaks::{PeakLoop, Peaks};
use std::arch::aarch64::*;
use std::arch::asm;

/// The loops of this ISA.
pub(super) const PEAKS: Peaks = Peaks {
    int8: PeakLoop { run: int8, operations: 2 * 32 * SUMS as u64 },
    bf16: || Some(PeakLoop { run: bf16, operations: 2 * 16 * SUMS as u64 }),
    ..dotprod::PEAKS
};

/// Independent sums, because each addition waits for the one before on the same sum. There are 32 registers.
const SUMS: usize = 24;

#[target_feature(enable = "neon,i8mm")]
fn int8(iterations: usize) -> f64 {
    let ones = vdupq_n_s8(1);
    let mut sums = [vdupq_n_s32(0); SUMS];
    for _ in 0..iterations {
        for sum in &mut sums {
            // SAFETY: the instructions for matrices are enabled; nothing but these registers is touched.
            unsafe {
                asm!(
                    "smmla {sum:v}.4s, {ones:v}.16b, {ones:v}.16b",
                    ones = in(vreg) ones,
                    sum = inout(vreg) *sum,
                    options(nomem, nostack, preserves_flags),
                );
            }
        }
    }
    sums.into_iter().map(|sum| f64::from(vaddvq_s32(sum))).sum()
}

#[target_feature(enable = "neon,bf16")]
fn bf16(iterations: usize) -> f64 {
    /// 1 as bf16.
    const ONE: u16 = 0x3f80;
    let ones = vdupq_n_u16(ONE);
    let mut sums = [vdupq_n_f32(0.0); SUMS];
    for _ in 0..iterations {
        for sum in &mut sums {
            // SAFETY: BF16 is enabled; nothing but these registers is touched.
            unsafe {
                asm!(
                    "bfmmla {sum:v}.4s, {ones:v}.8h, {ones:v}.8h",
                    ones = in(vreg) ones,
                    sum = inout(vreg) *sum,
                    options(nomem, nostack, preserves_flags),
                );
            }
        }
    }
    sums.into_iter().map(|sum| f64::from(vaddvq_f32(sum))).sum()
}
