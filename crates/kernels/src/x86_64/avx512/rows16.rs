//! [`Rows16`] in one AVX-512 register.
//!
//! SAFETY of every block here: [`Avx512Rows`] is used only inside the `#[target_feature]` functions of this
//! folder and of `amx/`, which dispatch.rs reaches only after it has seen AVX-512F, BW and VNNI on this CPU;
//! every load and store goes through a reference to an array of exactly its width.

use crate::prefetch::StreamPrefetch;
use crate::rows16::{PackedRows16, ROW_BYTES, Rows16};
use crate::tile::TILE_ROWS;
use crate::x86_64::prefetch::vnni_stream;
use std::arch::x86_64::*;

/// 16 rows.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Rows;

impl Rows16 for Avx512Rows {
    type Floats = __m512;

    #[inline(always)]
    fn splat(value: f32) -> Self::Floats {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(values: &[f32; TILE_ROWS]) -> Self::Floats {
        // SAFETY: AVX-512F is enabled; the reference covers the 16 numbers read.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn store(values: Self::Floats, out: &mut [f32; TILE_ROWS]) {
        // SAFETY: AVX-512F is enabled; the reference covers the 16 numbers written.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) }
    }

    #[inline(always)]
    fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn dot_bf16(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: AVX-512 BF16 is enabled: dispatch.rs reaches such products only after it has seen it. The
        // three types are 512 bits, and every pattern of them is valid.
        unsafe {
            let (a, b) =
                (std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b));
            _mm512_dpbf16_ps(c, a, b)
        }
    }

    #[inline(always)]
    fn round_to_bf16(numbers: &[f32; 2 * TILE_ROWS], words: &mut [u32; TILE_ROWS]) {
        // SAFETY: AVX-512 BF16 is enabled, as in `dot_bf16`; the references cover what is read and written.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(numbers.as_ptr()), _mm512_loadu_ps(numbers.as_ptr().add(16)));
            let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(words.as_mut_ptr().cast(), rounded);
        }
    }

    /// Interleaves pairs of rows, then fours; then collects the quarters of registers.
    #[inline(always)]
    fn transpose(rows: [&[u8; ROW_BYTES]; TILE_ROWS], out: &mut [[f32; TILE_ROWS]; TILE_ROWS]) {
        // SAFETY: AVX-512F is enabled; the references cover the 64 bytes of each load and store.
        unsafe {
            let mut pairs = [_mm512_setzero_si512(); TILE_ROWS];
            for i in 0..TILE_ROWS / 2 {
                let first = _mm512_loadu_si512(rows[2 * i].as_ptr().cast());
                let second = _mm512_loadu_si512(rows[2 * i + 1].as_ptr().cast());
                pairs[2 * i] = _mm512_unpacklo_epi32(first, second);
                pairs[2 * i + 1] = _mm512_unpackhi_epi32(first, second);
            }
            // Quarter q of `fours[k][i]` has word 4 q + k of rows 4 i to 4 i + 3.
            let mut fours = [[_mm512_setzero_si512(); 4]; 4];
            for i in 0..4 {
                for half in 0..2 {
                    let (first, second) = (pairs[4 * i + half], pairs[4 * i + 2 + half]);
                    fours[2 * half][i] = _mm512_unpacklo_epi64(first, second);
                    fours[2 * half + 1][i] = _mm512_unpackhi_epi64(first, second);
                }
            }
            /// The even quarters of two registers, and the odd ones.
            const EVEN: i32 = 0b10_00_10_00;
            const ODD: i32 = 0b11_01_11_01;
            for (k, [a, b, c, d]) in fours.into_iter().enumerate() {
                let even = [_mm512_shuffle_i32x4::<EVEN>(a, b), _mm512_shuffle_i32x4::<EVEN>(c, d)];
                let odd = [_mm512_shuffle_i32x4::<ODD>(a, b), _mm512_shuffle_i32x4::<ODD>(c, d)];
                for (column, [low, high]) in [(k, even), (4 + k, odd)] {
                    let words = _mm512_shuffle_i32x4::<EVEN>(low, high);
                    _mm512_storeu_si512(out[column].as_mut_ptr().cast(), words);
                    let words = _mm512_shuffle_i32x4::<ODD>(low, high);
                    _mm512_storeu_si512(out[8 + column].as_mut_ptr().cast(), words);
                }
            }
        }
    }
}

/// Shifts every byte. The shifts are of 16 bits, so the bits that leave one byte enter its neighbour. `count`
/// is a constant where it is called, so that one instruction remains.
#[inline(always)]
fn shift_right(bytes: __m512i, count: usize) -> __m512i {
    // SAFETY: AVX-512BW is enabled; see the top of this file.
    unsafe {
        match count {
            0 => bytes,
            1 => _mm512_srli_epi16::<1>(bytes),
            2 => _mm512_srli_epi16::<2>(bytes),
            3 => _mm512_srli_epi16::<3>(bytes),
            4 => _mm512_srli_epi16::<4>(bytes),
            5 => _mm512_srli_epi16::<5>(bytes),
            6 => _mm512_srli_epi16::<6>(bytes),
            _ => _mm512_srli_epi16::<7>(bytes),
        }
    }
}

/// Like [`shift_right`].
#[inline(always)]
fn shift_left(bytes: __m512i, count: usize) -> __m512i {
    // SAFETY: AVX-512BW is enabled; see the top of this file.
    unsafe {
        match count {
            0 => bytes,
            1 => _mm512_slli_epi16::<1>(bytes),
            2 => _mm512_slli_epi16::<2>(bytes),
            3 => _mm512_slli_epi16::<3>(bytes),
            4 => _mm512_slli_epi16::<4>(bytes),
            5 => _mm512_slli_epi16::<5>(bytes),
            6 => _mm512_slli_epi16::<6>(bytes),
            _ => _mm512_slli_epi16::<7>(bytes),
        }
    }
}

impl PackedRows16 for Avx512Rows {
    type Bytes = __m512i;
    type Sums = __m512i;
    const REGISTERS: usize = 1;
    const SIGNED_OFFSET: i32 = 128;
    const UNPACKS: bool = true;

    #[inline(always)]
    fn bytes<const M: usize>(bytes: &[u8; 64]) -> Self::Bytes {
        // SAFETY: AVX-512F is enabled; the reference covers the 64 bytes read.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_bytes(bytes: Self::Bytes, out: &mut [u8; 64]) {
        // SAFETY: AVX-512F is enabled; the reference covers the 64 bytes written.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), bytes) }
    }

    #[inline(always)]
    fn plus(bytes: Self::Bytes, more: u8) -> Self::Bytes {
        // SAFETY: AVX-512BW is enabled; see the top of this file.
        unsafe { _mm512_add_epi8(bytes, _mm512_set1_epi8(more as i8)) }
    }

    #[inline(always)]
    fn bits(bytes: Self::Bytes, shift: usize, mask: u8) -> Self::Bytes {
        // SAFETY: AVX-512F and BW are enabled; see the top of this file.
        unsafe { _mm512_and_si512(shift_right(bytes, shift), _mm512_set1_epi8(mask as i8)) }
    }

    #[inline(always)]
    fn with_bits(bytes: Self::Bytes, plane: Self::Bytes, from: usize, to: usize, mask: u8) -> Self::Bytes {
        // SAFETY: AVX-512F and BW are enabled; see the top of this file.
        unsafe {
            let shifted =
                if to > from { shift_left(plane, to - from) } else { shift_right(plane, from - to) };
            // bytes | (shifted & mask)
            const OR_AND: i32 = 0b1111_1000;
            _mm512_ternarylogic_epi32::<OR_AND>(bytes, shifted, _mm512_set1_epi8(mask as i8))
        }
    }

    #[inline(always)]
    fn lookup(bytes: Self::Bytes, table: &[u8; 16]) -> Self::Bytes {
        // SAFETY: AVX-512F and BW are enabled; the reference covers the 16 bytes read.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, bytes)
        }
    }

    #[inline(always)]
    fn start(start: i32) -> Self::Sums {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { _mm512_set1_epi32(start) }
    }

    #[inline(always)]
    fn dot(sums: Self::Sums, _register: usize, bytes: Self::Bytes, x: &[u32; 4], lane: usize) -> Self::Sums {
        // SAFETY: AVX-512 VNNI is enabled; see the top of this file.
        unsafe { _mm512_dpbusd_epi32(sums, bytes, _mm512_set1_epi32(x[lane] as i32)) }
    }

    #[inline(always)]
    fn dot_signed(
        sums: Self::Sums,
        register: usize,
        bytes: Self::Bytes,
        x: &[u32; 4],
        lane: usize,
    ) -> Self::Sums {
        Self::dot(sums, register, bytes, x, lane)
    }

    #[inline(always)]
    fn fold(sums: Self::Sums, _register: usize) -> Self::Sums {
        sums
    }

    #[inline(always)]
    fn scaled(sums: Self::Sums, scale: f32, offset: f32) -> Self::Floats {
        // SAFETY: AVX-512F is enabled; see the top of this file.
        unsafe { _mm512_fmsub_ps(_mm512_castsi512_ps(sums), _mm512_set1_ps(scale), _mm512_set1_ps(offset)) }
    }

    #[inline(always)]
    fn stream_prefetch() -> StreamPrefetch {
        vnni_stream()
    }

    #[inline(always)]
    fn halves(bytes: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
        // SAFETY: AVX-512F is enabled; the reference covers the 32 bytes read.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn unsigned(bytes: &[u8; TILE_ROWS]) -> Self::Floats {
        // SAFETY: AVX-512F is enabled; the reference covers the 16 bytes read.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn signed(bytes: &[u8; TILE_ROWS]) -> Self::Floats {
        // SAFETY: AVX-512F is enabled; the reference covers the 16 bytes read.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()))) }
    }
}
