//! Products of many rows with packed weights, which are unpacked first (`generic/unpacked.rs`), for AVX2
//! without `vpdpbusd`.
//!
//! `vpmaddubsw` multiplies bytes and adds pairs of products, in 16 bits. Sums stay in 16 bits for as many
//! groups as fit. The inner loops are assembly of a few instructions: from intrinsics, the compiler makes an
//! order in which more numbers are needed at once than there are registers, and keeps sums in memory.
//!
//! SAFETY of every block here: AVX2, FMA and F16C are enabled, because dispatch.rs reaches this ISA's table
//! only after it has seen them on this CPU. Loads go through references to arrays, or through a pointer to
//! the words of a block, whose number was checked, at a constant offset below that number.

use super::PANEL_ROWS;
use super::rows16::{Avx2Rows, add_pairs, scaled};
use crate::generic::packed::{self, PackedTask, with_rows};
use crate::generic::strip::{Part, Strip};
use crate::generic::unpacked::{self, NextStrips, UnpackedStrips, UnpackedTile};
use crate::packable::{Packable, with_packable};
use crate::quantized_rows::{MAX_PANEL_ROWS, OFFSET, Panel, ROW_WORDS, SCALE, group_word};
use crate::rows16::{PackedRows16, Rows16};
use crate::table::few_rows_kernel;
use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::ops::Range;

type Rows = Avx2Rows<false>;
type Floats = <Rows as Rows16>::Floats;
/// 4 bytes of each row of weights.
type Bytes = <Rows as PackedRows16>::Bytes;
/// Integer sums of a row of x with 16 rows of weights: in 32 bits, or in 16 bits, two for each row.
type Sums = [__m256i; 2];
/// What the sums of each row of x start at, for both halves of a tile.
type Starts = [[i32; MAX_PANEL_ROWS]; 2];

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn packed(task: &PackedTask) {
    if task.x.rows() <= MAX_PANEL_ROWS {
        let few_rows = few_rows_kernel!(Rows, #[target_feature(enable = "avx2,fma,f16c")]);
        return few_rows(task);
    }
    with_packable!(task.weight.dtype(), many_rows::<_>(task));
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
fn many_rows<P: Packable>(task: &PackedTask) {
    // A product of signed bytes takes so many instructions that unpacking gains nothing.
    if const { P::LAYOUT.is_signed() } {
        packed::many_rows(task, |strips, panel| {
            with_rows!(panel.rows, at most PANEL_ROWS, M, multiply_packed::<P, M>(task, strips, panel));
        });
        return;
    }
    unpacked::for_each_cached(
        task,
        1,
        |strips| unpacked::unpack::<P, Rows>(task, strips),
        |strips, panel, next| {
            with_rows!(panel.rows, at most PANEL_ROWS, M, {
                multiply_unpacked::<P, M>(task, strips, panel, next);
            });
        },
    );
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
fn multiply_packed<P: Packable, const M: usize>(task: &PackedTask, strips: &Range<usize>, panel: &Panel) {
    packed::multiply_packed::<P, Rows, M, 1>(task, strips, panel);
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
fn multiply_unpacked<P: Packable, const M: usize>(
    task: &PackedTask,
    strips: &UnpackedStrips,
    panel: &Panel,
    next: &mut NextStrips,
) {
    match const { (P::LAYOUT.scales, P::LAYOUT.has_mins) } {
        (1, false) => multiply::<P, 1, 0, M>(task, strips, panel, next),
        (1, true) => multiply::<P, 1, 1, M>(task, strips, panel, next),
        (_, false) => multiply::<P, 2, 0, M>(task, strips, panel, next),
        (_, true) => multiply::<P, 2, 2, M>(task, strips, panel, next),
    }
}

#[inline(always)]
fn multiply<P: Packable, const SCALES: usize, const MINS: usize, const M: usize>(
    task: &PackedTask,
    strips: &UnpackedStrips,
    panel: &Panel,
    next: &mut NextStrips,
) {
    let strip_of = |tiles| UnsignedStrip::<P, SCALES, MINS>(tiles, PhantomData);
    unpacked::multiply::<Rows, _, SCALES, MINS, M, 1>(task, strips, panel, next, strip_of);
}

/// A strip of unpacked tiles of type `P`.
struct UnsignedStrip<'a, P, const SCALES: usize, const MINS: usize>(
    &'a [UnpackedTile<SCALES, MINS>],
    PhantomData<P>,
);

impl<P, const SCALES: usize, const MINS: usize> Clone for UnsignedStrip<'_, P, SCALES, MINS> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P, const SCALES: usize, const MINS: usize> Copy for UnsignedStrip<'_, P, SCALES, MINS> {}

impl<'a, P: Packable, const SCALES: usize, const MINS: usize> Strip<Rows>
    for UnsignedStrip<'a, P, SCALES, MINS>
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
        sums: &mut [[Floats; N]; M],
    ) {
        assert_eq!(words.len(), ROW_WORDS * M, "the words of M rows");
        let starts = half_starts::<P, M>(words);
        for (n, tile) in tiles.into_iter().enumerate() {
            // SAFETY: see the top of this file.
            unsafe {
                if const { P::LAYOUT.largest() < 32 } {
                    multiply_rows::<P, SCALES, MINS, 0, 6, M, N>(tile, words, &starts, n, sums);
                } else {
                    // Sums leave 16 bits so often that those in 32 bits should be in registers too.
                    multiply_rows::<P, SCALES, MINS, 0, 3, M, N>(tile, words, &starts, n, sums);
                    multiply_rows::<P, SCALES, MINS, 3, 3, M, N>(&*hidden(tile), words, &starts, n, sums);
                }
            }
        }
    }
}

/// What sums start at if there are two scales for each row. All are computed at once, because the compiler
/// then uses vectors.
#[inline(always)]
fn half_starts<P: Packable, const M: usize>(words: &[u32]) -> Starts {
    let mut starts = Starts::default();
    if const { P::LAYOUT.scales == 2 } {
        for (half, starts) in starts.iter_mut().enumerate() {
            let part = Part { scales: 2, half, joined: false };
            for (m, start) in starts[..M].iter_mut().enumerate() {
                *start = part.start::<M>(words, m, P::LAYOUT.zero_point);
            }
        }
    }
    starts
}

/// The same address. The compiler does not know that, and so reads again what is there. Otherwise it would
/// copy what it has read to the stack, for want of registers.
#[inline(always)]
fn hidden<T>(mut at: *const T) -> *const T {
    // SAFETY: the assembly has no instructions.
    unsafe { asm!("/* {0} */", inout(reg) at, options(pure, readonly, nostack, preserves_flags)) };
    at
}

/// Runs code for each row of x from `$from` on, at most `$len` and below `$m`. Its number, counted from
/// `$from`, is a constant.
macro_rules! for_each_row {
    ([$($number:literal)*], $from:expr, $len:expr, $m:expr, $row:ident, $run:expr) => {
        $(if $number < $len && $from + $number < $m {
            const $row: usize = $number;
            $run
        })*
    };
    ($from:expr, $len:expr, $m:expr, $row:ident, $run:expr) => {
        for_each_row!([0 1 2 3 4 5], $from, $len, $m, $row, $run)
    };
}

/// Multiplies a tile with rows `FROM..FROM + LEN` of the M rows of x, and adds to their sums with strip `n`.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn multiply_rows<
    P: Packable,
    const SCALES: usize,
    const MINS: usize,
    const FROM: usize,
    const LEN: usize,
    const M: usize,
    const N: usize,
>(
    tile: &UnpackedTile<SCALES, MINS>,
    words: &[u32],
    starts: &Starts,
    n: usize,
    sums: &mut [[Floats; N]; M],
) {
    if SCALES == 1 {
        return multiply_part::<P, SCALES, MINS, 0, FROM, LEN, M, N>(tile, words, starts, n, sums);
    }
    // SAFETY: the addresses are the same.
    let (starts, again) =
        unsafe { (&*hidden(starts), std::slice::from_raw_parts(hidden(words.as_ptr()), words.len())) };
    multiply_part::<P, SCALES, MINS, 0, FROM, LEN, M, N>(tile, words, starts, n, sums);
    multiply_part::<P, SCALES, MINS, 1, FROM, LEN, M, N>(tile, again, starts, n, sums);
}

/// Does that for the columns that share a scale: all, or half `HALF` of them if there are two scales.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn multiply_part<
    P: Packable,
    const SCALES: usize,
    const MINS: usize,
    const HALF: usize,
    const FROM: usize,
    const LEN: usize,
    const M: usize,
    const N: usize,
>(
    tile: &UnpackedTile<SCALES, MINS>,
    words: &[u32],
    starts: &Starts,
    n: usize,
    sums: &mut [[Floats; N]; M],
) {
    let part = Part { scales: SCALES, half: HALF, joined: false };
    let mut dots = [[_mm256_setzero_si256(); 2]; LEN];
    for_each_row!(FROM, LEN, M, ROW, {
        let start = match SCALES {
            1 => part.start::<M>(words, FROM + ROW, P::LAYOUT.zero_point),
            _ => starts[HALF][FROM + ROW],
        };
        dots[ROW] = [_mm256_set1_epi32(start); 2];
    });
    // Not a closure: one that is not inlined would be compiled without the ISA's instructions.
    macro_rules! weights {
        ($group:expr) => {
            Rows::bytes::<M>(&tile.groups.as_flattened()[$group])
        };
    }
    // Adds the products of groups whose sum fits into 16 bits.
    macro_rules! dot_groups {
        ($first:literal $($group:literal)*) => {{
            let mut in_16_bits = [[_mm256_setzero_si256(); 2]; LEN];
            dot_group::<$first, true, FROM, LEN, M>(weights!($first), words, &mut in_16_bits);
            $(dot_group::<$group, false, FROM, LEN, M>(weights!($group), words, &mut in_16_bits);)*
            for_each_row!(FROM, LEN, M, ROW, {
                for r in 0..2 {
                    dots[ROW][r] = add_pairs(dots[ROW][r], in_16_bits[ROW][r]);
                }
            });
        }};
    }
    // Does the same for two groups whose sum alone fits.
    macro_rules! dot_pair {
        ($pair:literal) => {
            let weights = [weights!(2 * $pair), weights!(2 * $pair + 1)];
            dot_pair::<$pair, FROM, LEN, M>(weights, words, &mut dots);
        };
    }
    match (const { P::LAYOUT.largest() }, SCALES, HALF) {
        (..16, 1, _) => dot_groups!(0 1 2 3 4 5 6 7),
        (..16, _, 0) => dot_groups!(0 1 2 3),
        (..16, _, _) => dot_groups!(4 5 6 7),
        (16..32, _, _) => {
            dot_groups!(0 1 2 3);
            dot_groups!(4 5 6 7);
        }
        (_, _, 0) => {
            dot_pair!(0);
            dot_pair!(1);
        }
        (_, _, _) => {
            dot_pair!(2);
            dot_pair!(3);
        }
    }
    let scales = Rows::load(&tile.scales[HALF]);
    for_each_row!(FROM, LEN, M, ROW, {
        let (m, sums) = (FROM + ROW, &mut sums[FROM + ROW][n]);
        let (scale, offset) = (f32::from_bits(words[SCALE * M + m]), f32::from_bits(words[OFFSET * M + m]));
        *sums = Rows::mul_add(scaled(dots[ROW], scale, offset), scales, *sums);
    });
    if MINS > 0 {
        let mins = Rows::load(&tile.mins[HALF]);
        for_each_row!(FROM, LEN, M, ROW, {
            let sums = &mut sums[FROM + ROW][n];
            *sums = Rows::mul_add(mins, Rows::splat(part.total::<M>(words, FROM + ROW)), *sums);
        });
    }
}

/// Adds the products of a group in 16 bits, or, if `SET`, sets the sums to them.
#[target_feature(enable = "avx2")]
#[inline]
fn dot_group<const GROUP: usize, const SET: bool, const FROM: usize, const LEN: usize, const M: usize>(
    weights: Bytes,
    words: &[u32],
    sums: &mut [Sums; LEN],
) {
    for_each_row!(FROM, LEN, M, ROW, {
        let sums = &mut sums[ROW];
        dot_group_of_row::<GROUP, SET, FROM, ROW, M>(weights, words, sums);
    });
}

#[target_feature(enable = "avx2")]
#[inline]
fn dot_group_of_row<
    const GROUP: usize,
    const SET: bool,
    const FROM: usize,
    const ROW: usize,
    const M: usize,
>(
    weights: Bytes,
    words: &[u32],
    [a, b]: &mut Sums,
) {
    if SET {
        // SAFETY: see the top of this file.
        unsafe {
            asm!(
                "vpbroadcastd {b}, [{words} + {at}]",
                "vpmaddubsw {a}, {w0}, {b}",
                "vpmaddubsw {b}, {w1}, {b}",
                words = in(reg) words.as_ptr(),
                at = const 4 * group_word(GROUP, M, FROM + ROW),
                w0 = in(ymm_reg) weights[0],
                w1 = in(ymm_reg) weights[1],
                a = out(ymm_reg) *a,
                b = out(ymm_reg) *b,
                options(readonly, nostack, preserves_flags),
            );
        }
        return;
    }
    // SAFETY: see the top of this file.
    unsafe {
        asm!(
            "vpbroadcastd {y}, [{words} + {at}]",
            "vpmaddubsw {x}, {w0}, {y}",
            "vpmaddubsw {y}, {w1}, {y}",
            "vpaddw {a}, {a}, {x}",
            "vpaddw {b}, {b}, {y}",
            words = in(reg) words.as_ptr(),
            at = const 4 * group_word(GROUP, M, FROM + ROW),
            w0 = in(ymm_reg) weights[0],
            w1 = in(ymm_reg) weights[1],
            a = inout(ymm_reg) *a,
            b = inout(ymm_reg) *b,
            x = out(ymm_reg) _,
            y = out(ymm_reg) _,
            options(readonly, nostack, preserves_flags),
        );
    }
}

/// Adds the products of groups `2 * PAIR` and `2 * PAIR + 1` in 32 bits. Those of two groups fit into 16
/// bits.
#[target_feature(enable = "avx2")]
#[inline]
fn dot_pair<const PAIR: usize, const FROM: usize, const LEN: usize, const M: usize>(
    weights: [Bytes; 2],
    words: &[u32],
    dots: &mut [Sums; LEN],
) {
    for_each_row!(FROM, LEN, M, ROW, {
        let sums = &mut dots[ROW];
        dot_pair_of_row::<PAIR, FROM, ROW, M>(weights, words, sums);
    });
}

#[target_feature(enable = "avx2")]
#[inline]
fn dot_pair_of_row<const PAIR: usize, const FROM: usize, const ROW: usize, const M: usize>(
    weights: [Bytes; 2],
    words: &[u32],
    [a, b]: &mut Sums,
) {
    // SAFETY: see the top of this file.
    unsafe {
        asm!(
            "vpbroadcastd {y}, [{words} + {first}]",
            "vpbroadcastd {z}, [{words} + {second}]",
            "vpmaddubsw {x}, {w0}, {y}",
            "vpmaddubsw {y}, {w1}, {y}",
            "vpmaddubsw {t}, {w2}, {z}",
            "vpmaddubsw {z}, {w3}, {z}",
            "vpaddw {x}, {x}, {t}",
            "vpaddw {y}, {y}, {z}",
            "vpmaddwd {x}, {x}, {ones}",
            "vpmaddwd {y}, {y}, {ones}",
            "vpaddd {a}, {a}, {x}",
            "vpaddd {b}, {b}, {y}",
            words = in(reg) words.as_ptr(),
            first = const 4 * group_word(2 * PAIR, M, FROM + ROW),
            second = const 4 * group_word(2 * PAIR + 1, M, FROM + ROW),
            w0 = in(ymm_reg) weights[0][0],
            w1 = in(ymm_reg) weights[0][1],
            w2 = in(ymm_reg) weights[1][0],
            w3 = in(ymm_reg) weights[1][1],
            ones = in(ymm_reg) _mm256_set1_epi16(1),
            a = inout(ymm_reg) *a,
            b = inout(ymm_reg) *b,
            t = out(ymm_reg) _,
            x = out(ymm_reg) _,
            y = out(ymm_reg) _,
            z = out(ymm_reg) _,
            options(readonly, nostack, preserves_flags),
        );
    }
}
