//! Quantises blocks of 256 numbers. Each function returns whether the block can hold them.
//!
//! A block consists of groups of 16 or 32 numbers, each with a scale and perhaps a minimum. These are found
//! first, by the searches in `search.rs`. Then they are stored as integers, times the block's scale and
//! minimum in half precision, and the quants are computed again from the stored ones.
//!
//! Source: ggml, `ggml-quants.c`, `quantize_row_q2_K_ref` to `quantize_row_q6_K_ref`.

use super::put_half;
use super::search::{LANES, Lanes, MinSearch, Quants, find_scale, lanes, nearest, refine_scale};
use crate::blocks::f16_at;

/// Elements per block.
const BLOCK: usize = 256;
type Block = [f32; BLOCK];

/// A larger number fits into none of the types; the sums of a search could overflow.
const LARGEST: f32 = 1e9;
/// Blocks whose largest scale is below this count as zeros in Q6_K.
const SMALLEST: f32 = 1e-15;

#[inline(always)]
fn is_in_range(x: &Block) -> bool {
    x.iter().fold(true, |fits, number| fits & (number.abs() <= LARGEST))
}

/// Puts the quants of eight groups in the order of the numbers.
#[inline(always)]
fn put_quants<const LEN: usize>(out: &mut [u8], quants: &Quants<LEN>) {
    for (lane, out) in out.as_chunks_mut::<LEN>().0.iter_mut().enumerate() {
        for (out, quants) in out.iter_mut().zip(quants) {
            *out = quants[lane];
        }
    }
}

/// Computes the quants of a group from its stored scale and minimum. If the scale has become zero, the quants
/// of the search stay.
#[inline(always)]
fn requantize(quants: &mut [u8], x: &[f32], scale: f32, min: f32, lowest: i32, top: i32) {
    if scale != 0.0 {
        for (quant, number) in quants.iter_mut().zip(x) {
            *quant = (nearest((number + min) / scale).clamp(lowest, top) - lowest) as u8;
        }
    }
}

/// The factor that makes `max` the integer `top`; 0 if no group has a scale.
#[inline(always)]
fn factor(max: f32, top: f32) -> f32 {
    if max > 0.0 { top / max } else { 0.0 }
}

/// The largest of some numbers, or 0.
#[inline(always)]
fn largest(numbers: &[f32]) -> f32 {
    numbers.iter().fold(0.0, |max, &number| if number > max { number } else { max })
}

/// The number with the largest magnitude; the first of several.
#[inline(always)]
fn signed_largest(numbers: &[f32]) -> f32 {
    numbers.iter().fold(0.0, |max: f32, &number| if number.abs() > max.abs() { number } else { max })
}

/// Packs quants of 2 bits: a byte holds one of each quarter of 128 numbers.
#[inline(always)]
fn put_pairs(out: &mut [u8], quants: &[u8; BLOCK]) {
    for (out, quants) in out.chunks_exact_mut(32).zip(quants.chunks_exact(128)) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = (0..4).fold(0, |byte, quarter| byte | (quants[32 * quarter + i] & 3) << (2 * quarter));
        }
    }
}

/// The scales, minimums and quants of the 16 groups of Q2_K.
#[inline(always)]
fn sixteenths(
    x: &Block,
    find: impl Fn(&[Lanes; 16]) -> (Lanes, Lanes, Quants<16>),
) -> ([f32; 16], [f32; 16], [u8; BLOCK]) {
    let (mut scales, mut mins, mut quants) = ([0.0; 16], [0.0; 16], [0; BLOCK]);
    for half in 0..2 {
        let found = find(&lanes(&x[128 * half..128 * (half + 1)]));
        scales[LANES * half..][..LANES].copy_from_slice(&found.0);
        mins[LANES * half..][..LANES].copy_from_slice(&found.1);
        put_quants(&mut quants[128 * half..][..128], &found.2);
    }
    (scales, mins, quants)
}

pub(super) fn q2_k(x: &Block, out: &mut [u8; 84]) -> bool {
    const SEARCH: MinSearch = MinSearch { top: 3, first: -0.5, steps: 15, by_magnitude: true };
    let (scales, mins, mut quants) =
        sixteenths(x, |x| SEARCH.find(x, &x.map(|numbers| numbers.map(f32::abs))));
    let (max_scale, max_min) = (largest(&scales), largest(&mins));
    let fits = put_half(out, 80, max_scale / 15.0) & put_half(out, 82, max_min / 15.0);
    let (scale_factor, min_factor) = (factor(max_scale, 15.0), factor(max_min, 15.0));
    for group in 0..16 {
        // A negative scale fills all bits, as in ggml.
        let packed =
            nearest(scale_factor * scales[group]) as u8 | (nearest(min_factor * mins[group]) as u8) << 4;
        out[group] = packed;
        let scale = f16_at(out, 80) * f32::from(packed & 15);
        let min = f16_at(out, 82) * f32::from(packed >> 4);
        let numbers = 16 * group..16 * (group + 1);
        requantize(&mut quants[numbers.clone()], &x[numbers], scale, min, 0, SEARCH.top);
    }
    put_pairs(&mut out[16..80], &quants);
    fits & is_in_range(x)
}

pub(super) fn q3_k(x: &Block, out: &mut [u8; 110]) -> bool {
    let (scales, _, mut quants) = sixteenths(x, |x| {
        let (scales, quants) = refine_scale(x, 4);
        (scales, [0.0; LANES], quants)
    });
    let max_scale = signed_largest(&scales);
    let inverse = -32.0 / max_scale;
    let has_scale = max_scale != 0.0;
    let fits = put_half(out, 108, if has_scale { 1.0 / inverse } else { 0.0 });
    out[96..108].fill(0);
    for group in 0..16 {
        // The cast keeps the low byte, as in ggml.
        let scale = i32::from(nearest(inverse * scales[group]) as i8).clamp(-32, 31) + 32;
        let scale = if has_scale { scale as u8 } else { 0 };
        out[96 + group % 8] |= (scale & 15) << (4 * (group / 8));
        out[104 + group % 4] |= scale >> 4 << (2 * (group / 4));
        let scale = f16_at(out, 108) * (f32::from(scale) - 32.0);
        let numbers = 16 * group..16 * (group + 1);
        requantize(&mut quants[numbers.clone()], &x[numbers], scale, 0.0, -4, 3);
    }
    for (i, high) in out[..32].iter_mut().enumerate() {
        *high = (0..8).fold(0, |byte, bit| byte | (quants[32 * bit + i] >> 2) << bit);
    }
    put_pairs(&mut out[32..96], &quants);
    fits & is_in_range(x)
}

/// The quants of Q4_K or Q5_K. Writes the scales and minimums to the block's first 16 bytes.
#[inline(always)]
fn eighths(x: &Block, out: &mut [u8; 16], search: &MinSearch) -> (bool, [u8; BLOCK]) {
    let numbers: [Lanes; 32] = lanes(x);
    let mut squares = [0.0; LANES];
    for numbers in &numbers {
        for lane in 0..LANES {
            squares[lane] += numbers[lane] * numbers[lane];
        }
    }
    let mean = squares.map(|squares| (squares / 32.0).sqrt());
    let weights = numbers.map(|numbers| std::array::from_fn(|lane| mean[lane] + numbers[lane].abs()));
    let (scales, mins, found) = search.find(&numbers, &weights);
    let mut quants = [0; BLOCK];
    put_quants(&mut quants, &found);

    let (max_scale, max_min) = (largest(&scales), largest(&mins));
    let fits = put_half(out, 0, max_scale / 63.0) & put_half(out, 2, max_min / 63.0);
    let (scale_factor, min_factor) = (factor(max_scale, 63.0), factor(max_min, 63.0));
    for group in 0..8 {
        // A negative scale becomes the largest, as in ggml.
        let scale = (nearest(scale_factor * scales[group]) as u8).min(63);
        let min = (nearest(min_factor * mins[group]) as u8).min(63);
        if group < 4 {
            out[4 + group] = scale;
            out[8 + group] = min;
        } else {
            out[8 + group] = scale & 15 | min << 4;
            out[group] |= scale >> 4 << 6;
            out[4 + group] |= min >> 4 << 6;
        }
        let numbers = 32 * group..32 * (group + 1);
        let (scale, min) = (f16_at(out, 0) * f32::from(scale), f16_at(out, 2) * f32::from(min));
        requantize(&mut quants[numbers.clone()], &x[numbers], scale, min, 0, search.top);
    }
    (fits & is_in_range(x), quants)
}

/// Packs the lower four bits of quants: a byte holds one of each half of 64 numbers.
#[inline(always)]
fn put_nibbles(out: &mut [u8], quants: &[u8; BLOCK]) {
    for (out, quants) in out.chunks_exact_mut(32).zip(quants.chunks_exact(64)) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = quants[i] & 15 | quants[32 + i] << 4;
        }
    }
}

pub(super) fn q4_k(x: &Block, out: &mut [u8; 144]) -> bool {
    const SEARCH: MinSearch = MinSearch { top: 15, first: -1.0, steps: 20, by_magnitude: false };
    let (scales, nibbles) = out.split_first_chunk_mut().expect("a block has more than 16 bytes");
    let (fits, quants) = eighths(x, scales, &SEARCH);
    put_nibbles(nibbles, &quants);
    fits
}

pub(super) fn q5_k(x: &Block, out: &mut [u8; 176]) -> bool {
    const SEARCH: MinSearch = MinSearch { top: 31, first: -0.5, steps: 15, by_magnitude: false };
    let (scales, bits) = out.split_first_chunk_mut().expect("a block has more than 16 bytes");
    let (fits, quants) = eighths(x, scales, &SEARCH);
    let (high, nibbles) = bits.split_at_mut(32);
    for (i, high) in high.iter_mut().enumerate() {
        *high = (0..8).fold(0, |byte, bit| byte | (quants[32 * bit + i] >> 4) << bit);
    }
    put_nibbles(nibbles, &quants);
    fits
}

pub(super) fn q6_k(x: &Block, out: &mut [u8; 210]) -> bool {
    let (scales, _, mut quants) = sixteenths(x, |x| {
        let (scales, quants) = find_scale(x, 32);
        (scales, [0.0; LANES], quants)
    });
    let max_scale = signed_largest(&scales);
    if max_scale.abs() < SMALLEST {
        out.fill(0);
        return is_in_range(x);
    }
    let inverse = -128.0 / max_scale;
    let fits = put_half(out, 208, 1.0 / inverse);
    for group in 0..16 {
        let stored = nearest(inverse * scales[group]).min(127) as i8;
        out[192 + group] = stored as u8;
        let scale = f16_at(out, 208) * f32::from(stored);
        let numbers = 16 * group..16 * (group + 1);
        requantize(&mut quants[numbers.clone()], &x[numbers], scale, 0.0, -32, 31);
    }
    let (low, high) = out[..192].split_at_mut(128);
    let parts = low.chunks_exact_mut(64).zip(high.chunks_exact_mut(32)).zip(quants.chunks_exact(128));
    for ((low, high), quants) in parts {
        for (i, low) in low.iter_mut().enumerate() {
            *low = quants[i] & 15 | quants[64 + i] << 4;
        }
        for (i, high) in high.iter_mut().enumerate() {
            *high = (0..4).fold(0, |byte, quarter| byte | (quants[32 * quarter + i] >> 4) << (2 * quarter));
        }
    }
    fits & is_in_range(x)
}
