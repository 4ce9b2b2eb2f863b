//! [`Lanes`] in plain Rust: the reference, written to be read.

use crate::blocks::f16_at;
use crate::lanes::{LANES, Lanes};
use crate::prefetch::StreamPrefetch;
use half::bf16;

/// A vector as an array.
#[derive(Clone, Copy)]
pub(crate) struct ScalarLanes([f32; LANES]);

/// Nibble `i` of 16 bytes.
#[inline(always)]
fn nibble(bytes: &[u8], i: usize) -> u8 {
    if i < 16 { bytes[i] & 0x0f } else { bytes[i - 16] >> 4 }
}

impl Lanes for ScalarLanes {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        ScalarLanes([value; LANES])
    }

    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Self {
        ScalarLanes(*values)
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        *out = self.0;
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        ScalarLanes(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        ScalarLanes(std::array::from_fn(|i| self.0[i] * other.0[i]))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // `f32::mul_add` without an FMA instruction would be a library call for each lane.
        ScalarLanes(std::array::from_fn(|i| self.0[i] * factor.0[i] + addend.0[i]))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        ScalarLanes(std::array::from_fn(|i| if other.0[i] > self.0[i] { other.0[i] } else { self.0[i] }))
    }

    #[inline(always)]
    fn two_to(self) -> Self {
        // n is in the lowest bits. The shift moves it to the exponent and drops the other bits.
        ScalarLanes(self.0.map(|x| f32::from_bits((x.to_bits() << 23).wrapping_add(1.0_f32.to_bits()))))
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        let mut largest = self.0;
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                largest[i] = if largest[i + half] > largest[i] { largest[i + half] } else { largest[i] };
            }
            half /= 2;
        }
        largest[0]
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let mut sums = self.0;
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                sums[i] += sums[i + half];
            }
            half /= 2;
        }
        sums[0]
    }

    #[inline(always)]
    fn stream_prefetch() -> StreamPrefetch {
        StreamPrefetch::into_l1(2048)
    }

    #[inline(always)]
    fn f32(block: &[u8; 128]) -> Self {
        ScalarLanes(std::array::from_fn(|i| {
            f32::from_le_bytes([block[4 * i], block[4 * i + 1], block[4 * i + 2], block[4 * i + 3]])
        }))
    }

    #[inline(always)]
    fn f16(block: &[u8; 64]) -> Self {
        ScalarLanes(std::array::from_fn(|i| f16_at(block, 2 * i)))
    }

    #[inline(always)]
    fn bf16(block: &[u8; 64]) -> Self {
        ScalarLanes(std::array::from_fn(|i| {
            bf16::from_le_bytes([block[2 * i], block[2 * i + 1]]).to_f32_const()
        }))
    }

    #[inline(always)]
    fn q8_0(block: &[u8; 34]) -> Self {
        let d = f16_at(block, 0);
        ScalarLanes(std::array::from_fn(|i| f32::from(block[2 + i] as i8) * d))
    }

    #[inline(always)]
    fn q4_0(block: &[u8; 18]) -> Self {
        let d = f16_at(block, 0);
        ScalarLanes(std::array::from_fn(|i| f32::from(nibble(&block[2..], i) as i8 - 8) * d))
    }

    #[inline(always)]
    fn q4_1(block: &[u8; 20]) -> Self {
        let (d, m) = (f16_at(block, 0), f16_at(block, 2));
        ScalarLanes(std::array::from_fn(|i| f32::from(nibble(&block[4..], i)) * d + m))
    }

    #[inline(always)]
    fn i8(numbers: &[u8; 32]) -> Self {
        ScalarLanes(std::array::from_fn(|i| f32::from(numbers[i] as i8)))
    }
}
