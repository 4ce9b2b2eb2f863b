//! Throughput of the dot product of bytes; all else is that of NEON.

use crate::aarch64::neon;
use crate::peaks::{PeakLoop, Peaks};
use std::arch::aarch64::*;
use std::arch::asm;

/// The loops of this ISA.
pub(in crate::aarch64) const PEAKS: Peaks =
    Peaks { int8: PeakLoop { run: int8, operations: 2 * 16 * SUMS as u64 }, ..neon::PEAKS };

/// Independent sums, because each addition waits for the one before on the same sum. There are 32 registers.
const SUMS: usize = 24;

#[target_feature(enable = "neon,dotprod")]
fn int8(iterations: usize) -> f64 {
    let ones = vdupq_n_s8(1);
    let mut sums = [vdupq_n_s32(0); SUMS];
    for _ in 0..iterations {
        for sum in &mut sums {
            // SAFETY: the dot product is enabled; nothing but these registers is touched.
            unsafe {
                asm!(
                    "sdot {sum:v}.4s, {ones:v}.16b, {ones:v}.16b",
                    ones = in(vreg) ones,
                    sum = inout(vreg) *sum,
                    options(nomem, nostack, preserves_flags),
                );
            }
        }
    }
    sums.into_iter().map(|sum| f64::from(vaddvq_s32(sum))).sum()
}
