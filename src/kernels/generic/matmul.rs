//! `out = x · wᵀ` for weights in their storage type and f32 activations.
//!
//! One algorithm for any number of rows, so that an output never depends on its neighbours: lane
//! `k % 32` of its accumulator takes the products of elements k in increasing order; at the end the
//! lanes are added in a fixed tree. Few rows decode each weight in registers and use it at once;
//! more rows decode a panel of weight rows to f32 first and share it. Both see the same numbers.

// Counted loops over constant bounds are unrolled into registers; iterators over arrays are not always.
#![allow(clippy::needless_range_loop)]

use super::dequantize::{dequantize_row, partial_block};
use crate::kernels::lanes::{LANES, Lanes, Storage, with_storage};
use crate::kernels::pool::SharedOut;
use crate::kernels::{Output, WeightRows};
use std::cell::Cell;
use std::ops::Range;

/// Some rows of a weight against all rows of x. Shapes are checked where tasks are made.
pub(in crate::kernels) struct MatmulTask<'a> {
    /// `(rows, weight.cols)`, each row padded with zeros to whole lanes.
    pub(in crate::kernels) x: &'a [[f32; LANES]],
    pub(in crate::kernels) weight: WeightRows<'a>,
    /// The weight's rows to do: columns of `out`.
    pub(in crate::kernels) range: Range<usize>,
    /// `(rows, weight.rows)`
    pub(in crate::kernels) out: &'a SharedOut<'a>,
    pub(in crate::kernels) output: Output,
}

/// From this many rows of x on, a decoded panel pays.
const PANEL_FROM: usize = 4;
/// Rows of x, and of the panel, in one register tile: 4 x 3 accumulators of two AVX-512 registers.
const TILE_X: usize = 4;
const TILE_W: usize = 3;

thread_local! {
    static PANEL: Cell<Vec<[f32; LANES]>> = const { Cell::new(Vec::new()) };
}

impl<'a> MatmulTask<'a> {
    /// Lanes in a row of x.
    #[inline(always)]
    fn width(&self) -> usize {
        self.weight.cols.div_ceil(LANES)
    }

    #[inline(always)]
    fn x_row(&self, row: usize) -> &'a [[f32; LANES]] {
        &self.x[row * self.width()..][..self.width()]
    }

    /// Sets or adds to output `(row, column)`.
    #[inline(always)]
    fn put(&self, row: usize, column: usize, value: f32) {
        // SAFETY: this task alone has the columns of `range`, and `mod.rs` checked that `out` is
        // `(rows, weight.rows)`.
        unsafe { self.out.put(row * self.weight.rows + column, value, self.output) }
    }
}

/// Runs one task.
#[inline(always)]
pub(in crate::kernels) fn matmul<L: Lanes>(task: &MatmulTask) {
    let rows = task.x.len() / task.width();
    if rows < PANEL_FROM {
        with_storage!(task.weight.dtype, few_rows::<L>(task, rows));
    } else {
        // Taken out, not borrowed in a closure: a closure this large would be compiled apart, without
        // the level's instructions.
        let mut panel = PANEL.take();
        panel.resize(task.range.len() * task.width(), [0.0; LANES]);
        with_storage!(task.weight.dtype, fill_panel::<L>(task, &mut panel));
        many_rows::<L>(task, rows, &panel);
        PANEL.set(panel);
    }
}

#[inline(always)]
fn few_rows<L: Lanes, S: Storage>(task: &MatmulTask, rows: usize) {
    for column in task.range.clone() {
        let weights = task.weight.row(column);
        match rows {
            1 => dots::<L, S, 1>(task, weights, column),
            2 => dots::<L, S, 2>(task, weights, column),
            _ => dots::<L, S, 3>(task, weights, column),
        }
    }
}

/// One weight row against all N rows of x.
#[inline(always)]
fn dots<L: Lanes, S: Storage, const N: usize>(task: &MatmulTask, weights: &[u8], column: usize) {
    let whole = task.weight.cols / LANES;
    let mut x: [&[[f32; LANES]]; N] = [&[]; N];
    for row in 0..N {
        x[row] = &task.x_row(row)[..whole];
    }
    let mut sums = [L::splat(0.0); N];
    let blocks = weights.chunks_exact(S::BLOCK_BYTES);
    let tail = blocks.remainder();
    for (block, first) in blocks.zip((0..whole).step_by(S::UNITS)) {
        for line in (0..S::BLOCK_BYTES).step_by(64) {
            L::prefetch_stream(block.as_ptr().wrapping_add(line));
        }
        for unit in 0..S::UNITS {
            let w = S::lanes::<L>(block, unit);
            for row in 0..N {
                sums[row] = L::load(&x[row][first.wrapping_add(unit)]).mul_add(w, sums[row]);
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

/// Decodes the task's rows of weights, each padded with zeros to whole lanes.
#[inline(always)]
fn fill_panel<L: Lanes, S: Storage>(task: &MatmulTask, panel: &mut [[f32; LANES]]) {
    for (out, row) in panel.chunks_exact_mut(task.width()).zip(task.range.clone()) {
        dequantize_row::<L, S>(task.weight.row(row), out);
    }
}

#[inline(always)]
fn many_rows<L: Lanes>(task: &MatmulTask, rows: usize, panel: &[[f32; LANES]]) {
    let width = task.range.len();
    let mut row = 0;
    while row + TILE_X <= rows {
        let mut column = 0;
        while column + TILE_W <= width {
            tile::<L, TILE_X, TILE_W>(task, panel, row, column);
            column += TILE_W;
        }
        while column < width {
            tile::<L, TILE_X, 1>(task, panel, row, column);
            column += 1;
        }
        row += TILE_X;
    }
    while row < rows {
        let mut column = 0;
        while column + TILE_W <= width {
            tile::<L, 1, TILE_W>(task, panel, row, column);
            column += TILE_W;
        }
        while column < width {
            tile::<L, 1, 1>(task, panel, row, column);
            column += 1;
        }
        row += 1;
    }
}

/// X rows of x against W rows of the panel, `(range.len(), width)`.
#[inline(always)]
fn tile<L: Lanes, const X: usize, const W: usize>(
    task: &MatmulTask,
    panel: &[[f32; LANES]],
    row: usize,
    column: usize,
) {
    let width = task.width();
    let mut x: [&[[f32; LANES]]; X] = [&[]; X];
    for i in 0..X {
        x[i] = task.x_row(row + i);
    }
    let mut w: [&[[f32; LANES]]; W] = [&[]; W];
    for j in 0..W {
        w[j] = &panel[(column + j) * width..][..width];
    }
    let mut sums = [[L::splat(0.0); W]; X];
    for k in 0..width {
        for i in 0..X {
            let values = L::load(&x[i][k]);
            for j in 0..W {
                sums[i][j] = values.mul_add(L::load(&w[j][k]), sums[i][j]);
            }
        }
    }
    for i in 0..X {
        for j in 0..W {
            task.put(row + i, task.range.start + column + j, sums[i][j].sum());
        }
    }
}
