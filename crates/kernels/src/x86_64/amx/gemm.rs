//! `out = x · wᵀ` in tiles of bf16, for many rows of x.
//!
//! Weights are taken 16 rows (a strip) by some hundred columns (a slab) at a time and widened to bf16; all rows of x
//! then meet them, 32 by 32 outputs together. An output is one chain of sums, columns in increasing order, whatever
//! the other rows are.
//!
//! A word is two bf16.

use super::tiles::{BLOCK_ROWS, Block, Line, TILE_ROWS, TILE_WORDS, Tiles};
use super::widen::{round_pairs, take_away, widen_strip};
use crate::generic::elementwise::gate_mul;
use crate::generic::gemm::{GatedTask, GemmTask};
use crate::lanes::{Lanes as _, padded};
use crate::output::Output;
use crate::x86_64::avx512::Avx512Lanes;
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
            pack_row(&mut left, row, parts);
        }
    }
}

/// Writes 32 columns of one row of a panel, as [`pack_rows`] does.
#[inline(always)]
fn pack_row(x: &mut [f32; 2 * TILE_WORDS], row: usize, parts: &mut [[u32; PANEL_ROWS * TILE_WORDS]]) {
    let last = parts.len() - 1;
    for (number, part) in parts.iter_mut().enumerate() {
        let words = &mut part.as_chunks_mut().0[row];
        round_pairs(x, words);
        if number < last {
            take_away(words, x);
        }
    }
}

/// What a task multiplies all rows of x with, and what becomes of the sums.
trait Job {
    /// How many pairs of strips are done with together: a group, one for each two strips of the task.
    const PAIRS: usize;

    /// See [`widen_strip`], of a strip of the job.
    fn widen(&self, strip: usize, step: usize, lines: &mut [Line]);

    /// Takes the sums of the rows from `first` on and of a group.
    fn finish(&self, first: usize, group: usize, sums: &mut [Block]);
}

/// The outputs are the sums.
struct Sums<'a>(&'a GemmTask<'a>);

impl Job for Sums<'_> {
    const PAIRS: usize = 1;

    #[inline(always)]
    fn widen(&self, strip: usize, step: usize, lines: &mut [Line]) {
        widen_strip(self.0.weight, self.0.strips.start + strip, step, lines);
    }

    #[inline(always)]
    fn finish(&self, first: usize, group: usize, sums: &mut [Block]) {
        put(self.0, &sums[0], first, self.0.strips.start + group * STRIPS);
    }
}

/// A group is two strips of the gate and the same of what it gates.
struct Gated<'a, const PARTS: usize>(&'a GatedTask<'a>);

impl<const PARTS: usize> Job for Gated<'_, PARTS> {
    const PAIRS: usize = 2;

    #[inline(always)]
    fn widen(&self, strip: usize, step: usize, lines: &mut [Line]) {
        let (pair, strip) = (strip / STRIPS, strip % STRIPS);
        let weight = if pair % 2 == 0 { self.0.mlp.gate } else { self.0.mlp.up };
        widen_strip(weight, self.0.strips.start + pair / 2 * STRIPS + strip, step, lines);
    }

    #[inline(always)]
    fn finish(&self, first: usize, group: usize, sums: &mut [Block]) {
        let GatedTask { mlp, out, strips, .. } = self.0;
        let (gate, up) = sums.split_at_mut(1);
        let (gate, up) = (gate[0].0.as_flattened_mut(), up[0].0.as_flattened());
        gate_mul(mlp.activation, gate, up);
        let words = PARTS * PANEL_ROWS * TILE_WORDS;
        let steps = weight_words(mlp.gate.rows()) / TILE_WORDS;
        let at = first / PANEL_ROWS * steps + strips.start / STRIPS + group;
        // SAFETY: this task alone has these features, and panels do not overlap.
        let parts = unsafe { out.slice_mut(at * words, words) }.as_chunks_mut().0;
        for (row, x) in gate.as_chunks_mut().0.iter_mut().enumerate() {
            pack_row(x, row, parts);
        }
    }
}

/// Runs one task.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
pub(super) fn gemm<const PARTS: usize>(task: &GemmTask) {
    multiply::<PARTS, _>(task.x, task.rows, task.weight.cols(), task.strips.len(), &Sums(task));
}

/// Runs one task.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
pub(super) fn gated<const PARTS: usize>(task: &GatedTask) {
    multiply::<PARTS, _>(task.x, task.rows, task.mlp.gate.cols(), task.strips.len(), &Gated::<PARTS>(task));
}

#[inline(always)]
fn multiply<const PARTS: usize, J: Job>(x: &[u32], rows: usize, cols: usize, strips: usize, job: &J) {
    let words = weight_words(cols);
    let most = MOST_SLAB_WORDS / PARTS;
    let slab = words.div_ceil(words.div_ceil(most)).next_multiple_of(TILE_WORDS);
    let pairs = strips.div_ceil(STRIPS) * J::PAIRS;
    // Taken out, not borrowed in a closure: see generic/matmul.rs.
    let mut scratch = SCRATCH.take();
    let Scratch { weights, sums } = &mut scratch;
    weights.resize(pairs * STRIPS * slab, Line::ZERO);
    sums.resize(rows.div_ceil(PANEL_ROWS) * pairs, Block::ZERO);
    // SAFETY: this table is reached only after dispatch.rs has seen that there are tiles.
    let tiles = unsafe { Tiles::shape() };
    for start in (0..words).step_by(slab) {
        let len = slab.min(words - start);
        for (strip, weights) in weights.chunks_exact_mut(slab).enumerate() {
            job.widen(strip, start / TILE_WORDS, &mut weights[..len]);
        }
        let panels = x.chunks_exact(PARTS * PANEL_ROWS * words).zip(sums.chunks_exact_mut(pairs));
        for (panel, (x, sums)) in panels.enumerate() {
            let x = &x[PARTS * start * PANEL_ROWS..][..PARTS * len * PANEL_ROWS];
            for (group, sums) in sums.chunks_exact_mut(J::PAIRS).enumerate() {
                for (pair, sums) in sums.iter_mut().enumerate() {
                    let weights = &weights[(group * J::PAIRS + pair) * STRIPS * slab..][..STRIPS * slab];
                    let (first, second) = weights.split_at(slab);
                    tiles.multiply::<PARTS>(x, [&first[..len], &second[..len]], sums, start > 0);
                }
                if start + len == words {
                    job.finish(panel * PANEL_ROWS, group, sums);
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
            (Ok(out), Output::Add) => Avx512Lanes::load(out).add(Avx512Lanes::load(sums)).store(out),
            (Err(_), Output::Set) => out.copy_from_slice(&sums[..width]),
            (Err(_), Output::Add) => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum),
        }
    }
}
