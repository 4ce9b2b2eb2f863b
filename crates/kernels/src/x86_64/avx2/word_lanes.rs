//! [`WordLanes`] in four AVX2 registers.
//!
//! SAFETY of every block here: [`Avx2Lanes`] is used only inside this folder's `#[target_feature]` functions,
//! which dispatch.rs reaches only after it has seen AVX2, FMA and F16C on this CPU; every load and store goes
//! through a reference to an array of exactly its width.

use super::{Avx2Lanes, Avx2Rows};
use crate::lanes::{LANES, Lanes};
use crate::word_lanes::WordLanes;
use std::arch::x86_64::*;

impl WordLanes for Avx2Lanes {
    type Words = [__m256i; 4];
    type Rows = Avx2Rows<false>;
    const UNROLLED: usize = 2;

    #[inline(always)]
    fn splat_word(word: i32) -> Self::Words {
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe { [_mm256_set1_epi32(word); 4] }
    }

    #[inline(always)]
    fn load_words(words: &[i32; LANES]) -> Self::Words {
        // SAFETY: AVX2 is enabled; 4 x 8 words lie inside the reference.
        let part = |i: usize| unsafe { _mm256_loadu_si256(words.as_ptr().add(8 * i).cast()) };
        [part(0), part(1), part(2), part(3)]
    }

    #[inline(always)]
    fn store_words(words: Self::Words, out: &mut [i32; LANES]) {
        for (part, words) in out.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            // SAFETY: AVX2 is enabled; the reference covers the 8 words written.
            unsafe { _mm256_storeu_si256(part.as_mut_ptr().cast(), words) };
        }
    }

    #[inline(always)]
    fn add_word_products(sums: Self::Words, a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: AVX2 is enabled; see the top of this file.
        let add = |i: usize| unsafe { _mm256_add_epi32(sums[i], _mm256_madd_epi16(a[i], b[i])) };
        [add(0), add(1), add(2), add(3)]
    }

    #[inline(always)]
    fn from_sums(sums: Self::Words) -> Self {
        let [a, b, c, d] = sums;
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe {
            Avx2Lanes([
                _mm256_cvtepi32_ps(a),
                _mm256_cvtepi32_ps(b),
                _mm256_cvtepi32_ps(c),
                _mm256_cvtepi32_ps(d),
            ])
        }
    }

    #[inline(always)]
    fn round_pairs(low: Self, high: Self) -> Self::Words {
        /// All odd 16-bit numbers.
        const ODD: i32 = 0xaa;
        // SAFETY: AVX2 is enabled; see the top of this file.
        let pair = |i: usize| unsafe {
            let (low, high) = (_mm256_cvtps_epi32(low.0[i]), _mm256_cvtps_epi32(high.0[i]));
            _mm256_blend_epi16::<ODD>(low, _mm256_slli_epi32::<16>(high))
        };
        [pair(0), pair(1), pair(2), pair(3)]
    }

    #[inline(always)]
    fn round(self, words: &mut [i32; LANES / 2]) {
        for (i, words) in words.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            // SAFETY: AVX2 is enabled; the reference covers the 8 words written.
            unsafe {
                let (low, high) = (_mm256_cvtps_epi32(self.0[2 * i]), _mm256_cvtps_epi32(self.0[2 * i + 1]));
                // Packing takes the lower halves of both registers, then the upper ones.
                const IN_ORDER: i32 = 0b11_01_10_00;
                let rounded = _mm256_permute4x64_epi64::<IN_ORDER>(_mm256_packs_epi32(low, high));
                _mm256_storeu_si256(words.as_mut_ptr().cast(), rounded);
            }
        }
    }

    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: AVX2 is enabled; see the top of this file.
        self.zip(Self::splat(-0.0), |x, sign| unsafe { _mm256_andnot_ps(sign, x) })
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        let [a, b, c, d] = self.0;
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe { Avx2Lanes([_mm256_sqrt_ps(a), _mm256_sqrt_ps(b), _mm256_sqrt_ps(c), _mm256_sqrt_ps(d)]) }
    }

    #[inline(always)]
    fn inverse(self) -> Self {
        // SAFETY: AVX2 is enabled; see the top of this file.
        self.zip(Self::splat(1.0), |x, one| unsafe { _mm256_div_ps(one, x) })
    }

    #[inline(always)]
    fn nearest(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        let [a, b, c, d] = self.0;
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe {
            Avx2Lanes([
                _mm256_round_ps::<NEAREST>(a),
                _mm256_round_ps::<NEAREST>(b),
                _mm256_round_ps::<NEAREST>(c),
                _mm256_round_ps::<NEAREST>(d),
            ])
        }
    }

    #[inline(always)]
    fn times_two_to(self, n: Self) -> Self {
        /// The exponent of 1, and of the least n: 2^-127 becomes 0.
        const BIAS: i32 = 127;
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe {
            let mut powers = n.max(Self::splat(-BIAS as f32));
            for n in &mut powers.0 {
                let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(*n), _mm256_set1_epi32(BIAS));
                *n = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent));
            }
            self.mul(powers)
        }
    }

    #[inline(always)]
    fn largest_of_halves(self, out: &mut [f32; LANES / 2]) {
        let [a, b, c, d] = self.0;
        // SAFETY: AVX2 is enabled; the reference covers the 16 numbers written.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), _mm256_max_ps(a, c));
            _mm256_storeu_ps(out.as_mut_ptr().add(8), _mm256_max_ps(b, d));
        }
    }

    #[inline(always)]
    fn sums_of_halves(self, out: &mut [f32; LANES / 2]) {
        let [a, b, c, d] = self.0;
        // SAFETY: AVX2 is enabled; the reference covers the 16 numbers written.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), _mm256_add_ps(a, c));
            _mm256_storeu_ps(out.as_mut_ptr().add(8), _mm256_add_ps(b, d));
        }
    }
}
