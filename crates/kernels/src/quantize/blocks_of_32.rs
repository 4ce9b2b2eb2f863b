//! Quantises blocks of 32 numbers. Each function returns whether the block's scale and minimum are finite.

use super::put_half;

/// Elements per block.
const BLOCK: usize = 32;
type Block = [f32; BLOCK];

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

pub(super) fn q8_0(x: &Block, out: &mut [u8; 34]) -> bool {
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
pub(super) fn quants(x: &Block, min: f32, id: Option<f32>, half: f32, top: u32) -> [u8; BLOCK] {
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

pub(super) fn q4_0(x: &Block, out: &mut [u8; 18]) -> bool {
    let d = signed_max(x) / -8.0;
    put_nibbles(&mut out[2..], &quants(x, 0.0, inverse(d), 8.5, 15));
    put_half(out, 0, d)
}

pub(super) fn q5_0(x: &Block, out: &mut [u8; 22]) -> bool {
    let d = signed_max(x) / -16.0;
    let quants = quants(x, 0.0, inverse(d), 16.5, 31);
    put_fifth_bits(&mut out[2..6], &quants);
    put_nibbles(&mut out[6..], &quants);
    put_half(out, 0, d)
}

pub(super) fn q4_1(x: &Block, out: &mut [u8; 20]) -> bool {
    let (d, min) = scale_and_min(x, 15.0);
    put_nibbles(&mut out[4..], &quants(x, min, inverse(d), 0.5, 15));
    put_half(out, 0, d) & put_half(out, 2, min)
}

pub(super) fn q5_1(x: &Block, out: &mut [u8; 24]) -> bool {
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
}
