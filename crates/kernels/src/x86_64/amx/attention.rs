//! Attention of prompts in tiles of bf16.
//!
//! What `generic/attention.rs` computes, in the same blocks of positions. Queries, keys, weights and values are sums of
//! two bf16 each, so 16 bits of them count. A block's keys and values are laid out once for all queries of a task; then
//! 16 queries at a time get their scores, their weights and their sums of values. A query is a (row, head) of the task.

use super::tiles::{Line, PARTS, TILE_ROWS, TILE_WORDS, Tiles, WIDE_COLS, WideBlock};
use super::widen::{cut_pairs, pair_up_split, round_pairs, take_away};
use crate::blocks::WeightType;
use crate::generic::attention::{AttentionOutput, AttentionTask};
use crate::generic::dequantize::dequantize_row;
use crate::generic::elementwise::exp_of_negative;
use crate::generic::storage::{Bf16, F16, F32};
use crate::kv_block::BLOCK_POSITIONS;
use crate::lanes::{LANES, Lanes};
use crate::x86_64::avx512::Avx512Lanes;
use std::cell::Cell;
use std::ops::Range;

/// Elements of a query, or positions, that one step of a product takes.
const STEP: usize = 2 * TILE_WORDS;
/// Lines of a step: of 16 queries or their weights, and of 64 columns of keys or values.
const LEFT_LINES: usize = PARTS * TILE_ROWS;
const RIGHT_LINES: usize = 4 * PARTS * TILE_WORDS;

// The scores of a block are a wide block.
const _: () = assert!(WIDE_COLS == BLOCK_POSITIONS && BLOCK_POSITIONS == 2 * LANES);

/// Whether [`attention`] takes such heads.
pub(super) fn takes(head_dim: usize) -> bool {
    head_dim.is_multiple_of(STEP)
}

/// What is kept between tasks, to save allocations.
#[derive(Default)]
struct Scratch {
    /// A block's keys, `(head_dim, BLOCK_POSITIONS)`, or values, `(BLOCK_POSITIONS, head_dim)`.
    numbers: Vec<[f32; LANES]>,
    /// `(head_dim / STEP, RIGHT_LINES)`
    keys: Vec<Line>,
    /// `(head_dim / WIDE_COLS, BLOCK_POSITIONS / STEP, RIGHT_LINES)`
    values: Vec<Line>,
    /// Values that are no number and that not all queries see; among `values` they are zeros.
    not_finite: Vec<Value>,
    /// `(tiles of queries, head_dim / STEP, LEFT_LINES)`, divided by the square root of head_dim.
    queries: Vec<Line>,
    /// `(tiles of queries, head_dim / WIDE_COLS)`: the sums of `exp(score - maximum) * value`.
    weighted: Vec<WideBlock>,
    /// Of each tile of queries.
    softmaxes: Vec<Softmax>,
    weights: Weights,
}

/// Of 16 queries for a block.
struct Weights {
    /// Scores, then weights.
    numbers: WideBlock,
    /// Weights as `(BLOCK_POSITIONS / STEP, LEFT_LINES)`.
    lines: [Line; BLOCK_POSITIONS / STEP * LEFT_LINES],
}

impl Default for Weights {
    fn default() -> Self {
        Weights { numbers: WideBlock::ZERO, lines: [Line::ZERO; BLOCK_POSITIONS / STEP * LEFT_LINES] }
    }
}

/// An element of a position's values.
struct Value {
    position: usize,
    index: usize,
    value: f32,
}

/// The running softmax of 16 queries.
#[derive(Clone)]
struct Softmax {
    /// The largest score.
    maximum: [f32; TILE_ROWS],
    /// Of `exp(score - maximum)`, each lane by itself.
    sums: [[f32; LANES]; TILE_ROWS],
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Runs one task, all units of its rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
pub(super) fn attention(task: &AttentionTask) {
    // Taken out, not borrowed in a closure: see generic/matmul.rs.
    let mut scratch = SCRATCH.take();
    attention_with(task, &mut scratch);
    SCRATCH.set(scratch);
}

#[inline(always)]
fn attention_with(task: &AttentionTask, scratch: &mut Scratch) {
    let AttentionOutput::Rows(out) = task.output else { unreachable!("prompts are not split into units") };
    let (head_dim, group) = (task.head_dim, task.group());
    let count = task.rows.len() * group;
    let query_tiles = count.div_ceil(TILE_ROWS);
    let (steps, parts) = (head_dim / STEP, head_dim.div_ceil(WIDE_COLS));
    lay_out_queries(task, scratch);
    scratch.weighted.clear();
    scratch.weighted.resize(query_tiles * parts, WideBlock::ZERO);
    scratch.softmaxes.clear();
    let nothing = Softmax { maximum: [f32::NEG_INFINITY; TILE_ROWS], sums: [[0.0; LANES]; TILE_ROWS] };
    scratch.softmaxes.resize(query_tiles, nothing);
    // SAFETY: this table is reached only after dispatch.rs has seen that there are tiles.
    let tiles = unsafe { Tiles::shape() };
    for block in 0..task.seen_blocks() {
        let first = block * BLOCK_POSITIONS;
        lay_out_block(task, scratch, block);
        let Scratch { keys, values, not_finite, queries, weighted, softmaxes, weights, .. } = &mut *scratch;
        for tile in task.first_that_sees(first) / TILE_ROWS..query_tiles {
            let queries = &queries[tile * steps * LEFT_LINES..][..steps * LEFT_LINES];
            let visible: [usize; TILE_ROWS] = std::array::from_fn(|i| {
                let row = (tile * TILE_ROWS + i).min(count - 1) / group;
                (task.position + row + 1).saturating_sub(first).min(BLOCK_POSITIONS)
            });
            tiles.multiply_split(queries, keys, &mut weights.numbers, false);
            let kept = weigh(&mut softmaxes[tile], &visible, weights);
            let weighted = &mut weighted[tile * parts..][..parts];
            for (sums, values) in weighted.iter_mut().zip(values.chunks_exact(values.len() / parts)) {
                // Mostly an earlier block has the largest score.
                if kept != [1.0; TILE_ROWS] {
                    for (sums, kept) in sums.0.iter_mut().zip(kept) {
                        sums.iter_mut().for_each(|sum| *sum *= kept);
                    }
                }
                tiles.multiply_split(&weights.lines, values, sums, true);
            }
            for Value { position, index, value } in not_finite.iter() {
                for i in (0..TILE_ROWS).filter(|&i| visible[i] > *position) {
                    weighted[index / WIDE_COLS].0[i][index % WIDE_COLS] +=
                        weights.numbers.0[i][*position] * value;
                }
            }
        }
    }
    drop(tiles);
    for query in 0..count {
        let (tile, i) = (query / TILE_ROWS, query % TILE_ROWS);
        let inverse = 1.0 / Avx512Lanes::load(&scratch.softmaxes[tile].sums[i]).sum();
        let at = task.heads_at(query / group) + query % group * head_dim;
        // SAFETY: this task alone writes these rows' heads; `out` is as long as `queries`, from which the same range
        // was read.
        let out = unsafe { out.slice_mut(at, head_dim) };
        for (out, sums) in out.chunks_mut(WIDE_COLS).zip(&scratch.weighted[tile * parts..]) {
            out.iter_mut().zip(&sums.0[i]).for_each(|(out, sum)| *out = sum * inverse);
        }
    }
}

/// Writes numbers of a row as two lines.
#[inline(always)]
fn split(numbers: &[f32; STEP], lines: &mut [Line], row: usize) {
    let mut left = *numbers;
    round_pairs(&left, &mut lines[row].0);
    take_away(&lines[row].0, &mut left);
    round_pairs(&left, &mut lines[TILE_ROWS + row].0);
}

/// The task's queries, and zeros behind them.
#[inline(always)]
fn lay_out_queries(task: &AttentionTask, scratch: &mut Scratch) {
    let (head_dim, group) = (task.head_dim, task.group());
    let count = task.rows.len() * group;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let tile_lines = head_dim / STEP * LEFT_LINES;
    scratch.queries.clear();
    scratch.queries.resize(count.div_ceil(TILE_ROWS) * tile_lines, Line::ZERO);
    for query in 0..count {
        let at = task.heads_at(query / group) + query % group * head_dim;
        let (steps, _) = task.queries[at..at + head_dim].as_chunks::<STEP>();
        let lines = &mut scratch.queries[query / TILE_ROWS * tile_lines..][..tile_lines];
        for (numbers, lines) in steps.iter().zip(lines.chunks_exact_mut(LEFT_LINES)) {
            split(&numbers.map(|q| q * scale), lines, query % TILE_ROWS);
        }
    }
}

/// The keys and values of a block. What no query of the task sees may be anything: among the values it becomes zeros.
#[inline(always)]
fn lay_out_block(task: &AttentionTask, scratch: &mut Scratch, block: usize) {
    let Scratch { numbers, keys, values, not_finite, .. } = scratch;
    let (head_dim, first, stored) = (task.head_dim, block * BLOCK_POSITIONS, &task.blocks[block]);
    numbers.resize(head_dim * BLOCK_POSITIONS / LANES, [0.0; LANES]);
    keys.resize(head_dim / STEP * RIGHT_LINES, Line::ZERO);
    let parts = head_dim.div_ceil(WIDE_COLS);
    values.resize(parts * (BLOCK_POSITIONS / STEP) * RIGHT_LINES, Line::ZERO);

    widen(stored.dtype, stored.keys(task.kv_head, task.kv_heads), numbers);
    lay_out(numbers.as_flattened(), BLOCK_POSITIONS, 0, keys);

    widen(stored.dtype, stored.values(task.kv_head, task.kv_heads), numbers);
    let numbers = numbers.as_flattened_mut();
    let seen_by_all = (task.position + 1).saturating_sub(first).min(BLOCK_POSITIONS);
    let seen = (task.position + task.rows.len() - first).min(BLOCK_POSITIONS);
    take_out(&mut numbers[..seen * head_dim], head_dim, seen_by_all..seen, not_finite);
    numbers[seen * head_dim..].fill(0.0);
    let part_lines = values.len() / parts;
    for (part, values) in values.chunks_exact_mut(part_lines).enumerate() {
        lay_out(numbers, head_dim, part * WIDE_COLS, values);
    }
}

/// A query must not even multiply by zero what it does not see: it may be no number.
#[inline(always)]
fn take_out(values: &mut [f32], head_dim: usize, positions: Range<usize>, not_finite: &mut Vec<Value>) {
    not_finite.clear();
    for position in positions {
        let row = &mut values[position * head_dim..][..head_dim];
        // The sum of zeros, unless one is none.
        if row.iter().map(|value| value * 0.0).sum::<f32>() == 0.0 {
            continue;
        }
        for (index, value) in row.iter_mut().enumerate().filter(|(_, value)| !value.is_finite()) {
            not_finite.push(Value { position, index, value: std::mem::take(value) });
        }
    }
}

/// As f32.
#[inline(always)]
fn widen(dtype: WeightType, stored: &[u8], numbers: &mut [[f32; LANES]]) {
    match dtype {
        WeightType::F32 => dequantize_row::<Avx512Lanes, F32>(stored, numbers),
        WeightType::F16 => dequantize_row::<Avx512Lanes, F16>(stored, numbers),
        _ => dequantize_row::<Avx512Lanes, Bf16>(stored, numbers),
    }
}

/// 64 columns from `column` on of a matrix, `(rows, cols)`, as the right factor of products over its rows.
#[inline(always)]
fn lay_out(matrix: &[f32], cols: usize, column: usize, lines: &mut [Line]) {
    let pairs = matrix.chunks_exact(2 * cols).map(|pair| pair.split_at(cols));
    for (pair, (even, odd)) in pairs.enumerate() {
        let (step, word) = (pair / TILE_WORDS, pair % TILE_WORDS);
        let even = even[column..].as_chunks::<TILE_ROWS>().0;
        let odd = odd[column..].as_chunks::<TILE_ROWS>().0;
        for (tile, (even, odd)) in even.iter().zip(odd).take(4).enumerate() {
            let [first, second] = pair_up_split(even, odd);
            let at = step * RIGHT_LINES + tile * PARTS * TILE_WORDS + word;
            lines[at] = first;
            lines[at + TILE_WORDS] = second;
        }
    }
}

/// Makes weights of the scores of 16 queries for a block. Returns what remains of the earlier blocks' sums, now that the
/// maximum is another.
///
/// - `visible`: positions of the block that each query sees
#[inline(always)]
fn weigh(softmax: &mut Softmax, visible: &[usize; TILE_ROWS], weights: &mut Weights) -> [f32; TILE_ROWS] {
    let mut kept = [0.0; LANES];
    for (i, scores) in weights.numbers.0.iter_mut().enumerate() {
        if visible[i] < BLOCK_POSITIONS {
            scores[visible[i]..].fill(f32::NEG_INFINITY);
        }
        let [first, second] = scores.as_chunks().0 else { unreachable!("two vectors") };
        let before = softmax.maximum[i];
        // NaN is left out: the weights will be NaN in any case.
        let largest = Avx512Lanes::load(first).max(Avx512Lanes::load(second));
        let maximum = Avx512Lanes::splat(before).max(largest).largest();
        softmax.maximum[i] = maximum;
        kept[i] = before - maximum;
    }
    exp_of_negative(Avx512Lanes::load(&kept)).store(&mut kept);
    let kept: [f32; TILE_ROWS] = std::array::from_fn(|i| kept[i]);
    let Weights { numbers, lines } = weights;
    let (first_lines, second_lines) = lines.split_at_mut(LEFT_LINES);
    for (i, scores) in numbers.0.iter_mut().enumerate() {
        let [first, second] = scores.as_chunks_mut().0 else { unreachable!("two vectors") };
        let minus = Avx512Lanes::splat(-softmax.maximum[i]);
        let low = exp_of_negative(Avx512Lanes::load(first).add(minus));
        let high = exp_of_negative(Avx512Lanes::load(second).add(minus));
        let sums = Avx512Lanes::load(&softmax.sums[i]);
        sums.mul_add(Avx512Lanes::splat(kept[i]), low.add(high)).store(&mut softmax.sums[i]);
        low.store(first);
        high.store(second);
        for (numbers, lines) in [(first, &mut *first_lines), (second, &mut *second_lines)] {
            let (upper, lower) = lines.split_at_mut(TILE_ROWS);
            cut_pairs(numbers, &mut upper[i], &mut lower[i]);
        }
    }
    kept
}
