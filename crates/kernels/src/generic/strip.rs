//! Code shared by packed and unpacked strips.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use crate::quantized_rows::{FLOAT_START, HALF_SUM, OFFSET, SCALE, START_8, START_128, TOTAL, group_word};
use crate::rows16::PackedRows16;

/// Four words of a block, and the place in them of group `GROUP` of row `m`. If there is only one row, its
/// groups are neighbours, so that four of them are loaded at once. The place does not depend on `m`, because
/// it has to be a constant even where the compiler has not unrolled the loop over rows yet.
#[inline(always)]
pub(super) fn quad<const GROUP: usize, const M: usize>(words: &[u32], m: usize) -> (&[u32; 4], usize) {
    let (at, lane) = if M == 1 { (GROUP / 4 * 4, GROUP % 4) } else { (group_word(GROUP, M, m), 0) };
    (words[at..][..4].try_into().expect("the slice has this length"), lane)
}

/// The tiles of a strip, packed or unpacked, which are multiplied with the instructions of `R`.
pub(crate) trait Strip<R: PackedRows16>: Copy {
    type Tile: Copy;

    fn tile(self, index: usize) -> Self::Tile;
    /// Multiplies 32 columns of M rows of x with one tile of each of N strips, and adds to `sums`.
    fn multiply_tiles<const M: usize, const N: usize>(
        tiles: [Self::Tile; N],
        words: &[u32],
        sums: &mut [[R::Floats; N]; M],
    );
}

/// Runs code for some groups, with the group as a constant. The compiler does not unroll a loop over groups
/// with several rows and strips, and needs a constant to know where a group's bits are.
macro_rules! for_each_group {
    ([$($group:literal)*], $constant:ident, $run:expr) => {
        $({
            const $constant: usize = $group;
            $run
        })*
    };
    ($part:expr, $constant:ident, $run:expr) => {
        if $part.half == 0 {
            for_each_group!([0 1 2 3], $constant, $run);
        }
        if $part.half == 1 || $part.scales == 1 {
            for_each_group!([4 5 6 7], $constant, $run);
        }
    };
}
pub(crate) use for_each_group;

/// The part of a tile that shares a scale: all its columns, or half 0 or 1 of them.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    /// Scales of a row in a tile, 1 or 2.
    pub(crate) scales: usize,
    pub(crate) half: usize,
    /// Whether rows are joined.
    pub(crate) joined: bool,
}

impl Part {
    /// The sum of the part's bytes of row `m`, if it is a half.
    #[inline(always)]
    fn sum<const M: usize>(self, words: &[u32], m: usize) -> i32 {
        let first = words[HALF_SUM * M + m] as i32;
        if self.half == 0 {
            return first;
        }
        let whole = FLOAT_START.wrapping_sub(words[START_8 * M + m] as i32) >> 3;
        whole.wrapping_sub(first)
    }

    /// The beginning of the sums of row `m`, for weights that are stored `zero_point` too large.
    #[inline(always)]
    pub(super) fn start_sums<R: PackedRows16, const M: usize>(
        self,
        words: &[u32],
        m: usize,
        zero_point: i32,
    ) -> R::Sums {
        let start = self.start::<M>(words, m, zero_point);
        if self.joined {
            return R::start_joined(start, self.start::<M>(words, m, zero_point - 8));
        }
        R::start(start)
    }

    /// Where the integer sums of row `m` begin, for weights that are stored `zero_point` too large.
    #[inline(always)]
    pub(crate) fn start<const M: usize>(self, words: &[u32], m: usize, zero_point: i32) -> i32 {
        if zero_point == 0 {
            return FLOAT_START;
        }
        if self.scales == 2 {
            return FLOAT_START.wrapping_sub(self.sum::<M>(words, m).wrapping_mul(zero_point));
        }
        let (kind, factor) = if zero_point == 128 { (START_128, 1) } else { (START_8, zero_point / 8) };
        let start = (words[kind * M + m] as i32).wrapping_sub(FLOAT_START).wrapping_mul(factor);
        start.wrapping_add(FLOAT_START)
    }

    /// The sum of the part's columns of row `m`, which minimums are multiplied with.
    #[inline(always)]
    pub(crate) fn total<const M: usize>(self, words: &[u32], m: usize) -> f32 {
        if self.scales == 2 {
            return f32::from_bits(words[SCALE * M + m]) * self.sum::<M>(words, m) as f32;
        }
        f32::from_bits(words[TOTAL * M + m])
    }

    /// Scales the integer sums of M rows and strip `n`, and adds them to `sums`.
    #[inline(always)]
    pub(super) fn add_scaled<R: PackedRows16, const M: usize, const N: usize>(
        self,
        dots: &[[R::Sums; N]; M],
        words: &[u32],
        n: usize,
        scales: R::Floats,
        mins: Option<R::Floats>,
        sums: &mut [[R::Floats; N]; M],
    ) {
        for m in 0..M {
            let (scale, offset) = (words[SCALE * M + m], words[OFFSET * M + m]);
            let (scale, offset) = (f32::from_bits(scale), f32::from_bits(offset));
            let dot = if self.joined {
                R::scaled_joined(dots[m][n], scale)
            } else {
                R::scaled(dots[m][n], scale, offset)
            };
            sums[m][n] = R::mul_add(dot, scales, sums[m][n]);
        }
        if let Some(mins) = mins {
            for m in 0..M {
                sums[m][n] = R::mul_add(mins, R::splat(self.total::<M>(words, m)), sums[m][n]);
            }
        }
    }
}
