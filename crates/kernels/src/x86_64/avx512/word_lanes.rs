//! [`WordLanes`] in two AVX-512 registers.
//!
//! SAFETY of every block here: [`Avx512Lanes`] is used only inside this folder's `#[target_feature]`
//! functions, which dispatch.rs reaches only after it has seen AVX-512F, BW and VNNI on this CPU; every load
//! and store goes through a reference to an array of exactly its width.

use super::{Avx512Lanes, Avx512Rows};
use crate::lanes::LANES;
use crate::word_lanes::WordLanes;
use std::arch::x86_64::*;

impl WordLanes for Avx512Lanes {
    type Words = [__m512i; 2];
    type Rows = Avx512Rows;
    /// With 2, the compiler would replace `vpdpwssd` by two instructions, to shorten the chain of sums.
    const UNROLLED: usize = 1;

    #[inline(always)]
    fn splat_word(word: i32) -> Self::Words {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { [_mm512_set1_epi32(word); 2] }
    }

    #[inline(always)]
    fn load_words(words: &[i32; LANES]) -> Self::Words {
        // SAFETY: AVX-512F is enabled; the reference covers the 32 words read.
        unsafe {
            let at = words.as_ptr();
            [_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(16).cast())]
        }
    }

    #[inline(always)]
    fn store_words(words: Self::Words, out: &mut [i32; LANES]) {
        // SAFETY: AVX-512F is enabled; the reference covers the 32 words written.
        unsafe {
            let at = out.as_mut_ptr();
            _mm512_storeu_si512(at.cast(), words[0]);
            _mm512_storeu_si512(at.add(16).cast(), words[1]);
        }
    }

    #[inline(always)]
    fn add_word_products(sums: Self::Words, a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: AVX-512 VNNI is enabled; see the top of this file.
        unsafe { [_mm512_dpwssd_epi32(sums[0], a[0], b[0]), _mm512_dpwssd_epi32(sums[1], a[1], b[1])] }
    }

    #[inline(always)]
    fn from_sums(sums: Self::Words) -> Self {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { Avx512Lanes(_mm512_cvtepi32_ps(sums[0]), _mm512_cvtepi32_ps(sums[1])) }
    }

    #[inline(always)]
    fn round_pairs(low: Self, high: Self) -> Self::Words {
        /// All odd 16-bit numbers.
        const ODD: u32 = 0xaaaa_aaaa;
        // SAFETY: AVX-512F and BW are enabled; see the top of this file.
        let pair = |low, high| unsafe {
            let (low, high) = (_mm512_cvtps_epi32(low), _mm512_cvtps_epi32(high));
            _mm512_mask_mov_epi16(low, ODD, _mm512_slli_epi32::<16>(high))
        };
        [pair(low.0, high.0), pair(low.1, high.1)]
    }

    #[inline(always)]
    fn round(self, words: &mut [i32; LANES / 2]) {
        // SAFETY: AVX-512F is enabled; the reference covers the 16 words written.
        unsafe {
            let at = words.as_mut_ptr();
            let round = |numbers| _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(numbers));
            _mm256_storeu_si256(at.cast(), round(self.0));
            _mm256_storeu_si256(at.add(8).cast(), round(self.1));
        }
    }

    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { Avx512Lanes(_mm512_abs_ps(self.0), _mm512_abs_ps(self.1)) }
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { Avx512Lanes(_mm512_sqrt_ps(self.0), _mm512_sqrt_ps(self.1)) }
    }

    #[inline(always)]
    fn inverse(self) -> Self {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe {
            let one = _mm512_set1_ps(1.0);
            Avx512Lanes(_mm512_div_ps(one, self.0), _mm512_div_ps(one, self.1))
        }
    }

    #[inline(always)]
    fn nearest(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe {
            let nearest = |numbers| _mm512_roundscale_ps::<NEAREST>(numbers);
            Avx512Lanes(nearest(self.0), nearest(self.1))
        }
    }

    #[inline(always)]
    fn times_two_to(self, n: Self) -> Self {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { Avx512Lanes(_mm512_scalef_ps(self.0, n.0), _mm512_scalef_ps(self.1, n.1)) }
    }

    #[inline(always)]
    fn largest_of_halves(self, out: &mut [f32; LANES / 2]) {
        // SAFETY: AVX-512F is enabled; the reference covers the 16 numbers written.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_max_ps(self.0, self.1)) }
    }

    #[inline(always)]
    fn sums_of_halves(self, out: &mut [f32; LANES / 2]) {
        // SAFETY: AVX-512F is enabled; the reference covers the 16 numbers written.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_add_ps(self.0, self.1)) }
    }
}
