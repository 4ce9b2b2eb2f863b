//! Converts numbers to words of two bf16, in the order of AMX tiles.
//!
//! SAFETY of every block here: these functions run only inside this folder's `#[target_feature]` functions,
//! which dispatch.rs reaches only after it has seen AVX-512F, BW and BF16 on this CPU; every load and store
//! goes through a reference to an array of exactly its width.

use super::tiles::{AMX_TILE_WORDS, AmxTileRow};
use crate::blocks::WeightType;
use crate::generic::dequantize::dequantize_exactly;
use crate::generic::storage::with_storage;
use crate::generic::strip::{Part, for_each_group};
use crate::generic::tile::Tile;
use crate::packable::{Packable, with_packable};
use crate::prefetch::prefetch_l1;
use crate::rows16::Rows16;
use crate::tile::{TILE_COLS, TILE_ROWS, bytes_at};
use crate::weight::{Weight, WeightRows};
use crate::x86_64::avx512::{Avx512Lanes, Avx512Rows};
use std::arch::x86_64::*;
use std::ops::Range;

/// Writes numbers as sums of two bf16 by truncating them to their upper halves. That is faster than
/// [`Rows16::round_to_bf16`] and [`subtract_bf16`], and slightly less precise.
#[inline(always)]
pub(super) fn truncate_to_bf16_pairs(
    x: &[f32; 2 * AMX_TILE_WORDS],
    upper: &mut AmxTileRow,
    lower: &mut AmxTileRow,
) {
    // SAFETY: see the top of this file.
    unsafe {
        let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16)));
        let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        let cut = |x| _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), mask));
        let (low_cut, high_cut) = (cut(low), cut(high));
        let words: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high_cut, low_cut));
        _mm512_store_si512(upper.0.as_mut_ptr().cast(), words);
        let left = _mm512_cvtne2ps_pbh(_mm512_sub_ps(high, high_cut), _mm512_sub_ps(low, low_cut));
        _mm512_store_si512(lower.0.as_mut_ptr().cast(), std::mem::transmute::<__m512bh, __m512i>(left));
    }
}

/// Subtracts from `x` what [`Rows16::round_to_bf16`] made of it. The differences are exact.
#[inline(always)]
pub(super) fn subtract_bf16(words: &[u32; AMX_TILE_WORDS], x: &mut [f32; 2 * AMX_TILE_WORDS]) {
    let (words, _) = words.as_chunks::<{ AMX_TILE_WORDS / 2 }>();
    for (x, words) in x.as_chunks_mut::<AMX_TILE_WORDS>().0.iter_mut().zip(words) {
        // SAFETY: see the top of this file.
        unsafe {
            let halves = _mm256_loadu_si256(words.as_ptr().cast());
            let rounded = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves));
            let left = _mm512_sub_ps(_mm512_loadu_ps(x.as_ptr()), _mm512_castsi512_ps(rounded));
            _mm512_storeu_ps(x.as_mut_ptr(), left);
        }
    }
}

/// A word for each lane: the lane of `even` in the low half, the lane of `odd` in the high half.
#[inline(always)]
fn interleave(even: __m512, odd: __m512) -> AmxTileRow {
    let mut tile_row = AmxTileRow::ZERO;
    // SAFETY: see the top of this file.
    unsafe {
        // `even`'s lanes are in the lower half of the register, `odd`'s in the upper half.
        let halves: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
        let order = _mm512_add_epi32(
            _mm512_set1_epi32(16 << 16),
            _mm512_mullo_epi32(
                _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                _mm512_set1_epi32(0x0001_0001),
            ),
        );
        _mm512_store_si512(tile_row.0.as_mut_ptr().cast(), _mm512_permutexvar_epi16(order, halves));
    }
    tile_row
}

/// [`interleave`] for numbers that are sums of two bf16: the rounded numbers, and their residuals.
#[inline(always)]
pub(super) fn interleave_bf16_pairs(even: &[f32; TILE_ROWS], odd: &[f32; TILE_ROWS]) -> [AmxTileRow; 2] {
    // SAFETY: see the top of this file.
    unsafe {
        let (even, odd) = (_mm512_loadu_ps(even.as_ptr()), _mm512_loadu_ps(odd.as_ptr()));
        let tile_row = interleave(even, odd);
        let words = _mm512_load_si512(tile_row.0.as_ptr().cast());
        let low = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words));
        let high = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
        [tile_row, interleave(_mm512_sub_ps(even, low), _mm512_sub_ps(odd, high))]
    }
}

/// Converts a part of a strip of weights, from tile `step` on. Where there are no rows or columns it writes
/// zeros. It is not inlined, because it contains code for all types, which takes long to compile.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
#[inline(never)]
pub(super) fn convert_strip(weight: Weight, strip: usize, step: usize, tile_rows: &mut [AmxTileRow]) {
    if strip * TILE_ROWS >= weight.rows() {
        return tile_rows.fill(AmxTileRow::ZERO);
    }
    match weight {
        Weight::Packed(packed) => {
            let tiles = packed.strip(strip);
            with_packable!(packed.dtype(), convert_tiles::<_>(tiles, step, tile_rows));
        }
        Weight::Rows(rows) => convert_rows(rows, strip, step, tile_rows),
    }
}

/// [`convert_strip`] for packed weights. A tile of 32 columns becomes 16 words.
#[inline(always)]
fn convert_tiles<P: Packable>(strip: &[u8], step: usize, tile_rows: &mut [AmxTileRow]) {
    let layout = const { P::LAYOUT };
    let (tile_rows, _) = tile_rows.as_chunks_mut::<AMX_TILE_WORDS>();
    for (index, tile_rows) in (step..strip.len() / layout.block_bytes() * layout.block_tiles).zip(tile_rows) {
        let tile = Tile::<P>::of_strip(strip, index);
        for half in 0..layout.scales {
            let scales = tile.scales::<Avx512Rows>(half);
            // The sum is rounded once, to the same number as in ggml's reference, because the product that
            // is rounded there is exact or has nothing added to it.
            let offsets = if layout.has_mins {
                tile.mins::<Avx512Rows>(half)
            } else {
                Avx512Rows::mul(scales, Avx512Rows::splat(-layout.zero_point as f32))
            };
            for_each_group!(Part { scales: layout.scales, half, joined: false }, GROUP, {
                let bytes = tile.group::<Avx512Rows, GROUP, 1>();
                let [a, b, c, d] =
                    columns(bytes).map(|numbers| Avx512Rows::mul_add(numbers, scales, offsets));
                tile_rows[2 * GROUP] = interleave(a, b);
                tile_rows[2 * GROUP + 1] = interleave(c, d);
            });
        }
    }
}

/// The four bytes of each lane, as floats.
#[inline(always)]
fn columns(bytes: __m512i) -> [__m512; 4] {
    // SAFETY: see the top of this file.
    unsafe {
        let mask = _mm512_set1_epi32(255);
        [
            _mm512_cvtepi32_ps(_mm512_and_si512(bytes, mask)),
            _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32::<8>(bytes), mask)),
            _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32::<16>(bytes), mask)),
            _mm512_cvtepi32_ps(_mm512_srli_epi32::<24>(bytes)),
        ]
    }
}

/// [`convert_strip`] for weights in their storage type.
#[inline(always)]
fn convert_rows(weight: WeightRows, strip: usize, step: usize, tile_rows: &mut [AmxTileRow]) {
    let (first, cols) = (strip * TILE_ROWS, weight.cols());
    let (steps, _) = tile_rows.as_chunks_mut::<AMX_TILE_WORDS>();
    let is_whole = first + TILE_ROWS <= weight.rows() && (step + steps.len()) * TILE_COLS <= cols;
    if weight.dtype() == WeightType::BF16 && is_whole {
        let rows: [&[u8]; TILE_ROWS] =
            std::array::from_fn(|row| &weight.row(first + row)[4 * AMX_TILE_WORDS * step..]);
        let next_strip = TILE_ROWS * weight.row(first).len();
        for (at, tile_rows) in steps.iter_mut().enumerate() {
            let rows = rows.map(|row| bytes_at(row, 4 * AMX_TILE_WORDS * at));
            // The rows of a strip's slab are short and far apart, so the processor's prefetcher does not
            // foresee the next strip.
            for row in rows {
                prefetch_l1(row.as_ptr().wrapping_add(next_strip));
            }
            transpose(rows, tile_rows);
        }
        return;
    }
    let mut rows = [[0_u32; AMX_TILE_WORDS * STEPS]; TILE_ROWS];
    for (at, steps) in steps.chunks_mut(STEPS).enumerate() {
        let start = TILE_COLS * (step + at * STEPS);
        let columns = start.min(cols)..(start + TILE_COLS * steps.len()).min(cols);
        for (row, words) in (first..weight.rows()).zip(&mut rows) {
            convert_row(weight, row, columns.clone(), &mut words[..AMX_TILE_WORDS * steps.len()]);
        }
        let rows: &[[u8; 4 * AMX_TILE_WORDS * STEPS]; TILE_ROWS] = bytemuck::cast_ref(&rows);
        for (at, tile_rows) in steps.iter_mut().enumerate() {
            transpose(rows.each_ref().map(|row| bytes_at(row, 4 * AMX_TILE_WORDS * at)), tile_rows);
        }
    }
}

/// AMX tiles of a row that are converted at once: 256 columns, which are whole blocks of every type.
const STEPS: usize = 8;

/// Converts a part of a row to words; zeros follow it.
#[inline(always)]
fn convert_row(weight: WeightRows, row: usize, columns: Range<usize>, words: &mut [u32]) {
    let dtype = weight.dtype();
    let at = |column: usize| column / dtype.block_len() * dtype.block_bytes();
    let bytes = &weight.row(row)[at(columns.start)..at(columns.end)];
    if dtype == WeightType::BF16 {
        let out: &mut [u8] = bytemuck::cast_slice_mut(words);
        out[..bytes.len()].copy_from_slice(bytes);
        out[bytes.len()..].fill(0);
        return;
    }
    let mut numbers = [0.0; TILE_COLS * STEPS];
    with_storage!(dtype, dequantize_exactly::<Avx512Lanes>(bytes, &mut numbers[..columns.len()]));
    for (numbers, words) in numbers.as_chunks::<TILE_COLS>().0.iter().zip(words.as_chunks_mut().0) {
        Avx512Rows::round_to_bf16(numbers, words);
    }
}

/// Transposes 16 words of 16 rows.
///
/// Each of four registers takes a quarter of the words of rows `i`, `4 + i`, `8 + i` and `12 + i`, so that
/// only groups of four words have to be interleaved.
#[inline(always)]
fn transpose(rows: [&[u8; 4 * AMX_TILE_WORDS]; TILE_ROWS], tile_rows: &mut [AmxTileRow; AMX_TILE_WORDS]) {
    for quarter in 0..4 {
        // SAFETY: see the top of this file; a quarter is 16 of a row's 64 bytes.
        unsafe {
            let load = |row: usize| _mm_loadu_si128(rows[row].as_ptr().cast::<__m128i>().add(quarter));
            let fours = |i: usize| {
                let pair = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(load(i)), load(4 + i));
                _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(pair, load(8 + i)), load(12 + i))
            };
            let (a, b, c, d) = (fours(0), fours(1), fours(2), fours(3));
            let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            let transposed = [
                _mm512_unpacklo_epi64(ab, cd),
                _mm512_unpackhi_epi64(ab, cd),
                _mm512_unpacklo_epi64(ab_high, cd_high),
                _mm512_unpackhi_epi64(ab_high, cd_high),
            ];
            for (tile_row, transposed) in tile_rows[4 * quarter..][..4].iter_mut().zip(transposed) {
                _mm512_store_si512(tile_row.0.as_mut_ptr().cast(), transposed);
            }
        }
    }
}
