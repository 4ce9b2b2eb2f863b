//! Causal attention of a few rows of queries over blocks of cached keys and values.
//!
//! Keys lie transposed inside a block, `(head_dim, BLOCK_POSITIONS)`: a lane is a position, so
//! scores need no sums across lanes. The softmax runs block by block with a running maximum (Milakov
//! and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867). Blocks start at
//! fixed positions, so that a row's result does not depend on how the prompt was cut.

use super::dequantize::dequantize_row;
use super::elementwise::exp;
use crate::kernels::lanes::{LANES, Lanes, load_partial, with_storage};
use crate::kernels::pool::SharedOut;
use crate::kernels::{BLOCK_POSITIONS, KvBlock};
use std::cell::Cell;
use std::ops::Range;

/// Some rows of one sequence against one head of keys and values, for all query heads that share it.
pub(in crate::kernels) struct AttentionTask<'a> {
    /// `(rows, query_heads, head_dim)`
    pub(in crate::kernels) queries: &'a [f32],
    pub(in crate::kernels) query_heads: usize,
    pub(in crate::kernels) head_dim: usize,
    /// The rows of `queries` and `out` to do.
    pub(in crate::kernels) rows: Range<usize>,
    /// The position of the first of them.
    pub(in crate::kernels) position: usize,
    /// Block i holds positions from `i * BLOCK_POSITIONS` on; they reach over all rows' positions.
    pub(in crate::kernels) blocks: &'a [KvBlock<'a>],
    pub(in crate::kernels) kv_head: usize,
    pub(in crate::kernels) kv_heads: usize,
    /// As `queries`.
    pub(in crate::kernels) out: &'a SharedOut<'a>,
}

/// What is kept between tasks: the block in f32, and for each (row, head) its running softmax.
#[derive(Default)]
struct Scratch {
    /// `(head_dim, BLOCK_POSITIONS)`
    keys: Vec<[f32; LANES]>,
    /// `(BLOCK_POSITIONS, head_dim)`
    values: Vec<[f32; LANES]>,
    /// `(rows, heads)`
    maximum: Vec<f32>,
    sum: Vec<f32>,
    /// `(rows, heads, head_dim)`
    weighted: Vec<f32>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Runs one task.
#[inline(always)]
pub(in crate::kernels) fn attention<L: Lanes>(task: &AttentionTask) {
    // Taken out, not borrowed in a closure: see matmul.rs.
    let mut scratch = SCRATCH.take();
    attention_with::<L>(task, &mut scratch);
    SCRATCH.set(scratch);
}

#[inline(always)]
fn attention_with<L: Lanes>(task: &AttentionTask, scratch: &mut Scratch) {
    let head_dim = task.head_dim;
    let group = task.query_heads / task.kv_heads;
    let cells = task.rows.len() * group;
    // 64 positions: always whole lanes.
    let block_lanes = head_dim * BLOCK_POSITIONS / LANES;
    scratch.keys.resize(block_lanes, [0.0; LANES]);
    scratch.values.resize(block_lanes, [0.0; LANES]);
    for (buffer, len, value) in [
        (&mut scratch.maximum, cells, f32::NEG_INFINITY),
        (&mut scratch.sum, cells, 0.0),
        (&mut scratch.weighted, cells * head_dim, 0.0),
    ] {
        buffer.clear();
        buffer.resize(len, value);
    }
    let scale = 1.0 / (head_dim as f32).sqrt();
    let query = |row: usize, head: usize| {
        let head = task.kv_head * group + head;
        (task.rows.start + row) * task.query_heads * head_dim + head * head_dim
    };

    let last = task.position + task.rows.len() - 1;
    for (index, block) in task.blocks[..=last / BLOCK_POSITIONS].iter().enumerate() {
        let first = index * BLOCK_POSITIONS;
        let (keys, values) = (&mut scratch.keys[..], &mut scratch.values[..]);
        with_storage!(block.dtype, dequantize_row::<L>(block.keys(task.kv_head, task.kv_heads), keys));
        with_storage!(block.dtype, dequantize_row::<L>(block.values(task.kv_head, task.kv_heads), values));
        for row in first.saturating_sub(task.position)..task.rows.len() {
            let visible = (task.position + row + 1 - first).min(BLOCK_POSITIONS);
            for head in 0..group {
                let cell = row * group + head;
                let q = &task.queries[query(row, head)..][..head_dim];
                let mut weights = scores::<L>(q, &scratch.keys, scale);
                weights[visible..].fill(f32::NEG_INFINITY);
                let before = scratch.maximum[cell];
                let maximum = largest(&weights, before);
                for weight in &mut weights {
                    *weight = exp(*weight - maximum);
                }
                let kept = exp(before - maximum);
                scratch.maximum[cell] = maximum;
                scratch.sum[cell] = scratch.sum[cell] * kept + sum::<L>(&weights);
                let weighted = &mut scratch.weighted[cell * head_dim..][..head_dim];
                add_values::<L>(weighted, kept, &weights[..visible], scratch.values.as_flattened());
            }
        }
    }

    for row in 0..task.rows.len() {
        for head in 0..group {
            let cell = row * group + head;
            let inverse = 1.0 / scratch.sum[cell];
            // SAFETY: this task alone writes these rows' heads; `mod.rs` checked that `out` is as
            // long as `queries`, into which the same range was just read.
            let out = unsafe { task.out.slice_mut(query(row, head), head_dim) };
            for (out, &value) in out.iter_mut().zip(&scratch.weighted[cell * head_dim..]) {
                *out = value * inverse;
            }
        }
    }
}

/// `q · keys * scale` for every position of a block.
#[inline(always)]
fn scores<L: Lanes>(q: &[f32], keys: &[[f32; LANES]], scale: f32) -> [f32; BLOCK_POSITIONS] {
    let (mut low, mut high) = (L::splat(0.0), L::splat(0.0));
    let (keys, _) = keys.as_chunks::<{ BLOCK_POSITIONS / LANES }>();
    for (&q, [first, second]) in q.iter().zip(keys) {
        let q = L::splat(q);
        low = L::load(first).mul_add(q, low);
        high = L::load(second).mul_add(q, high);
    }
    let mut scores = [0.0; BLOCK_POSITIONS];
    let (first, second) = scores.split_at_mut(LANES);
    low.mul(L::splat(scale)).store(first.try_into().expect("LANES long"));
    high.mul(L::splat(scale)).store(second.try_into().expect("LANES long"));
    scores
}

/// The largest weight, or `least`. NaN is left out, as it would be by f32::max, which is not vectorised.
#[inline(always)]
fn largest(weights: &[f32; BLOCK_POSITIONS], least: f32) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut largest = [least; 16];
    let (parts, _) = weights.as_chunks::<16>();
    for part in parts {
        for i in 0..16 {
            largest[i] = larger(largest[i], part[i]);
        }
    }
    let mut half = 8;
    while half > 0 {
        for i in 0..half {
            largest[i] = larger(largest[i], largest[i + half]);
        }
        half /= 2;
    }
    largest[0]
}

#[inline(always)]
fn sum<L: Lanes>(weights: &[f32; BLOCK_POSITIONS]) -> f32 {
    let (low, high) = weights.split_at(LANES);
    let low = L::load(low.try_into().expect("LANES long"));
    low.add(L::load(high.try_into().expect("LANES long"))).sum()
}

/// `weighted = weighted * kept + weights · values`
#[inline(always)]
fn add_values<L: Lanes>(weighted: &mut [f32], kept: f32, weights: &[f32], values: &[f32]) {
    let head_dim = weighted.len();
    for (index, chunk) in weighted.chunks_mut(LANES).enumerate() {
        let rows = || values.chunks_exact(head_dim).map(|row| &row[index * LANES..][..chunk.len()]);
        let mut sums = load_partial::<L>(chunk).mul(L::splat(kept));
        if chunk.len() == LANES {
            for (&weight, row) in weights.iter().zip(rows()) {
                sums = L::load(row.try_into().expect("LANES long")).mul_add(L::splat(weight), sums);
            }
        } else {
            for (&weight, row) in weights.iter().zip(rows()) {
                sums = load_partial::<L>(row).mul_add(L::splat(weight), sums);
            }
        }
        let mut out = [0.0; LANES];
        sums.store(&mut out);
        chunk.copy_from_slice(&out[..chunk.len()]);
    }
}
