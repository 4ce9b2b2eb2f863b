//! Throughput of plain Rust, with the instructions that the compiler chooses.

use crate::peaks::{PeakLoop, Peaks};
use std::hint::black_box;

/// The loops of this ISA.
pub(super) const PEAKS: Peaks = Peaks {
    reads: &[read],
    int8: PeakLoop { run: int8, operations: 2 * BYTE_SUMS as u64 },
    bf16: || None,
    f32: PeakLoop { run: f32, operations: 2 * FLOAT_SUMS as u64 },
};

/// Independent sums, because each addition waits for the one before on the same sum. With more of them the
/// compiler keeps some in memory.
const FLOAT_SUMS: usize = 32;
const BYTE_SUMS: usize = 64;

fn read(words: &[u64]) -> u64 {
    let (lines, tail) = words.as_chunks::<8>();
    let mut all = [0; 8];
    for line in lines {
        all = std::array::from_fn(|i| all[i] ^ line[i]);
    }
    all.iter().chain(tail).fold(0, |all, word| all ^ word)
}

// Both loops hide their factors from the compiler in every iteration. Otherwise it would move the products
// out of the loop, since they never change.

fn int8(iterations: usize) -> f64 {
    let (weights, x) = ([1_i8; BYTE_SUMS], [1_i8; BYTE_SUMS]);
    let mut sums = [0_i32; BYTE_SUMS];
    for _ in 0..iterations {
        let (weights, x) = (black_box(&weights), black_box(&x));
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = sum.wrapping_add(i32::from(weights[i]).wrapping_mul(i32::from(x[i])));
        }
    }
    sums.iter().map(|&sum| f64::from(sum)).sum()
}

fn f32(iterations: usize) -> f64 {
    let weights = [1.0_f32; FLOAT_SUMS];
    let x: f32 = black_box(1.0);
    let mut sums = [0.0_f32; FLOAT_SUMS];
    for _ in 0..iterations {
        let weights = black_box(&weights);
        for (sum, weight) in sums.iter_mut().zip(weights) {
            // Every aarch64 processor has an FMA instruction. Elsewhere `mul_add` would be a library call.
            *sum = if cfg!(target_arch = "aarch64") { weight.mul_add(x, *sum) } else { *sum + weight * x };
        }
    }
    sums.iter().map(|&sum| f64::from(sum)).sum()
}
