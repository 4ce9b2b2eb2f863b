//! Converts to the types of single numbers.

use super::{Unstorable, all_finite, largest};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Numbers that are converted together.
const CHUNK: usize = 32;

pub(super) fn f32(row: &[f32], out: &mut [u8]) -> Result<(), Unstorable> {
    numbers(row, out, |numbers, out: &mut [[u8; 4]]| {
        out.iter_mut().zip(numbers).for_each(|(out, number)| *out = number.to_le_bytes());
        all_finite(numbers)
    })
}

pub(super) fn f16(row: &[f32], out: &mut [u8]) -> Result<(), Unstorable> {
    numbers(row, out, |numbers, out: &mut [[u8; 2]]| {
        let mut narrow = [f16::ZERO; CHUNK];
        let narrow = &mut narrow[..numbers.len()];
        narrow.convert_from_f32_slice(numbers);
        out.iter_mut().zip(&*narrow).for_each(|(out, number)| *out = number.to_le_bytes());
        narrow.iter().all(|number| number.is_finite())
    })
}

pub(super) fn bf16(row: &[f32], out: &mut [u8]) -> Result<(), Unstorable> {
    numbers(row, out, |numbers, out: &mut [[u8; 2]]| {
        let mut finite = true;
        for (out, number) in out.iter_mut().zip(numbers) {
            // Rounds to nearest, ties to even. `bf16::from_f32` checks for NaN first, which is much slower.
            let bits = number.to_bits();
            let narrow = (bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16) as u16;
            *out = narrow.to_le_bytes();
            finite &= narrow & 0x7F80 != 0x7F80;
        }
        finite & all_finite(numbers)
    })
}

/// Converts to a type of single numbers, some at a time. `convert` returns whether all that it wrote is
/// finite.
#[inline(always)]
fn numbers<const BYTES: usize>(
    row: &[f32],
    out: &mut [u8],
    convert: impl Fn(&[f32], &mut [[u8; BYTES]]) -> bool,
) -> Result<(), Unstorable> {
    for (at, (row, out)) in row.chunks(CHUNK).zip(out.as_chunks_mut().0.chunks_mut(CHUNK)).enumerate() {
        if !convert(row, out) {
            // If all numbers are finite, the largest caused the overflow. NaN and infinity have larger bits.
            return Err(largest(row, at * CHUNK));
        }
    }
    Ok(())
}
