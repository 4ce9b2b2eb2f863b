//! `out = x · wᵀ` for many rows of f32 or bf16 activations. The order of sums differs from `matmul.rs`.
//!
//! The work is divided into slabs: 16 rows of weights (a strip) by 256 columns. A slab is dequantised and
//! transposed, so that a lane is a row of weights. While it is in L1, it is multiplied with all rows of x,
//! one panel at a time, and the weights of the next slab are prefetched. An output is the sum of its slabs.
//! Within a slab the products are added one after the other, with columns in increasing order, whatever the
//! other rows are.
//!
//! A word is one f32, or two bf16 where the ISA has a dot product of bf16. Some ISAs multiply two words of
//! two rows of x at once. For them, a row's words are padded with zeros to an even number, two neighbouring
//! words of a row stay neighbours, and panels have an even number of rows.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use super::dequantize::dequantize_exactly;
use super::gemm_task::TaskKind;
use super::storage::with_storage;
use crate::blocks::WeightType;
use crate::lanes::{LANES, Lanes, padded};
use crate::prefetch::prefetch_l2;
use crate::rows16::{ROW_BYTES, Rows16};
use crate::tile::TILE_ROWS;
use crate::weight::WeightRows;
use std::cell::Cell;
use std::ops::Range;

/// Columns of a slab: whole blocks of every type. The slabs of the microkernel's strips fit into L1 together
/// with a panel.
const SLAB_COLS: usize = 256;

/// The part of a row that does not exist.
static ZEROS: [u8; 4 * SLAB_COLS] = [0; 4 * SLAB_COLS];

/// A word of each row of a strip. Aligned, so that loading it into an AVX-512 register reads only one cache
/// line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Words(pub(crate) [f32; TILE_ROWS]);

impl Words {
    const ZERO: Words = Words([0.0; TILE_ROWS]);
}

#[derive(Default)]
struct Scratch {
    /// `(16 rows, SLAB_COLS)`
    rows: Vec<f32>,
    /// `(words of a slab, strips)`
    slab: Vec<Words>,
    /// The sums of the slabs so far, `(groups of STRIPS strips, weights, rows, strips)`. In `out` they would
    /// be far apart.
    sums: Vec<Words>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Words of a row of `cols` elements.
pub(crate) fn row_words<R: Rows16, const BF16: bool>(cols: usize) -> usize {
    if BF16 { cols.div_ceil(2).next_multiple_of(R::BF16_WORDS) } else { cols }
}

/// Words that are multiplied together.
const fn step<R: Rows16, const BF16: bool>() -> usize {
    if BF16 { R::BF16_WORDS } else { 1 }
}

/// The row counts that the last panel may have, for panels of `panel` rows. [`multiply`] has code for these
/// counts.
pub(crate) const fn tail_rows(panel: usize) -> &'static [usize] {
    match panel {
        12 => &[1, 2, 3, 6, 12],
        8 => &[1, 2, 4, 8],
        6 => &[1, 2, 3, 6],
        4 => &[1, 2, 3, 4],
        _ => panic!("no such panel size"),
    }
}

/// Writes one panel: the rows of `x`, `(rows, cols)`, as words. Missing rows are zeros.
#[inline(always)]
pub(crate) fn pack_rows<R: Rows16, const BF16: bool>(x: &[f32], rows: usize, panel: &mut [u32]) {
    let cols = x.len() / rows;
    let words = row_words::<R, BF16>(cols);
    let panel_rows = panel.len() / words;
    let mut lines = [[0_u32; TILE_ROWS]; TILE_ROWS];
    let mut transposed = [[0.0; TILE_ROWS]; TILE_ROWS];
    for start in (0..words).step_by(TILE_ROWS) {
        for (row, line) in x.chunks_exact(cols).zip(&mut lines) {
            if BF16 {
                *line = round_to_words::<R>(&row[2 * start..cols.min(2 * (start + TILE_ROWS))]);
            } else {
                let numbers = &row[start..cols.min(start + TILE_ROWS)];
                line[..numbers.len()].copy_from_slice(bytemuck::cast_slice(numbers));
            }
        }
        R::transpose(lines.each_ref().map(bytemuck::cast_ref), &mut transposed);
        for (word, rows) in (start..words).zip(&transposed).step_by(const { step::<R, BF16>() }) {
            let out = &mut panel[word * panel_rows..];
            match out.first_chunk_mut() {
                // Writes more than this word. The next words overwrite it.
                Some(out) => *out = rows.map(f32::to_bits),
                None => out.copy_from_slice(&rows.map(f32::to_bits)[..out.len()]),
            }
        }
    }
}

/// Words of up to 32 numbers, padded with zeros.
#[inline(always)]
pub(super) fn round_to_words<R: Rows16>(numbers: &[f32]) -> [u32; TILE_ROWS] {
    let mut words = [0; TILE_ROWS];
    match numbers.try_into() {
        Ok(numbers) => R::round_to_bf16(numbers, &mut words),
        Err(_) => R::round_to_bf16(&padded(numbers), &mut words),
    }
    words
}

/// Rounds numbers to bf16. The words go to the first half.
#[inline(always)]
fn round_in_place<R: Rows16>(numbers: &mut [f32]) {
    for start in (0..numbers.len()).step_by(LANES) {
        let end = numbers.len().min(start + LANES);
        let words = round_to_words::<R>(&numbers[start..end]);
        let out = &mut numbers[start / 2..end.div_ceil(2)];
        out.copy_from_slice(bytemuck::cast_slice(&words[..out.len()]));
    }
}

/// Runs one task with a microkernel of `PANEL` rows and `STRIPS` strips. If `BF16`, a word is two bf16.
#[inline(always)]
pub(crate) fn gemm<'a, L, R, K, const PANEL: usize, const STRIPS: usize, const BF16: bool>(task: &K)
where
    L: Lanes,
    R: Rows16,
    K: TaskKind<'a>,
{
    // Taken out instead of borrowed in a closure: see [`take_buffer`](super::matmul::take_buffer).
    let mut scratch = SCRATCH.take();
    let Scratch { rows, slab, sums } = &mut scratch;
    rows.resize(TILE_ROWS * SLAB_COLS, 0.0);
    slab.resize(row_words::<R, BF16>(SLAB_COLS) * STRIPS, Words::ZERO);
    let cols = task.weight(0).cols();
    let words = row_words::<R, BF16>(cols);
    let x_rows = task.x().len() / words;
    let panels = x_rows.div_ceil(PANEL);
    let group_len = K::WEIGHTS * x_rows * STRIPS;
    sums.resize(task.strips().len().div_ceil(STRIPS) * group_len, Words::ZERO);
    for start in (0..cols).step_by(SLAB_COLS) {
        let slab_cols = start..cols.min(start + SLAB_COLS);
        let (first, len) = (row_words::<R, BF16>(start), row_words::<R, BF16>(slab_cols.len()));
        let groups = task.strips().step_by(STRIPS).zip(sums.chunks_exact_mut(group_len));
        for (strip, sums) in groups {
            for number in 0..K::WEIGHTS {
                let weight = task.weight(number);
                for n in 0..STRIPS {
                    fill_slab::<L, R, STRIPS, BF16>(weight, strip + n, slab_cols.clone(), n, rows, slab);
                }
                let next = Slab { number, strip, cols: slab_cols.clone() }.next::<STRIPS, K>(task);
                for panel in 0..panels {
                    let row = |panel| panel * STRIPS * TILE_ROWS / panels;
                    next.prefetch::<L>(task.weight(next.number), row(panel)..row(panel + 1));
                    let rows = panel * PANEL..x_rows.min((panel + 1) * PANEL);
                    let x = &task.x()[rows.start * words..rows.end * words];
                    let x = &x[first * rows.len()..(first + len) * rows.len()];
                    let at = (number * x_rows + rows.start) * STRIPS;
                    let panel_sums = &mut sums[at..][..rows.len() * STRIPS];
                    multiply::<R, PANEL, STRIPS, BF16>(x, &slab[..len * STRIPS], panel_sums, start > 0);
                    if slab_cols.end == cols && number + 1 == K::WEIGHTS {
                        task.finish::<R, PANEL, STRIPS>(sums, rows, strip);
                    }
                }
            }
        }
    }
    SCRATCH.set(scratch);
}

/// The slabs of some strips that are multiplied together.
struct Slab {
    /// The number of the weight.
    number: usize,
    /// The first strip.
    strip: usize,
    cols: Range<usize>,
}

impl Slab {
    /// What this thread will probably multiply next: another weight, other strips, other columns, or the next
    /// task.
    #[inline(always)]
    fn next<'a, const STRIPS: usize, K: TaskKind<'a>>(self, task: &K) -> Self {
        let Slab { number, strip, cols } = self;
        let all_cols = task.weight(0).cols();
        if number + 1 < K::WEIGHTS {
            Slab { number: number + 1, strip, cols }
        } else if strip + STRIPS < task.strips().end {
            Slab { number: 0, strip: strip + STRIPS, cols }
        } else if cols.end < all_cols {
            let cols = cols.end..all_cols.min(cols.end + SLAB_COLS);
            Slab { number: 0, strip: task.strips().start, cols }
        } else {
            Slab { number: 0, strip: task.strips().end, cols: 0..all_cols.min(SLAB_COLS) }
        }
    }

    /// Prefetches some rows of this slab, as far as they exist.
    #[inline(always)]
    fn prefetch<L: Lanes>(&self, weight: WeightRows, rows: Range<usize>) {
        let first = self.strip * TILE_ROWS;
        for row in first + rows.start..weight.rows().min(first + rows.end) {
            let part = part_of_row(weight, row, &self.cols);
            for line in 0..part.len().div_ceil(ROW_BYTES) {
                prefetch_l2(part.as_ptr().wrapping_add(ROW_BYTES * line));
            }
        }
    }
}

/// The bytes of some columns of a row: whole blocks.
#[inline(always)]
fn part_of_row<'a>(weight: WeightRows<'a>, row: usize, cols: &Range<usize>) -> &'a [u8] {
    let dtype = weight.dtype();
    let bytes_of = |elements: usize| elements / dtype.block_len() * dtype.block_bytes();
    &weight.row(row)[bytes_of(cols.start)..bytes_of(cols.end)]
}

/// Writes a strip's slab to place `place` of the slabs of the microkernel's strips. Rows that do not exist
/// are zeros.
#[inline(always)]
fn fill_slab<L: Lanes, R: Rows16, const STRIPS: usize, const BF16: bool>(
    weight: WeightRows,
    strip: usize,
    cols: Range<usize>,
    place: usize,
    rows: &mut [f32],
    slab: &mut [Words],
) {
    let dtype = weight.dtype();
    let has_words = dtype == if BF16 { WeightType::BF16 } else { WeightType::F32 };
    let len = cols.len() * if BF16 { 2 } else { 4 };
    let first = strip * TILE_ROWS;
    let mut parts = [&ZEROS[..len]; TILE_ROWS];
    let buffers = rows.chunks_exact_mut(SLAB_COLS);
    for ((row, part), buffer) in (first..weight.rows()).zip(&mut parts).zip(buffers) {
        let bytes = part_of_row(weight, row, &cols);
        *part = if has_words {
            bytes
        } else {
            with_storage!(dtype, dequantize_exactly::<L>(bytes, &mut buffer[..cols.len()]));
            if BF16 {
                round_in_place::<R>(&mut buffer[..cols.len()]);
            }
            &bytemuck::cast_slice(buffer)[..len]
        };
    }
    let mut transposed = [[0.0; TILE_ROWS]; TILE_ROWS];
    for start in (0..len).step_by(ROW_BYTES) {
        let mut tails;
        let mut lines = [&[0; ROW_BYTES]; TILE_ROWS];
        if start + ROW_BYTES <= len {
            for (line, part) in lines.iter_mut().zip(parts) {
                *line = part[start..].first_chunk().expect("the parts have `len` bytes");
            }
        } else {
            tails = [[0; ROW_BYTES]; TILE_ROWS];
            for ((line, part), tail) in lines.iter_mut().zip(parts).zip(&mut tails) {
                tail[..len - start].copy_from_slice(&part[start..]);
                *line = tail;
            }
        }
        R::transpose(lines, &mut transposed);
        // The last square may reach beyond the slab's end. What lies there is not used.
        for (k, transposed) in transposed.iter().enumerate() {
            slab[(start / 4 + k) * STRIPS + place] = Words(*transposed);
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
        4 => microkernel::<R, 4, N, BF16>(x, weights, sums, accumulates),
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
    let sums = if const { step::<R, BF16>() == 2 } {
        sums_of_pairs::<R, M, N>(x, weights)
    } else {
        sums_of_words::<R, M, N, BF16>(x, weights)
    };
    // They started from zero, and the earlier sums are added now. Otherwise the compiler keeps a sum in
    // memory, and every iteration waits for it to be stored and loaded.
    let out: &mut [[Words; N]; M] = out.as_chunks_mut().0.first_chunk_mut().expect("M rows of N strips");
    for m in 0..M {
        for n in 0..N {
            let before = if accumulates { R::load(&out[m][n].0) } else { R::splat(0.0) };
            R::store(R::add(before, sums[m][n]), &mut out[m][n].0);
        }
    }
}

/// The products of M rows and N strips, added up word by word.
#[inline(always)]
fn sums_of_words<R: Rows16, const M: usize, const N: usize, const BF16: bool>(
    x: &[u32],
    weights: &[Words],
) -> [[R::Floats; N]; M] {
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
    sums
}

/// The same for two words of two rows of x at once. Their sums with rows 0 to 7 of a strip take the first
/// row's place, those with rows 8 to 15 the second's. M is even: panels have no other number of rows.
#[inline(always)]
fn sums_of_pairs<R: Rows16, const M: usize, const N: usize>(
    x: &[u32],
    weights: &[Words],
) -> [[R::Floats; N]; M] {
    assert!(M.is_multiple_of(2), "panels have pairs of rows");
    let mut sums = [[R::splat(0.0); N]; M];
    let (x, weights) = (x.as_chunks::<M>().0.as_chunks().0, weights.as_chunks::<N>().0.as_chunks().0);
    for (x, weights) in x.iter().zip(weights) {
        let x: &[[u32; M]; 2] = x;
        let weights: &[[Words; N]; 2] = weights;
        for n in 0..N {
            for half in 0..2 {
                let lanes = R::load(&weights[half][n].0);
                for m in (0..M).step_by(2) {
                    let pair = x.as_flattened()[2 * m..].first_chunk().expect("two words of two rows");
                    sums[m + half][n] = R::dot_bf16_pairs(lanes, pair, sums[m + half][n]);
                }
            }
        }
    }
    for m in (0..M).step_by(2) {
        for n in 0..N {
            [sums[m][n], sums[m + 1][n]] = R::apart([sums[m][n], sums[m + 1][n]]);
        }
    }
    sums
}
