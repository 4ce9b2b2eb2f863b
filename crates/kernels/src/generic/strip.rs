//! What packed and unpacked strips of weights have in common.

// Counted loops over constant bounds are unrolled into registers; iterators over arrays are not always.
#![allow(clippy::needless_range_loop)]

use crate::quantized_rows::{OFFSET, SCALE, TOTAL};
use crate::rows16::PackedRows16;

/// The tiles of a strip, as they are stored or unpacked.
pub(super) trait Strip: Copy {
    type Tile: Copy;

    fn tile(self, index: usize) -> Self::Tile;
    /// 32 columns of M rows of x against a tile of each of N strips.
    fn multiply_tiles<R: PackedRows16, const M: usize, const N: usize>(
        tiles: [Self::Tile; N],
        words: &[u32],
        sums: &mut [[R::Floats; N]; M],
    );
}

/// Adds the products of 32 columns of M rows and strip `n` to their sums.
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
