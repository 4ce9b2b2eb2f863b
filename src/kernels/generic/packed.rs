//! `out = x · wᵀ` for weights in tiles of 16 rows and activations in 8 bits.
//!
//! For each 32 columns the products of integers are summed exactly; the sum, made a number, is added to
//! the output's f32 with the two scales: `out += (sum * scale_x) * d`, columns in increasing order, then
//! the minimum's part. Where a row is two lines, their sums are added at the end. That is all that decides
//! an output's bits: not the rows beside it, nor how many there are, nor which of the tiles below computed it.

// Counted loops over constant bounds are unrolled into registers; iterators over arrays are not always.
#![allow(clippy::needless_range_loop)]

use crate::kernels::Output;
use crate::kernels::activations::{BLOCK_WORDS, GROUPS, QuantizedRows};
use crate::kernels::pack::{Layout, PackedRows, TILE_ROWS, part, with_layout};
use crate::kernels::pool::SharedOut;
use crate::kernels::rows16::Rows16;
use std::ops::Range;

/// Some strips of a weight against all rows of x. Shapes are checked where tasks are made.
pub(in crate::kernels) struct PackedTask<'a> {
    pub(in crate::kernels) x: &'a QuantizedRows,
    pub(in crate::kernels) weight: &'a PackedRows,
    /// The weight's strips to do.
    pub(in crate::kernels) strips: Range<usize>,
    /// `(x.rows, weight.rows)`
    pub(in crate::kernels) out: &'a SharedOut<'a>,
    pub(in crate::kernels) output: Output,
}

/// Strips that all panels meet before the next ones: few enough to stay in a near cache.
const CACHED_STRIPS: usize = 4;

/// Runs one task. Whole panels of `PANEL` lines, where there are more than one, meet `STRIPS` strips together.
#[inline(always)]
pub(in crate::kernels) fn packed<R: Rows16, const PANEL: usize, const STRIPS: usize>(task: &PackedTask) {
    with_layout!(task.weight.dtype(), strips::<_, R, PANEL, STRIPS>(task));
}

#[inline(always)]
fn strips<L: Layout, R: Rows16, const PANEL: usize, const STRIPS: usize>(task: &PackedTask) {
    // A single panel reads each weight once: one stream.
    let many = task.x.lines() > PANEL;
    let mut strip = task.strips.start;
    while strip < task.strips.end {
        let end = if many { (strip + CACHED_STRIPS).min(task.strips.end) } else { strip + 1 };
        for (first, lines, panel) in task.x.panels() {
            let mut next = strip;
            while many && lines == PANEL && next + STRIPS <= end {
                tile::<R, L, PANEL, STRIPS>(task, next, first, panel);
                next += STRIPS;
            }
            while next < end {
                one_strip::<R, L>(task, next, first, lines, panel);
                next += 1;
            }
        }
        strip = end;
    }
}

/// A panel of any number of lines against one strip.
#[inline(always)]
fn one_strip<R: Rows16, L: Layout>(
    task: &PackedTask,
    strip: usize,
    first: usize,
    rows: usize,
    panel: &[u32],
) {
    match rows {
        1 => tile::<R, L, 1, 1>(task, strip, first, panel),
        2 => tile::<R, L, 2, 1>(task, strip, first, panel),
        3 => tile::<R, L, 3, 1>(task, strip, first, panel),
        4 => tile::<R, L, 4, 1>(task, strip, first, panel),
        5 => tile::<R, L, 5, 1>(task, strip, first, panel),
        6 => tile::<R, L, 6, 1>(task, strip, first, panel),
        7 => tile::<R, L, 7, 1>(task, strip, first, panel),
        _ => tile::<R, L, 8, 1>(task, strip, first, panel),
    }
}

/// M lines of x, a whole panel, against N strips.
#[inline(always)]
fn tile<R: Rows16, L: Layout, const M: usize, const N: usize>(
    task: &PackedTask,
    strip: usize,
    first: usize,
    panel: &[u32],
) {
    let mut sums = [[R::splat(0.0); N]; M];
    let streams: [&[u8]; N] = std::array::from_fn(|n| task.weight.strip(strip + n));
    let mut at = 0_usize;
    // With more panels the strip is soon in a near cache.
    let streams_weights = N == 1 && task.x.lines() == M;
    for words in panel.chunks_exact(BLOCK_WORDS * M) {
        let tiles: [&[u8]; N] = std::array::from_fn(|n| &streams[n][at..][..L::LAYOUT.bytes]);
        if streams_weights {
            for line in (0..L::LAYOUT.bytes).step_by(64) {
                R::prefetch_stream(tiles[0].as_ptr().wrapping_add(line));
            }
        }
        at = at.wrapping_add(L::LAYOUT.bytes);
        block::<R, L, M, N>(tiles, words, &mut sums);
    }
    let per_row = task.x.precision.lines();
    for n in 0..N {
        for m in (0..M).step_by(per_row) {
            let sum = if per_row == 2 && m + 1 < M { R::add(sums[m][n], sums[m + 1][n]) } else { sums[m][n] };
            put::<R>(task, (first + m) / per_row, (strip + n) * TILE_ROWS, sum);
        }
    }
}

/// 32 columns of M lines of x against a tile of each of N strips.
#[inline(always)]
fn block<R: Rows16, L: Layout, const M: usize, const N: usize>(
    tiles: [&[u8]; N],
    words: &[u32],
    sums: &mut [[R::Floats; N]; M],
) {
    let layout = const { L::LAYOUT };
    let scale = |m: usize| f32::from_bits(words[GROUPS * M + m]);
    let total = |m: usize| f32::from_bits(words[(GROUPS + 2) * M + m]);
    let mut dots = [[R::start(0); N]; M];
    let zero_point = if layout.wide { R::SIGNED_OFFSET } else { layout.zero_point };
    if zero_point > 0 {
        for m in 0..M {
            let start = (words[(GROUPS + 1) * M + m] as i32).wrapping_mul(zero_point / 8);
            dots[m] = [R::start(start); N];
        }
    }
    if layout.wide {
        for group in 0..GROUPS {
            for n in 0..N {
                let weights = R::bytes(part(tiles[n], layout.groups + 64 * group));
                for m in 0..M {
                    dots[m][n] = R::dot_signed(dots[m][n], weights, words[group * M + m]);
                }
            }
        }
    } else {
        pair::<R, L, 0, 1, M, N>(tiles, words, &mut dots);
        pair::<R, L, 2, 3, M, N>(tiles, words, &mut dots);
        if layout.high_bits.is_some() {
            fold::<R, M, N>(&mut dots);
        }
        pair::<R, L, 4, 5, M, N>(tiles, words, &mut dots);
        pair::<R, L, 6, 7, M, N>(tiles, words, &mut dots);
        fold::<R, M, N>(&mut dots);
    }
    for n in 0..N {
        let scales = R::halves(part(tiles[n], 0));
        for m in 0..M {
            let dot = R::mul(R::to_floats(dots[m][n]), R::splat(scale(m)));
            sums[m][n] = R::mul_add(dot, scales, sums[m][n]);
        }
        if let Some(mins) = layout.mins {
            let mins = R::halves(part(tiles[n], mins));
            for m in 0..M {
                sums[m][n] = R::mul_add(mins, R::splat(total(m)), sums[m][n]);
            }
        }
    }
}

/// The products of groups LOW and HIGH, whose nibbles share bytes.
#[inline(always)]
fn pair<R: Rows16, L: Layout, const LOW: usize, const HIGH: usize, const M: usize, const N: usize>(
    tiles: [&[u8]; N],
    words: &[u32],
    dots: &mut [[R::Sums; N]; M],
) {
    let layout = const { L::LAYOUT };
    for n in 0..N {
        let (mut low, mut high) = R::nibbles(R::bytes(part(tiles[n], layout.groups + 32 * LOW)));
        if let Some(plane) = layout.high_bits {
            let plane = R::bytes(part(tiles[n], plane));
            low = R::with_high_bit::<LOW>(low, plane);
            high = R::with_high_bit::<HIGH>(high, plane);
        }
        for m in 0..M {
            dots[m][n] = R::dot(dots[m][n], low, words[LOW * M + m]);
            dots[m][n] = R::dot(dots[m][n], high, words[HIGH * M + m]);
        }
    }
}

#[inline(always)]
fn fold<R: Rows16, const M: usize, const N: usize>(dots: &mut [[R::Sums; N]; M]) {
    for m in 0..M {
        for n in 0..N {
            dots[m][n] = R::fold(dots[m][n]);
        }
    }
}

/// Sets or adds to the outputs of `row` for the 16 features from `feature` on, or those that there are.
#[inline(always)]
fn put<R: Rows16>(task: &PackedTask, row: usize, feature: usize, sums: R::Floats) {
    let features = task.weight.rows();
    let len = TILE_ROWS.min(features - feature);
    // SAFETY: this task alone has the features of its strips.
    let out = unsafe { task.out.slice_mut(row * features + feature, len) };
    if let Ok(out) = <&mut [f32; TILE_ROWS]>::try_from(&mut *out) {
        let sums = if task.output == Output::Add { R::add(R::load(out), sums) } else { sums };
        R::store(sums, out);
        return;
    }
    let mut values = [0.0; TILE_ROWS];
    R::store(sums, &mut values);
    for (out, value) in out.iter_mut().zip(values) {
        *out = if task.output == Output::Add { *out + value } else { value };
    }
}
