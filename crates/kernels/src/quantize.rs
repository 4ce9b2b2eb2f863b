//! Quantises rows of float32 to the storage types, with the same bits as ggml's reference quantisers.
//!
//! Every product, sum and quotient is rounded to float32 on its own, as in C; nothing is fused. So every
//! machine gives the same blocks, and they equal those of the `gguf` package. Reductions use several lanes
//! and loops have no early exit, so that the compiler vectorises them.
//!
//! A number that the type cannot hold is an error; it never becomes an infinity in the file. That concerns
//! NaN, the infinities, and numbers beyond the range of the block's half-precision scale or minimum.
//!
//! Source: ggml, `ggml-quants.c`, `quantize_row_*_ref`.

use crate::blocks::WeightType;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Elements per block of the quantised types that are made here.
const BLOCK: usize = 32;
type Block = [f32; BLOCK];

/// The types that [`quantize_row`] makes.
pub const TARGETS: [WeightType; 8] = {
    use WeightType::*;
    [F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1]
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
        WeightType::F32 => numbers(row, out, |numbers, out: &mut [[u8; 4]]| {
            out.iter_mut().zip(numbers).for_each(|(out, number)| *out = number.to_le_bytes());
            all_finite(numbers)
        }),
        WeightType::F16 => numbers(row, out, |numbers, out: &mut [[u8; 2]]| {
            let mut narrow = [f16::ZERO; BLOCK];
            let narrow = &mut narrow[..numbers.len()];
            narrow.convert_from_f32_slice(numbers);
            out.iter_mut().zip(&*narrow).for_each(|(out, number)| *out = number.to_le_bytes());
            narrow.iter().all(|number| number.is_finite())
        }),
        WeightType::BF16 => numbers(row, out, |numbers, out: &mut [[u8; 2]]| {
            let mut finite = true;
            for (out, number) in out.iter_mut().zip(numbers) {
                // Rounds to nearest, ties to even. `bf16::from_f32` checks for NaN first, which is much
                // slower.
                let bits = number.to_bits();
                let narrow = (bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16) as u16;
                *out = narrow.to_le_bytes();
                finite &= narrow & 0x7F80 != 0x7F80;
            }
            finite & all_finite(numbers)
        }),
        WeightType::Q8_0 => blocks(row, out, q8_0),
        WeightType::Q4_0 => blocks(row, out, q4_0),
        WeightType::Q4_1 => blocks(row, out, q4_1),
        WeightType::Q5_0 => blocks(row, out, q5_0),
        WeightType::Q5_1 => blocks(row, out, q5_1),
        WeightType::Q2_K
        | WeightType::Q3_K
        | WeightType::Q4_K
        | WeightType::Q5_K
        | WeightType::Q6_K
        | WeightType::IQ4_NL
        | WeightType::IQ4_XS => panic!("{dtype} is not made here"),
    }
}

/// Converts to a type of single numbers, 32 at a time. `convert` returns whether all that it wrote is finite.
#[inline(always)]
fn numbers<const BYTES: usize>(
    row: &[f32],
    out: &mut [u8],
    convert: impl Fn(&[f32], &mut [[u8; BYTES]]) -> bool,
) -> Result<(), Unstorable> {
    for (at, (row, out)) in row.chunks(BLOCK).zip(out.as_chunks_mut().0.chunks_mut(BLOCK)).enumerate() {
        if !convert(row, out) {
            // If all numbers are finite, the largest caused the overflow. NaN and infinity have larger bits.
            return Err(largest(row, at * BLOCK));
        }
    }
    Ok(())
}

/// Converts to a type of blocks. `convert` returns whether the block's scale and minimum are finite.
#[inline(always)]
fn blocks<const BYTES: usize>(
    row: &[f32],
    out: &mut [u8],
    convert: impl Fn(&Block, &mut [u8; BYTES]) -> bool,
) -> Result<(), Unstorable> {
    for (at, (row, out)) in row.as_chunks().0.iter().zip(out.as_chunks_mut().0).enumerate() {
        // A comparison ignores NaN, so the numbers are checked too, not only the scale.
        if !(all_finite(row) & convert(row, out)) {
            return Err(largest(row, at * BLOCK));
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

/// The smallest and the largest number, found in eight lanes, so that the compiler keeps them in registers.
#[inline(always)]
fn extremes(x: &Block) -> (f32, f32) {
    let (mut least, mut most) = ([x[0]; 8], [x[0]; 8]);
    for chunk in x.as_chunks::<8>().0 {
        for lane in 0..8 {
            least[lane] = if chunk[lane] < least[lane] { chunk[lane] } else { least[lane] };
            most[lane] = if chunk[lane] > most[lane] { chunk[lane] } else { most[lane] };
        }
    }
    for width in [4, 2, 1] {
        for lane in 0..width {
            least[lane] = if least[lane + width] < least[lane] { least[lane + width] } else { least[lane] };
            most[lane] = if most[lane + width] > most[lane] { most[lane + width] } else { most[lane] };
        }
    }
    (least[0], most[0])
}

/// The number with the largest magnitude, with its sign; the first of several. 0.0 if all are zeros of either
/// sign, because ggml starts with 0.0 and a zero is not larger.
#[inline(always)]
fn signed_max(x: &Block) -> f32 {
    let (min, max) = extremes(x);
    if -min == max {
        return x.iter().copied().find(|number| number.abs() == max && max > 0.0).unwrap_or(0.0);
    }
    if -min > max { min } else { max }
}

/// The inverse of a scale: 0 for 0, and None if it is beyond float32.
#[inline(always)]
fn inverse(d: f32) -> Option<f32> {
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    inverse.is_finite().then_some(inverse)
}

/// Writes a half at `at` of a block. Returns whether it is finite.
#[inline(always)]
fn put_half(out: &mut [u8], at: usize, value: f32) -> bool {
    let half = f16::from_f32(value);
    out[at..at + 2].copy_from_slice(&half.to_le_bytes());
    half.is_finite()
}

/// The nearest integer to a number within 2^21 of 0, halves away from zero, as bits of an i32. `f32::round`
/// would be a call to libm for each number.
#[inline(always)]
fn round(number: f32) -> u32 {
    // As in `truncate`, but in the middle of the range, so that negative numbers work too.
    const ONES: f32 = 1.5 * (1 << 23) as f32;
    let rounded = number + ONES;
    // Exact. A half was rounded to the even neighbour, which may be the one nearer to zero.
    let error = number - (rounded - ONES);
    let up = u32::from((error == 0.5) & (number > 0.0));
    let down = u32::from((error == -0.5) & (number < 0.0));
    rounded.to_bits().wrapping_sub(ONES.to_bits()).wrapping_add(up).wrapping_sub(down)
}

fn q8_0(x: &Block, out: &mut [u8; 34]) -> bool {
    let d = signed_max(x).abs() / 127.0;
    let fits = put_half(out, 0, d);
    let Some(id) = inverse(d) else {
        out[2..].fill(0);
        return fits;
    };
    for (out, number) in out[2..].iter_mut().zip(x) {
        *out = round(number * id) as u8;
    }
    fits
}

/// The integer part of a number between 0 and 2^22. A cast is slower, as it handles all other numbers too.
#[inline(always)]
fn truncate(number: f32) -> u32 {
    // The last bit of a float of this size counts ones. Adding it rounds to an integer, which is in the low
    // bits.
    const ONES: f32 = (1 << 23) as f32;
    let rounded = number + ONES;
    let up = rounded - ONES > number;
    rounded.to_bits().wrapping_sub(ONES.to_bits()).wrapping_sub(u32::from(up))
}

/// `(x - min) * id + half`, truncated: the integers that types of 4 and 5 bits store.
#[inline(always)]
fn quants(x: &Block, min: f32, id: Option<f32>, half: f32, top: u32) -> [u8; BLOCK] {
    let mut quants = [0; BLOCK];
    let Some(id) = id else { return quants };
    for (quant, number) in quants.iter_mut().zip(x) {
        *quant = truncate((number - min) * id + half).min(top) as u8;
    }
    quants
}

/// Byte `j` gets element `j` in its low half and element `j + 16` in its high half; the lower four bits of
/// five.
#[inline(always)]
fn put_nibbles(out: &mut [u8], quants: &[u8; BLOCK]) {
    let (low, high) = quants.split_at(BLOCK / 2);
    for (out, (low, high)) in out.iter_mut().zip(low.iter().zip(high)) {
        *out = low & 15 | high << 4;
    }
}

/// Bit `i` gets the fifth bit of element `i`.
#[inline(always)]
fn put_fifth_bits(out: &mut [u8], quants: &[u8; BLOCK]) {
    let bits =
        quants.iter().enumerate().fold(0_u32, |bits, (i, quant)| bits | u32::from(quant >> 4 & 1) << i);
    out.copy_from_slice(&bits.to_le_bytes());
}

fn q4_0(x: &Block, out: &mut [u8; 18]) -> bool {
    let d = signed_max(x) / -8.0;
    put_nibbles(&mut out[2..], &quants(x, 0.0, inverse(d), 8.5, 15));
    put_half(out, 0, d)
}

fn q5_0(x: &Block, out: &mut [u8; 22]) -> bool {
    let d = signed_max(x) / -16.0;
    let quants = quants(x, 0.0, inverse(d), 16.5, 31);
    put_fifth_bits(&mut out[2..6], &quants);
    put_nibbles(&mut out[6..], &quants);
    put_half(out, 0, d)
}

fn q4_1(x: &Block, out: &mut [u8; 20]) -> bool {
    let (d, min) = scale_and_min(x, 15.0);
    put_nibbles(&mut out[4..], &quants(x, min, inverse(d), 0.5, 15));
    put_half(out, 0, d) & put_half(out, 2, min)
}

fn q5_1(x: &Block, out: &mut [u8; 24]) -> bool {
    let (d, min) = scale_and_min(x, 31.0);
    let quants = quants(x, min, inverse(d), 0.5, 31);
    put_fifth_bits(&mut out[4..8], &quants);
    put_nibbles(&mut out[8..], &quants);
    put_half(out, 0, d) & put_half(out, 2, min)
}

/// The scale for `steps` steps from the smallest to the largest number, and the smallest number. If that is
/// zero, it has the sign of the first zero.
#[inline(always)]
fn scale_and_min(x: &Block, steps: f32) -> (f32, f32) {
    let (mut min, max) = extremes(x);
    if min == 0.0 {
        min = x.iter().copied().find(|number| *number == 0.0).unwrap_or(min);
    }
    ((max - min) / steps, min)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dequantize;

    /// The bits of rows of 32 numbers. Then, for each type, its name and the blocks that the `gguf` Python
    /// package makes of them. `crates/kernels/tests/golden/quantized.py` writes the file.
    const GOLDEN: &str = include_str!("../tests/golden/quantized.txt");

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    fn quantized(dtype: WeightType, row: &[f32]) -> Result<Vec<u8>, Unstorable> {
        let mut out = vec![0xAA; dtype.bytes_for(row.len()).unwrap()];
        quantize_row(dtype, row, &mut out).map(|()| out)
    }

    #[test]
    fn blocks_are_those_of_the_gguf_package() {
        let mut lines = GOLDEN.lines().map(|line| line.split_once(' ').unwrap());
        let (_, rows) = lines.next().unwrap();
        let row: Vec<f32> = hex(rows).as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
        let mut tested = vec![WeightType::F32];
        for (name, blocks) in lines {
            let dtype = TARGETS.into_iter().find(|dtype| dtype.name() == name).unwrap();
            let (got, expected) = (quantized(dtype, &row).unwrap(), hex(blocks));
            let (block, bytes) = (dtype.block_len(), dtype.block_bytes());
            for (at, (got, expected)) in got.chunks(bytes).zip(expected.chunks(bytes)).enumerate() {
                assert_eq!(got, expected, "{dtype} {:?}", &row[at * block..(at + 1) * block]);
            }
            tested.push(dtype);
        }
        assert_eq!(tested, TARGETS);
    }

    #[test]
    fn unstorable_numbers_are_refused_with_index_and_value() {
        for dtype in TARGETS {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut row = [0.5; 96];
                row[70] = bad;
                let refusal = quantized(dtype, &row).unwrap_err();
                assert_eq!((refusal.index, refusal.value.to_bits()), (70, bad.to_bits()), "{dtype}");
            }
            let mut row = [0.5; 96];
            (row[3], row[70]) = (2.0, -f32::MAX);
            let refused = Unstorable { index: 70, value: -f32::MAX };
            match dtype {
                WeightType::F32 => assert!(quantized(dtype, &row).is_ok()),
                _ => assert_eq!(quantized(dtype, &row), Err(refused), "{dtype}"),
            }
        }
    }

    #[test]
    fn the_largest_numbers_that_fit_stay_finite() {
        let largest = [
            (WeightType::F16, 65_519.0),
            (WeightType::Q8_0, 65_519.0 * 127.0),
            (WeightType::Q4_0, 65_519.0 * 8.0),
            (WeightType::Q5_0, 65_519.0 * 16.0),
            // The minimum is a half too.
            (WeightType::Q4_1, 65_519.0),
            (WeightType::Q5_1, 65_519.0),
        ];
        for (dtype, value) in largest {
            for value in [value, -value] {
                let mut row = [1.0; 32];
                row[9] = value;
                let mut dequantized = [0.0; 32];
                dequantize(dtype, &quantized(dtype, &row).unwrap(), &mut dequantized);
                assert!(dequantized.iter().all(|x| x.is_finite()), "{dtype} {dequantized:?}");
                row[9] = value * 1.01;
                row[10] = -row[9];
                assert!(quantized(dtype, &row).is_err(), "{dtype}");
            }
        }
    }

    #[test]
    fn numbers_too_small_for_a_scale_become_zero() {
        for dtype in TARGETS.into_iter().filter(|dtype| dtype.block_len() > 1) {
            for tiny in [1e-45, 1e-40, 1e-38, -1e-38, -0.0] {
                let mut row = [0.0; 32];
                (row[5], row[6]) = (tiny, tiny / -2.0);
                let mut dequantized = [1.0; 32];
                dequantize(dtype, &quantized(dtype, &row).unwrap(), &mut dequantized);
                assert_eq!(dequantized, [0.0; 32], "{dtype} {tiny}");
            }
        }
    }

    #[test]
    fn any_bits_become_finite_numbers_or_are_refused() {
        let mut bits = 1_u64;
        for _ in 0..20_000 {
            let row: [f32; 32] = std::array::from_fn(|_| {
                bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                f32::from_bits((bits >> 32) as u32)
            });
            for dtype in TARGETS {
                match quantized(dtype, &row) {
                    Err(refused) => assert_eq!(refused.value.to_bits(), row[refused.index].to_bits()),
                    Ok(bytes) => {
                        let mut dequantized = [f32::NAN; 32];
                        dequantize(dtype, &bytes, &mut dequantized);
                        assert!(dequantized.iter().all(|number| number.is_finite()), "{dtype} {row:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn integers_are_found_at_and_beside_the_halves() {
        for i in -127_i32..=127 {
            for half in [-0.5_f32, 0.0, 0.5] {
                let middle = i as f32 + half;
                for number in [middle.next_down(), middle, middle.next_up()] {
                    assert_eq!(round(number) as i32, number.round() as i32, "{number}");
                    if number >= 0.0 {
                        assert_eq!(truncate(number), number as u32, "{number}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_of_negative_zeros_have_ggmls_scale() {
        assert_eq!(quantized(WeightType::Q4_0, &[-0.0; 32]).unwrap()[..3], [0, 0x80, 0x88]);
        assert_eq!(quantized(WeightType::Q8_0, &[-0.0; 32]).unwrap(), [0; 34]);
    }

    #[test]
    fn no_more_than_half_a_step_is_lost() {
        let mut bits = 1_u64;
        let mut random = || {
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (bits >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        for dtype in TARGETS {
            for _ in 0..200 {
                let row: [f32; 64] = std::array::from_fn(|_| random());
                let mut dequantized = [0.0; 64];
                dequantize(dtype, &quantized(dtype, &row).unwrap(), &mut dequantized);
                // The largest magnitude is below 1. Types without a minimum have one step less at one end,
                // which costs a whole step.
                let step = match dtype {
                    WeightType::Q8_0 => 0.5 / 127.0,
                    WeightType::Q4_0 => 1.0 / 8.0,
                    WeightType::Q5_0 => 1.0 / 16.0,
                    WeightType::Q4_1 => 0.5 * 2.0 / 15.0,
                    WeightType::Q5_1 => 0.5 * 2.0 / 31.0,
                    _ => 1.0 / 256.0,
                };
                for (got, expected) in dequantized.iter().zip(&row) {
                    assert!((got - expected).abs() < step * 1.01 + 1e-3, "{dtype} {got} {expected}");
                }
            }
        }
    }
}
