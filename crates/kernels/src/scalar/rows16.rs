//! 16 rows in plain Rust: the reference, written to be read.

use crate::blocks::f16_at;
use crate::pack::TILE_ROWS;
use crate::rows16::Rows16;

/// Arrays of 16.
#[derive(Clone, Copy)]
pub(crate) struct ScalarRows;

type Floats = [f32; TILE_ROWS];

#[inline(always)]
fn zip(a: Floats, b: Floats, operation: impl Fn(f32, f32) -> f32) -> Floats {
    std::array::from_fn(|i| operation(a[i], b[i]))
}

/// Adds to each row's sum the products of its 4 weights and those of `x`.
#[inline(always)]
fn dot(sums: [i32; TILE_ROWS], weights: [i32; 64], x: u32) -> [i32; TILE_ROWS] {
    let x = x.to_le_bytes().map(|byte| i32::from(byte as i8));
    std::array::from_fn(|row| (0..4).fold(sums[row], |sum, j| sum + weights[4 * row + j] * x[j]))
}

impl Rows16 for ScalarRows {
    type Bytes = [u8; 64];
    type Sums = [i32; TILE_ROWS];
    type Floats = Floats;
    const SIGNED_OFFSET: i32 = 0;
    const FLOAT_START: i32 = 0;

    #[inline(always)]
    fn bytes(bytes: &[u8; 64]) -> Self::Bytes {
        *bytes
    }

    #[inline(always)]
    fn nibbles(bytes: Self::Bytes) -> (Self::Bytes, Self::Bytes) {
        (bytes.map(|byte| byte & 15), bytes.map(|byte| byte >> 4))
    }

    #[inline(always)]
    fn with_high_bit<const BIT: usize>(nibbles: Self::Bytes, plane: Self::Bytes) -> Self::Bytes {
        std::array::from_fn(|i| nibbles[i] | (plane[i] >> BIT & 1) << 4)
    }

    #[inline(always)]
    fn start(start: i32) -> Self::Sums {
        [start; TILE_ROWS]
    }

    #[inline(always)]
    fn dot(sums: Self::Sums, bytes: Self::Bytes, x: u32) -> Self::Sums {
        dot(sums, bytes.map(i32::from), x)
    }

    #[inline(always)]
    fn dot_signed(sums: Self::Sums, bytes: Self::Bytes, x: u32) -> Self::Sums {
        dot(sums, bytes.map(|byte| i32::from(byte) - 128), x)
    }

    #[inline(always)]
    fn fold(sums: Self::Sums) -> Self::Sums {
        sums
    }

    #[inline(always)]
    fn scaled(sums: Self::Sums, scale: f32, _offset: f32) -> Self::Floats {
        sums.map(|sum| sum as f32 * scale)
    }

    #[inline(always)]
    fn prefetch_stream(_address: *const u8) {}

    #[inline(always)]
    fn splat(value: f32) -> Self::Floats {
        [value; TILE_ROWS]
    }

    #[inline(always)]
    fn load(values: &[f32; TILE_ROWS]) -> Self::Floats {
        *values
    }

    #[inline(always)]
    fn halves(bytes: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
        std::array::from_fn(|i| f16_at(bytes, 2 * i))
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
        // Not f32::mul_add: without the instruction that is a library call per lane.
        zip(zip(a, b, |a, b| a * b), c, |product, c| product + c)
    }

    #[inline(always)]
    fn dot_bf16(_a: Self::Floats, _b: Self::Floats, _c: Self::Floats) -> Self::Floats {
        unreachable!("this level's table has no products of bf16")
    }

    #[inline(always)]
    fn turn(rows: &[f32], stride: usize, out: &mut [[f32; TILE_ROWS]; TILE_ROWS]) {
        for (lane, row) in rows.chunks(stride).take(TILE_ROWS).enumerate() {
            for (out, &value) in out.iter_mut().zip(row) {
                out[lane] = value;
            }
        }
    }
}
