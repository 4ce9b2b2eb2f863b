//! Unpacked weights: tiles with one byte per weight, for products of many rows.
//!
//! If every panel unpacked the tiles anew, ISAs with a dot product of bytes would spend a fifth of their time
//! on it. With many panels, some strips are therefore unpacked once, to a buffer that stays in the cache.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use super::packed::{PackedTask, multiply_panel, split};
use super::strip::{Part, Strip, for_each_group, quad};
use super::tile::Tile;
use crate::packable::Packable;
use crate::prefetch::prefetch_l2;
use crate::quantized_rows::{GROUPS, Panel};
use crate::rows16::PackedRows16;
use crate::tile::{TILE_COLS, TILE_ROWS};
use std::cell::Cell;
use std::ops::Range;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

// SAFETY: 64 bytes without padding, of which every pattern is valid.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Line {}

/// A tile whose numbers can be used as they are. It has `SCALES` scales for each row, 1 or 2, and `MINS`
/// minimums, as many or none.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct UnpackedTile<const SCALES: usize, const MINS: usize> {
    pub(crate) scales: [[f32; TILE_ROWS]; SCALES],
    pub(crate) mins: [[f32; TILE_ROWS]; MINS],
    /// The weights in pairs of groups, which [`PackedRows16::store_groups`] wrote. Each is stored as
    /// [`SIGN`](crate::tile::SIGN) says, or as [`PackedRows16::UNPACKED_AS_STORED`] does.
    pub(crate) groups: [[[u8; 64]; 2]; GROUPS / 2],
}

// SAFETY: every field is a multiple of 64 bytes, so there is no padding, and every pattern is valid.
unsafe impl<const SCALES: usize, const MINS: usize> bytemuck::Zeroable for UnpackedTile<SCALES, MINS> {}
// SAFETY: as above.
unsafe impl<const SCALES: usize, const MINS: usize> bytemuck::Pod for UnpackedTile<SCALES, MINS> {}

impl<const SCALES: usize, const MINS: usize> UnpackedTile<SCALES, MINS> {
    #[inline(always)]
    fn fill<R: PackedRows16, P: Packable>(&mut self, tile: Tile<P>) {
        for half in 0..SCALES {
            R::store(tile.scales::<R>(half), &mut self.scales[half]);
        }
        for half in 0..MINS {
            R::store(tile.mins::<R>(half), &mut self.mins[half]);
        }
        let is_ready = R::UNPACKED_AS_STORED || const { P::LAYOUT.is_signed() };
        let more = if is_ready { 0 } else { (R::SIGNED_OFFSET - P::LAYOUT.zero_point) as u8 };
        for_each_group!([0 1 2 3], PAIR, {
            const FIRST: usize = 2 * PAIR;
            const SECOND: usize = 2 * PAIR + 1;
            let (first, second) = (tile.group::<R, FIRST, 1>(), tile.group::<R, SECOND, 1>());
            R::store_groups([R::plus(first, more), R::plus(second, more)], &mut self.groups[PAIR]);
        });
    }
}

/// Bytes of unpacked strips that stay in the cache.
pub(crate) const UNPACKED_BYTES: usize = 640 << 10;
/// Up to this many panels, only the strips of one microkernel are unpacked at once: the products of more take
/// so long that reading their weights does not matter.
const FEW_PANELS: usize = 16;

thread_local! {
    static UNPACKED: Cell<Vec<Line>> = Cell::default();
}

/// Strips of a task's weight that are unpacked at once.
pub(crate) struct UnpackedStrips {
    strips: Range<usize>,
    /// Bytes of an unpacked strip.
    strip_bytes: usize,
    lines: Vec<Line>,
}

impl UnpackedStrips {
    fn tiles<const SCALES: usize, const MINS: usize>(&self) -> &[UnpackedTile<SCALES, MINS>] {
        bytemuck::cast_slice(&self.lines[..self.strips.len() * self.strip_bytes / size_of::<Line>()])
    }

    fn tiles_mut<const SCALES: usize, const MINS: usize>(&mut self) -> &mut [UnpackedTile<SCALES, MINS>] {
        bytemuck::cast_slice_mut(&mut self.lines[..self.strips.len() * self.strip_bytes / size_of::<Line>()])
    }
}

/// The next strips of a task. They are prefetched while those before are multiplied: otherwise memory would
/// be idle.
pub(crate) struct NextStrips<'a> {
    bytes: &'a [u8],
    /// Cache lines that are prefetched with one tile.
    lines: usize,
    /// How often that has been done.
    calls: usize,
}

impl<'a> NextStrips<'a> {
    fn after(unpacked: &UnpackedStrips, task: &PackedTask<'a>) -> Self {
        let end = unpacked.strips.end;
        let bytes = task.weight.strips_bytes(end..(end + unpacked.strips.len()).min(task.strips.end));
        let (panels, blocks) = (task.x.panel_count, task.x.cols() / TILE_COLS);
        let lines = if panels > FEW_PANELS { 0 } else { bytes.len().div_ceil(panels * blocks * 64) };
        NextStrips { bytes, lines, calls: 0 }
    }
}

/// Calls `unpack` and, for each panel of x, `multiply` for all strips of a task, as many at once as stay in
/// the cache. `multiply` is [`multiply`] for a number of rows known at run time. The microkernel has `strips`
/// strips.
#[inline(always)]
pub(crate) fn for_each_cached(
    task: &PackedTask,
    strips: usize,
    unpack: impl Fn(&mut UnpackedStrips),
    multiply: impl Fn(&UnpackedStrips, &Panel, &mut NextStrips),
) {
    let layout = task.weight.layout();
    let scales = layout.scales * if layout.has_mins { 2 } else { 1 };
    let strip_bytes = task.x.cols() / TILE_COLS * (scales + GROUPS) * size_of::<Line>();
    let cached = match task.x.panel_count {
        ..=FEW_PANELS => strips,
        _ => UNPACKED_BYTES / strip_bytes / strips * strips,
    };
    let together = cached.clamp(strips, task.strips.len().max(strips));
    // Taken out instead of borrowed in a closure: see [`take_buffer`](super::matmul::take_buffer).
    let mut lines = UNPACKED.take();
    let len = together * strip_bytes / size_of::<Line>();
    if lines.len() < len {
        lines.resize(len, Line([0; 64]));
    }
    let mut unpacked = UnpackedStrips { strips: 0..0, strip_bytes, lines };
    for strips in split(&task.strips, together) {
        unpacked.strips = strips;
        unpack(&mut unpacked);
        let mut next = NextStrips::after(&unpacked, task);
        for panel in task.x.panels() {
            multiply(&unpacked, &panel, &mut next);
        }
    }
    UNPACKED.set(unpacked.lines);
}

/// Unpacks the strips.
#[inline(always)]
pub(crate) fn unpack<P: Packable, R: PackedRows16>(task: &PackedTask, unpacked: &mut UnpackedStrips) {
    // The number of minimums must be a constant.
    match const { (P::LAYOUT.scales, P::LAYOUT.has_mins) } {
        (1, false) => unpack_tiles::<P, R, 1, 0>(task, unpacked),
        (1, true) => unpack_tiles::<P, R, 1, 1>(task, unpacked),
        (_, false) => unpack_tiles::<P, R, 2, 0>(task, unpacked),
        (_, true) => unpack_tiles::<P, R, 2, 2>(task, unpacked),
    }
}

#[inline(always)]
fn unpack_tiles<P: Packable, R: PackedRows16, const SCALES: usize, const MINS: usize>(
    task: &PackedTask,
    unpacked: &mut UnpackedStrips,
) {
    let prefetch = R::stream_prefetch();
    let first = unpacked.strips.start;
    let blocks = task.x.cols() / TILE_COLS;
    for (index, tiles) in unpacked.tiles_mut::<SCALES, MINS>().chunks_exact_mut(blocks).enumerate() {
        let strip = task.weight.strip(first + index);
        for (index, unpacked) in tiles.iter_mut().enumerate() {
            let tile = Tile::of_strip(strip, index);
            tile.prefetch_ahead(prefetch);
            unpacked.fill::<R, P>(tile);
        }
    }
}

/// Multiplies a panel of M rows with the unpacked strips, `STRIPS` at a time. `strip_of` makes a strip of its
/// tiles.
#[inline(always)]
pub(crate) fn multiply<
    'a,
    R: PackedRows16,
    S: Strip<R>,
    const SCALES: usize,
    const MINS: usize,
    const M: usize,
    const STRIPS: usize,
>(
    task: &PackedTask,
    unpacked: &'a UnpackedStrips,
    panel: &Panel,
    next: &mut NextStrips,
    strip_of: impl Fn(&'a [UnpackedTile<SCALES, MINS>]) -> S,
) {
    let (first, blocks) = (unpacked.strips.start, task.x.cols() / TILE_COLS);
    let tiles = unpacked.tiles::<SCALES, MINS>();
    let strip = |strip: usize| strip_of(&tiles[(strip - first) * blocks..][..blocks]);
    let (bytes, lines, calls) = (next.bytes, next.lines, Cell::new(next.calls));
    let prefetch = || {
        // Wrapping, although nothing overflows: this runs for every 32 columns.
        let first = calls.get().wrapping_mul(lines);
        for line in first..first.wrapping_add(lines) {
            prefetch_l2(bytes.as_ptr().wrapping_add(64 * line));
        }
        calls.set(calls.get().wrapping_add(1));
    };
    multiply_panel::<R, _, M, STRIPS>(task, &unpacked.strips, panel, strip, prefetch);
    next.calls = calls.get();
}

/// A strip of unpacked tiles.
#[derive(Clone, Copy)]
pub(crate) struct UnpackedStrip<'a, const SCALES: usize, const MINS: usize>(
    pub(crate) &'a [UnpackedTile<SCALES, MINS>],
);

impl<'a, R: PackedRows16, const SCALES: usize, const MINS: usize> Strip<R>
    for UnpackedStrip<'a, SCALES, MINS>
{
    type Tile = &'a UnpackedTile<SCALES, MINS>;

    #[inline(always)]
    fn tile(self, index: usize) -> Self::Tile {
        &self.0[index]
    }

    #[inline(always)]
    fn multiply_tiles<const M: usize, const N: usize>(
        tiles: [Self::Tile; N],
        words: &[u32],
        sums: &mut [[R::Floats; N]; M],
    ) {
        multiply_part::<R, SCALES, MINS, 0, M, N>(tiles, words, sums);
        if SCALES == 2 {
            multiply_part::<R, SCALES, MINS, 1, M, N>(tiles, words, sums);
        }
    }
}

/// Multiplies the columns of the tiles, or half `HALF` of them if there are two scales for each row.
#[inline(always)]
fn multiply_part<
    R: PackedRows16,
    const SCALES: usize,
    const MINS: usize,
    const HALF: usize,
    const M: usize,
    const N: usize,
>(
    tiles: [&UnpackedTile<SCALES, MINS>; N],
    words: &[u32],
    sums: &mut [[R::Floats; N]; M],
) {
    let part = Part { scales: SCALES, half: HALF, joined: false };
    let mut dots = [[R::start(0); N]; M];
    for m in 0..M {
        dots[m] = [part.start_sums::<R, M>(words, m, R::SIGNED_OFFSET); N];
    }
    // Not a loop: the compiler might not unroll it, and would keep the sums in memory.
    dot_part::<R, SCALES, MINS, HALF, M, N>(tiles, words, 0, &mut dots);
    if R::REGISTERS == 2 {
        dot_part::<R, SCALES, MINS, HALF, M, N>(tiles, words, 1, &mut dots);
    }
    for n in 0..N {
        let mins = if MINS > 0 { Some(R::load(&tiles[n].mins[HALF])) } else { None };
        part.add_scaled::<R, M, N>(&dots, words, n, R::load(&tiles[n].scales[HALF]), mins, sums);
    }
}

/// Adds the products of one register of rows.
#[inline(always)]
fn dot_part<
    R: PackedRows16,
    const SCALES: usize,
    const MINS: usize,
    const HALF: usize,
    const M: usize,
    const N: usize,
>(
    tiles: [&UnpackedTile<SCALES, MINS>; N],
    words: &[u32],
    register: usize,
    dots: &mut [[R::Sums; N]; M],
) {
    for_each_group!(Part { scales: SCALES, half: HALF, joined: false }, GROUP, {
        let mut weights = [R::bytes::<M>(&tiles[0].groups[GROUP / 2][GROUP % 2]); N];
        for n in 1..N {
            weights[n] = R::bytes::<M>(&tiles[n].groups[GROUP / 2][GROUP % 2]);
        }
        for m in 0..M {
            let (x, lane) = quad::<GROUP, M>(words, m);
            for n in 0..N {
                dots[m][n] = R::dot_signed(dots[m][n], register, weights[n], x, lane);
            }
        }
    });
}
