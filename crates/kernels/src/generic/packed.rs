//! `out = x · wᵀ` for packed weights and activations in 8 bits.
//!
//! For every 32 columns, products of integers are summed exactly. The sum becomes a float, and the output's
//! f32 adds it with both scales: `out += (sum * scale_x) * d`, then the minimum's part. Columns are added in
//! increasing order; the residual of a block is added in the same way after the block. Nothing else affects
//! an output's bits: neither other rows, nor their number, nor which of the functions below computed it.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use super::strip::{Strip, add_scaled};
use super::unpacked::{UnpackedStrip, UnpackedTile};
use crate::output::{Output, SharedOut};
use crate::pack::{Layout, PackedRows, TILE_COLS, TILE_ROWS, bytes_at};
use crate::quantized_rows::{
    FLOAT_START, GROUPS, MAX_PANEL_ROWS, Panel, QuantizedRows, START_8, START_128, block_words,
};
use crate::rows16::PackedRows16;
use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Some strips of a weight, to be multiplied with all rows of x. The facade has checked the shapes.
pub(crate) struct PackedTask<'a> {
    pub(crate) x: &'a QuantizedRows,
    pub(crate) weight: &'a PackedRows,
    /// The strips of the weight that this task computes.
    pub(crate) strips: Range<usize>,
    /// `(x.rows, weight.rows)`
    pub(crate) out: &'a SharedOut<'a>,
    pub(crate) output: Output,
}

/// Strips that are multiplied with all panels before the next ones: few enough to stay in the cache.
const CACHED_STRIPS: usize = 4;
/// Outputs (of 16 features and a row) that are kept on the stack while weights are streamed. By the time the
/// next output of a cache line is computed, the line has left L1 and L2; fetching it would delay the weights.
const STACK_OUTPUTS: usize = 64;
/// From this many panels on (blocks of residuals count too), strips are unpacked first, if the ISA can use
/// that.
const UNPACK_FROM_PANELS: usize = 8;
/// Bytes of unpacked strips that stay in the cache.
const UNPACKED_BYTES: usize = 512 << 10;

thread_local! {
    static UNPACKED: Cell<Vec<UnpackedTile>> = Cell::default();
}

/// Runs code for a panel of `$rows` rows, with the number of rows as a constant.
macro_rules! with_rows {
    ($rows:expr, $constant:ident, $run:expr) => {
        match $rows {
            1 => with_rows!($constant = 1, $run),
            2 => with_rows!($constant = 2, $run),
            3 => with_rows!($constant = 3, $run),
            4 => with_rows!($constant = 4, $run),
            5 => with_rows!($constant = 5, $run),
            6 => with_rows!($constant = 6, $run),
            7 => with_rows!($constant = 7, $run),
            _ => with_rows!($constant = MAX_PANEL_ROWS, $run),
        }
    };
    ($constant:ident = $rows:expr, $run:expr) => {{
        const $constant: usize = $rows;
        $run
    }};
}

/// Runs one task with weights in layout `L`. The microkernel has `PANEL` rows and `STRIPS` strips if there
/// are several panels.
#[inline(always)]
pub(crate) fn packed<L: Layout, R: PackedRows16, const PANEL: usize, const STRIPS: usize>(task: &PackedTask) {
    let blocks: usize = task.x.panels().map(|panel| panel.blocks.len() / block_words(panel.rows)).sum();
    let unpacks = R::SIGNED_OFFSET > 0 && blocks >= UNPACK_FROM_PANELS * (task.x.cols() / TILE_COLS);
    if unpacks && L::LAYOUT.mins.is_some() {
        return unpacked_strips::<L, R, true, PANEL, STRIPS>(task);
    }
    if unpacks {
        return unpacked_strips::<L, R, false, PANEL, STRIPS>(task);
    }
    if task.x.rows() <= MAX_PANEL_ROWS {
        for panel in task.x.panels() {
            with_rows!(panel.rows, M, one_panel::<L, R, M>(task, &panel));
        }
        return;
    }
    for strips in split(&task.strips, CACHED_STRIPS) {
        many_panels::<R, _, PANEL, STRIPS>(task, strips, |strip| packed_strip::<L>(task, strip));
    }
}

/// [`packed`] with strips that are unpacked first.
#[inline(always)]
fn unpacked_strips<L: Layout, R: PackedRows16, const MINS: bool, const PANEL: usize, const STRIPS: usize>(
    task: &PackedTask,
) {
    let blocks = task.x.cols() / TILE_COLS;
    let cached = UNPACKED_BYTES / (blocks * size_of::<UnpackedTile>()) / STRIPS * STRIPS;
    let together = cached.clamp(STRIPS, task.strips.len().max(STRIPS));
    // Taken out instead of borrowed in a closure: see [`take_buffer`](super::matmul::take_buffer).
    let mut tiles = UNPACKED.take();
    if tiles.len() < together * blocks {
        tiles.resize(together * blocks, UnpackedTile::EMPTY);
    }
    for strips in split(&task.strips, together) {
        for (strip, tiles) in strips.clone().zip(tiles.chunks_exact_mut(blocks)) {
            let stored = task.weight.strip(strip).chunks_exact(L::LAYOUT.bytes);
            for (tile, stored) in tiles.iter_mut().zip(stored) {
                tile.fill::<R, L>(stored);
            }
        }
        let first = strips.start;
        let unpacked = |strip: usize| UnpackedStrip::<MINS>(&tiles[(strip - first) * blocks..][..blocks]);
        many_panels::<R, _, PANEL, STRIPS>(task, strips, unpacked);
    }
    UNPACKED.set(tiles);
}

/// Ranges of `len` elements that cover `range`; the last may be shorter.
fn split(range: &Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.clone().step_by(len).map(move |start| start..(start + len).min(end))
}

/// Multiplies the only panel of x, of M rows, with all strips of a task. Each weight is read once, in one
/// stream.
#[inline(always)]
fn one_panel<L: Layout, R: PackedRows16, const M: usize>(task: &PackedTask, panel: &Panel) {
    let mut outputs = [MaybeUninit::<R::Floats>::uninit(); STACK_OUTPUTS];
    for strips in split(&task.strips, const { STACK_OUTPUTS / M }) {
        for (strip, outputs) in strips.clone().zip(outputs.chunks_exact_mut(M)) {
            let sums = microkernel::<R, PackedStrip<L>, M, 1>(
                [packed_strip::<L>(task, strip)],
                panel,
                prefetch_ahead::<R, L>,
            );
            for m in 0..M {
                outputs[m].write(sums[m][0]);
            }
        }
        for (strip, outputs) in strips.zip(outputs.chunks_exact(M)) {
            for m in 0..M {
                // SAFETY: the loop above wrote the outputs of each of these strips.
                let sums = unsafe { outputs[m].assume_init() };
                write_outputs::<R>(task, panel.first + m, strip * TILE_ROWS, sums);
            }
        }
    }
}

/// Multiplies all panels of x with some strips.
#[inline(always)]
fn many_panels<R: PackedRows16, S: Strip, const PANEL: usize, const STRIPS: usize>(
    task: &PackedTask,
    strips: Range<usize>,
    tiles_of: impl Fn(usize) -> S,
) {
    for panel in task.x.panels() {
        let mut strip = strips.start;
        while panel.rows == PANEL && strip + STRIPS <= strips.end {
            multiply_strips::<R, S, PANEL, STRIPS>(
                task,
                strip,
                std::array::from_fn(|n| tiles_of(strip + n)),
                &panel,
            );
            strip += STRIPS;
        }
        for strip in strip..strips.end {
            one_strip::<R, S>(task, strip, tiles_of(strip), &panel);
        }
    }
}

/// Multiplies a panel of any number of rows with one strip.
#[inline(always)]
fn one_strip<R: PackedRows16, S: Strip>(task: &PackedTask, strip: usize, tiles: S, panel: &Panel) {
    with_rows!(panel.rows, M, multiply_strips::<R, S, M, 1>(task, strip, [tiles], panel));
}

/// Multiplies a panel of M rows with N strips and writes the outputs.
#[inline(always)]
fn multiply_strips<R: PackedRows16, S: Strip, const M: usize, const N: usize>(
    task: &PackedTask,
    strip: usize,
    strips: [S; N],
    panel: &Panel,
) {
    let sums = microkernel::<R, S, M, N>(strips, panel, |_| {});
    for n in 0..N {
        for m in 0..M {
            write_outputs::<R>(task, panel.first + m, (strip + n) * TILE_ROWS, sums[m][n]);
        }
    }
}

/// The products of a panel of M rows and N strips. `prefetch` is called with each tile of the first strip.
#[inline(always)]
fn microkernel<R: PackedRows16, S: Strip, const M: usize, const N: usize>(
    strips: [S; N],
    panel: &Panel,
    prefetch: impl Fn(S::Tile),
) -> [[R::Floats; N]; M] {
    let mut sums = [[R::splat(0.0); N]; M];
    for block in panel.blocks.chunks_exact(const { block_words(M) }) {
        let (index, words) = (block[0] as usize, &block[1..]);
        let mut tiles = [strips[0].tile(index); N];
        for n in 1..N {
            tiles[n] = strips[n].tile(index);
        }
        prefetch(tiles[0]);
        S::multiply_tiles::<R, M, N>(tiles, words, &mut sums);
    }
    sums
}

/// A strip in packed form.
struct PackedStrip<'a, L>(&'a [u8], PhantomData<L>);

#[inline(always)]
fn packed_strip<'a, L: Layout>(task: &PackedTask<'a>, strip: usize) -> PackedStrip<'a, L> {
    PackedStrip(task.weight.strip(strip), PhantomData)
}

/// Prefetches what follows `tile` in the stream of weights.
#[inline(always)]
fn prefetch_ahead<R: PackedRows16, L: Layout>(tile: &[u8]) {
    for line in (0..L::LAYOUT.bytes).step_by(64) {
        R::prefetch_stream(tile.as_ptr().wrapping_add(line));
    }
}

impl<L> Clone for PackedStrip<'_, L> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<L> Copy for PackedStrip<'_, L> {}

impl<'a, L: Layout> Strip for PackedStrip<'a, L> {
    type Tile = &'a [u8];

    #[inline(always)]
    fn tile(self, index: usize) -> &'a [u8] {
        // Wrapping, although nothing overflows: this runs for every 32 columns.
        &self.0[index.wrapping_mul(L::LAYOUT.bytes)..][..L::LAYOUT.bytes]
    }

    #[inline(always)]
    fn multiply_tiles<R: PackedRows16, const M: usize, const N: usize>(
        tiles: [&'a [u8]; N],
        words: &[u32],
        sums: &mut [[R::Floats; N]; M],
    ) {
        let layout = const { L::LAYOUT };
        let mut dots = [[R::start(FLOAT_START); N]; M];
        let zero_point = if layout.stores_bytes { R::SIGNED_OFFSET } else { layout.zero_point };
        if zero_point > 0 {
            for m in 0..M {
                let (kind, factor) =
                    if zero_point == 128 { (START_128, 1) } else { (START_8, zero_point / 8) };
                let start = (words[kind * M + m] as i32).wrapping_sub(FLOAT_START).wrapping_mul(factor);
                dots[m] = [R::start(start.wrapping_add(FLOAT_START)); N];
            }
        }
        if layout.stores_bytes {
            for group in 0..GROUPS {
                for n in 0..N {
                    let weights = R::bytes(bytes_at(tiles[n], layout.groups + 64 * group));
                    for m in 0..M {
                        dots[m][n] = R::dot_signed(dots[m][n], weights, words[group * M + m]);
                    }
                }
            }
        } else {
            dot_nibbles::<R, L, 0, 1, M, N>(tiles, words, &mut dots);
            dot_nibbles::<R, L, 2, 3, M, N>(tiles, words, &mut dots);
            if layout.high_bits.is_some() {
                fold_all::<R, M, N>(&mut dots);
            }
            dot_nibbles::<R, L, 4, 5, M, N>(tiles, words, &mut dots);
            dot_nibbles::<R, L, 6, 7, M, N>(tiles, words, &mut dots);
            fold_all::<R, M, N>(&mut dots);
        }
        for n in 0..N {
            let scales = R::halves(bytes_at(tiles[n], 0));
            // `map` would need a closure, which would be compiled without the ISA's instructions.
            #[allow(clippy::manual_map)]
            let mins = match layout.mins {
                Some(mins) => Some(R::halves(bytes_at(tiles[n], mins))),
                None => None,
            };
            add_scaled::<R, M, N>(&dots, words, n, scales, mins, sums);
        }
    }
}

/// Multiplies groups LOW and HIGH, whose nibbles share bytes.
#[inline(always)]
fn dot_nibbles<
    R: PackedRows16,
    L: Layout,
    const LOW: usize,
    const HIGH: usize,
    const M: usize,
    const N: usize,
>(
    tiles: [&[u8]; N],
    words: &[u32],
    dots: &mut [[R::Sums; N]; M],
) {
    let layout = const { L::LAYOUT };
    for n in 0..N {
        let (mut low, mut high) = R::nibbles(R::bytes(bytes_at(tiles[n], layout.groups + 32 * LOW)));
        if let Some(plane) = layout.high_bits {
            let plane = R::bytes(bytes_at(tiles[n], plane));
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
fn fold_all<R: PackedRows16, const M: usize, const N: usize>(dots: &mut [[R::Sums; N]; M]) {
    for m in 0..M {
        for n in 0..N {
            dots[m][n] = R::fold(dots[m][n]);
        }
    }
}

/// Sets or adds to the outputs of `row`: 16 features from `feature` on, or as many as there are.
#[inline(always)]
fn write_outputs<R: PackedRows16>(task: &PackedTask, row: usize, feature: usize, sums: R::Floats) {
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
