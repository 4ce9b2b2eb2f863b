//! What AVX2 and AVX-512 have in common: 16-byte vectors, and sums of 8 floats.

use std::arch::x86_64::*;

/// 32 bytes as two vectors.
#[inline(always)]
pub(super) fn bytes(bytes: &[u8; 32]) -> (__m128i, __m128i) {
    // SAFETY: SSE2 is part of x86-64; the reference covers the 32 bytes read.
    unsafe { (_mm_loadu_si128(bytes.as_ptr().cast()), _mm_loadu_si128(bytes.as_ptr().add(16).cast())) }
}

/// The low and the high nibbles of 16 bytes.
#[inline(always)]
pub(super) fn nibbles(bytes: &[u8; 16]) -> (__m128i, __m128i) {
    // SAFETY: SSE2 is part of x86-64; the reference covers the 16 bytes read.
    unsafe {
        let packed = _mm_loadu_si128(bytes.as_ptr().cast());
        let mask = _mm_set1_epi8(0x0f);
        (_mm_and_si128(packed, mask), _mm_and_si128(_mm_srli_epi16::<4>(packed), mask))
    }
}

/// The sum of 8 lanes, halving: lanes i and i + 4, then i + 2, then i + 1.
#[inline(always)]
pub(super) fn sum_of_8(eight: __m256) -> f32 {
    // SAFETY: only the lanes of AVX2 and AVX-512 call this, where AVX is enabled.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}
