//! Quantises rows of float32 to the storage types, with the same bits as ggml's reference quantisers.
//!
//! - `quantize/numbers.rs`: F32, F16, BF16
//! - `quantize/blocks_of_32.rs`: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1
//! - `quantize/k_blocks.rs`: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K; `quantize/search.rs` finds their scales
//!
//! Every product, sum and quotient is rounded to float32 on its own; nothing is fused. So every machine gives
//! the same blocks. They equal those of the `gguf` package, which has no K types, and those of ggml built for
//! x86-64: its CMake files compile `ggml-quants.c` without instructions that fuse, even in a native build.
//! Compilers for arm64 fuse products and sums in C by default, which changes up to one block of 70.
//!
//! Loops have no early exit, and independent sums use several lanes, so that the compiler vectorises them.
//!
//! A number that the type cannot hold is an error; it never becomes an infinity in the file. That concerns
//! NaN, the infinities, and numbers beyond the range of the block's half-precision scale or minimum.
//!
//! Source: ggml, `ggml-quants.c`, `quantize_row_*_ref`.

mod blocks_of_32;
mod k_blocks;
mod numbers;
mod search;

use crate::blocks::WeightType;
use blocks_of_32::{q4_0, q4_1, q5_0, q5_1, q8_0};
use half::f16;
use k_blocks::{q2_k, q3_k, q4_k, q5_k, q6_k};
use numbers::{bf16, f16, f32};

/// The types that [`quantize_row`] makes.
pub const TARGETS: [WeightType; 13] = {
    use WeightType::*;
    [F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K]
};

/// A number that the storage type cannot hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unstorable {
    /// Its index in the row.
    pub index: usize,
    /// The number, which is not finite or too large.
    pub value: f32,
}

impl std::fmt::Display for Unstorable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "element {} is {:e}", self.index, self.value)
    }
}

impl std::error::Error for Unstorable {}

/// Stores a row of numbers as `dtype`, one of [`TARGETS`].
///
/// - `row`: any number of whole blocks
/// - `out`: `dtype.bytes_for(row.len())` bytes, overwritten
///
/// Denormals are treated like other numbers. If a block's scale is too small to have a float32 inverse (all
/// numbers are below 1e-37), its quants are zeros; its scale rounds to zero as a half in any case.
///
/// # Errors
/// [`Unstorable`] for a number that is not finite, or so large that `dtype` would make it infinite. `out` is
/// then incomplete.
///
/// # Panics
/// If `dtype` is not one of [`TARGETS`], or a length disagrees.
pub fn quantize_row(dtype: WeightType, row: &[f32], out: &mut [u8]) -> Result<(), Unstorable> {
    assert_eq!(dtype.bytes_for(row.len()), Some(out.len()), "out has the size of the row in {dtype}");
    match dtype {
        WeightType::F32 => f32(row, out),
        WeightType::F16 => f16(row, out),
        WeightType::BF16 => bf16(row, out),
        WeightType::Q8_0 => blocks(row, out, q8_0),
        WeightType::Q4_0 => blocks(row, out, q4_0),
        WeightType::Q4_1 => blocks(row, out, q4_1),
        WeightType::Q5_0 => blocks(row, out, q5_0),
        WeightType::Q5_1 => blocks(row, out, q5_1),
        WeightType::Q2_K => blocks(row, out, q2_k),
        WeightType::Q3_K => blocks(row, out, q3_k),
        WeightType::Q4_K => blocks(row, out, q4_k),
        WeightType::Q5_K => blocks(row, out, q5_k),
        WeightType::Q6_K => blocks(row, out, q6_k),
        WeightType::IQ4_NL | WeightType::IQ4_XS => panic!("{dtype} is not made here"),
    }
}

/// Converts to a type of blocks. `convert` returns whether the block's scale and minimum are finite.
#[inline(always)]
fn blocks<const LEN: usize, const BYTES: usize>(
    row: &[f32],
    out: &mut [u8],
    convert: impl Fn(&[f32; LEN], &mut [u8; BYTES]) -> bool,
) -> Result<(), Unstorable> {
    for (at, (row, out)) in row.as_chunks().0.iter().zip(out.as_chunks_mut().0).enumerate() {
        // A comparison ignores NaN, so the numbers are checked too, not only the scale.
        if !(all_finite(row) & convert(row, out)) {
            return Err(largest(row, at * LEN));
        }
    }
    Ok(())
}

/// Checks all numbers, because the compiler does not vectorise loops with an early exit.
#[inline(always)]
fn all_finite(numbers: &[f32]) -> bool {
    numbers.iter().fold(true, |finite, number| finite & number.is_finite())
}

/// The number with the largest magnitude; NaN counts as the largest.
#[cold]
fn largest(numbers: &[f32], start: usize) -> Unstorable {
    let magnitude = |(_, number): &(usize, &f32)| number.abs().to_bits();
    let (at, value) = numbers.iter().enumerate().max_by_key(magnitude).unwrap_or((0, &0.0));
    Unstorable { index: start + at, value: *value }
}

/// Writes a half at `at` of a block. Returns whether it is finite.
#[inline(always)]
fn put_half(out: &mut [u8], at: usize, value: f32) -> bool {
    let half = f16::from_f32(value);
    out[at..at + 2].copy_from_slice(&half.to_le_bytes());
    half.is_finite()
}
