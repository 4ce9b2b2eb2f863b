//! `out = x · wᵀ` for weights in their storage type and f32 activations.
//!
//! One algorithm for any number of rows, so that an output never depends on its neighbours: lane
//! `k % 32` of its accumulator takes the products of elements k in increasing order; at the end the
//! lanes are added in a fixed tree. Few rows decode each weight in registers and use it at once;
//! more rows decode a panel of weight rows to f32 first and share it. Both see the same numbers.

use super::dequantize::{dequantize_row, partial_unit};
use crate::kernels::lanes::{LANES, Lanes, Storage, load_partial, with_storage};
use crate::kernels::pool::SharedOut;
use crate::kernels::{Output, WeightRows};
use std::cell::Cell;
use std::ops::Range;

/// Some rows of a weight against all rows of x. Shapes are checked where tasks are made.
pub(in crate::kernels) struct MatmulTask<'a> {
    /// `(rows, weight.cols)`
    pub(in crate::kernels) x: &'a [f32],
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
/// How far ahead a row of weights is asked for: hardware prefetchers alone reach half the speed on
/// row-major weights.
const PREFETCH_BYTES: usize = 2048;

thread_local! {
    static PANEL: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

impl MatmulTask<'_> {
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
    let rows = task.x.len() / task.weight.cols;
    if rows < PANEL_FROM {
        with_storage!(task.weight.dtype, few_rows::<L>(task));
    } else {
        // Taken out, not borrowed in a closure: a closure this large would be compiled apart, without
        // the level's instructions.
        let mut panel = PANEL.take();
        with_storage!(task.weight.dtype, many_rows::<L>(task, &mut panel));
        PANEL.set(panel);
    }
}

#[inline(always)]
fn few_rows<L: Lanes, S: Storage>(task: &MatmulTask) {
    for column in task.range.clone() {
        let weights = task.weight.row(column);
        let x = |row: usize| &task.x[row * task.weight.cols..][..task.weight.cols];
        match task.x.len() / task.weight.cols {
            1 => {
                let [a] = dots::<L, S, 1>(weights, [x(0)]);
                task.put(0, column, a);
            }
            2 => {
                let [a, b] = dots::<L, S, 2>(weights, [x(0), x(1)]);
                task.put(0, column, a);
                task.put(1, column, b);
            }
            _ => {
                let [a, b, c] = dots::<L, S, 3>(weights, [x(0), x(1), x(2)]);
                task.put(0, column, a);
                task.put(1, column, b);
                task.put(2, column, c);
            }
        }
    }
}

/// One weight row against N rows of x.
#[inline(always)]
fn dots<L: Lanes, S: Storage, const N: usize>(weights: &[u8], x: [&[f32]; N]) -> [f32; N] {
    let mut sums = [L::splat(0.0); N];
    let units = weights.chunks_exact(S::UNIT_BYTES);
    let tail = units.remainder();
    let whole = units.len() * LANES;
    for (index, unit) in units.enumerate() {
        L::prefetch(unit.as_ptr().wrapping_add(PREFETCH_BYTES));
        if S::UNIT_BYTES > 64 {
            L::prefetch(unit.as_ptr().wrapping_add(PREFETCH_BYTES + 64));
        }
        let w = S::lanes::<L>(unit);
        for row in 0..N {
            let chunk = &x[row][index * LANES..][..LANES];
            sums[row] = L::load(chunk.try_into().expect("LANES long")).mul_add(w, sums[row]);
        }
    }
    if !tail.is_empty() {
        let w = partial_unit::<L, S>(tail);
        for row in 0..N {
            sums[row] = load_partial::<L>(&x[row][whole..]).mul_add(w, sums[row]);
        }
    }
    sums.map(|sum| sum.sum())
}

#[inline(always)]
fn many_rows<L: Lanes, S: Storage>(task: &MatmulTask, panel: &mut Vec<f32>) {
    let cols = task.weight.cols;
    let rows = task.x.len() / cols;
    let width = task.range.len();
    panel.resize(width * cols, 0.0);
    for (out, row) in panel.chunks_exact_mut(cols).zip(task.range.clone()) {
        dequantize_row::<L, S>(task.weight.row(row), out);
    }
    let mut row = 0;
    while row < rows {
        let tile_x = if row + TILE_X <= rows { TILE_X } else { 1 };
        let mut column = 0;
        while column < width {
            let tile_w = if column + TILE_W <= width { TILE_W } else { 1 };
            match (tile_x, tile_w) {
                (TILE_X, TILE_W) => tile::<L, TILE_X, TILE_W>(task, panel, row, column),
                (TILE_X, _) => tile::<L, TILE_X, 1>(task, panel, row, column),
                (_, TILE_W) => tile::<L, 1, TILE_W>(task, panel, row, column),
                _ => tile::<L, 1, 1>(task, panel, row, column),
            }
            column += tile_w;
        }
        row += tile_x;
    }
}

/// X rows of x against W rows of the panel, `(range.len(), cols)`.
#[inline(always)]
fn tile<L: Lanes, const X: usize, const W: usize>(
    task: &MatmulTask,
    panel: &[f32],
    row: usize,
    column: usize,
) {
    let cols = task.weight.cols;
    let x: [&[f32]; X] = std::array::from_fn(|i| &task.x[(row + i) * cols..][..cols]);
    let w: [&[f32]; W] = std::array::from_fn(|i| &panel[(column + i) * cols..][..cols]);
    let mut sums = [[L::splat(0.0); W]; X];
    let whole = cols - cols % LANES;
    let mut k = 0;
    while k < whole {
        for j in 0..W {
            let weights = L::load((&w[j][k..][..LANES]).try_into().expect("LANES long"));
            for i in 0..X {
                let values = L::load((&x[i][k..][..LANES]).try_into().expect("LANES long"));
                sums[i][j] = values.mul_add(weights, sums[i][j]);
            }
        }
        k += LANES;
    }
    if whole < cols {
        for j in 0..W {
            let weights = load_partial::<L>(&w[j][whole..]);
            for i in 0..X {
                sums[i][j] = load_partial::<L>(&x[i][whole..]).mul_add(weights, sums[i][j]);
            }
        }
    }
    for i in 0..X {
        for j in 0..W {
            task.put(row + i, task.range.start + column + j, sums[i][j].sum());
        }
    }
}
