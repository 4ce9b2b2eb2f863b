//! `out = x · wᵀ` with AMX tiles of bf16, for many rows of x.
//!
//! The work is divided into slabs: strips of 16 rows of weights by a few hundred columns. The slabs of a
//! task's strips are converted to bf16 and multiplied with all rows of x; the microkernel computes 32 by 32
//! outputs. An output adds its products one after the other, with columns in increasing order, whatever the
//! other rows are.
//!
//! A word is two bf16.

use super::convert::{convert_strip, subtract_bf16};
use super::tiles::{AMX_TILE_ROWS, AMX_TILE_WORDS, AmxTileRow, AmxTiles, SQUARE_SIDE, SquareSums};
use crate::generic::elementwise::gate_mul;
use crate::generic::gemm_task::{GatedTask, GemmTask};
use crate::lanes::{Lanes as _, padded};
use crate::output::Output;
use crate::rows16::Rows16 as _;
use crate::x86_64::avx512::{Avx512Lanes, Avx512Rows};
use std::cell::Cell;

/// Rows of x in a panel: two AMX tiles.
pub(super) const PANEL_ROWS: usize = SQUARE_SIDE;
/// Strips of the microkernel: two AMX tiles.
pub(super) const STRIPS: usize = SQUARE_SIDE / AMX_TILE_ROWS;
/// The most strips of a task. Every task reads all of x, which comes slowly from L2 or L3, so few large tasks
/// are better.
pub(super) const MAX_TASK_STRIPS: usize = 16;
/// The most words of a slab, so that a panel of x stays in L1 while it is multiplied with all strips.
const MAX_SLAB_WORDS: usize = 128;

#[derive(Default)]
struct Scratch {
    /// `(strips, slab)`
    weights: Vec<AmxTileRow>,
    /// `(panels, pairs of strips)`: the sums of the slabs so far. In `out` they would be far apart.
    sums: Vec<SquareSums>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Words of a weight row of `cols` elements, rounded up to whole AMX tiles.
fn weight_words(cols: usize) -> usize {
    cols.div_ceil(2).next_multiple_of(AMX_TILE_WORDS)
}

/// Words of a row of x; each element is a sum of TERMS bf16.
pub(super) fn row_words<const TERMS: usize>(cols: usize) -> usize {
    TERMS * weight_words(cols)
}

/// Writes one panel: the rows of `x`, `(rows, cols)`, as `(words / 16, TERMS, 32 rows, 16 words)`. Missing
/// rows are zeros. The second term is the residual of rounding to the first.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn pack_rows<const TERMS: usize>(x: &[f32], rows: usize, panel: &mut [u32]) {
    let cols = x.len() / rows;
    let (tiles, _) = panel.as_chunks_mut::<{ PANEL_ROWS * AMX_TILE_WORDS }>();
    for (step, terms) in tiles.chunks_exact_mut(TERMS).enumerate() {
        let start = (step * 2 * AMX_TILE_WORDS).min(cols);
        let end = (start + 2 * AMX_TILE_WORDS).min(cols);
        for row in 0..PANEL_ROWS {
            let mut numbers = padded(if row < rows { &x[row * cols..][start..end] } else { &[] });
            pack_row(&mut numbers, row, terms);
        }
    }
}

/// Writes 32 columns of one row of a panel, as [`pack_rows`] does.
#[inline(always)]
fn pack_row(x: &mut [f32; 2 * AMX_TILE_WORDS], row: usize, terms: &mut [[u32; PANEL_ROWS * AMX_TILE_WORDS]]) {
    let last = terms.len() - 1;
    for (number, term) in terms.iter_mut().enumerate() {
        let words = &mut term.as_chunks_mut().0[row];
        Avx512Rows::round_to_bf16(x, words);
        if number < last {
            subtract_bf16(words, x);
        }
    }
}

/// Which weights a task multiplies with all rows of x, and what it does with the sums.
trait TaskKind {
    /// How many weights share x. For every pair of strips of the task, each weight has sums of its own.
    const WEIGHTS: usize;

    /// [`convert_strip`] for a strip of the task; strips of all weights are numbered together.
    fn convert(&self, strip: usize, step: usize, tile_rows: &mut [AmxTileRow]);

    /// Uses the complete sums of the rows from `first` on and a pair of strips, one for each weight.
    fn finish(&self, first: usize, strip_pair: usize, sums: &mut [SquareSums]);
}

/// A plain product: the outputs are the sums.
struct Plain<'a>(&'a GemmTask<'a>);

impl TaskKind for Plain<'_> {
    const WEIGHTS: usize = 1;

    #[inline(always)]
    fn convert(&self, strip: usize, step: usize, tile_rows: &mut [AmxTileRow]) {
        // SAFETY: only `gemm` calls this, and has the same instructions.
        unsafe { convert_strip(self.0.weight, self.0.strips.start + strip, step, tile_rows) };
    }

    #[inline(always)]
    fn finish(&self, first: usize, strip_pair: usize, sums: &mut [SquareSums]) {
        write_outputs(self.0, &sums[0], first, self.0.strips.start + strip_pair * STRIPS);
    }
}

/// A gate and the weight that it gates.
struct Gated<'a, const TERMS: usize>(&'a GatedTask<'a>);

impl<const TERMS: usize> TaskKind for Gated<'_, TERMS> {
    const WEIGHTS: usize = 2;

    #[inline(always)]
    fn convert(&self, strip: usize, step: usize, tile_rows: &mut [AmxTileRow]) {
        let (pair, strip) = (strip / STRIPS, strip % STRIPS);
        let weight = if pair % 2 == 0 { self.0.mlp.gate } else { self.0.mlp.up };
        let strip = self.0.strips.start + pair / 2 * STRIPS + strip;
        // SAFETY: only `gated` calls this, and has the same instructions.
        unsafe { convert_strip(weight, strip, step, tile_rows) };
    }

    #[inline(always)]
    fn finish(&self, first: usize, strip_pair: usize, sums: &mut [SquareSums]) {
        let GatedTask { mlp, out, strips, .. } = self.0;
        let (gate, up) = sums.split_at_mut(1);
        let (gate, up) = (gate[0].0.as_flattened_mut(), up[0].0.as_flattened());
        gate_mul(mlp.activation, gate, up);
        let words = TERMS * PANEL_ROWS * AMX_TILE_WORDS;
        let steps = weight_words(mlp.gate.rows()) / AMX_TILE_WORDS;
        let at = first / PANEL_ROWS * steps + strips.start / STRIPS + strip_pair;
        // SAFETY: this task alone has these features, and panels do not overlap.
        let terms = unsafe { out.slice_mut(at * words, words) }.as_chunks_mut().0;
        for (row, x) in gate.as_chunks_mut().0.iter_mut().enumerate() {
            pack_row(x, row, terms);
        }
    }
}

/// Runs one task.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
pub(super) fn gemm<const TERMS: usize>(task: &GemmTask) {
    multiply::<TERMS, _>(task.x, task.rows, task.weight.cols(), task.strips.len(), &Plain(task));
}

/// Runs one task.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
pub(super) fn gated<const TERMS: usize>(task: &GatedTask) {
    multiply::<TERMS, _>(task.x, task.rows, task.mlp.gate.cols(), task.strips.len(), &Gated::<TERMS>(task));
}

#[inline(always)]
fn multiply<const TERMS: usize, K: TaskKind>(x: &[u32], rows: usize, cols: usize, strips: usize, kind: &K) {
    let words = weight_words(cols);
    let max_words = MAX_SLAB_WORDS / TERMS;
    let slab = words.div_ceil(words.div_ceil(max_words)).next_multiple_of(AMX_TILE_WORDS);
    let pairs = strips.div_ceil(STRIPS) * K::WEIGHTS;
    // Taken out instead of borrowed in a closure: see [`take_buffer`](crate::generic::matmul::take_buffer).
    let mut scratch = SCRATCH.take();
    let Scratch { weights, sums } = &mut scratch;
    weights.resize(pairs * STRIPS * slab, AmxTileRow::ZERO);
    sums.resize(rows.div_ceil(PANEL_ROWS) * pairs, SquareSums::ZERO);
    // SAFETY: this table is reached only after dispatch.rs has seen that AMX is available.
    let tiles = unsafe { AmxTiles::configure() };
    for start in (0..words).step_by(slab) {
        let len = slab.min(words - start);
        for (strip, weights) in weights.chunks_exact_mut(slab).enumerate() {
            kind.convert(strip, start / AMX_TILE_WORDS, &mut weights[..len]);
        }
        let panels = x.chunks_exact(TERMS * PANEL_ROWS * words).zip(sums.chunks_exact_mut(pairs));
        for (panel, (x, sums)) in panels.enumerate() {
            let x = &x[TERMS * start * PANEL_ROWS..][..TERMS * len * PANEL_ROWS];
            for (strip_pair, sums) in sums.chunks_exact_mut(K::WEIGHTS).enumerate() {
                for (weight, sums) in sums.iter_mut().enumerate() {
                    let weights =
                        &weights[(strip_pair * K::WEIGHTS + weight) * STRIPS * slab..][..STRIPS * slab];
                    let (first, second) = weights.split_at(slab);
                    tiles.multiply::<TERMS>(x, [&first[..len], &second[..len]], sums, start > 0);
                }
                if start + len == words {
                    kind.finish(panel * PANEL_ROWS, strip_pair, sums);
                }
            }
        }
    }
    SCRATCH.set(scratch);
}

/// Sets or adds to the outputs of the rows from `first` on and the two strips from `strip` on, as far as they
/// exist.
#[inline(always)]
fn write_outputs(task: &GemmTask, sums: &SquareSums, first: usize, strip: usize) {
    let features = task.weight.rows();
    let feature = strip * AMX_TILE_ROWS;
    let width = SQUARE_SIDE.min((task.strips.end * AMX_TILE_ROWS).min(features) - feature);
    for (row, sums) in (first..task.rows).zip(&sums.0) {
        // SAFETY: this task alone has the features of its strips.
        let out = unsafe { task.out.slice_mut(row * features + feature, width) };
        match (<&mut [f32; SQUARE_SIDE]>::try_from(&mut *out), task.output) {
            (Ok(out), Output::Set) => *out = *sums,
            (Ok(out), Output::Add) => Avx512Lanes::load(out).add(Avx512Lanes::load(sums)).store(out),
            (Err(_), Output::Set) => out.copy_from_slice(&sums[..width]),
            (Err(_), Output::Add) => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum),
        }
    }
}
