//! Throughput of AVX-VNNI: that of AVX2, except for products of bytes.

use crate::peaks::{PeakLoop, Peaks};
use crate::x86_64::avx2::{self, sum_lanes};
use std::arch::x86_64::*;
use std::hint::black_box;

/// The loops of this ISA.
pub(super) const PEAKS: Peaks =
    Peaks { int8: PeakLoop { run: int8, operations: 2 * 32 * SUMS as u64 }, ..avx2::PEAKS };

/// Independent sums, because each addition waits for the one before on the same sum. There are 16 registers.
const SUMS: usize = 12;

#[target_feature(enable = "avx2,avxvnni")]
fn int8(iterations: usize) -> f64 {
    let ones = _mm256_set1_epi8(black_box(1));
    // Hidden, so that the compiler does not see that all sums are the same.
    let mut sums = black_box([_mm256_setzero_si256(); SUMS]);
    for _ in 0..iterations {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, ones, ones);
        }
    }
    sums.into_iter().map(|sum| f64::from(sum_lanes(sum))).sum()
}
