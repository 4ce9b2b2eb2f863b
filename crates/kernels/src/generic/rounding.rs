//! Numbers of attention in 16 bits, see `attention_bits16.rs`.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use crate::kv_block::KV_BLOCK_POSITIONS;
use crate::lanes::LANES;
use crate::word_lanes::WordLanes;

/// Columns of a row: positions, or elements of values.
pub(super) const COLS: usize = 64;
/// Vectors of [`COLS`] columns.
pub(super) const VECTORS: usize = COLS / LANES;
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
pub(super) struct Row<T>(pub(super) [[T; LANES]; VECTORS]);

impl<T: Copy + Default> Default for Row<T> {
    fn default() -> Self {
        Row([[T::default(); LANES]; VECTORS])
    }
}

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
pub(super) fn round_queries<L: WordLanes, const PADDING: usize>(
    queries: &[f32],
    head_dim: usize,
    words: &mut Vec<i32>,
    scales: &mut Vec<f32>,
) {
    words.clear();
    scales.clear();
    words.resize((queries.len() / head_dim + PADDING) * head_dim / 2, 0);
    for (query, words) in queries.chunks_exact(head_dim).zip(words.chunks_exact_mut(head_dim / 2)) {
        let vectors = query.as_chunks().0;
        let mut largest = L::splat(SMALLEST);
        // The sum is 0 if all numbers are finite, else NaN, which then goes into all scores.
        let mut not_finite = L::splat(0.0);
        for numbers in vectors {
            let numbers = L::load(numbers);
            // NaN is not the largest.
            largest = largest.max(numbers.abs());
            not_finite = numbers.mul_add(L::splat(0.0), not_finite);
        }
        let largest = largest.largest();
        let inverse = L::splat(1.0 / largest);
        let mut squares = L::splat(0.0);
        for numbers in vectors {
            let numbers = L::load(numbers).mul(inverse);
            squares = numbers.mul_add(numbers, squares);
        }
        let scale = LARGEST.min(NORM / squares.sum().sqrt());
        let factor = L::splat(scale / largest);
        for (numbers, words) in vectors.iter().zip(words.as_chunks_mut().0) {
            L::load(numbers).mul(factor).round(words);
        }
        scales.push(largest / scale + not_finite.sum());
    }
}

/// Rounds two rows of numbers and interleaves them: the word of a column has the first row's number in its
/// low half.
#[inline(always)]
fn round_pair<L: WordLanes>(
    [low, high]: [&[f32; COLS]; 2],
    inverse_scales: &[L; VECTORS],
    words: &mut Row<i32>,
) {
    let (low, high) = (low.as_chunks().0, high.as_chunks().0);
    for v in 0..VECTORS {
        let round = |numbers: &[f32; LANES]| L::load(numbers).mul(inverse_scales[v]);
        L::store_words(L::round_pairs(round(&low[v]), round(&high[v])), &mut words.0[v]);
    }
}

/// For [`COLS`] columns of a matrix, the largest magnitude and the sum of squares.
#[inline(always)]
fn measure<'a, L: WordLanes>(rows: impl Iterator<Item = &'a [f32; COLS]>) -> ([L; VECTORS], [L; VECTORS]) {
    let mut largest = [L::splat(SMALLEST); VECTORS];
    let mut squares = [L::splat(0.0); VECTORS];
    for row in rows {
        let row = row.as_chunks().0;
        for v in 0..VECTORS {
            let numbers = L::load(&row[v]);
            largest[v] = largest[v].max(numbers.abs());
            squares[v] = numbers.mul_add(numbers, squares[v]);
        }
    }
    (largest, squares)
}

/// Whether sums of squares are finite. Then all numbers are.
#[inline(always)]
fn are_finite<L: WordLanes>(squares: &[L; VECTORS]) -> bool {
    let mut zero = L::splat(0.0);
    for v in 0..VECTORS {
        // Infinity times 0 is NaN.
        zero = squares[v].mul_add(L::splat(0.0), zero);
    }
    zero.sum() == 0.0
}

/// Rounds a KV block's keys. Returns a scale for each position; None if a key is not finite.
#[inline(always)]
pub(super) fn round_keys<L: WordLanes>(keys: &[[f32; COLS]], words: &mut Vec<Row<i32>>) -> Option<Row<f32>> {
    let (largest, squares) = measure::<L>(keys.iter());
    if !are_finite(&squares) {
        return None;
    }
    let mut scales = Row::default();
    let mut inverse = largest;
    for v in 0..VECTORS {
        let by_norm = squares[v].sqrt().mul(L::splat(1.0 / NORM));
        let scale = largest[v].mul(L::splat(1.0 / LARGEST)).max(by_norm);
        scale.store(&mut scales.0[v]);
        inverse[v] = scale.inverse();
    }
    words.resize(keys.len() / 2, Row::default());
    for ([low, high], words) in keys.as_chunks().0.iter().zip(words) {
        round_pair([low, high], &inverse, words);
    }
    Some(scales)
}

/// Rounds a KV block's values. Returns false if a value is not finite.
#[inline(always)]
pub(super) fn round_values<L: WordLanes>(
    values: &[f32],
    head_dim: usize,
    words: &mut Vec<Row<i32>>,
    scales: &mut Vec<Row<f32>>,
) -> bool {
    let parts = head_dim.div_ceil(COLS);
    words.resize(parts * WEIGHT_WORDS, Row::default());
    scales.resize(parts, Row::default());
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
        let (largest, squares) = measure::<L>(rows.into_iter());
        if !are_finite(&squares) {
            return false;
        }
        let mut inverse = largest;
        for v in 0..VECTORS {
            let scale = largest[v].mul(L::splat(1.0 / LARGEST));
            scale.store(&mut scales.0[v]);
            inverse[v] = scale.inverse();
        }
        for (rows, words) in rows.as_chunks().0.iter().zip(words) {
            round_pair(*rows, &inverse, words);
        }
    }
    true
}

/// Rounds a query's softmax weights for a KV block.
#[inline(always)]
pub(super) fn round_weights<L: WordLanes>(
    numbers: &Row<f32>,
    inverse_scale: f32,
    words: &mut [i32; WEIGHT_WORDS],
) {
    for (numbers, words) in numbers.0.iter().zip(words.as_chunks_mut().0) {
        L::load(numbers).mul(L::splat(inverse_scale)).round(words);
    }
}
