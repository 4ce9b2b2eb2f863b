//! `out = x · wᵀ` for packed weights and activations in 8 bits.
//!
//! For every 32 columns, products of integers are summed exactly. The sum becomes a float, and the output's
//! f32 adds it with both scales: `out += (sum * scale_x) * d`, then the minimum's part. Columns are added in
//! increasing order; the residual of a block is added in the same way after the block. Nothing else affects
//! an output's bits: neither other rows, nor their number, nor which of the functions below computed it.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use super::strip::{Part, Strip, for_each_group, quad};
use super::tile::Tile;
use crate::output::{Output, SharedOut};
use crate::pack::PackedRows;
use crate::packable::Packable;
use crate::quantized_rows::{GROUPS, Panel, QuantizedRows, block_words};
use crate::rows16::PackedRows16;
use crate::tile::TILE_ROWS;
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
/// Runs code for a panel of `$rows` rows, with the number of rows as a constant. Given a maximum, it does
/// nothing for more rows.
macro_rules! with_rows {
    ($rows:expr, at most $most:expr, $constant:ident, $run:expr) => {
        $crate::generic::packed::with_rows!($rows, $constant, {
            if const { $constant <= $most } {
                $run
            }
        })
    };
    ($rows:expr, $constant:ident, $run:expr) => {
        match $rows {
            1 => $crate::generic::packed::with_rows!($constant = 1, $run),
            2 => $crate::generic::packed::with_rows!($constant = 2, $run),
            3 => $crate::generic::packed::with_rows!($constant = 3, $run),
            4 => $crate::generic::packed::with_rows!($constant = 4, $run),
            5 => $crate::generic::packed::with_rows!($constant = 5, $run),
            6 => $crate::generic::packed::with_rows!($constant = 6, $run),
            7 => $crate::generic::packed::with_rows!($constant = 7, $run),
            _ => {
                $crate::generic::packed::with_rows!($constant = $crate::quantized_rows::MAX_PANEL_ROWS, $run)
            }
        }
    };
    ($constant:ident = $rows:expr, $run:expr) => {{
        const $constant: usize = $rows;
        $run
    }};
}
pub(crate) use with_rows;

/// Runs one task of M rows with weights of type `P`.
#[inline(always)]
pub(crate) fn few_rows<P: Packable, R: PackedRows16, const M: usize>(task: &PackedTask) {
    for panel in task.x.panels() {
        one_panel::<P, R, M>(task, &panel);
    }
}

/// Runs one task of several panels, which all unpack the weights in registers: `multiply` is
/// [`multiply_packed`] for a number of rows known at run time. ISAs that unpack strips for several panels
/// never call it.
#[inline(always)]
pub(crate) fn many_rows(task: &PackedTask, multiply: impl Fn(&Range<usize>, &Panel)) {
    for strips in split(&task.strips, CACHED_STRIPS) {
        for panel in task.x.panels() {
            multiply(&strips, &panel);
        }
    }
}

/// Multiplies a panel of M rows with some strips of type `P`, `STRIPS` at a time.
#[inline(always)]
pub(crate) fn multiply_packed<P: Packable, R: PackedRows16, const M: usize, const STRIPS: usize>(
    task: &PackedTask,
    strips: &Range<usize>,
    panel: &Panel,
) {
    multiply_panel::<R, _, M, STRIPS>(task, strips, panel, |strip| packed_strip::<P>(task, strip), || {});
}

/// Ranges of `len` elements that cover `range`; the last may be shorter.
pub(super) fn split(range: &Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.clone().step_by(len).map(move |start| start..(start + len).min(end))
}

/// Multiplies the only panel of x, of M rows, with all strips of a task. Each weight is read once, in one
/// stream.
#[inline(always)]
fn one_panel<P: Packable, R: PackedRows16, const M: usize>(task: &PackedTask, panel: &Panel) {
    let prefetch = R::stream_prefetch();
    let mut outputs = [MaybeUninit::<R::Floats>::uninit(); STACK_OUTPUTS];
    for strips in split(&task.strips, const { STACK_OUTPUTS / M }) {
        for (strip, outputs) in strips.clone().zip(outputs.chunks_exact_mut(M)) {
            let sums =
                microkernel::<R, PackedStrip<P>, M, 1>([packed_strip::<P>(task, strip)], panel, |tile| {
                    tile.prefetch_ahead(prefetch)
                });
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

/// Multiplies a panel of M rows with some strips, `STRIPS` at a time. `prefetch` is called for every tile.
#[inline(always)]
pub(super) fn multiply_panel<R: PackedRows16, S: Strip<R>, const M: usize, const STRIPS: usize>(
    task: &PackedTask,
    strips: &Range<usize>,
    panel: &Panel,
    tiles_of: impl Fn(usize) -> S,
    prefetch: impl Fn(),
) {
    let mut strip = strips.start;
    while strip + STRIPS <= strips.end {
        let strips = std::array::from_fn(|n| tiles_of(strip + n));
        multiply_strips::<R, S, M, STRIPS>(task, strip, strips, panel, &prefetch);
        strip += STRIPS;
    }
    for strip in strip..strips.end {
        multiply_strips::<R, S, M, 1>(task, strip, [tiles_of(strip)], panel, &prefetch);
    }
}

/// Multiplies a panel of M rows with N strips and writes the outputs.
#[inline(always)]
fn multiply_strips<R: PackedRows16, S: Strip<R>, const M: usize, const N: usize>(
    task: &PackedTask,
    strip: usize,
    strips: [S; N],
    panel: &Panel,
    prefetch: &impl Fn(),
) {
    let sums = microkernel::<R, S, M, N>(strips, panel, |_| prefetch());
    for n in 0..N {
        for m in 0..M {
            write_outputs::<R>(task, panel.first + m, (strip + n) * TILE_ROWS, sums[m][n]);
        }
    }
}

/// The products of a panel of M rows and N strips. `prefetch` is called with each tile of the first strip.
#[inline(always)]
fn microkernel<R: PackedRows16, S: Strip<R>, const M: usize, const N: usize>(
    strips: [S; N],
    panel: &Panel,
    prefetch: impl Fn(S::Tile),
) -> [[R::Floats; N]; M] {
    let mut sums = [[R::splat(0.0); N]; M];
    let mut index = 0;
    for block in panel.blocks.chunks_exact(const { block_words(M) }) {
        let words = &block[1..];
        if !R::COUNTS_TILES || index != block[0] as usize {
            // A residual has the tile of the block before.
            index = R::read_index(block[0] as usize);
        }
        let mut tiles = [strips[0].tile(index); N];
        for n in 1..N {
            tiles[n] = strips[n].tile(index);
        }
        prefetch(tiles[0]);
        S::multiply_tiles::<M, N>(tiles, words, &mut sums);
        index = index.wrapping_add(1);
    }
    sums
}

/// A strip in packed form.
struct PackedStrip<'a, P>(&'a [u8], PhantomData<P>);

#[inline(always)]
fn packed_strip<'a, P: Packable>(task: &PackedTask<'a>, strip: usize) -> PackedStrip<'a, P> {
    PackedStrip(task.weight.strip(strip), PhantomData)
}

impl<P> Clone for PackedStrip<'_, P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for PackedStrip<'_, P> {}

impl<'a, P: Packable, R: PackedRows16> Strip<R> for PackedStrip<'a, P> {
    type Tile = Tile<'a, P>;

    #[inline(always)]
    fn tile(self, index: usize) -> Self::Tile {
        Tile::of_strip(self.0, index)
    }

    #[inline(always)]
    fn multiply_tiles<const M: usize, const N: usize>(
        tiles: [Self::Tile; N],
        words: &[u32],
        sums: &mut [[R::Floats; N]; M],
    ) {
        multiply_part::<R, P, 0, M, N>(tiles, words, sums);
        if const { P::LAYOUT.scales == 2 } {
            multiply_part::<R, P, 1, M, N>(tiles, words, sums);
        }
    }
}

#[inline(always)]
const fn part<P: Packable, const HALF: usize>() -> Part {
    Part { scales: P::LAYOUT.scales, half: HALF, joined: P::LAYOUT.is_paired() }
}

/// Multiplies the columns of the tiles, or half `HALF` of them if there are two scales for each row.
#[inline(always)]
fn multiply_part<R: PackedRows16, P: Packable, const HALF: usize, const M: usize, const N: usize>(
    tiles: [Tile<P>; N],
    words: &[u32],
    sums: &mut [[R::Floats; N]; M],
) {
    let layout = const { P::LAYOUT };
    let part = part::<P, HALF>();
    let zero_point = if const { P::LAYOUT.is_signed() } { R::SIGNED_OFFSET } else { layout.zero_point };
    let mut dots = [[R::start(0); N]; M];
    for m in 0..M {
        dots[m] = [part.start_sums::<R, M>(words, m, zero_point); N];
    }
    // Not a loop: the compiler might not unroll it, and would keep the sums in memory.
    dot_part::<R, P, HALF, M, N>(tiles, words, 0, &mut dots);
    if R::REGISTERS == 2 {
        dot_part::<R, P, HALF, M, N>(tiles, words, 1, &mut dots);
    }
    for n in 0..N {
        let scales = tiles[n].scales::<R>(HALF);
        // `then` would need a closure, which would be compiled without the ISA's instructions.
        let mins = if layout.has_mins { Some(tiles[n].mins::<R>(HALF)) } else { None };
        part.add_scaled::<R, M, N>(&dots, words, n, scales, mins, sums);
    }
}

/// Adds the products of one register of rows.
#[inline(always)]
fn dot_part<R: PackedRows16, P: Packable, const HALF: usize, const M: usize, const N: usize>(
    tiles: [Tile<P>; N],
    words: &[u32],
    register: usize,
    dots: &mut [[R::Sums; N]; M],
) {
    let part = part::<P, HALF>();
    for_each_group!(part, GROUP, dot_group::<R, P, GROUP, M, N>(tiles, words, register, dots));
    if !const { P::LAYOUT.is_signed() } {
        fold_all::<R, M, N>(dots, register);
    }
}

/// Adds the products of group `GROUP`.
#[inline(always)]
fn dot_group<R: PackedRows16, P: Packable, const GROUP: usize, const M: usize, const N: usize>(
    tiles: [Tile<P>; N],
    words: &[u32],
    register: usize,
    dots: &mut [[R::Sums; N]; M],
) {
    let is_signed = const { P::LAYOUT.is_signed() };
    for n in 0..N {
        let weights = if const { P::LAYOUT.is_paired() } {
            tiles[n].joined::<R, GROUP, M>()
        } else {
            tiles[n].group::<R, GROUP, M>()
        };
        for m in 0..M {
            let (x, lane) = quad::<GROUP, M>(words, m);
            dots[m][n] = if is_signed {
                R::dot_signed(dots[m][n], register, weights, x, lane)
            } else {
                R::dot(dots[m][n], register, weights, x, lane)
            };
        }
    }
    // The sums of larger numbers have to be folded earlier.
    let groups = const {
        match P::LAYOUT.largest() {
            0..16 => GROUPS,
            16..32 => 4,
            _ => 2,
        }
    };
    if !is_signed && (GROUP + 1).is_multiple_of(groups) && GROUP + 1 < GROUPS {
        fold_all::<R, M, N>(dots, register);
    }
}

#[inline(always)]
fn fold_all<R: PackedRows16, const M: usize, const N: usize>(dots: &mut [[R::Sums; N]; M], register: usize) {
    for m in 0..M {
        for n in 0..N {
            dots[m][n] = R::fold(dots[m][n], register);
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
