//! [`Rows16`] in plain Rust: the reference, written to be read.

use crate::rows16::{ROW_BYTES, Rows16};
use crate::tile::TILE_ROWS;

/// 16 rows as arrays.
#[derive(Clone, Copy)]
pub(crate) struct ScalarRows;

type Floats = [f32; TILE_ROWS];

#[inline(always)]
fn zip(a: Floats, b: Floats, operation: impl Fn(f32, f32) -> f32) -> Floats {
    std::array::from_fn(|i| operation(a[i], b[i]))
}

impl Rows16 for ScalarRows {
    type Floats = Floats;

    #[inline(always)]
    fn splat(value: f32) -> Self::Floats {
        [value; TILE_ROWS]
    }

    #[inline(always)]
    fn load(values: &[f32; TILE_ROWS]) -> Self::Floats {
        *values
    }

    #[inline(always)]
    fn store(values: Self::Floats, out: &mut [f32; TILE_ROWS]) {
        *out = values;
    }

    #[inline(always)]
    fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // `f32::mul_add` without an FMA instruction would be a library call for each lane.
        zip(zip(a, b, |a, b| a * b), c, |product, c| product + c)
    }

    #[inline(always)]
    fn dot_bf16(_a: Self::Floats, _b: Self::Floats, _c: Self::Floats) -> Self::Floats {
        unreachable!("this ISA's table has no products of bf16")
    }

    #[inline(always)]
    fn round_to_bf16(_numbers: &[f32; 2 * TILE_ROWS], _words: &mut [u32; TILE_ROWS]) {
        unreachable!("this ISA's table has no products of bf16")
    }

    #[inline(always)]
    fn transpose(rows: [&[u8; ROW_BYTES]; TILE_ROWS], out: &mut [[f32; TILE_ROWS]; TILE_ROWS]) {
        for (lane, row) in rows.into_iter().enumerate() {
            for (out, &word) in out.iter_mut().zip(row.as_chunks().0) {
                out[lane] = f32::from_le_bytes(word);
            }
        }
    }
}
