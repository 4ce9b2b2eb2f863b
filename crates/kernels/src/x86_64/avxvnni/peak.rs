//! The limits of AVX-VNNI: those of AVX2, but for the products of bytes.

use crate::peaks::{PeakLoop, Peaks};
use crate::x86_64::avx2::{self, sum_lanes};
use std::arch::x86_64::*;
use std::hint::black_box;

/// This level's loops.
pub(super) const PEAKS: Peaks =
    Peaks { int8: PeakLoop { run: int8, operations: 2 * 32 * SUMS as u64 }, ..avx2::PEAKS };

/// Sums side by side, as none can be added to before its last addition is done. There are 16 registers.
const SUMS: usize = 12;

#[target_feature(enable = "avx2,avxvnni")]
fn int8(iterations: usize) -> f64 {
    let ones = _mm256_set1_epi8(black_box(1));
    // Hidden, lest the compiler see that all are the same.
    let mut sums = black_box([_mm256_setzero_si256(); SUMS]);
    for _ in 0..iterations {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, ones, ones);
        }
    }
    sums.into_iter().map(|sum| f64::from(sum_lanes(sum))).sum()
}
