//! Products of many rows with packed weights. `smmla` multiplies 8 columns of two rows of activations with 8
//! columns of two rows of weights, and adds the products to four sums: twice the work of `sdot`.
//!
//! When 32 columns are multiplied, the sums of a pair of rows of activations are brought apart. From then on
//! they go through the same operations as those of `sdot`, so the outputs have the same bits.
//!
//! SAFETY of every block with `smmla` here: the matrix instructions are enabled, because dispatch.rs reaches
//! this ISA's table only after it has seen them on this CPU.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use crate::aarch64::dotprod;
use crate::aarch64::neon::{NeonRows, scaled};
use crate::generic::packed::PackedTask;
use crate::generic::strip::{Part, Strip};
use crate::generic::unpacked::UnpackedTile;
use crate::quantized_rows::{FLOAT_START, MAX_PANEL_ROWS, SCALE, group_word};
use crate::rows16::{PackedRows16, Rows16};
use crate::table::unpacked_kernel;
use crate::tile::TILE_ROWS;
use std::arch::aarch64::*;
use std::arch::asm;

type Rows = NeonRows<true, true>;
type Floats = <Rows as Rows16>::Floats;

/// Rows of a panel. Their float sums take 16 of 32 registers, the integer sums of half of a tile's rows 8.
pub(super) const PANEL_ROWS: usize = 4;
/// Pairs of rows of a panel.
const PAIRS: usize = PANEL_ROWS / 2;
/// The sums of a pair of rows and half of a tile's rows. Each register has two rows of weights for the first
/// row, then the same two for the second.
type PairSums = [int32x4_t; 4];

/// Few rows are multiplied without the matrix instructions: reading the weights takes longer.
#[target_feature(enable = "neon,dotprod,i8mm")]
pub(super) fn packed(task: &PackedTask) {
    if task.x.rows() <= MAX_PANEL_ROWS {
        // SAFETY: the dot product is enabled, and the task is as this function's caller promises.
        return unsafe { (dotprod::TABLE.packed)(task) };
    }
    let many_rows = unpacked_kernel!(
        Rows, MatrixStrip, PANEL_ROWS, 1, #[target_feature(enable = "neon,dotprod,i8mm")]
    );
    many_rows(task);
}

/// A strip of unpacked tiles.
#[derive(Clone, Copy)]
struct MatrixStrip<'a, const SCALES: usize, const MINS: usize>(&'a [UnpackedTile<SCALES, MINS>]);

impl<'a, const SCALES: usize, const MINS: usize> Strip<Rows> for MatrixStrip<'a, SCALES, MINS> {
    type Tile = &'a UnpackedTile<SCALES, MINS>;

    #[inline(always)]
    fn tile(self, index: usize) -> Self::Tile {
        &self.0[index]
    }

    #[inline(always)]
    fn multiply_tiles<const M: usize, const N: usize>(
        tiles: [Self::Tile; N],
        words: &[u32],
        sums: &mut [[Floats; N]; M],
    ) {
        for n in 0..N {
            // Not loops: the compiler might not unroll them, and would keep the sums in memory.
            multiply_part::<SCALES, MINS, 0, 0, M, N>(tiles[n], words, n, sums);
            multiply_part::<SCALES, MINS, 0, 1, M, N>(tiles[n], words, n, sums);
            if SCALES == 2 {
                multiply_part::<SCALES, MINS, 1, 0, M, N>(tiles[n], words, n, sums);
                multiply_part::<SCALES, MINS, 1, 1, M, N>(tiles[n], words, n, sums);
            }
        }
    }
}

/// Multiplies half `ROWS` of the rows of a tile, and its columns, or half `HALF` of them if there are two
/// scales for each row.
#[inline(always)]
fn multiply_part<
    const SCALES: usize,
    const MINS: usize,
    const HALF: usize,
    const ROWS: usize,
    const M: usize,
    const N: usize,
>(
    tile: &UnpackedTile<SCALES, MINS>,
    words: &[u32],
    n: usize,
    sums: &mut [[Floats; N]; M],
) {
    let words = if HALF + ROWS > 0 { after_half::<M, N>(words, 1 - ROWS, sums) } else { words };
    // SAFETY: NEON is part of 64-bit Arm.
    let mut dots = unsafe { [[vdupq_n_s32(FLOAT_START); 4]; PAIRS] };
    if HALF == 0 {
        dot_pair_of_groups::<0, M>(&tile.groups[0][ROWS], words, &mut dots);
        dot_pair_of_groups::<1, M>(&tile.groups[1][ROWS], words, &mut dots);
    }
    if HALF == 1 || SCALES == 1 {
        dot_pair_of_groups::<2, M>(&tile.groups[2][ROWS], words, &mut dots);
        dot_pair_of_groups::<3, M>(&tile.groups[3][ROWS], words, &mut dots);
    }
    let part = Part { scales: SCALES, half: HALF, joined: false };
    for m in 0..M {
        let scale = f32::from_bits(words[SCALE * M + m]);
        for q in 0..2 {
            let (sum, four) = (&mut sums[m][n][2 * ROWS + q], 2 * ROWS + q);
            let dot = scaled(row_of_pair(dots[m / 2], q, m % 2), scale);
            // SAFETY: NEON is part of 64-bit Arm.
            unsafe {
                *sum = vfmaq_f32(*sum, dot, load_four(&tile.scales[HALF], four));
                if MINS > 0 {
                    let mins = load_four(&tile.mins[HALF], four);
                    *sum = vfmaq_n_f32(*sum, mins, part.total::<M>(words, m));
                }
            }
        }
    }
}

/// The same words. The compiler does not know that, and so multiplies them after it has added to the sums of
/// half `half` of the rows. It would begin before, and would run out of registers.
#[inline(always)]
fn after_half<'a, const M: usize, const N: usize>(
    words: &'a [u32],
    half: usize,
    sums: &[[Floats; N]; M],
) -> &'a [u32] {
    let mut at = words.as_ptr();
    for m in 0..M {
        for n in 0..N {
            // SAFETY: the assembly has no instructions.
            unsafe {
                asm!(
                    "/* {at} {0:v} {1:v} */",
                    in(vreg) sums[m][n][2 * half],
                    in(vreg) sums[m][n][2 * half + 1],
                    at = inout(reg) at,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
    }
    // SAFETY: the address is the same.
    unsafe { std::slice::from_raw_parts(at, words.len()) }
}

/// Adds the products of pair `PAIR` of groups, 8 columns, with half of a tile's rows.
#[inline(always)]
fn dot_pair_of_groups<const PAIR: usize, const M: usize>(
    weights: &[u8; 64],
    words: &[u32],
    dots: &mut [PairSums; PAIRS],
) {
    let weights = Rows::bytes::<M>(weights);
    for m in (0..M).step_by(2) {
        let at = group_word(2 * PAIR, M, m);
        // SAFETY: NEON is part of 64-bit Arm; the slices cover what is read.
        let x = unsafe {
            if m + 1 < M {
                vld1q_u32(words[at..][..4].as_ptr())
            } else {
                // A row without a partner. The products of zeros are not used.
                vcombine_u32(vld1_u32(words[at..][..2].as_ptr()), vdup_n_u32(0))
            }
        };
        for r in 0..4 {
            dots[m / 2][r] = smmla(dots[m / 2][r], x, weights[r]);
        }
    }
}

/// `sums` plus the products of 8 bytes of each of two rows of `x` and of `weights`.
#[inline(always)]
fn smmla(mut sums: int32x4_t, x: uint32x4_t, weights: uint8x16_t) -> int32x4_t {
    // SAFETY: the matrix instructions are enabled; see the top of this file. Nothing but these registers is
    // touched.
    unsafe {
        asm!(
            "smmla {sums:v}.4s, {x:v}.16b, {weights:v}.16b",
            sums = inout(vreg) sums,
            x = in(vreg) x,
            weights = in(vreg) weights,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// The sums of row `row`, 0 or 1, of a pair, for the `q`-th four rows of weights.
#[inline(always)]
fn row_of_pair(sums: PairSums, q: usize, row: usize) -> int32x4_t {
    // SAFETY: NEON is part of 64-bit Arm.
    unsafe {
        let (low, high) = (vreinterpretq_s64_s32(sums[2 * q]), vreinterpretq_s64_s32(sums[2 * q + 1]));
        vreinterpretq_s32_s64(if row == 0 { vzip1q_s64(low, high) } else { vzip2q_s64(low, high) })
    }
}

/// The numbers of the `q`-th four rows.
#[inline(always)]
fn load_four(numbers: &[f32; TILE_ROWS], q: usize) -> float32x4_t {
    // SAFETY: NEON is part of 64-bit Arm; the slice covers what is read.
    unsafe { vld1q_f32(numbers[4 * q..][..4].as_ptr()) }
}
