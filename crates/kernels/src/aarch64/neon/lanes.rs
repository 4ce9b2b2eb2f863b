//! [`Lanes`] in eight NEON registers.
//!
//! NEON is part of 64-bit Arm, so its instructions need no check. Every load and store goes through a
//! reference to an array of exactly its width.

use super::vectors::from_halves;
use crate::lanes::{LANES, Lanes};
use crate::prefetch::StreamPrefetch;
use std::arch::aarch64::*;

/// 8 x 4 numbers.
#[derive(Clone, Copy)]
pub(in crate::aarch64) struct NeonLanes([float32x4_t; 8]);

impl NeonLanes {
    #[inline(always)]
    fn zip(self, other: Self, operation: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        let ([a, b, c, d, e, f, g, h], [i, j, k, l, m, n, o, p]) = (self.0, other.0);
        NeonLanes([
            operation(a, i),
            operation(b, j),
            operation(c, k),
            operation(d, l),
            operation(e, m),
            operation(f, n),
            operation(g, o),
            operation(h, p),
        ])
    }
}

/// Floats from 16-bit integers, which [`from_bytes`] made.
#[inline(always)]
fn from_wide(wide: [int16x8_t; 4]) -> NeonLanes {
    // SAFETY: NEON is part of 64-bit Arm.
    unsafe {
        let [a, b, c, d] = wide;
        let low = |x| vcvtq_f32_s32(vmovl_s16(vget_low_s16(x)));
        let high = |x| vcvtq_f32_s32(vmovl_high_s16(x));
        NeonLanes([low(a), high(a), low(b), high(b), low(c), high(c), low(d), high(d)])
    }
}

/// Floats from 32 small signed integers, 16 in each half.
#[inline(always)]
fn from_bytes([low, high]: [int8x16_t; 2]) -> NeonLanes {
    // SAFETY: NEON is part of 64-bit Arm.
    unsafe {
        from_wide([
            vmovl_s8(vget_low_s8(low)),
            vmovl_high_s8(low),
            vmovl_s8(vget_low_s8(high)),
            vmovl_high_s8(high),
        ])
    }
}

/// The low and the high nibbles of 16 bytes.
#[inline(always)]
fn nibbles(bytes: &[u8; 16]) -> [int8x16_t; 2] {
    // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
    unsafe {
        let packed = vld1q_u8(bytes.as_ptr());
        let (low, high) = (vandq_u8(packed, vdupq_n_u8(0x0f)), vshrq_n_u8::<4>(packed));
        [vreinterpretq_s8_u8(low), vreinterpretq_s8_u8(high)]
    }
}

/// The f16 at byte `at`, in every lane.
#[inline(always)]
fn half_at(block: &[u8], at: usize) -> NeonLanes {
    // SAFETY: NEON is part of 64-bit Arm.
    unsafe {
        let bits = u16::from_le_bytes([block[at], block[at + 1]]);
        NeonLanes([from_halves(vdupq_n_u16(bits))[0]; 8])
    }
}

impl Lanes for NeonLanes {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe { NeonLanes([vdupq_n_f32(value); 8]) }
    }

    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Self {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
        unsafe { NeonLanes(std::array::from_fn(|i| vld1q_f32(values.as_ptr().add(4 * i)))) }
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is written.
        unsafe {
            for (i, four) in self.0.into_iter().enumerate() {
                vst1q_f32(out.as_mut_ptr().add(4 * i), four);
            }
        }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe { self.zip(other, |a, b| vaddq_f32(a, b)) }
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe { self.zip(other, |a, b| vmulq_f32(a, b)) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe { NeonLanes(std::array::from_fn(|i| vfmaq_f32(addend.0[i], self.0[i], factor.0[i]))) }
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            // The instruction for maxima returns NaN if either is NaN.
            self.zip(other, |a, b| vbslq_f32(vcgtq_f32(b, a), b, a))
        }
    }

    #[inline(always)]
    fn two_to(self) -> Self {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            self.zip(Self::splat(1.0), |x, one| {
                let exponent = vshlq_n_u32::<23>(vreinterpretq_u32_f32(x));
                vreinterpretq_f32_u32(vaddq_u32(exponent, vreinterpretq_u32_f32(one)))
            })
        }
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            let [a, b, c, d, e, f, g, h] = self.0;
            let low = vmaxq_f32(vmaxq_f32(a, e), vmaxq_f32(c, g));
            let high = vmaxq_f32(vmaxq_f32(b, f), vmaxq_f32(d, h));
            vmaxvq_f32(vmaxq_f32(low, high))
        }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            let [a, b, c, d, e, f, g, h] = self.0;
            let low = vaddq_f32(vaddq_f32(a, e), vaddq_f32(c, g));
            let high = vaddq_f32(vaddq_f32(b, f), vaddq_f32(d, h));
            let four = vaddq_f32(low, high);
            vaddv_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
        }
    }

    #[inline(always)]
    fn stream_prefetch() -> StreamPrefetch {
        StreamPrefetch::into_l1(2048)
    }

    #[inline(always)]
    fn f32(block: &[u8; 128]) -> Self {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
        unsafe {
            NeonLanes(std::array::from_fn(|i| vreinterpretq_f32_u8(vld1q_u8(block.as_ptr().add(16 * i)))))
        }
    }

    #[inline(always)]
    fn f16(block: &[u8; 64]) -> Self {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
        unsafe {
            let part = |i: usize| from_halves(vld1q_u16(block.as_ptr().add(16 * i).cast()));
            let ([a, b], [c, d], [e, f], [g, h]) = (part(0), part(1), part(2), part(3));
            NeonLanes([a, b, c, d, e, f, g, h])
        }
    }

    #[inline(always)]
    fn bf16(block: &[u8; 64]) -> Self {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
        unsafe {
            let part = |i: usize| {
                let bits = vld1q_u16(block.as_ptr().add(16 * i).cast());
                let (low, high) = (vshll_n_u16::<16>(vget_low_u16(bits)), vshll_high_n_u16::<16>(bits));
                [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
            };
            let ([a, b], [c, d], [e, f], [g, h]) = (part(0), part(1), part(2), part(3));
            NeonLanes([a, b, c, d, e, f, g, h])
        }
    }

    #[inline(always)]
    fn q8_0(block: &[u8; 34]) -> Self {
        Self::i8(block[2..].try_into().expect("32 bytes")).mul(half_at(block, 0))
    }

    #[inline(always)]
    fn q4_0(block: &[u8; 18]) -> Self {
        // SAFETY: NEON is part of 64-bit Arm.
        unsafe {
            let [low, high] = nibbles(block[2..].try_into().expect("16 bytes"));
            let eight = vdupq_n_s8(8);
            from_bytes([vsubq_s8(low, eight), vsubq_s8(high, eight)]).mul(half_at(block, 0))
        }
    }

    #[inline(always)]
    fn q4_1(block: &[u8; 20]) -> Self {
        let numbers = from_bytes(nibbles(block[4..].try_into().expect("16 bytes")));
        numbers.mul(half_at(block, 0)).add(half_at(block, 2))
    }

    #[inline(always)]
    fn i8(numbers: &[u8; 32]) -> Self {
        // SAFETY: NEON is part of 64-bit Arm; the reference covers what is read.
        unsafe {
            let part = |i: usize| vld1q_s8(numbers.as_ptr().add(16 * i).cast());
            from_bytes([part(0), part(1)])
        }
    }
}
