//! `out = x · wᵀ` for many rows of f32 or bf16 activations. The order of sums differs from `matmul.rs`.
//!
//! The work is divided into slabs: 16 rows of weights (a strip) by 256 words. A slab is dequantised and
//! transposed, so that a lane is a row of weights. While it is in L1, it is multiplied with all rows of x,
//! one panel at a time. An output is the sum of its slabs. Within a slab the products are added one after the
//! other, with columns in increasing order, whatever the other rows are.
//!
//! A word is one f32, or two bf16 where the ISA has a dot product of bf16.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use super::dequantize::dequantize_exactly;
use super::storage::with_storage;
use crate::lanes::Lanes;
use crate::mlp::Mlp;
use crate::output::{Output, SharedOut};
use crate::rows16::Rows16;
use crate::tile::TILE_ROWS;
use crate::weight::{Weight, WeightRows};
use std::cell::Cell;
use std::ops::Range;

/// Words of a row in a slab: whole blocks of every type. The slabs of the microkernel's strips fit into L1
/// together with a panel.
const SLAB_WORDS: usize = 256;

/// Some strips of a weight, to be multiplied with all rows of x. The facade has checked the shapes.
pub(crate) struct GemmTask<'a> {
    /// Panels of `(words, rows)`. The last panel may have another number of rows, see [`tail_rows`].
    pub(crate) x: &'a [u32],
    /// Rows of x.
    pub(crate) rows: usize,
    pub(crate) weight: Weight<'a>,
    /// The strips of the weight that this task computes.
    pub(crate) strips: Range<usize>,
    /// `(rows, weight.rows)`
    pub(crate) out: &'a SharedOut<'a>,
    pub(crate) output: Output,
}

/// Some strips of a gate and of the weight that it gates, to be multiplied with all rows of x.
pub(crate) struct GatedTask<'a> {
    /// Panels, as in [`GemmTask`].
    pub(crate) x: &'a [u32],
    /// Rows of x.
    pub(crate) rows: usize,
    pub(crate) mlp: &'a Mlp<'a>,
    /// The strips that this task computes, the same of both weights.
    pub(crate) strips: Range<usize>,
    /// `activation(x · gateᵀ) * (x · upᵀ)`, as panels for the next product.
    pub(crate) out: &'a SharedOut<'a, u32>,
}

/// A word of each row of a strip. Aligned, so that loading it into an AVX-512 register reads only one cache
/// line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Words([f32; TILE_ROWS]);

impl Words {
    const ZERO: Words = Words([0.0; TILE_ROWS]);
}

#[derive(Default)]
struct Scratch {
    /// `(16 rows, SLAB_WORDS)`
    rows: Vec<f32>,
    /// `(SLAB_WORDS, strips)`
    slab: Vec<Words>,
    /// The sums of the slabs so far, `(groups of STRIPS strips, rows, strips)`. In `out` they would be far
    /// apart.
    sums: Vec<Words>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Words of a row of `cols` elements.
pub(crate) fn row_words<const BF16: bool>(cols: usize) -> usize {
    if BF16 { cols.div_ceil(2) } else { cols }
}

/// The row counts that the last panel may have, for panels of `panel` rows. [`multiply`] has code for these
/// counts.
pub(crate) const fn tail_rows(panel: usize) -> &'static [usize] {
    match panel {
        12 => &[1, 2, 3, 6, 12],
        6 => &[1, 2, 3, 6],
        4 => &[1, 2, 3, 4],
        _ => panic!("no such panel size"),
    }
}

/// Writes one panel: the rows of `x`, `(rows, cols)`, as words. Missing rows are zeros.
#[inline(always)]
pub(crate) fn pack_rows<const BF16: bool>(x: &[f32], rows: usize, panel: &mut [u32]) {
    let cols = x.len() / rows;
    let panel_rows = panel.len() / row_words::<BF16>(cols);
    if rows < panel_rows {
        panel.fill(0);
    }
    for (m, row) in x.chunks_exact(cols).enumerate() {
        let words = panel.iter_mut().skip(m).step_by(panel_rows);
        if BF16 {
            for (word, pair) in words.zip(row.chunks(2)) {
                *word = round_to_bf16(pair[0]) | pair.get(1).map_or(0, |&x| round_to_bf16(x) << 16);
            }
        } else {
            words.zip(row).for_each(|(word, x)| *word = x.to_bits());
        }
    }
}

/// Rounds to bf16, ties to even.
#[inline(always)]
fn round_to_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    if x.is_nan() { bits >> 16 | 0x40 } else { bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16 }
}

/// Runs one task with a microkernel of `PANEL` rows and `STRIPS` strips. If `BF16`, a word is two bf16.
#[inline(always)]
pub(crate) fn gemm<L: Lanes, R: Rows16, const PANEL: usize, const STRIPS: usize, const BF16: bool>(
    task: &GemmTask,
) {
    let Weight::Rows(weight) = task.weight else { unreachable!("this kernel takes unpacked weights") };
    // Taken out instead of borrowed in a closure: see [`take_buffer`](super::matmul::take_buffer).
    let mut scratch = SCRATCH.take();
    let Scratch { rows, slab, sums } = &mut scratch;
    rows.resize(TILE_ROWS * SLAB_WORDS, 0.0);
    slab.resize(SLAB_WORDS * STRIPS, Words::ZERO);
    let words = row_words::<BF16>(weight.cols());
    let sums_len = task.x.len() / words * STRIPS;
    sums.resize(task.strips.len().div_ceil(STRIPS) * sums_len, Words::ZERO);
    for start in (0..words).step_by(SLAB_WORDS) {
        let len = SLAB_WORDS.min(words - start);
        for (strip, sums) in task.strips.clone().step_by(STRIPS).zip(sums.chunks_exact_mut(sums_len)) {
            for n in 0..STRIPS {
                let weight = if strip + n < task.strips.end { Some(weight) } else { None };
                fill_slab::<L, R, STRIPS, BF16>(weight, strip + n, start..start + len, n, rows, slab);
            }
            let weights = &slab[..len * STRIPS];
            let panels = task.x.chunks(PANEL * words).zip(sums.chunks_mut(PANEL * STRIPS));
            for (number, (x, sums)) in panels.enumerate() {
                let rows = x.len() / words;
                let x = &x[start * rows..(start + len) * rows];
                multiply::<R, PANEL, STRIPS, BF16>(x, weights, sums, start > 0);
                if start + len == words {
                    write_outputs::<R, STRIPS>(task, sums, number * PANEL, strip);
                }
            }
        }
    }
    SCRATCH.set(scratch);
}

/// Writes a strip's slab, or zeros, to place `place` of the slabs of the microkernel's strips.
#[inline(always)]
fn fill_slab<L: Lanes, R: Rows16, const STRIPS: usize, const BF16: bool>(
    weight: Option<WeightRows>,
    strip: usize,
    words: Range<usize>,
    place: usize,
    rows: &mut [f32],
    slab: &mut [Words],
) {
    for (lane, out) in rows.chunks_exact_mut(SLAB_WORDS).enumerate() {
        let row = strip * TILE_ROWS + lane;
        let Some(weight) = weight.filter(|weight| row < weight.rows()) else {
            out.fill(0.0);
            continue;
        };
        let (bytes, dtype) = (weight.row(row), weight.dtype());
        if BF16 {
            let bytes = &bytes[4 * words.start..bytes.len().min(4 * words.end)];
            for (out, pair) in out.iter_mut().zip(bytes.chunks(4)) {
                // With an odd number of columns the last word is half full.
                let bits = pair.iter().rev().fold(0, |bits, &byte| bits << 8 | u32::from(byte));
                *out = f32::from_bits(bits);
            }
        } else {
            let bytes_of = |elements: usize| elements / dtype.block_len() * dtype.block_bytes();
            let bytes = &bytes[bytes_of(words.start)..bytes_of(words.end)];
            let out = &mut out[..words.len()];
            with_storage!(dtype, dequantize_exactly::<L>(bytes, out));
        }
    }
    // The last square may reach beyond the slab's end. What lies there is transposed too, but not used.
    let mut transposed = [[0.0; TILE_ROWS]; TILE_ROWS];
    for start in (0..words.len()).step_by(TILE_ROWS) {
        R::transpose(&rows[start..], SLAB_WORDS, &mut transposed);
        for (k, transposed) in transposed.iter().enumerate() {
            slab[(start + k) * STRIPS + place] = Words(*transposed);
        }
    }
}

/// Multiplies M rows of x, or as many as [`tail_rows`] allows, with N strips, and sets or adds to `sums`.
#[inline(always)]
fn multiply<R: Rows16, const M: usize, const N: usize, const BF16: bool>(
    x: &[u32],
    weights: &[Words],
    sums: &mut [Words],
    accumulates: bool,
) {
    match sums.len() / N {
        rows if rows == M => microkernel::<R, M, N, BF16>(x, weights, sums, accumulates),
        1 => microkernel::<R, 1, N, BF16>(x, weights, sums, accumulates),
        2 => microkernel::<R, 2, N, BF16>(x, weights, sums, accumulates),
        3 => microkernel::<R, 3, N, BF16>(x, weights, sums, accumulates),
        6 => microkernel::<R, 6, N, BF16>(x, weights, sums, accumulates),
        rows => unreachable!("no code for {rows} rows"),
    }
}

/// [`multiply`] for M rows.
#[inline(always)]
fn microkernel<R: Rows16, const M: usize, const N: usize, const BF16: bool>(
    x: &[u32],
    weights: &[Words],
    out: &mut [Words],
    accumulates: bool,
) {
    // Starts from zero and adds the earlier sums at the end. Otherwise the compiler keeps a sum in memory,
    // and every iteration waits for it to be stored and loaded.
    let mut sums = [[R::splat(0.0); N]; M];
    // Arrays instead of slices: a bounds check would keep the sums out of registers.
    for (x, weights) in x.as_chunks::<M>().0.iter().zip(weights.as_chunks::<N>().0) {
        // All weights are loaded first. Loaded inside the loop, they would keep a dozen words of x in
        // registers.
        let mut lanes = [R::splat(0.0); N];
        for n in 0..N {
            lanes[n] = R::load(&weights[n].0);
        }
        for m in 0..M {
            let word = R::splat(f32::from_bits(x[m]));
            for n in 0..N {
                sums[m][n] = match BF16 {
                    true => R::dot_bf16(lanes[n], word, sums[m][n]),
                    false => R::mul_add(lanes[n], word, sums[m][n]),
                };
            }
        }
    }
    let out: &mut [[Words; N]; M] = out.as_chunks_mut().0.first_chunk_mut().expect("M rows of N strips");
    for m in 0..M {
        for n in 0..N {
            let before = if accumulates { R::load(&out[m][n].0) } else { R::splat(0.0) };
            R::store(R::add(before, sums[m][n]), &mut out[m][n].0);
        }
    }
}

/// Writes outputs: the rows from `first` on and the features of the N strips from `strip` on, as far as they
/// exist.
#[inline(always)]
fn write_outputs<R: Rows16, const N: usize>(task: &GemmTask, sums: &[Words], first: usize, strip: usize) {
    let features = task.weight.rows();
    for (row, sums) in (first..task.rows).zip(sums.as_chunks::<N>().0) {
        for n in 0..N.min(task.strips.end - strip) {
            let feature = (strip + n) * TILE_ROWS;
            let width = TILE_ROWS.min(features - feature);
            // SAFETY: this task alone has the features of its strips.
            let out = unsafe { task.out.slice_mut(row * features + feature, width) };
            match (<&mut [f32; TILE_ROWS]>::try_from(&mut *out), task.output) {
                (Ok(out), Output::Set) => *out = sums[n].0,
                (Ok(out), Output::Add) => R::store(R::add(R::load(out), R::load(&sums[n].0)), out),
                (Err(_), Output::Set) => out.copy_from_slice(&sums[n].0[..width]),
                (Err(_), Output::Add) => out.iter_mut().zip(&sums[n].0).for_each(|(out, sum)| *out += sum),
            }
        }
    }
}
