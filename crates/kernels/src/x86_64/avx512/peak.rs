//! Throughput of AVX-512 with VNNI and, where the CPU has it, BF16.
//!
//! SAFETY of every block here: the functions enable what they use, and are called only through this folder's
//! table, which dispatch.rs reaches only after it has seen AVX-512F, BW and VNNI on this CPU, and `bf16`
//! only after BF16 was seen here.

use crate::peaks::{PeakLoop, Peaks};
use crate::x86_64::prefetch::vnni_stream;
use std::arch::x86_64::*;
use std::hint::black_box;

/// The loops of this ISA.
pub(in crate::x86_64) const PEAKS: Peaks = Peaks {
    reads: &[read::<0>, read::<1024>, read::<8192>, read::<STREAM>],
    int8: PeakLoop { run: int8, operations: 2 * 64 * SUMS as u64 },
    bf16: || {
        is_x86_feature_detected!("avx512bf16")
            .then_some(PeakLoop { run: bf16, operations: 2 * 32 * SUMS as u64 })
    },
    f32: PeakLoop { run: f32, operations: 2 * 16 * SUMS as u64 },
};

/// Independent sums, because each addition waits for the one before on the same sum. There are 32 registers.
const SUMS: usize = 16;
/// Words that one iteration of [`read`] reads.
const READ_WORDS: usize = 64;

/// Tells [`read`] to prefetch like the kernels.
const STREAM: usize = usize::MAX;

/// Reads all words and prefetches `DISTANCE` bytes ahead; 0 means no prefetch.
#[target_feature(enable = "avx512f")]
#[allow(unused_unsafe)] // fetching ahead is safe in later versions of Rust
fn read<const DISTANCE: usize>(words: &[u64]) -> u64 {
    let prefetch = vnni_stream();
    let (runs, tail) = words.as_chunks::<READ_WORDS>();
    let mut all = [_mm512_setzero_si512(); READ_WORDS / 8];
    for run in runs {
        let start = run.as_ptr();
        if DISTANCE == STREAM {
            prefetch.after(bytemuck::cast_slice(run));
        }
        for (i, all) in all.iter_mut().enumerate() {
            if DISTANCE > 0 && DISTANCE < STREAM {
                // SAFETY: a prefetch is a hint; it never faults, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(DISTANCE / 8 + 8 * i).cast()) };
            }
            // SAFETY: 8 words from 8 i on are inside the run's 64.
            *all = _mm512_xor_si512(*all, unsafe { _mm512_loadu_si512(start.add(8 * i).cast()) });
        }
    }
    let mut lanes = [0_u64; READ_WORDS];
    for (lanes, all) in lanes.as_chunks_mut::<8>().0.iter_mut().zip(all) {
        // SAFETY: the reference covers the 8 words written.
        unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), all) };
    }
    lanes.iter().chain(tail).fold(0, |all, word| all ^ word)
}

// All loops hide their sums at first, so that the compiler does not see that they are the same.

#[target_feature(enable = "avx512f,avx512vnni")]
fn int8(iterations: usize) -> f64 {
    let ones = _mm512_set1_epi8(black_box(1));
    let mut sums = black_box([_mm512_setzero_si512(); SUMS]);
    for _ in 0..iterations {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, ones, ones);
        }
    }
    sums.into_iter().map(|sum| f64::from(_mm512_reduce_add_epi32(sum))).sum()
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16(iterations: usize) -> f64 {
    /// 1 as bf16.
    const ONE: i16 = 0x3f80;
    // SAFETY: both types are 512 bits, and every pattern of them is valid.
    let ones: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi16(black_box(ONE))) };
    let mut sums = black_box([_mm512_setzero_ps(); SUMS]);
    for _ in 0..iterations {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, ones, ones);
        }
    }
    sums.into_iter().map(|sum| f64::from(_mm512_reduce_add_ps(sum))).sum()
}

#[target_feature(enable = "avx512f")]
fn f32(iterations: usize) -> f64 {
    let ones = _mm512_set1_ps(black_box(1.0));
    let mut sums = black_box([_mm512_setzero_ps(); SUMS]);
    for _ in 0..iterations {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(ones, ones, *sum);
        }
    }
    sums.into_iter().map(|sum| f64::from(_mm512_reduce_add_ps(sum))).sum()
}
