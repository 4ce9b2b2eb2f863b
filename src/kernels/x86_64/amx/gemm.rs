//! `out = x · wᵀ` in tiles of bf16, for many rows of x.
//!
//! Weights are taken 16 rows (a strip) by some hundred columns (a slab) at a time and widened to bf16; all rows of x
//! then meet them, 32 by 32 outputs together. An output is one chain of sums, columns in increasing order, whatever
//! the other rows are.
//!
//! A word is two bf16.

use super::tiles::{BLOCK_ROWS, Block, TILE_ROWS, TILE_WORDS, Tiles};
use super::widen::{Line, round_pairs, take_away, widen_strip};
use crate::kernels::Output;
use crate::kernels::generic::gemm::GemmTask;
use crate::kernels::lanes::padded;
use std::cell::Cell;

/// Rows of x that meet weights together: two tiles.
pub(super) const PANEL_ROWS: usize = BLOCK_ROWS;
/// Strips that do: two tiles too.
pub(super) const STRIPS: usize = BLOCK_ROWS / TILE_ROWS;
/// The most strips of a task: each reads all of x, which the farther caches give slowly.
pub(super) const TASK_STRIPS: usize = 16;
/// The most words of a slab: 32 rows of x stay in the nearest cache while strips come and go.
const MOST_SLAB_WORDS: usize = 128;

#[derive(Default)]
struct Scratch {
    /// `(strips, slab)`
    weights: Vec<Line>,
    /// `(panels, pairs of strips)`: the sums of the slabs so far. In `out` they would lie far from each other.
    sums: Vec<Block>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Words of a weight's row of `cols` elements, whole tiles.
fn weight_words(cols: usize) -> usize {
    cols.div_ceil(2).next_multiple_of(TILE_WORDS)
}

/// Words of a row of x, for each element PARTS numbers in bf16.
pub(super) fn row_words<const PARTS: usize>(cols: usize) -> usize {
    PARTS * weight_words(cols)
}

/// Writes one panel: the rows of `x`, `(rows, cols)`, and zeros for those that are missing, as
/// `(words / 16, PARTS, 32 rows, 16 words)`. The second part is what rounding to the first has lost.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn pack_rows<const PARTS: usize>(x: &[f32], rows: usize, panel: &mut [u32]) {
    let cols = x.len() / rows;
    let (tiles, _) = panel.as_chunks_mut::<{ PANEL_ROWS * TILE_WORDS }>();
    for (step, parts) in tiles.chunks_exact_mut(PARTS).enumerate() {
        let start = (step * 2 * TILE_WORDS).min(cols);
        let end = (start + 2 * TILE_WORDS).min(cols);
        for row in 0..PANEL_ROWS {
            let mut left = padded(if row < rows { &x[row * cols..][start..end] } else { &[] });
            for part in parts.iter_mut() {
                let words = &mut part.as_chunks_mut().0[row];
                round_pairs(&left, words);
                take_away(words, &mut left);
            }
        }
    }
}

/// Runs one task.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
pub(super) fn gemm<const PARTS: usize>(task: &GemmTask) {
    let words = weight_words(task.weight.cols());
    let most = MOST_SLAB_WORDS / PARTS;
    let slab = words.div_ceil(words.div_ceil(most)).next_multiple_of(TILE_WORDS);
    let pairs = task.strips.len().div_ceil(STRIPS);
    // Taken out, not borrowed in a closure: see generic/matmul.rs.
    let mut scratch = SCRATCH.take();
    let Scratch { weights, sums } = &mut scratch;
    weights.resize(pairs * STRIPS * slab, Line::ZERO);
    sums.resize(task.rows.div_ceil(PANEL_ROWS) * pairs, Block::ZERO);
    // SAFETY: this table is reached only after dispatch.rs has seen that there are tiles.
    let tiles = unsafe { Tiles::shape() };
    for start in (0..words).step_by(slab) {
        let len = slab.min(words - start);
        for (strip, weights) in weights.chunks_exact_mut(slab).enumerate() {
            widen_strip(task, task.strips.start + strip, start / TILE_WORDS, &mut weights[..len]);
        }
        let panels = task.x.chunks_exact(PARTS * PANEL_ROWS * words).zip(sums.chunks_exact_mut(pairs));
        for (panel, (x, sums)) in panels.enumerate() {
            let x = &x[PARTS * start * PANEL_ROWS..][..PARTS * len * PANEL_ROWS];
            for (pair, sums) in sums.iter_mut().enumerate() {
                let weights = &weights[pair * STRIPS * slab..][..STRIPS * slab];
                let (first, second) = weights.split_at(slab);
                tiles.multiply::<PARTS>(x, [&first[..len], &second[..len]], sums, start > 0);
                if start + len == words {
                    put(task, sums, panel * PANEL_ROWS, task.strips.start + pair * STRIPS);
                }
            }
        }
    }
    SCRATCH.set(scratch);
}

/// Sets or adds to the outputs of the rows from `first` and the strips from `strip` on, those that there are.
#[inline(always)]
fn put(task: &GemmTask, sums: &Block, first: usize, strip: usize) {
    let features = task.weight.rows();
    let feature = strip * TILE_ROWS;
    let width = BLOCK_ROWS.min((task.strips.end * TILE_ROWS).min(features) - feature);
    for (row, sums) in (first..task.rows).zip(&sums.0) {
        // SAFETY: this task alone has the features of its strips.
        let out = unsafe { task.out.slice_mut(row * features + feature, width) };
        match (<&mut [f32; BLOCK_ROWS]>::try_from(&mut *out), task.output) {
            (Ok(out), Output::Set) => *out = *sums,
            (Ok(out), Output::Add) => {
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out += sum;
                }
            }
            (Err(_), Output::Set) => out.copy_from_slice(&sums[..width]),
            (Err(_), Output::Add) => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum),
        }
    }
}
