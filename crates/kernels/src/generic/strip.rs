//! Code shared by packed and unpacked strips.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use crate::quantized_rows::{OFFSET, SCALE, TOTAL};
use crate::rows16::PackedRows16;

/// The tiles of a strip, packed or unpacked.
pub(super) trait Strip: Copy {
    type Tile: Copy;

    fn tile(self, index: usize) -> Self::Tile;
    /// Multiplies 32 columns of M rows of x with one tile of each of N strips, and adds to `sums`.
    fn multiply_tiles<R: PackedRows16, const M: usize, const N: usize>(
        tiles: [Self::Tile; N],
        words: &[u32],
        sums: &mut [[R::Floats; N]; M],
    );
}

/// Scales the integer sums of 32 columns of M rows and strip `n`, and adds them to `sums`.
#[inline(always)]
pub(super) fn add_scaled<R: PackedRows16, const M: usize, const N: usize>(
    dots: &[[R::Sums; N]; M],
    words: &[u32],
    n: usize,
    scales: R::Floats,
    mins: Option<R::Floats>,
    sums: &mut [[R::Floats; N]; M],
) {
    let word = |kind: usize, m: usize| f32::from_bits(words[kind * M + m]);
    for m in 0..M {
        let dot = R::scaled(dots[m][n], word(SCALE, m), word(OFFSET, m));
        sums[m][n] = R::mul_add(dot, scales, sums[m][n]);
    }
    if let Some(mins) = mins {
        for m in 0..M {
            sums[m][n] = R::mul_add(mins, R::splat(word(TOTAL, m)), sums[m][n]);
        }
    }
}
