//! [`Rows16`] in pairs of AVX2 registers, with 8 rows in each.
//!
//! SAFETY of every block here: [`Avx2Rows`] is used only inside the `#[target_feature]` functions of this
//! folder and of `avxvnni/`, which dispatch.rs reaches only after it has seen AVX2, FMA and F16C, and
//! AVX-VNNI for `Avx2Rows<true>`, on this CPU; every load and store goes through a reference to an array of
//! exactly its width.

use crate::prefetch::StreamPrefetch;
use crate::rows16::{PackedRows16, ROW_BYTES, Rows16};
use crate::tile::TILE_ROWS;
use crate::x86_64::prefetch::vnni_stream;
use std::arch::x86_64::*;

/// 16 rows. With `VNNI`, one instruction multiplies bytes and adds four products.
#[derive(Clone, Copy)]
pub(crate) struct Avx2Rows<const VNNI: bool>;

/// Sums in 32 bits, and, without VNNI, sums in 16 bits, two for each row.
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    wide: [__m256i; 2],
    narrow: [__m256i; 2],
}

type Floats = [__m256; 2];

// No closures here: one that is not inlined would be compiled without the ISA's instructions.

/// Shifts every byte. The shifts are of 16 bits, so the bits that leave one byte enter its neighbour. `count`
/// is a constant where it is called, so that one instruction remains.
#[inline(always)]
fn shift_right(bytes: __m256i, count: usize) -> __m256i {
    // SAFETY: AVX2 is enabled; see the top of this file.
    unsafe {
        match count {
            0 => bytes,
            1 => _mm256_srli_epi16::<1>(bytes),
            2 => _mm256_srli_epi16::<2>(bytes),
            3 => _mm256_srli_epi16::<3>(bytes),
            4 => _mm256_srli_epi16::<4>(bytes),
            5 => _mm256_srli_epi16::<5>(bytes),
            6 => _mm256_srli_epi16::<6>(bytes),
            _ => _mm256_srli_epi16::<7>(bytes),
        }
    }
}

/// Like [`shift_right`].
#[inline(always)]
fn shift_left(bytes: __m256i, count: usize) -> __m256i {
    // SAFETY: AVX2 is enabled; see the top of this file.
    unsafe {
        match count {
            0 => bytes,
            1 => _mm256_slli_epi16::<1>(bytes),
            2 => _mm256_slli_epi16::<2>(bytes),
            3 => _mm256_slli_epi16::<3>(bytes),
            4 => _mm256_slli_epi16::<4>(bytes),
            5 => _mm256_slli_epi16::<5>(bytes),
            6 => _mm256_slli_epi16::<6>(bytes),
            _ => _mm256_slli_epi16::<7>(bytes),
        }
    }
}

/// `sum` plus the products of 4 weights, which are stored 128 too large, and the bytes of `x`.
#[inline(always)]
fn add_signed(sum: __m256i, bytes: __m256i, x: __m256i) -> __m256i {
    // SAFETY: AVX2 is enabled; see the top of this file.
    unsafe {
        // `maddubs` takes unsigned weights, and would overflow if they were offset. So their sign moves to
        // the other factor. 2 * 128 * 127 fits into 16 bits.
        let weights = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

/// `sum` plus both 16-bit numbers of each pair.
#[inline(always)]
pub(super) fn add_pairs(sum: __m256i, narrow: __m256i) -> __m256i {
    // SAFETY: AVX2 is enabled; see the top of this file.
    unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1))) }
}

/// [`PackedRows16::scaled`] of sums in 32 bits.
#[inline(always)]
pub(super) fn scaled(wide: [__m256i; 2], scale: f32, offset: f32) -> Floats {
    // SAFETY: AVX2 and FMA are enabled; see the top of this file.
    unsafe {
        let (scale, offset) = (_mm256_set1_ps(scale), _mm256_set1_ps(offset));
        let [a, b] = [_mm256_castsi256_ps(wide[0]), _mm256_castsi256_ps(wide[1])];
        [_mm256_fmsub_ps(a, scale, offset), _mm256_fmsub_ps(b, scale, offset)]
    }
}

impl<const VNNI: bool> Rows16 for Avx2Rows<VNNI> {
    type Floats = Floats;

    #[inline(always)]
    fn splat(value: f32) -> Self::Floats {
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load(values: &[f32; TILE_ROWS]) -> Self::Floats {
        // SAFETY: AVX2 is enabled; the reference covers the 16 numbers read.
        unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn store(values: Self::Floats, out: &mut [f32; TILE_ROWS]) {
        // SAFETY: AVX2 is enabled; the reference covers the 16 numbers written.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), values[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), values[1]);
        }
    }

    #[inline(always)]
    fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: FMA is enabled; see the top of this file.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn dot_bf16(_a: Self::Floats, _b: Self::Floats, _c: Self::Floats) -> Self::Floats {
        unreachable!("this ISA's table has no products of bf16")
    }

    #[inline(always)]
    fn round_to_bf16(_numbers: &[f32; 2 * TILE_ROWS], _words: &mut [u32; TILE_ROWS]) {
        unreachable!("this ISA's table has no products of bf16")
    }

    #[inline(always)]
    fn transpose(rows: [&[u8; ROW_BYTES]; TILE_ROWS], out: &mut [[f32; TILE_ROWS]; TILE_ROWS]) {
        for lane in [0, 8] {
            for column in [0, 8] {
                transpose_8x8(&rows, lane, column, out);
            }
        }
    }
}

impl<const VNNI: bool> PackedRows16 for Avx2Rows<VNNI> {
    type Bytes = [__m256i; 2];
    type Sums = Sums;
    const REGISTERS: usize = 2;
    const SIGNED_OFFSET: i32 = if VNNI { 128 } else { 0 };
    const UNPACKS: bool = true;
    const UNPACKED_AS_STORED: bool = !VNNI;

    #[inline(always)]
    fn bytes<const M: usize>(bytes: &[u8; 64]) -> Self::Bytes {
        // SAFETY: AVX2 is enabled; the reference covers the 64 bytes read.
        unsafe {
            let at = bytes.as_ptr().cast::<__m256i>();
            [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))]
        }
    }

    #[inline(always)]
    fn store_bytes([a, b]: Self::Bytes, out: &mut [u8; 64]) {
        // SAFETY: AVX2 is enabled; the reference covers the 64 bytes written.
        unsafe {
            let at = out.as_mut_ptr().cast::<__m256i>();
            _mm256_storeu_si256(at, a);
            _mm256_storeu_si256(at.add(1), b);
        }
    }

    #[inline(always)]
    fn plus([a, b]: Self::Bytes, more: u8) -> Self::Bytes {
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe {
            let more = _mm256_set1_epi8(more as i8);
            [_mm256_add_epi8(a, more), _mm256_add_epi8(b, more)]
        }
    }

    #[inline(always)]
    fn bits([a, b]: Self::Bytes, shift: usize, mask: u8) -> Self::Bytes {
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe {
            let mask = _mm256_set1_epi8(mask as i8);
            [_mm256_and_si256(shift_right(a, shift), mask), _mm256_and_si256(shift_right(b, shift), mask)]
        }
    }

    #[inline(always)]
    fn with_bits([a, b]: Self::Bytes, plane: Self::Bytes, from: usize, to: usize, mask: u8) -> Self::Bytes {
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe {
            let mask = _mm256_set1_epi8(mask as i8);
            let [c, d] = if to > from {
                [shift_left(plane[0], to - from), shift_left(plane[1], to - from)]
            } else {
                [shift_right(plane[0], from - to), shift_right(plane[1], from - to)]
            };
            [_mm256_or_si256(a, _mm256_and_si256(c, mask)), _mm256_or_si256(b, _mm256_and_si256(d, mask))]
        }
    }

    #[inline(always)]
    fn lookup([a, b]: Self::Bytes, table: &[u8; 16]) -> Self::Bytes {
        // SAFETY: AVX2 is enabled; the reference covers the 16 bytes read.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            [_mm256_shuffle_epi8(table, a), _mm256_shuffle_epi8(table, b)]
        }
    }

    #[inline(always)]
    fn start(start: i32) -> Self::Sums {
        // SAFETY: AVX2 is enabled; see the top of this file.
        unsafe { Sums { wide: [_mm256_set1_epi32(start); 2], narrow: [_mm256_setzero_si256(); 2] } }
    }

    #[inline(always)]
    fn dot(
        mut sums: Self::Sums,
        register: usize,
        bytes: Self::Bytes,
        x: &[u32; 4],
        lane: usize,
    ) -> Self::Sums {
        // SAFETY: AVX2, and AVX-VNNI if `VNNI`, is enabled; see the top of this file.
        unsafe {
            let x = _mm256_set1_epi32(x[lane] as i32);
            if VNNI {
                sums.wide[register] = _mm256_dpbusd_avx_epi32(sums.wide[register], bytes[register], x);
            } else {
                // A pair of products is at most 2 * 63 * 127. Two of them fit into 16 bits, four if no byte
                // is above 31, eight if none is above 15.
                let pairs = _mm256_maddubs_epi16(bytes[register], x);
                sums.narrow[register] = _mm256_add_epi16(sums.narrow[register], pairs);
            }
        }
        sums
    }

    #[inline(always)]
    fn dot_signed(
        mut sums: Self::Sums,
        register: usize,
        bytes: Self::Bytes,
        x: &[u32; 4],
        lane: usize,
    ) -> Self::Sums {
        if VNNI {
            return Self::dot(sums, register, bytes, x, lane);
        }
        // SAFETY: AVX2 is enabled; see the top of this file.
        let x = unsafe { _mm256_set1_epi32(x[lane] as i32) };
        sums.wide[register] = add_signed(sums.wide[register], bytes[register], x);
        sums
    }

    #[inline(always)]
    fn fold(mut sums: Self::Sums, register: usize) -> Self::Sums {
        if !VNNI {
            sums.wide[register] = add_pairs(sums.wide[register], sums.narrow[register]);
            // SAFETY: AVX2 is enabled; see the top of this file.
            sums.narrow[register] = unsafe { _mm256_setzero_si256() };
        }
        sums
    }

    #[inline(always)]
    fn scaled(Sums { wide, .. }: Self::Sums, scale: f32, offset: f32) -> Self::Floats {
        scaled(wide, scale, offset)
    }

    #[inline(always)]
    fn stream_prefetch() -> StreamPrefetch {
        if VNNI { vnni_stream() } else { StreamPrefetch::into_l1(1536) }
    }

    #[inline(always)]
    fn halves(bytes: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
        // SAFETY: F16C is enabled; the reference covers the 2 x 16 bytes read.
        unsafe {
            let at = bytes.as_ptr().cast::<__m128i>();
            [_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at.add(1)))]
        }
    }

    #[inline(always)]
    fn unsigned(bytes: &[u8; TILE_ROWS]) -> Self::Floats {
        // SAFETY: AVX2 is enabled; the reference covers the 2 x 8 bytes read.
        unsafe {
            let at = bytes.as_ptr();
            let (a, b) = (_mm_loadl_epi64(at.cast()), _mm_loadl_epi64(at.add(8).cast()));
            [_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(a)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b))]
        }
    }

    #[inline(always)]
    fn signed(bytes: &[u8; TILE_ROWS]) -> Self::Floats {
        // SAFETY: AVX2 is enabled; the reference covers the 2 x 8 bytes read.
        unsafe {
            let at = bytes.as_ptr();
            let (a, b) = (_mm_loadl_epi64(at.cast()), _mm_loadl_epi64(at.add(8).cast()));
            [_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(a)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b))]
        }
    }
}

/// Transposes a quarter of [`Rows16::transpose`]: 8 rows from `lane` on and 8 words from `column` on.
///
/// Interleaves pairs of rows, then fours, then eights.
#[inline(always)]
fn transpose_8x8(
    rows: &[&[u8; ROW_BYTES]; TILE_ROWS],
    lane: usize,
    column: usize,
    out: &mut [[f32; TILE_ROWS]; TILE_ROWS],
) {
    let row = |i: usize| -> &[u8; 32] {
        rows[lane + i][4 * column..][..32].try_into().expect("the slice has this length")
    };
    let rows = [row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)];
    // SAFETY: AVX2 is enabled; every load and store goes through a slice of 8 numbers.
    unsafe {
        let mut a = [_mm256_setzero_ps(); 8];
        for i in 0..4 {
            let (x, y) = (rows[2 * i].as_ptr().cast(), rows[2 * i + 1].as_ptr().cast());
            let (x, y) = (_mm256_loadu_ps(x), _mm256_loadu_ps(y));
            (a[2 * i], a[2 * i + 1]) = (_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
        }
        for half in 0..2 {
            for i in 0..2 {
                // Columns 2i and 2i + 1. The upper half of the register has the columns that are 4 further.
                let (low, high) = (a[i], a[i + 2]);
                let (other_low, other_high) = (a[i + 4], a[i + 6]);
                let (x, y) = match half {
                    0 => (
                        _mm256_shuffle_ps::<0x44>(low, high),
                        _mm256_shuffle_ps::<0x44>(other_low, other_high),
                    ),
                    _ => (
                        _mm256_shuffle_ps::<0xee>(low, high),
                        _mm256_shuffle_ps::<0xee>(other_low, other_high),
                    ),
                };
                let column = column + 2 * i + half;
                let first = out[column][lane..][..8].as_mut_ptr();
                _mm256_storeu_ps(first, _mm256_permute2f128_ps::<0x20>(x, y));
                let second = out[column + 4][lane..][..8].as_mut_ptr();
                _mm256_storeu_ps(second, _mm256_permute2f128_ps::<0x31>(x, y));
            }
        }
    }
}
