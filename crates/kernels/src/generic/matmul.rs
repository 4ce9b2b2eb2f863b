//! `out = x · wᵀ` for weights in their storage type and f32 activations.
//!
//! The order of sums is the same for any number of rows, so an output never depends on other rows. Lane
//! `k % 32` of an output's accumulator adds the products of elements k in increasing order. At the end the
//! lanes are added in a fixed tree.
//!
//! With few rows, each weight is dequantised in registers and used at once. Float weights are read like that
//! for up to 8 rows, because converting them is cheap. With more rows, a task first dequantises its weights
//! to f32, and all rows share them. All variants see the same numbers.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use super::dequantize::{dequantize_row, partial_block};
use super::storage::Storage;
use crate::blocks::WeightType;
use crate::lanes::{LANES, Lanes};
use crate::output::{Output, SharedOut};
use crate::prefetch::prefetch_l1;
use crate::weight::WeightRows;
use std::cell::Cell;
use std::ops::Range;

/// Some rows of a weight, to be multiplied with all rows of x. The facade has checked the shapes.
pub(crate) struct MatmulTask<'a> {
    /// `(rows, weight.cols)`, each row padded with zeros to whole vectors.
    pub(crate) x: &'a [[f32; LANES]],
    pub(crate) weight: WeightRows<'a>,
    /// The rows of the weight that this task computes; they are columns of `out`.
    pub(crate) range: Range<usize>,
    /// `(rows, weight.rows)`
    pub(crate) out: &'a SharedOut<'a>,
    pub(crate) output: Output,
}

/// From this many rows of x on, weights are dequantised first. Float weights take one instruction to convert,
/// so the limit is higher: they are read as they are stored for up to two microkernels of rows.
const DEQUANTIZE_FROM: usize = 4;
const DEQUANTIZE_FLOATS_FROM: usize = 2 * MICROKERNEL_ROWS + 1;
/// The microkernel: 4 rows of x by 3 rows of weights, 12 accumulators of two AVX-512 registers each.
const MICROKERNEL_ROWS: usize = 4;
const MICROKERNEL_COLUMNS: usize = 3;
/// Blocks of stored float weights that are computed between two checks for the end of the row.
const UNROLLED_BLOCKS: usize = 8;

thread_local! {
    static DEQUANTIZED: Cell<Vec<[f32; LANES]>> = const { Cell::new(Vec::new()) };
}

impl<'a> MatmulTask<'a> {
    /// Rows of x.
    #[inline(always)]
    pub(crate) fn rows(&self) -> usize {
        self.x.len() / self.row_vectors()
    }

    /// Vectors of a row of x.
    #[inline(always)]
    fn row_vectors(&self) -> usize {
        self.weight.cols.div_ceil(LANES)
    }

    #[inline(always)]
    fn x_row(&self, row: usize) -> &'a [[f32; LANES]] {
        &self.x[row * self.row_vectors()..][..self.row_vectors()]
    }

    /// Sets output `(row, column)`, or adds to it.
    #[inline(always)]
    fn put(&self, row: usize, column: usize, value: f32) {
        // SAFETY: this task alone has the columns of `range`, and the facade checked that `out` is
        // `(rows, weight.rows)`.
        unsafe { self.out.put(row * self.weight.rows + column, value, self.output) }
    }
}

/// The number of rows of x from which on weights of `dtype` are dequantised first.
pub(crate) fn dequantize_from(dtype: WeightType) -> usize {
    if dtype.block_len() == 1 { DEQUANTIZE_FLOATS_FROM } else { DEQUANTIZE_FROM }
}

/// This thread's buffer for dequantised weights, `(range.len(), row_vectors)`.
///
/// Taken out instead of borrowed in a closure: the closure would contain the whole computation, too large to
/// be inlined, and would be compiled without the ISA's instructions.
pub(crate) fn take_buffer(task: &MatmulTask) -> Vec<[f32; LANES]> {
    let mut dequantized = DEQUANTIZED.take();
    dequantized.resize(task.range.len() * task.row_vectors(), [0.0; LANES]);
    dequantized
}

/// Keeps the buffer for this thread's next task.
pub(crate) fn return_buffer(dequantized: Vec<[f32; LANES]>) {
    DEQUANTIZED.set(dequantized);
}

/// Multiplies fewer rows of x than [`dequantize_from`] says with weights in their storage type.
#[inline(always)]
pub(crate) fn few_rows<L: Lanes, S: Storage>(task: &MatmulTask, rows: usize) {
    if S::IS_FLOAT && rows >= DEQUANTIZE_FROM {
        return stored_microkernels::<L, S>(task, rows);
    }
    for column in task.range.clone() {
        let weights = task.weight.row(column);
        match rows {
            1 => dot_rows::<L, S, 1>(task, weights, column),
            2 => dot_rows::<L, S, 2>(task, weights, column),
            _ => dot_rows::<L, S, 3>(task, weights, column),
        }
    }
}

/// Multiplies one row of weights with all N rows of x.
#[inline(always)]
fn dot_rows<L: Lanes, S: Storage, const N: usize>(task: &MatmulTask, weights: &[u8], column: usize) {
    let whole = task.weight.cols / LANES;
    let mut x: [&[[f32; LANES]]; N] = [&[]; N];
    for row in 0..N {
        x[row] = &task.x_row(row)[..whole];
    }
    let mut sums = [L::splat(0.0); N];
    let prefetch = L::stream_prefetch();
    let blocks = weights.chunks_exact(S::BLOCK_BYTES);
    let tail = blocks.remainder();
    for (block, first) in blocks.zip((0..whole).step_by(S::VECTORS)) {
        prefetch.after(block);
        for vector in 0..S::VECTORS {
            let w = S::lanes::<L>(block, vector);
            for row in 0..N {
                sums[row] = L::load(&x[row][first.wrapping_add(vector)]).mul_add(w, sums[row]);
            }
        }
    }
    if !tail.is_empty() {
        let w = partial_block::<L, S>(tail);
        for row in 0..N {
            sums[row] = L::load(&task.x_row(row)[whole]).mul_add(w, sums[row]);
        }
    }
    for row in 0..N {
        task.put(row, column, sums[row].sum());
    }
}

/// Multiplies 4 to 8 rows of x with float weights as they are stored, `MICROKERNEL_COLUMNS` weight rows at a
/// time. The first four rows of x bring these weights into the cache for the others.
#[inline(always)]
fn stored_microkernels<L: Lanes, S: Storage>(task: &MatmulTask, rows: usize) {
    let mut column = task.range.start;
    while column + MICROKERNEL_COLUMNS <= task.range.end {
        let mut row = 0;
        while row < rows {
            match rows - row {
                1 => stored_microkernel::<L, S, 1, MICROKERNEL_COLUMNS>(task, row, column),
                2 => stored_microkernel::<L, S, 2, MICROKERNEL_COLUMNS>(task, row, column),
                3 => stored_microkernel::<L, S, 3, MICROKERNEL_COLUMNS>(task, row, column),
                _ => stored_microkernel::<L, S, MICROKERNEL_ROWS, MICROKERNEL_COLUMNS>(task, row, column),
            }
            row += MICROKERNEL_ROWS;
        }
        column += MICROKERNEL_COLUMNS;
    }
    while column < task.range.end {
        for row in 0..rows {
            stored_microkernel::<L, S, 1, 1>(task, row, column);
        }
        column += 1;
    }
}

/// Multiplies X rows of x with W rows of float weights in their storage type.
#[inline(always)]
fn stored_microkernel<L: Lanes, S: Storage, const X: usize, const W: usize>(
    task: &MatmulTask,
    row: usize,
    column: usize,
) {
    let mut x: [&[[f32; LANES]]; X] = [&[]; X];
    for i in 0..X {
        x[i] = task.x_row(row + i);
    }
    let mut w: [&[S::Block]; W] = [&[]; W];
    for j in 0..W {
        w[j] = S::blocks(task.weight.row(column + j));
    }
    // The first rows of x prefetch the next W weight rows. For later rows of x the weights are in the cache.
    let next = (row == 0).then_some(W * w[0].len() * S::BLOCK_BYTES);
    let mut sums = [[L::splat(0.0); W]; X];
    let mut at = 0;
    while at + UNROLLED_BLOCKS <= w[0].len() {
        sums = add_blocks::<L, S, X, W, UNROLLED_BLOCKS>(sums, &x, &w, at, next);
        at += UNROLLED_BLOCKS;
    }
    while at < w[0].len() {
        sums = add_blocks::<L, S, X, W, 1>(sums, &x, &w, at, next);
        at += 1;
    }
    if at < task.row_vectors() {
        for j in 0..W {
            let weights = partial_block::<L, S>(&task.weight.row(column + j)[at * S::BLOCK_BYTES..]);
            for i in 0..X {
                sums[i][j] = L::load(&x[i][at]).mul_add(weights, sums[i][j]);
            }
        }
    }
    put_sums(task, sums, row, column);
}

/// Adds B blocks in [`stored_microkernel`]. Arrays instead of slices: a bounds check would keep the sums out
/// of registers.
#[inline(always)]
fn add_blocks<L: Lanes, S: Storage, const X: usize, const W: usize, const B: usize>(
    mut sums: [[L; W]; X],
    x: &[&[[f32; LANES]]; X],
    w: &[&[S::Block]; W],
    at: usize,
    next: Option<usize>,
) -> [[L; W]; X] {
    let x: [&[[f32; LANES]; B]; X] =
        std::array::from_fn(|i| x[i][at..][..B].try_into().expect("slices of B blocks"));
    let w: [&[S::Block; B]; W] =
        std::array::from_fn(|j| w[j][at..][..B].try_into().expect("slices of B blocks"));
    if let Some(next) = next {
        for j in 0..W {
            for block in w[j] {
                for line in (0..S::BLOCK_BYTES).step_by(64) {
                    prefetch_l1(block.as_ref().as_ptr().wrapping_add(next).wrapping_add(line));
                }
            }
        }
    }
    for k in 0..B {
        for j in 0..W {
            let weights = S::lanes::<L>(w[j][k].as_ref(), 0);
            for i in 0..X {
                sums[i][j] = L::load(&x[i][k]).mul_add(weights, sums[i][j]);
            }
        }
    }
    sums
}

/// Dequantises the task's rows of weights. Each is padded with zeros to whole vectors.
#[inline(always)]
pub(crate) fn dequantize_weights<L: Lanes, S: Storage>(task: &MatmulTask, dequantized: &mut [[f32; LANES]]) {
    for (out, row) in dequantized.chunks_exact_mut(task.row_vectors()).zip(task.range.clone()) {
        dequantize_row::<L, S>(task.weight.row(row), out);
    }
}

/// Multiplies all rows of x with the task's dequantised weights.
#[inline(always)]
pub(crate) fn many_rows<L: Lanes>(task: &MatmulTask, rows: usize, dequantized: &[[f32; LANES]]) {
    let columns = task.range.len();
    let mut row = 0;
    while row + MICROKERNEL_ROWS <= rows {
        let mut column = 0;
        while column + MICROKERNEL_COLUMNS <= columns {
            microkernel::<L, MICROKERNEL_ROWS, MICROKERNEL_COLUMNS>(task, dequantized, row, column);
            column += MICROKERNEL_COLUMNS;
        }
        while column < columns {
            microkernel::<L, MICROKERNEL_ROWS, 1>(task, dequantized, row, column);
            column += 1;
        }
        row += MICROKERNEL_ROWS;
    }
    while row < rows {
        let mut column = 0;
        while column + MICROKERNEL_COLUMNS <= columns {
            microkernel::<L, 1, MICROKERNEL_COLUMNS>(task, dequantized, row, column);
            column += MICROKERNEL_COLUMNS;
        }
        while column < columns {
            microkernel::<L, 1, 1>(task, dequantized, row, column);
            column += 1;
        }
        row += 1;
    }
}

/// Multiplies X rows of x with W rows of dequantised weights, `(range.len(), row_vectors)`.
#[inline(always)]
fn microkernel<L: Lanes, const X: usize, const W: usize>(
    task: &MatmulTask,
    dequantized: &[[f32; LANES]],
    row: usize,
    column: usize,
) {
    let vectors = task.row_vectors();
    let mut x: [&[[f32; LANES]]; X] = [&[]; X];
    for i in 0..X {
        x[i] = task.x_row(row + i);
    }
    let mut w: [&[[f32; LANES]]; W] = [&[]; W];
    for j in 0..W {
        w[j] = &dequantized[(column + j) * vectors..][..vectors];
    }
    let mut sums = [[L::splat(0.0); W]; X];
    for k in 0..vectors {
        for i in 0..X {
            let values = L::load(&x[i][k]);
            for j in 0..W {
                sums[i][j] = values.mul_add(L::load(&w[j][k]), sums[i][j]);
            }
        }
    }
    put_sums(task, sums, row, task.range.start + column);
}

/// Adds up the lanes of a microkernel's sums and writes the outputs.
#[inline(always)]
fn put_sums<L: Lanes, const X: usize, const W: usize>(
    task: &MatmulTask,
    sums: [[L; W]; X],
    row: usize,
    column: usize,
) {
    // The sums go through memory in a loop short enough to be unrolled. If a longer loop read them, the
    // compiler would keep them in memory all the time.
    let mut lanes = [[[0.0; LANES]; W]; X];
    for i in 0..X {
        for j in 0..W {
            sums[i][j].store(&mut lanes[i][j]);
        }
    }
    for i in 0..X {
        for j in 0..W {
            task.put(row + i, column + j, L::load(&lanes[i][j]).sum());
        }
    }
}
