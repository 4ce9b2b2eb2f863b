//! Attention of prompts with AMX tiles of bf16.
//!
//! Computes the same as `generic/attention.rs`, KV block by KV block. Queries, keys, softmax weights and
//! values are each the sum of two bf16, which is about 16 bits. A KV block is laid out once for all queries
//! of a task. Then 16 queries at a time get their scores, their softmax weights and their weighted sums of
//! values. A query is a (row, head) of the task.

use super::convert::{interleave_bf16_pairs, subtract_bf16, truncate_to_bf16_pairs};
use super::tiles::{AMX_TILE_ROWS, AMX_TILE_WORDS, AmxTileRow, AmxTiles, TERMS, WIDE_COLS, WideSums};
use crate::generic::attention::{AttentionOutput, AttentionTask, dequantize_keys, dequantize_values};
use crate::generic::elementwise::exp_of_negative;
use crate::kv_block::KV_BLOCK_POSITIONS;
use crate::lanes::{LANES, Lanes};
use crate::rows16::Rows16 as _;
use crate::x86_64::avx512::{Avx512Lanes, Avx512Rows};
use std::cell::Cell;
use std::ops::{Range, RangeInclusive};

/// Queries of one task. Laying out a KV block costs time, so many queries have to share it.
pub(super) const TASK_QUERIES: RangeInclusive<usize> = 384..=384;
/// Elements of a query, or positions, in one step of a product.
const STEP: usize = 2 * AMX_TILE_WORDS;
/// AMX tile rows of a step: for 16 queries (or their softmax weights), and for 64 columns of keys or values.
const LEFT_TILE_ROWS: usize = TERMS * AMX_TILE_ROWS;
const RIGHT_TILE_ROWS: usize = 4 * TERMS * AMX_TILE_WORDS;

// The scores of a KV block are a `WideSums`.
const _: () = assert!(WIDE_COLS == KV_BLOCK_POSITIONS && KV_BLOCK_POSITIONS == 2 * LANES);

/// Whether [`attention`] supports this head_dim.
pub(super) fn takes(head_dim: usize) -> bool {
    head_dim.is_multiple_of(STEP)
}

/// Buffers that are kept between tasks.
#[derive(Default)]
struct Scratch {
    /// A KV block's keys, `(head_dim, KV_BLOCK_POSITIONS)`, or values, `(KV_BLOCK_POSITIONS, head_dim)`.
    numbers: Vec<[f32; LANES]>,
    /// `(head_dim / STEP, RIGHT_TILE_ROWS)`
    keys: Vec<AmxTileRow>,
    /// `(head_dim / WIDE_COLS, KV_BLOCK_POSITIONS / STEP, RIGHT_TILE_ROWS)`
    values: Vec<AmxTileRow>,
    /// Values that are not finite and that not all queries see. In `values` they are zeros.
    not_finite: Vec<Value>,
    /// `(AMX tiles of queries, head_dim / STEP, LEFT_TILE_ROWS)`, divided by the square root of head_dim.
    queries: Vec<AmxTileRow>,
    /// `(AMX tiles of queries, head_dim / WIDE_COLS)`: the sums of `exp(score - maximum) * value`.
    weighted: Vec<WideSums>,
    /// One for each AMX tile of queries.
    softmaxes: Vec<Softmax>,
    weights: Weights,
}

/// Scores and softmax weights of 16 queries for a KV block.
struct Weights {
    /// Scores, then softmax weights.
    numbers: WideSums,
    /// Softmax weights as `(KV_BLOCK_POSITIONS / STEP, LEFT_TILE_ROWS)`.
    tile_rows: [AmxTileRow; KV_BLOCK_POSITIONS / STEP * LEFT_TILE_ROWS],
}

impl Default for Weights {
    fn default() -> Self {
        Weights {
            numbers: WideSums::ZERO,
            tile_rows: [AmxTileRow::ZERO; KV_BLOCK_POSITIONS / STEP * LEFT_TILE_ROWS],
        }
    }
}

/// One element of a position's values.
struct Value {
    position: usize,
    index: usize,
    value: f32,
}

/// The running softmax of 16 queries.
#[derive(Clone)]
struct Softmax {
    /// The largest score.
    maximum: [f32; AMX_TILE_ROWS],
    /// The sum of `exp(score - maximum)`, for each lane.
    sums: [[f32; LANES]; AMX_TILE_ROWS],
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Runs one task: all units of its rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
pub(super) fn attention(task: &AttentionTask) {
    // Taken out instead of borrowed in a closure: see [`take_buffer`](crate::generic::matmul::take_buffer).
    let mut scratch = SCRATCH.take();
    attention_with(task, &mut scratch);
    SCRATCH.set(scratch);
}

#[inline(always)]
fn attention_with(task: &AttentionTask, scratch: &mut Scratch) {
    let AttentionOutput::Rows(out) = task.output else {
        unreachable!("the table says that only whole rows are taken")
    };
    let (head_dim, group) = (task.head_dim, task.group());
    let count = task.rows.len() * group;
    let query_tiles = count.div_ceil(AMX_TILE_ROWS);
    let (steps, parts) = (head_dim / STEP, head_dim.div_ceil(WIDE_COLS));
    lay_out_queries(task, scratch);
    scratch.weighted.clear();
    scratch.weighted.resize(query_tiles * parts, WideSums::ZERO);
    scratch.softmaxes.clear();
    let nothing =
        Softmax { maximum: [f32::NEG_INFINITY; AMX_TILE_ROWS], sums: [[0.0; LANES]; AMX_TILE_ROWS] };
    scratch.softmaxes.resize(query_tiles, nothing);
    // SAFETY: this table is reached only after dispatch.rs has seen that AMX is available.
    let tiles = unsafe { AmxTiles::configure() };
    for block in 0..task.seen_kv_blocks() {
        let first = block * KV_BLOCK_POSITIONS;
        lay_out_kv_block(task, scratch, block);
        let Scratch { keys, values, not_finite, queries, weighted, softmaxes, weights, .. } = &mut *scratch;
        for query_tile in task.first_query_seeing(first) / AMX_TILE_ROWS..query_tiles {
            let queries = &queries[query_tile * steps * LEFT_TILE_ROWS..][..steps * LEFT_TILE_ROWS];
            let visible: [usize; AMX_TILE_ROWS] = std::array::from_fn(|i| {
                let row = (query_tile * AMX_TILE_ROWS + i).min(count - 1) / group;
                (task.position + row + 1).saturating_sub(first).min(KV_BLOCK_POSITIONS)
            });
            tiles.multiply_bf16_pairs(queries, keys, &mut weights.numbers, false);
            let rescale = softmax_weights(&mut softmaxes[query_tile], &visible, weights);
            let weighted = &mut weighted[query_tile * parts..][..parts];
            for (sums, values) in weighted.iter_mut().zip(values.chunks_exact(values.len() / parts)) {
                // Usually an earlier KV block has the largest score, so that nothing has to be rescaled.
                if rescale != [1.0; AMX_TILE_ROWS] {
                    for (sums, rescale) in sums.0.iter_mut().zip(rescale) {
                        sums.iter_mut().for_each(|sum| *sum *= rescale);
                    }
                }
                tiles.multiply_bf16_pairs(&weights.tile_rows, values, sums, true);
            }
            for Value { position, index, value } in not_finite.iter() {
                for i in (0..AMX_TILE_ROWS).filter(|&i| visible[i] > *position) {
                    weighted[index / WIDE_COLS].0[i][index % WIDE_COLS] +=
                        weights.numbers.0[i][*position] * value;
                }
            }
        }
    }
    drop(tiles);
    for query in 0..count {
        let (query_tile, i) = (query / AMX_TILE_ROWS, query % AMX_TILE_ROWS);
        let inverse = 1.0 / Avx512Lanes::load(&scratch.softmaxes[query_tile].sums[i]).sum();
        let at = task.heads_offset(query / group) + query % group * head_dim;
        // SAFETY: this task alone writes these rows' heads; `out` is as long as `queries`, which was read at
        // the same range.
        let out = unsafe { out.slice_mut(at, head_dim) };
        for (out, sums) in out.chunks_mut(WIDE_COLS).zip(&scratch.weighted[query_tile * parts..]) {
            out.iter_mut().zip(&sums.0[i]).for_each(|(out, sum)| *out = sum * inverse);
        }
    }
}

/// Writes 32 numbers of a row as two AMX tile rows, whose sum they are.
#[inline(always)]
fn write_bf16_pairs(numbers: &[f32; STEP], tile_rows: &mut [AmxTileRow], row: usize) {
    let mut remaining = *numbers;
    Avx512Rows::round_to_bf16(&remaining, &mut tile_rows[row].0);
    subtract_bf16(&tile_rows[row].0, &mut remaining);
    Avx512Rows::round_to_bf16(&remaining, &mut tile_rows[AMX_TILE_ROWS + row].0);
}

/// Lays out the task's queries, padded with zeros to whole AMX tiles.
#[inline(always)]
fn lay_out_queries(task: &AttentionTask, scratch: &mut Scratch) {
    let (head_dim, group) = (task.head_dim, task.group());
    let count = task.rows.len() * group;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let rows_per_tile = head_dim / STEP * LEFT_TILE_ROWS;
    scratch.queries.clear();
    scratch.queries.resize(count.div_ceil(AMX_TILE_ROWS) * rows_per_tile, AmxTileRow::ZERO);
    for query in 0..count {
        let at = task.heads_offset(query / group) + query % group * head_dim;
        let (steps, _) = task.queries[at..at + head_dim].as_chunks::<STEP>();
        let tile_rows = &mut scratch.queries[query / AMX_TILE_ROWS * rows_per_tile..][..rows_per_tile];
        for (numbers, tile_rows) in steps.iter().zip(tile_rows.chunks_exact_mut(LEFT_TILE_ROWS)) {
            write_bf16_pairs(&numbers.map(|q| q * scale), tile_rows, query % AMX_TILE_ROWS);
        }
    }
}

/// Lays out a KV block. Positions that no query of the task sees may hold anything; their values become
/// zeros.
#[inline(always)]
fn lay_out_kv_block(task: &AttentionTask, scratch: &mut Scratch, block: usize) {
    let Scratch { numbers, keys, values, not_finite, .. } = scratch;
    let (head_dim, first, stored) = (task.head_dim, block * KV_BLOCK_POSITIONS, &task.kv_blocks[block]);
    numbers.resize(head_dim * KV_BLOCK_POSITIONS / LANES, [0.0; LANES]);
    keys.resize(head_dim / STEP * RIGHT_TILE_ROWS, AmxTileRow::ZERO);
    let parts = head_dim.div_ceil(WIDE_COLS);
    values.resize(parts * (KV_BLOCK_POSITIONS / STEP) * RIGHT_TILE_ROWS, AmxTileRow::ZERO);

    dequantize_keys::<Avx512Lanes>(stored.dtype, stored.keys(task.kv_head, task.kv_heads), numbers);
    lay_out(numbers.as_flattened(), KV_BLOCK_POSITIONS, 0, keys);

    dequantize_values::<Avx512Lanes>(stored.dtype, stored.values(task.kv_head, task.kv_heads), numbers);
    let numbers = numbers.as_flattened_mut();
    let seen_by_all = (task.position + 1).saturating_sub(first).min(KV_BLOCK_POSITIONS);
    let seen = (task.position + task.rows.len() - first).min(KV_BLOCK_POSITIONS);
    take_non_finite(&mut numbers[..seen * head_dim], head_dim, seen_by_all..seen, not_finite);
    numbers[seen * head_dim..].fill(0.0);
    let rows_per_part = values.len() / parts;
    for (part, values) in values.chunks_exact_mut(rows_per_part).enumerate() {
        lay_out(numbers, head_dim, part * WIDE_COLS, values);
    }
}

/// Moves values that are not finite to a list and leaves zeros. A query must not multiply a value that it
/// does not see even by zero, because the product may be NaN.
#[inline(always)]
fn take_non_finite(
    values: &mut [f32],
    head_dim: usize,
    positions: Range<usize>,
    not_finite: &mut Vec<Value>,
) {
    not_finite.clear();
    for position in positions {
        let row = &mut values[position * head_dim..][..head_dim];
        // The sum is 0 if all values are finite, else NaN.
        if row.iter().map(|value| value * 0.0).sum::<f32>() == 0.0 {
            continue;
        }
        for (index, value) in row.iter_mut().enumerate().filter(|(_, value)| !value.is_finite()) {
            not_finite.push(Value { position, index, value: std::mem::take(value) });
        }
    }
}

/// Lays out 64 columns from `column` on of a matrix, `(rows, cols)`, as the right factor of products over its
/// rows.
#[inline(always)]
fn lay_out(matrix: &[f32], cols: usize, column: usize, tile_rows: &mut [AmxTileRow]) {
    let pairs = matrix.chunks_exact(2 * cols).map(|pair| pair.split_at(cols));
    for (pair, (even, odd)) in pairs.enumerate() {
        let (step, word) = (pair / AMX_TILE_WORDS, pair % AMX_TILE_WORDS);
        let even = even[column..].as_chunks::<AMX_TILE_ROWS>().0;
        let odd = odd[column..].as_chunks::<AMX_TILE_ROWS>().0;
        for (tile, (even, odd)) in even.iter().zip(odd).take(4).enumerate() {
            let [first, second] = interleave_bf16_pairs(even, odd);
            let at = step * RIGHT_TILE_ROWS + tile * TERMS * AMX_TILE_WORDS + word;
            tile_rows[at] = first;
            tile_rows[at + AMX_TILE_WORDS] = second;
        }
    }
}

/// Turns the scores of 16 queries for a KV block into softmax weights. Returns the factors for the sums of
/// earlier blocks, because the maximum has changed.
///
/// - `visible`: the number of positions of the block that each query sees
#[inline(always)]
fn softmax_weights(
    softmax: &mut Softmax,
    visible: &[usize; AMX_TILE_ROWS],
    weights: &mut Weights,
) -> [f32; AMX_TILE_ROWS] {
    let mut rescale = [0.0; LANES];
    for (i, scores) in weights.numbers.0.iter_mut().enumerate() {
        if visible[i] < KV_BLOCK_POSITIONS {
            scores[visible[i]..].fill(f32::NEG_INFINITY);
        }
        let [first, second] = scores.as_chunks().0 else { unreachable!("two vectors") };
        let before = softmax.maximum[i];
        // The maximum ignores NaN, but the weights become NaN in any case.
        let largest = Avx512Lanes::load(first).max(Avx512Lanes::load(second));
        let maximum = Avx512Lanes::splat(before).max(largest).largest();
        softmax.maximum[i] = maximum;
        rescale[i] = before - maximum;
    }
    exp_of_negative(Avx512Lanes::load(&rescale)).store(&mut rescale);
    let rescale: [f32; AMX_TILE_ROWS] = std::array::from_fn(|i| rescale[i]);
    let Weights { numbers, tile_rows } = weights;
    let (first_rows, second_rows) = tile_rows.split_at_mut(LEFT_TILE_ROWS);
    for (i, scores) in numbers.0.iter_mut().enumerate() {
        let [first, second] = scores.as_chunks_mut().0 else { unreachable!("two vectors") };
        let minus = Avx512Lanes::splat(-softmax.maximum[i]);
        let low = exp_of_negative(Avx512Lanes::load(first).add(minus));
        let high = exp_of_negative(Avx512Lanes::load(second).add(minus));
        let sums = Avx512Lanes::load(&softmax.sums[i]);
        sums.mul_add(Avx512Lanes::splat(rescale[i]), low.add(high)).store(&mut softmax.sums[i]);
        low.store(first);
        high.store(second);
        for (numbers, tile_rows) in [(first, &mut *first_rows), (second, &mut *second_rows)] {
            let (upper, lower) = tile_rows.split_at_mut(AMX_TILE_ROWS);
            truncate_to_bf16_pairs(numbers, &mut upper[i], &mut lower[i]);
        }
    }
    rescale
}
