//! [`Lanes`] in two AVX-512 registers.
//!
//! SAFETY of every block here: [`Avx512Lanes`] is used only inside the `#[target_feature]` functions of this
//! folder and of `amx/`, which dispatch.rs reaches only after it has seen the features on this CPU; every
//! load and store goes through a reference to an array of exactly its width.

use crate::lanes::{LANES, Lanes};
use crate::prefetch::StreamPrefetch;
use crate::x86_64::prefetch::{is_of_amd, vnni_stream};
use crate::x86_64::vectors::{bytes, nibbles, sum_of_8};
use std::arch::x86_64::*;

/// 2 x 16 numbers.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Lanes(pub(super) __m512, pub(super) __m512);

/// Floats from 32 small integers, 16 in each half.
#[inline(always)]
fn from_bytes<const SIGNED: bool>(low: __m128i, high: __m128i) -> Avx512Lanes {
    // SAFETY: AVX-512F is enabled; see the top of this file.
    unsafe {
        let convert = |x| if SIGNED { _mm512_cvtepi8_epi32(x) } else { _mm512_cvtepu8_epi32(x) };
        Avx512Lanes(_mm512_cvtepi32_ps(convert(low)), _mm512_cvtepi32_ps(convert(high)))
    }
}

/// The f16 at byte `at`, in every lane.
#[inline(always)]
fn half_at(block: &[u8], at: usize) -> Avx512Lanes {
    let bits = i16::from_le_bytes([block[at], block[at + 1]]);
    // SAFETY: AVX-512F is enabled; see the top of this file.
    let value = unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(bits)) };
    Avx512Lanes(value, value)
}

impl Lanes for Avx512Lanes {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { Avx512Lanes(_mm512_set1_ps(value), _mm512_set1_ps(value)) }
    }

    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Self {
        // SAFETY: AVX-512F is enabled; the reference covers the 32 numbers read.
        unsafe { Avx512Lanes(_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values.as_ptr().add(16))) }
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        // SAFETY: AVX-512F is enabled; the reference covers the 32 numbers written.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), self.0);
            _mm512_storeu_ps(out.as_mut_ptr().add(16), self.1);
        }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { Avx512Lanes(_mm512_add_ps(self.0, other.0), _mm512_add_ps(self.1, other.1)) }
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { Avx512Lanes(_mm512_mul_ps(self.0, other.0), _mm512_mul_ps(self.1, other.1)) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe {
            Avx512Lanes(
                _mm512_fmadd_ps(self.0, factor.0, addend.0),
                _mm512_fmadd_ps(self.1, factor.1, addend.1),
            )
        }
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // The instruction returns its second operand if either is NaN. SAFETY: AVX-512F is enabled; see the
        // top of this file.
        unsafe { Avx512Lanes(_mm512_max_ps(other.0, self.0), _mm512_max_ps(other.1, self.1)) }
    }

    #[inline(always)]
    fn two_to(self) -> Self {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe {
            let one = _mm512_castps_si512(_mm512_set1_ps(1.0));
            let power = |x| _mm512_add_epi32(_mm512_slli_epi32::<23>(_mm512_castps_si512(x)), one);
            Avx512Lanes(_mm512_castsi512_ps(power(self.0)), _mm512_castsi512_ps(power(self.1)))
        }
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { _mm512_reduce_max_ps(_mm512_max_ps(self.0, self.1)) }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe {
            let sums = _mm512_add_ps(self.0, self.1);
            let upper =
                _mm512_castpd_ps(_mm512_castpd256_pd512(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(sums))));
            sum_of_8(_mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_castps512_ps256(upper)))
        }
    }

    #[inline(always)]
    fn stream_prefetch() -> StreamPrefetch {
        vnni_stream()
    }

    #[inline(always)]
    fn prefetches_kv_into_l1() -> bool {
        is_of_amd()
    }

    #[inline(always)]
    fn f32(block: &[u8; 128]) -> Self {
        // SAFETY: AVX-512F is enabled; the reference covers the 128 bytes read; loadu needs no alignment.
        unsafe {
            Avx512Lanes(
                _mm512_loadu_ps(block.as_ptr().cast()),
                _mm512_loadu_ps(block.as_ptr().cast::<f32>().add(16)),
            )
        }
    }

    #[inline(always)]
    fn f16(block: &[u8; 64]) -> Self {
        // SAFETY: AVX-512F is enabled; the reference covers the 64 bytes read.
        unsafe {
            let low = _mm256_loadu_si256(block.as_ptr().cast());
            let high = _mm256_loadu_si256(block.as_ptr().add(32).cast());
            Avx512Lanes(_mm512_cvtph_ps(low), _mm512_cvtph_ps(high))
        }
    }

    #[inline(always)]
    fn bf16(block: &[u8; 64]) -> Self {
        // SAFETY: AVX-512F is enabled; the reference covers the 64 bytes read.
        unsafe {
            let low = _mm256_loadu_si256(block.as_ptr().cast());
            let high = _mm256_loadu_si256(block.as_ptr().add(32).cast());
            let convert = |x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)));
            Avx512Lanes(convert(low), convert(high))
        }
    }

    #[inline(always)]
    fn q8_0(block: &[u8; 34]) -> Self {
        Self::i8(block[2..].try_into().expect("32 bytes")).mul(half_at(block, 0))
    }

    #[inline(always)]
    fn q4_0(block: &[u8; 18]) -> Self {
        let (low, high) = nibbles(block[2..].try_into().expect("16 bytes"));
        from_bytes::<false>(low, high).add(Self::splat(-8.0)).mul(half_at(block, 0))
    }

    #[inline(always)]
    fn q4_1(block: &[u8; 20]) -> Self {
        let (low, high) = nibbles(block[4..].try_into().expect("16 bytes"));
        from_bytes::<false>(low, high).mul(half_at(block, 0)).add(half_at(block, 2))
    }

    #[inline(always)]
    fn i8(numbers: &[u8; 32]) -> Self {
        let (low, high) = bytes(numbers);
        from_bytes::<true>(low, high)
    }
}
