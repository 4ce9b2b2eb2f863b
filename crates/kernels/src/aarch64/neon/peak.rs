//! Throughput of NEON.

use crate::peaks::{PeakLoop, Peaks};
use crate::prefetch::prefetch_l1;
use std::arch::aarch64::*;
use std::arch::asm;
use std::hint::black_box;

/// The loops of this ISA.
pub(in crate::aarch64) const PEAKS: Peaks = Peaks {
    reads: &[read::<0>, read::<1024>, read::<8192>],
    int8: PeakLoop { run: int8, operations: 2 * 16 * BYTE_SUMS as u64 },
    bf16: || None,
    f32: PeakLoop { run: f32, operations: 2 * 4 * FLOAT_SUMS as u64 },
};

/// Independent sums, because each addition waits for the one before on the same sum. There are 32 registers;
/// bytes have two sums each.
const FLOAT_SUMS: usize = 24;
const BYTE_SUMS: usize = 12;
/// Words that one iteration of [`read`] reads.
const READ_WORDS: usize = 32;

/// Reads all words and prefetches `DISTANCE` bytes ahead; 0 means no prefetch.
#[target_feature(enable = "neon")]
fn read<const DISTANCE: usize>(words: &[u64]) -> u64 {
    let (runs, tail) = words.as_chunks::<READ_WORDS>();
    let mut all = [vdupq_n_u64(0); READ_WORDS / 2];
    for run in runs {
        let start = run.as_ptr();
        for (i, all) in all.iter_mut().enumerate() {
            if DISTANCE > 0 && i % 4 == 0 {
                prefetch_l1(start.wrapping_add(DISTANCE / 8 + 2 * i).cast());
            }
            // SAFETY: 2 words from 2 i on are inside the run's 32.
            *all = veorq_u64(*all, unsafe { vld1q_u64(start.add(2 * i)) });
        }
    }
    let both = all.iter().fold(vdupq_n_u64(0), |both, words| veorq_u64(both, *words));
    let first = vgetq_lane_u64::<0>(both) ^ vgetq_lane_u64::<1>(both);
    tail.iter().fold(first, |all, word| all ^ word)
}

#[target_feature(enable = "neon")]
fn int8(iterations: usize) -> f64 {
    let ones = vdupq_n_s8(1);
    let mut sums = [[vdupq_n_s16(0); 2]; BYTE_SUMS];
    for _ in 0..iterations {
        for [low, high] in &mut sums {
            // Assembly, because with intrinsics the compiler moves the product, which never changes, out of
            // the loop. SAFETY: NEON is part of 64-bit Arm; nothing but these registers is touched.
            unsafe {
                asm!(
                    "smlal {low:v}.8h, {ones:v}.8b, {ones:v}.8b",
                    "smlal2 {high:v}.8h, {ones:v}.16b, {ones:v}.16b",
                    ones = in(vreg) ones,
                    low = inout(vreg) *low,
                    high = inout(vreg) *high,
                    options(nomem, nostack, preserves_flags),
                );
            }
        }
    }
    sums.iter().flatten().map(|&sum| f64::from(vaddlvq_s16(sum))).sum()
}

#[target_feature(enable = "neon")]
fn f32(iterations: usize) -> f64 {
    let ones = vdupq_n_f32(black_box(1.0));
    // Hidden, so that the compiler does not see that all sums are the same.
    let mut sums = black_box([vdupq_n_f32(0.0); FLOAT_SUMS]);
    for _ in 0..iterations {
        for sum in &mut sums {
            *sum = vfmaq_f32(*sum, ones, ones);
        }
    }
    sums.into_iter().map(|sum| f64::from(vaddvq_f32(sum))).sum()
}
