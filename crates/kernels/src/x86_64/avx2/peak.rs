//! Throughput of AVX2 and FMA.
//!
//! SAFETY of every block here: the functions enable what they use, and are called only through the tables of
//! this folder and of `avxvnni/`, which dispatch.rs reaches only after it has seen AVX2 and FMA on this CPU.

use crate::peaks::{PeakLoop, Peaks};
use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;

/// The loops of this ISA.
pub(in crate::x86_64) const PEAKS: Peaks = Peaks {
    reads: &[read::<0>, read::<1024>, read::<8192>],
    int8: PeakLoop { run: int8, operations: 2 * 32 * BYTE_SUMS as u64 },
    bf16: || None,
    f32: PeakLoop { run: f32, operations: 2 * 8 * FLOAT_SUMS as u64 },
};

/// Independent sums, because each addition waits for the one before on the same sum. There are 16 registers,
/// and the factors and products need some of them.
const FLOAT_SUMS: usize = 12;
const BYTE_SUMS: usize = 8;
/// Words that one iteration of [`read`] reads.
const READ_WORDS: usize = 32;

/// Reads all words and prefetches `DISTANCE` bytes ahead; 0 means no prefetch.
#[target_feature(enable = "avx2")]
#[allow(unused_unsafe)] // fetching ahead is safe in later versions of Rust
fn read<const DISTANCE: usize>(words: &[u64]) -> u64 {
    let (runs, tail) = words.as_chunks::<READ_WORDS>();
    let mut all = [_mm256_setzero_si256(); READ_WORDS / 4];
    for run in runs {
        let start = run.as_ptr();
        for (i, all) in all.iter_mut().enumerate() {
            if DISTANCE > 0 && i % 2 == 0 {
                // SAFETY: a prefetch is a hint; it never faults, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(DISTANCE / 8 + 4 * i).cast()) };
            }
            // SAFETY: 4 words from 4 i on are inside the run's 32.
            *all = _mm256_xor_si256(*all, unsafe { _mm256_loadu_si256(start.add(4 * i).cast()) });
        }
    }
    let mut lanes = [0_u64; READ_WORDS];
    for (lanes, all) in lanes.as_chunks_mut::<4>().0.iter_mut().zip(all) {
        // SAFETY: the reference covers the 4 words written.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), all) };
    }
    lanes.iter().chain(tail).fold(0, |all, word| all ^ word)
}

/// The least that a dot product of bytes needs here: products in pairs of 16 bits, and their addition.
#[target_feature(enable = "avx2")]
fn int8(iterations: usize) -> f64 {
    let ones = _mm256_set1_epi8(1);
    let mut sums = [_mm256_setzero_si256(); BYTE_SUMS];
    for _ in 0..iterations {
        for sum in &mut sums {
            // Assembly, because with intrinsics the compiler moves the product, which never changes, out of
            // the loop. SAFETY: AVX2 is enabled; nothing but these registers is touched.
            unsafe {
                asm!(
                    "vpmaddubsw {product}, {ones}, {ones}",
                    "vpaddw {sum}, {sum}, {product}",
                    product = out(ymm_reg) _,
                    ones = in(ymm_reg) ones,
                    sum = inout(ymm_reg) *sum,
                    options(nomem, nostack, preserves_flags),
                );
            }
        }
    }
    let wide = sums.map(|sum| _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    wide.into_iter().map(|sum| f64::from(sum_lanes(sum))).sum()
}

#[target_feature(enable = "avx2,fma")]
fn f32(iterations: usize) -> f64 {
    let ones = _mm256_set1_ps(black_box(1.0));
    // Hidden, so that the compiler does not see that all sums are the same.
    let mut sums = black_box([_mm256_setzero_ps(); FLOAT_SUMS]);
    for _ in 0..iterations {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(ones, ones, *sum);
        }
    }
    // The sums are whole numbers as long as they are exact.
    sums.into_iter().map(|sum| f64::from(sum_lanes(_mm256_cvtps_epi32(sum)))).sum()
}

/// The sum of the 8 lanes; it wraps on overflow.
#[target_feature(enable = "avx2")]
pub(in crate::x86_64) fn sum_lanes(sums: __m256i) -> i32 {
    let mut lanes = [0_i32; 8];
    // SAFETY: the reference covers the 8 numbers written.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sums) };
    lanes.iter().fold(0, |all, lane| all.wrapping_add(*lane))
}
