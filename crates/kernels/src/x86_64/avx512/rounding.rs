//! Numbers of attention in 16 bits, see `attention.rs`.
//!
//! SAFETY of every block here: these functions are used only inside `attention.rs`, whose
//! `#[target_feature]` function enables AVX-512F and BW; every load and store goes through a reference to an
//! array of at least its width.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use crate::kv_block::KV_BLOCK_POSITIONS;
use std::arch::x86_64::*;

/// Columns of the microkernel: positions, or elements of values.
pub(super) const COLS: usize = 64;
/// Vectors of [`COLS`] columns.
pub(super) const VECTORS: usize = COLS / 16;
/// Words of a query's softmax weights for a KV block.
pub(super) const WEIGHT_WORDS: usize = KV_BLOCK_POSITIONS / 2;

const _: () = assert!(COLS == KV_BLOCK_POSITIONS);

/// The largest norm of a query and of a key. A score is at most the product of the norms, which leaves room
/// for rounding below 2^31.
const NORM: f32 = 46_000.0;
/// The largest sum of a query's softmax weights for a KV block. A weighted sum is at most this times the
/// largest value, which leaves room for rounding below 2^31.
pub(super) const WEIGHTS_SUM: f32 = 65_000.0;
/// The largest 16-bit number.
pub(super) const LARGEST: f32 = 32_767.0;
/// Numbers that are all smaller have the scale of this one, whose inverse is finite.
const SMALLEST: f32 = 1e-30;

/// [`COLS`] columns of a row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Row<T>(pub(super) [T; COLS]);

/// A KV block, rounded to 16 bits.
pub(super) struct RoundedKvBlock<'a> {
    pub(super) keys: &'a [Row<i32>],
    pub(super) key_scales: &'a Row<f32>,
    pub(super) values: &'a [Row<i32>],
    pub(super) value_scales: &'a [Row<f32>],
}

/// Rounds queries. Behind them come PADDING queries of zeros.
///
/// - `queries`: `(queries, head_dim)`
#[inline(always)]
pub(super) fn round_queries<const PADDING: usize>(
    queries: &[f32],
    head_dim: usize,
    words: &mut Vec<i32>,
    scales: &mut Vec<f32>,
) {
    words.clear();
    scales.clear();
    words.resize((queries.len() / head_dim + PADDING) * head_dim / 2, 0);
    for (query, words) in queries.chunks_exact(head_dim).zip(words.chunks_exact_mut(head_dim / 2)) {
        let vectors = query.as_chunks::<16>().0;
        // SAFETY: see the top of this file; there are as many halves of words as numbers.
        unsafe {
            let mut largest = _mm512_set1_ps(SMALLEST);
            // The sum is 0 if all numbers are finite, else NaN, which then goes into all scores.
            let mut not_finite = _mm512_setzero_ps();
            for numbers in vectors {
                let numbers = _mm512_loadu_ps(numbers.as_ptr());
                // The instruction returns its second operand if either is NaN.
                largest = _mm512_max_ps(_mm512_abs_ps(numbers), largest);
                not_finite = _mm512_fmadd_ps(numbers, _mm512_setzero_ps(), not_finite);
            }
            let largest = _mm512_reduce_max_ps(largest);
            let inverse = _mm512_set1_ps(1.0 / largest);
            let mut squares = _mm512_setzero_ps();
            for numbers in vectors {
                let numbers = _mm512_mul_ps(_mm512_loadu_ps(numbers.as_ptr()), inverse);
                squares = _mm512_fmadd_ps(numbers, numbers, squares);
            }
            let scale = LARGEST.min(NORM / _mm512_reduce_add_ps(squares).sqrt());
            let factor = _mm512_set1_ps(scale / largest);
            for (numbers, words) in vectors.iter().zip(words.as_chunks_mut::<8>().0) {
                let rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(numbers.as_ptr()), factor));
                _mm256_storeu_si256(words.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(rounded));
            }
            scales.push(largest / scale + _mm512_reduce_add_ps(not_finite));
        }
    }
}

/// Rounds two rows of numbers and interleaves them: the word of a column has the first row's number in its
/// low half.
#[inline(always)]
fn round_pair(rows: [&[f32; COLS]; 2], inverse_scales: &[__m512; VECTORS], words: &mut Row<i32>) {
    for v in 0..VECTORS {
        // SAFETY: see the top of this file; 16 numbers from 16 v on are inside the rows.
        unsafe {
            let round = |row: &[f32; COLS]| {
                let numbers = _mm512_loadu_ps(row.as_ptr().add(16 * v));
                _mm512_cvtps_epi32(_mm512_mul_ps(numbers, inverse_scales[v]))
            };
            let (low, high) = (round(rows[0]), round(rows[1]));
            /// All odd 16-bit numbers.
            const ODD: u32 = 0xaaaa_aaaa;
            let words_of_both = _mm512_mask_mov_epi16(low, ODD, _mm512_slli_epi32::<16>(high));
            _mm512_store_si512(words.0.as_mut_ptr().add(16 * v).cast(), words_of_both);
        }
    }
}

/// For [`COLS`] columns of a matrix, the largest magnitude and the sum of squares.
#[inline(always)]
fn measure<'a>(rows: impl Iterator<Item = &'a [f32; COLS]>) -> ([__m512; VECTORS], [__m512; VECTORS]) {
    // SAFETY: see the top of this file; 16 numbers from 16 v on are inside the row.
    unsafe {
        let mut largest = [_mm512_set1_ps(SMALLEST); VECTORS];
        let mut squares = [_mm512_setzero_ps(); VECTORS];
        for row in rows {
            for v in 0..VECTORS {
                let numbers = _mm512_loadu_ps(row.as_ptr().add(16 * v));
                largest[v] = _mm512_max_ps(largest[v], _mm512_abs_ps(numbers));
                squares[v] = _mm512_fmadd_ps(numbers, numbers, squares[v]);
            }
        }
        (largest, squares)
    }
}

/// Whether sums of squares are finite. Then all numbers are.
#[inline(always)]
fn are_finite(squares: &[__m512; VECTORS]) -> bool {
    // SAFETY: see the top of this file.
    unsafe {
        let infinity = _mm512_set1_ps(f32::INFINITY);
        squares.iter().all(|&squares| _mm512_cmplt_ps_mask(squares, infinity) == u16::MAX)
    }
}

/// Rounds a KV block's keys. Returns a scale for each position; None if a key is not finite.
#[inline(always)]
pub(super) fn round_keys(keys: &[[f32; COLS]], words: &mut Vec<Row<i32>>) -> Option<Row<f32>> {
    let (largest, squares) = measure(keys.iter());
    if !are_finite(&squares) {
        return None;
    }
    let mut scales = Row([0.0; COLS]);
    let mut inverse = largest;
    for v in 0..VECTORS {
        // SAFETY: see the top of this file; 16 numbers from 16 v on are inside the row.
        unsafe {
            let by_largest = _mm512_div_ps(_mm512_set1_ps(LARGEST), largest[v]);
            let by_norm = _mm512_div_ps(_mm512_set1_ps(NORM), _mm512_sqrt_ps(squares[v]));
            inverse[v] = _mm512_min_ps(by_largest, by_norm);
            let scale = _mm512_div_ps(_mm512_set1_ps(1.0), inverse[v]);
            _mm512_store_ps(scales.0.as_mut_ptr().add(16 * v), scale);
        }
    }
    words.resize(keys.len() / 2, Row([0; COLS]));
    for ([low, high], words) in keys.as_chunks().0.iter().zip(words) {
        round_pair([low, high], &inverse, words);
    }
    Some(scales)
}

/// Rounds a KV block's values. Returns false if a value is not finite.
#[inline(always)]
pub(super) fn round_values(
    values: &[f32],
    head_dim: usize,
    words: &mut Vec<Row<i32>>,
    scales: &mut Vec<Row<f32>>,
) -> bool {
    let parts = head_dim.div_ceil(COLS);
    words.resize(parts * WEIGHT_WORDS, Row([0; COLS]));
    scales.resize(parts, Row([0.0; COLS]));
    for (part, (words, scales)) in words.chunks_exact_mut(WEIGHT_WORDS).zip(scales).enumerate() {
        // The last part may be narrower.
        let mut narrow = [[0.0; COLS]; KV_BLOCK_POSITIONS];
        let (start, width) = (part * COLS, COLS.min(head_dim - part * COLS));
        let mut rows: [&[f32; COLS]; KV_BLOCK_POSITIONS] = [&[0.0; COLS]; KV_BLOCK_POSITIONS];
        for ((row, narrow), values) in rows.iter_mut().zip(&mut narrow).zip(values.chunks_exact(head_dim)) {
            *row = match values[start..].first_chunk() {
                Some(values) => values,
                None => {
                    narrow[..width].copy_from_slice(&values[start..]);
                    narrow
                }
            };
        }
        let (largest, squares) = measure(rows.into_iter());
        if !are_finite(&squares) {
            return false;
        }
        let mut inverse = largest;
        for v in 0..VECTORS {
            // SAFETY: see the top of this file; 16 numbers from 16 v on are inside the row.
            unsafe {
                inverse[v] = _mm512_div_ps(_mm512_set1_ps(LARGEST), largest[v]);
                let scale = _mm512_div_ps(largest[v], _mm512_set1_ps(LARGEST));
                _mm512_store_ps(scales.0.as_mut_ptr().add(16 * v), scale);
            }
        }
        for (rows, words) in rows.as_chunks().0.iter().zip(words) {
            round_pair(*rows, &inverse, words);
        }
    }
    true
}

/// Rounds a query's softmax weights for a KV block.
#[inline(always)]
pub(super) fn round_weights(numbers: &Row<f32>, inverse_scale: f32, words: &mut [i32; WEIGHT_WORDS]) {
    for v in 0..VECTORS {
        // SAFETY: see the top of this file; 16 numbers from 16 v on are inside the row, and there are as many
        // halves of words.
        unsafe {
            let numbers = _mm512_load_ps(numbers.0.as_ptr().add(16 * v));
            let rounded = _mm512_cvtps_epi32(_mm512_mul_ps(numbers, _mm512_set1_ps(inverse_scale)));
            _mm256_storeu_si256(words.as_mut_ptr().add(8 * v).cast(), _mm512_cvtepi32_epi16(rounded));
        }
    }
}
