//! Dequantises 32 elements of a block, for the types that have no code of their own in each ISA.
//!
//! The compiler vectorises this code for the ISA that it is inlined into. `blocks.rs` describes the layouts.
//! Products and sums are rounded where ggml's reference rounds them.

use crate::blocks::{IQ4_VALUES, f16_at, iq4_xs_scale, q3_k_scale, scale_and_min};
use crate::lanes::LANES;

type Vector = [f32; LANES];

/// 32 quants of 5 bits. Quant `i` consists of nibble `i` of the 16 bytes at `at`, and, as its highest bit,
/// bit `i` of the 4 bytes before them.
#[inline(always)]
fn five_bits(block: &[u8], at: usize) -> [u8; LANES] {
    let high = u32::from_le_bytes([block[at - 4], block[at - 3], block[at - 2], block[at - 1]]);
    let mut quants = [0; LANES];
    for j in 0..16 {
        quants[j] = block[at + j] & 15 | ((high >> j) as u8 & 1) << 4;
        quants[j + 16] = block[at + j] >> 4 | ((high >> (j + 16)) as u8 & 1) << 4;
    }
    quants
}

#[inline(always)]
pub(crate) fn q5_0(block: &[u8; 22], _vector: usize) -> Vector {
    let d = f16_at(block, 0);
    let quants = five_bits(block, 6);
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = (f32::from(quants[i]) - 16.0) * d;
    }
    out
}

#[inline(always)]
pub(crate) fn q5_1(block: &[u8; 24], _vector: usize) -> Vector {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    let quants = five_bits(block, 8);
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = f32::from(quants[i]) * d + m;
    }
    out
}

#[inline(always)]
pub(crate) fn q2_k(block: &[u8; 84], vector: usize) -> Vector {
    let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
    let (quants, shift) = (&block[16 + 32 * (vector / 4)..][..LANES], 2 * (vector % 4));
    let mut out = [0.0; LANES];
    for half in 0..2 {
        let packed = block[2 * vector + half];
        let (scale, min) = (d * f32::from(packed & 15), dmin * f32::from(packed >> 4));
        for i in 16 * half..16 * (half + 1) {
            out[i] = scale * f32::from(quants[i] >> shift & 3) - min;
        }
    }
    out
}

#[inline(always)]
pub(crate) fn q3_k(block: &[u8; 110], vector: usize) -> Vector {
    let d = f16_at(block, 108);
    let (high, scales) = (&block[..LANES], &block[96..108]);
    let (quants, shift) = (&block[32 + 32 * (vector / 4)..][..LANES], 2 * (vector % 4));
    let mut out = [0.0; LANES];
    for half in 0..2 {
        let scale = d * f32::from(q3_k_scale(scales, 2 * vector + half));
        for i in 16 * half..16 * (half + 1) {
            let quant = quants[i] >> shift & 3 | (high[i] >> vector & 1) << 2;
            out[i] = scale * (f32::from(quant) - 4.0);
        }
    }
    out
}

#[inline(always)]
pub(crate) fn q4_k(block: &[u8; 144], vector: usize) -> Vector {
    let (scale, min) = scale_and_min(&block[4..16], vector);
    let (scale, min) = (f16_at(block, 0) * f32::from(scale), f16_at(block, 2) * f32::from(min));
    let (quants, shift) = (&block[16 + 32 * (vector / 2)..][..LANES], 4 * (vector % 2));
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = scale * f32::from(quants[i] >> shift & 15) - min;
    }
    out
}

#[inline(always)]
pub(crate) fn q5_k(block: &[u8; 176], vector: usize) -> Vector {
    let (scale, min) = scale_and_min(&block[4..16], vector);
    let (scale, min) = (f16_at(block, 0) * f32::from(scale), f16_at(block, 2) * f32::from(min));
    let high = &block[16..48];
    let (quants, shift) = (&block[48 + 32 * (vector / 2)..][..LANES], 4 * (vector % 2));
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        let quant = quants[i] >> shift & 15 | (high[i] >> vector & 1) << 4;
        out[i] = scale * f32::from(quant) - min;
    }
    out
}

#[inline(always)]
pub(crate) fn q6_k(block: &[u8; 210], vector: usize) -> Vector {
    let d = f16_at(block, 208);
    let (part, quarter) = (vector / 4, vector % 4);
    let low = &block[64 * part + 32 * (quarter % 2)..][..LANES];
    let high = &block[128 + 32 * part..][..LANES];
    let mut out = [0.0; LANES];
    for half in 0..2 {
        let scale = d * f32::from(block[192 + 2 * vector + half] as i8);
        for i in 16 * half..16 * (half + 1) {
            let quant = low[i] >> (4 * (quarter / 2)) & 15 | (high[i] >> (2 * quarter) & 3) << 4;
            out[i] = scale * (f32::from(quant) - 32.0);
        }
    }
    out
}

/// 32 products of `scale` and the values of nibbles.
#[inline(always)]
fn iq4_values(nibbles: &[u8], scale: f32) -> Vector {
    let mut out = [0.0; LANES];
    for j in 0..LANES / 2 {
        out[j] = scale * f32::from(IQ4_VALUES[usize::from(nibbles[j] & 15)]);
        out[j + LANES / 2] = scale * f32::from(IQ4_VALUES[usize::from(nibbles[j] >> 4)]);
    }
    out
}

#[inline(always)]
pub(crate) fn iq4_nl(block: &[u8; 18], _vector: usize) -> Vector {
    iq4_values(&block[2..], f16_at(block, 0))
}

#[inline(always)]
pub(crate) fn iq4_xs(block: &[u8; 136], vector: usize) -> Vector {
    let scale = f16_at(block, 0) * f32::from(iq4_xs_scale(block, vector));
    iq4_values(&block[8 + 16 * vector..][..16], scale)
}
