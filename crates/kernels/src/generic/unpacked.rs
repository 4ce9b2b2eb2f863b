//! Unpacked weights: tiles with one byte per weight, for products of many rows.
//!
//! If every panel unpacked the tiles anew, ISAs with `vpdpbusd` would spend a fifth of their time on it. With
//! many panels, some strips are therefore unpacked once, to a buffer that stays in the cache.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use super::strip::{Strip, add_scaled};
use crate::pack::{Layout, TILE_ROWS, bytes_at};
use crate::quantized_rows::{GROUPS, START_128};
use crate::rows16::PackedRows16;

/// A tile whose numbers can be used as they are.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct UnpackedTile {
    scales: [f32; TILE_ROWS],
    /// Zeros if the type has no minimums.
    mins: [f32; TILE_ROWS],
    /// The weights, each plus 128.
    groups: [[u8; 64]; GROUPS],
}

impl UnpackedTile {
    pub(super) const EMPTY: UnpackedTile =
        UnpackedTile { scales: [0.0; TILE_ROWS], mins: [0.0; TILE_ROWS], groups: [[0; 64]; GROUPS] };

    /// Unpacks a tile.
    #[inline(always)]
    pub(super) fn fill<R: PackedRows16, L: Layout>(&mut self, tile: &[u8]) {
        let layout = const { L::LAYOUT };
        R::store(R::halves(bytes_at(tile, 0)), &mut self.scales);
        if let Some(mins) = layout.mins {
            R::store(R::halves(bytes_at(tile, mins)), &mut self.mins);
        }
        if layout.stores_bytes {
            for (group, out) in self.groups.iter_mut().enumerate() {
                *out = *bytes_at(tile, layout.groups + 64 * group);
            }
            return;
        }
        let more = const { 128 - L::LAYOUT.zero_point as u8 };
        for (pair, [low, high]) in self.groups.as_chunks_mut().0.iter_mut().enumerate() {
            let nibbles: &[u8; 64] = bytes_at(tile, layout.groups + 64 * pair);
            // Wrapping, although nothing overflows: checks would prevent vectorisation.
            for ((low, high), byte) in low.iter_mut().zip(high).zip(nibbles) {
                (*low, *high) = ((byte & 15).wrapping_add(more), (byte >> 4).wrapping_add(more));
            }
        }
        if let Some(plane) = layout.high_bits {
            let plane: &[u8; 64] = bytes_at(tile, plane);
            for (group, out) in self.groups.iter_mut().enumerate() {
                for (out, bits) in out.iter_mut().zip(plane) {
                    *out = out.wrapping_add((bits >> group & 1) << 4);
                }
            }
        }
    }
}

/// A strip of unpacked tiles. `MINS` says whether they have minimums.
#[derive(Clone, Copy)]
pub(super) struct UnpackedStrip<'a, const MINS: bool>(pub(super) &'a [UnpackedTile]);

impl<'a, const MINS: bool> Strip for UnpackedStrip<'a, MINS> {
    type Tile = &'a UnpackedTile;

    #[inline(always)]
    fn tile(self, index: usize) -> &'a UnpackedTile {
        &self.0[index]
    }

    #[inline(always)]
    fn multiply_tiles<R: PackedRows16, const M: usize, const N: usize>(
        tiles: [&'a UnpackedTile; N],
        words: &[u32],
        sums: &mut [[R::Floats; N]; M],
    ) {
        let mut dots = [[R::start(0); N]; M];
        for m in 0..M {
            dots[m] = [R::start(words[START_128 * M + m] as i32); N];
        }
        for group in 0..GROUPS {
            let mut weights = [R::bytes(&tiles[0].groups[group]); N];
            for n in 1..N {
                weights[n] = R::bytes(&tiles[n].groups[group]);
            }
            for m in 0..M {
                for n in 0..N {
                    dots[m][n] = R::dot_signed(dots[m][n], weights[n], words[group * M + m]);
                }
            }
        }
        for n in 0..N {
            let mins = if MINS { Some(R::load(&tiles[n].mins)) } else { None };
            add_scaled::<R, M, N>(&dots, words, n, R::load(&tiles[n].scales), mins, sums);
        }
    }
}
