//! Attention of prompts in 16-bit integers.
//!
//! Computes the same as `attention.rs`, KV block by KV block. Instructions for 16-bit integers do twice as
//! many operations as FMA. Every query, every position's key and every column of a KV block's values has an
//! f32 scale, and its numbers are rounded to 16 bits. The error is smaller than that of rounding keys and
//! values to f16. Sums of products are exact: scales are chosen so that 32 bits do not overflow.
//!
//! The scale of a column of values depends on all positions of its KV block. So a row that does not see the
//! whole block, which is each row's last block, computes that block in f32. So does every row if the block
//! has a number that is not finite.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use super::attention::{AttentionOutput, AttentionTask, Queries, SeenKvBlock, dequantize_kv_block};
use super::elementwise::exp_of_negative;
use super::partial_attention::PartialAttention;
use super::rounding::{
    LARGEST, RoundedKvBlock, Row, VECTORS, WEIGHT_WORDS, WEIGHTS_SUM, round_keys, round_queries,
    round_values, round_weights,
};
use crate::attention::MAX_TASK_QUERIES;
use crate::kv_block::KV_BLOCK_POSITIONS;
use crate::lanes::LANES;
use crate::prefetch::prefetch_l2;
use crate::rows16::Rows16;
use crate::word_lanes::WordLanes;
use std::cell::Cell;
use std::ops::{Range, RangeInclusive};

/// Queries of one task. Rounding a KV block costs time, so many queries have to share it.
pub(crate) const TASK_QUERIES: RangeInclusive<usize> = 96..=MAX_TASK_QUERIES;
/// Queries whose softmax is computed together, one in each lane.
const BATCH: usize = LANES / 2;

/// Whether [`attention`] takes this head_dim.
pub(crate) fn takes(head_dim: usize) -> bool {
    head_dim.is_multiple_of(LANES)
}

/// Buffers that are kept between tasks. A word is two neighbouring 16-bit numbers.
#[derive(Default)]
struct Scratch {
    /// A KV block in f32: keys `(head_dim, KV_BLOCK_POSITIONS)`, values `(KV_BLOCK_POSITIONS, head_dim)`.
    keys: Vec<[f32; LANES]>,
    values: Vec<[f32; LANES]>,
    /// `(head_dim / 2)`: words of two elements, a column for each position.
    key_words: Vec<Row<i32>>,
    /// `(head_dim / COLS, KV_BLOCK_POSITIONS / 2)`: words of two positions, a column for each element.
    /// Columns beyond head_dim are not used.
    value_words: Vec<Row<i32>>,
    /// One row for each part of `value_words`.
    value_scales: Vec<Row<f32>>,
    /// `(queries, head_dim / 2)`, and zeros for the last call of the microkernel.
    query_words: Vec<i32>,
    query_scales: Vec<f32>,
    queries: Queries,
    total: PartialAttention,
    batch: Batch,
}

/// Intermediate results of a batch of queries. They are kept, because zeroing them would take time.
#[derive(Default)]
struct Batch {
    /// Scores, then softmax weights.
    numbers: [Row<f32>; BATCH],
    /// For each query, the largest numbers of its lanes, then the sums.
    vectors: [[f32; BATCH]; BATCH],
    /// Rounded softmax weights.
    weights: [[i32; WEIGHT_WORDS]; BATCH],
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Runs one task: all units of its rows, or one. BATCH is a multiple of `QUERIES`.
///
/// - `attend_in_f32`: [`attend_kv_block`](super::attention::attend_kv_block) for f32
/// - `QUERIES`, `WIDTH`: queries and vectors of the microkernel
#[inline(always)]
pub(crate) fn attention<L: WordLanes, const QUERIES: usize, const WIDTH: usize>(
    task: &AttentionTask,
    attend_in_f32: impl Fn(&mut Queries, SeenKvBlock),
) {
    // Taken out instead of borrowed in a closure: see [`take_buffer`](super::matmul::take_buffer).
    let mut scratch = SCRATCH.take();
    attention_with::<L, QUERIES, WIDTH>(task, &mut scratch, &attend_in_f32);
    SCRATCH.set(scratch);
}

#[inline(always)]
fn attention_with<L: WordLanes, const QUERIES: usize, const WIDTH: usize>(
    task: &AttentionTask,
    scratch: &mut Scratch,
    attend_in_f32: &impl Fn(&mut Queries, SeenKvBlock),
) {
    let head_dim = task.head_dim;
    scratch.queries.scale(task);
    let scaled = &scratch.queries.scaled;
    round_queries::<L, QUERIES>(scaled, head_dim, &mut scratch.query_words, &mut scratch.query_scales);
    scratch.total.clear(task.rows.len() * task.group(), head_dim.div_ceil(LANES));
    for unit in task.units() {
        attend_unit::<L, QUERIES, WIDTH>(task, scratch, unit, attend_in_f32);
        task.keep_unit(unit, &mut scratch.queries.unit, &mut scratch.total);
    }
    if let AttentionOutput::Rows(out) = task.output {
        scratch.total.write_rows(task, out);
    }
}

/// Computes one unit's part of the attention; it goes to `scratch.queries.unit`.
#[inline(always)]
fn attend_unit<L: WordLanes, const QUERIES: usize, const WIDTH: usize>(
    task: &AttentionTask,
    scratch: &mut Scratch,
    unit: usize,
    attend_in_f32: &impl Fn(&mut Queries, SeenKvBlock),
) {
    let Scratch { keys, values, queries, .. } = scratch;
    let (head_dim, count) = (task.head_dim, task.rows.len() * task.group());
    queries.clear(task);
    for index in task.kv_blocks_of(unit) {
        let (block, first) = (&task.kv_blocks[index], index * KV_BLOCK_POSITIONS);
        dequantize_kv_block::<L>(task, block, keys, values);
        // Queries before these do not see the whole block.
        let mut full = task.first_query_seeing(first + KV_BLOCK_POSITIONS - 1);
        if full < count {
            let key_scales = round_keys::<L>(keys.as_flattened().as_chunks().0, &mut scratch.key_words);
            let is_finite = round_values::<L>(
                values.as_flattened(),
                head_dim,
                &mut scratch.value_words,
                &mut scratch.value_scales,
            );
            match key_scales.filter(|_| is_finite) {
                Some(key_scales) => {
                    let block = RoundedKvBlock {
                        keys: &scratch.key_words,
                        key_scales: &key_scales,
                        values: &scratch.value_words,
                        value_scales: &scratch.value_scales,
                    };
                    let batches = (count - full).div_ceil(BATCH);
                    for (number, start) in (full..count).step_by(BATCH).enumerate() {
                        prefetch_part(task, index + 1, number, batches);
                        let batch = start..count.min(start + BATCH);
                        let (words, scales) = (&scratch.query_words, &scratch.query_scales);
                        attend::<L, QUERIES, WIDTH>(
                            &block,
                            words,
                            scales,
                            head_dim,
                            queries,
                            batch,
                            &mut scratch.batch,
                        );
                    }
                }
                None => full = count,
            }
        }
        let in_f32 = task.first_query_seeing(first)..full;
        if !in_f32.is_empty() {
            let (keys, values) = (bytemuck::cast_slice(keys), bytemuck::cast_slice(values));
            // Numbers in f32 are not prefetched, so what follows does not matter.
            let bytes = [keys, values, keys, values];
            attend_in_f32(queries, SeenKvBlock { seen_by: in_f32, first, bytes });
        }
    }
}

/// Prefetches one of `parts` parts of a KV block, if it exists.
#[inline(always)]
fn prefetch_part(task: &AttentionTask, index: usize, part: usize, parts: usize) {
    let Some(block) = task.kv_blocks.get(index) else { return };
    for bytes in [block.keys(task.kv_head, task.kv_heads), block.values(task.kv_head, task.kv_heads)] {
        for line in bytes[bytes.len() * part / parts..bytes.len() * (part + 1) / parts].chunks(64) {
            prefetch_l2(line.as_ptr());
        }
    }
}

/// Sums of products of `QUERIES` rows of `x` and all rows of `words`, for `WIDTH` vectors of columns from
/// `first` on.
///
/// - `x`: `(QUERIES, words.len())`, `stride` apart
#[inline(always)]
fn dot<L: WordLanes, const QUERIES: usize, const WIDTH: usize>(
    x: &[i32],
    stride: usize,
    words: &[Row<i32>],
    first: usize,
) -> [[L::Words; WIDTH]; QUERIES] {
    let mut rows: [&[i32]; QUERIES] = [&[]; QUERIES];
    for i in 0..QUERIES {
        rows[i] = &x[i * stride..][..words.len()];
    }
    let mut sums = [[L::splat_word(0); WIDTH]; QUERIES];
    for (step, words) in words.chunks_exact(L::UNROLLED).enumerate() {
        for k in 0..L::UNROLLED {
            let mut columns = [L::splat_word(0); WIDTH];
            for v in 0..WIDTH {
                columns[v] = L::load_words(&words[k].0[first + v]);
            }
            for i in 0..QUERIES {
                // SAFETY: every row of x has as many words as there are rows of words.
                let word = L::splat_word(unsafe { *rows[i].get_unchecked(step * L::UNROLLED + k) });
                for v in 0..WIDTH {
                    sums[i][v] = L::add_word_products(sums[i][v], columns[v], word);
                }
            }
        }
    }
    sums
}

/// Attends to one KV block, which all queries of the batch see as a whole.
#[inline(always)]
fn attend<L: WordLanes, const QUERIES: usize, const WIDTH: usize>(
    block: &RoundedKvBlock,
    query_words: &[i32],
    query_scales: &[f32],
    head_dim: usize,
    queries: &mut Queries,
    batch: Range<usize>,
    buffers: &mut Batch,
) {
    let row_words = head_dim / 2;
    let Batch { numbers, vectors, weights } = buffers;
    for start in (0..batch.len()).step_by(QUERIES) {
        let words = &query_words[(batch.start + start) * row_words..];
        for first in (0..VECTORS).step_by(WIDTH) {
            let sums = dot::<L, QUERIES, WIDTH>(words, row_words, block.keys, first);
            for i in 0..QUERIES {
                for v in 0..WIDTH {
                    let scale = L::load(&block.key_scales.0[first + v]);
                    L::from_sums(sums[i][v]).mul(scale).store(&mut numbers[start + i].0[first + v]);
                }
            }
        }
    }
    for (numbers, largest) in numbers[..batch.len()].iter().zip(&mut *vectors) {
        let [low, high] = numbers.0.each_ref().map(L::load);
        low.max(high).largest_of_halves(largest);
    }

    let largest = across::<L::Rows>(vectors, |a, b| if a > b { a } else { b });
    let (mut scales, mut before, mut after) = ([0.0; BATCH], [0.0; BATCH], [0.0; BATCH]);
    scales[..batch.len()].copy_from_slice(&query_scales[batch.clone()]);
    before[..batch.len()].copy_from_slice(&queries.unit.maximum[batch.clone()]);
    // The factors of the earlier sums, and those of this block's sums: the maximum has changed.
    let mut factors = [[0.0; BATCH]; 2];
    for i in 0..BATCH {
        let maximum = largest[i] * scales[i];
        after[i] = if maximum > before[i] { maximum } else { before[i] };
        factors[0][i] = before[i] - after[i];
        factors[1][i] = maximum - after[i];
    }
    queries.unit.maximum[batch.clone()].copy_from_slice(&after[..batch.len()]);
    let logarithms = L::load(factors.as_flattened().try_into().expect("two batches"));
    exp_of_negative(logarithms).store(factors.as_flattened_mut().try_into().expect("two batches"));
    let [earlier, mut now] = factors;

    for i in 0..batch.len() {
        let to_log2 = scales[i] * std::f32::consts::LOG2_E;
        exp2_of_differences::<L>(&mut numbers[i], largest[i], to_log2, &mut vectors[i]);
    }
    let sums = across::<L::Rows>(vectors, |a, b| a + b);
    for (i, sum) in queries.unit.sum[batch.clone()].iter_mut().enumerate() {
        *sum = *sum * earlier[i] + sums[i] * now[i];
    }
    let mut inverse_scales = [0.0; BATCH];
    for i in 0..BATCH {
        let largest = WEIGHTS_SUM / sums[i];
        inverse_scales[i] = if largest < LARGEST { largest } else { LARGEST };
        now[i] /= inverse_scales[i];
    }
    for i in 0..batch.len() {
        round_weights::<L>(&numbers[i], inverse_scales[i], &mut weights[i]);
    }

    let width = head_dim / LANES;
    let parts = block.values.as_chunks::<WEIGHT_WORDS>().0.iter().zip(block.value_scales).enumerate();
    for (part, (values, value_scales)) in parts {
        for (start, weights) in (0..batch.len()).step_by(QUERIES).zip(weights.as_chunks::<QUERIES>().0) {
            // The last part may be narrower.
            for first in (0..VECTORS.min(width - part * VECTORS)).step_by(WIDTH) {
                let sums = dot::<L, QUERIES, WIDTH>(weights.as_flattened(), WEIGHT_WORDS, values, first);
                for i in 0..QUERIES.min(batch.len() - start) {
                    let row = &mut queries.unit.weighted[(batch.start + start + i) * width..][..width];
                    for v in 0..WIDTH {
                        let Some(weighted) = row.get_mut(part * VECTORS + first + v) else { break };
                        let before = L::load(weighted).mul(L::splat(earlier[start + i]));
                        let sum = L::from_sums(sums[i][v]).mul(L::load(&value_scales.0[first + v]));
                        sum.mul_add(L::splat(now[start + i]), before).store(weighted);
                    }
                }
            }
        }
    }
}

/// Combines the numbers of each query: those 8 apart, then 4, and so on.
#[inline(always)]
fn across<R: Rows16>(vectors: &[[f32; BATCH]; BATCH], combine: impl Fn(f32, f32) -> f32) -> [f32; BATCH] {
    let mut columns = [[0.0; BATCH]; BATCH];
    R::transpose(vectors.each_ref().map(bytemuck::cast_ref), &mut columns);
    for half in [8, 4, 2, 1] {
        for k in 0..half {
            for i in 0..BATCH {
                columns[k][i] = combine(columns[k][i], columns[k + half][i]);
            }
        }
    }
    columns[0]
}

/// Replaces every number x by `2^((x - largest) * factor)`, which is at most 1: more would overflow 16 bits.
/// Adds up those in the same lane.
#[inline(always)]
fn exp2_of_differences<L: WordLanes>(
    numbers: &mut Row<f32>,
    largest: f32,
    factor: f32,
    sums: &mut [f32; BATCH],
) {
    /// The coefficients of the polynomial closest to 2^x for |x| <= 1/2, from the highest power to the
    /// lowest. The error is below 2^-18, which is less than that of rounding to 16 bits.
    const COEFFICIENTS: [f32; 5] = [0.009_570_102, 0.055_917_86, 0.240_247_44, 0.693_121_8, 0.999_999_3];
    let mut sum = L::splat(0.0);
    for numbers in &mut numbers.0 {
        let x = L::load(numbers).add(L::splat(-largest)).mul(L::splat(factor));
        let whole = x.nearest();
        let x = x.add(whole.mul(L::splat(-1.0)));
        let mut power = L::splat(COEFFICIENTS[0]);
        for i in 1..COEFFICIENTS.len() {
            power = power.mul_add(x, L::splat(COEFFICIENTS[i]));
        }
        let power = power.times_two_to(whole);
        power.store(numbers);
        sum = sum.add(power);
    }
    sum.sums_of_halves(sums);
}
