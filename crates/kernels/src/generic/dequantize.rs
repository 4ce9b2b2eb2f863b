//! Dequantises rows of weights.

use super::storage::{Storage, with_storage};
use crate::lanes::{LANES, Lanes};
use crate::weight::WeightRows;

/// Dequantises row `row` of `rows` to `out`, `(cols,)`.
#[inline(always)]
pub(crate) fn dequantize<L: Lanes>(rows: WeightRows, row: usize, out: &mut [f32]) {
    let bytes = rows.row(row);
    with_storage!(rows.dtype, dequantize_exactly::<L>(bytes, out));
}

/// Dequantises a part of a row that consists of whole blocks.
#[inline(always)]
pub(crate) fn dequantize_exactly<L: Lanes, S: Storage>(bytes: &[u8], out: &mut [f32]) {
    let (chunks, tail) = out.as_chunks_mut();
    let (whole, partial) = bytes.split_at(chunks.len() / S::VECTORS * S::BLOCK_BYTES);
    dequantize_row::<L, S>(whole, chunks);
    if !tail.is_empty() {
        let mut padded = [0.0; LANES];
        partial_block::<L, S>(partial).store(&mut padded);
        tail.copy_from_slice(&padded[..tail.len()]);
    }
}

/// Dequantises a row and pads it with zeros to whole vectors.
#[inline(always)]
pub(crate) fn dequantize_row<L: Lanes, S: Storage>(bytes: &[u8], out: &mut [[f32; LANES]]) {
    let blocks = bytes.chunks_exact(S::BLOCK_BYTES);
    let tail = blocks.remainder();
    for (block, out) in blocks.zip(out.chunks_exact_mut(S::VECTORS)) {
        for (vector, out) in out.iter_mut().enumerate() {
            S::lanes::<L>(block, vector).store(out);
        }
    }
    if let (false, Some(last)) = (tail.is_empty(), out.last_mut()) {
        partial_block::<L, S>(tail).store(last);
    }
}

/// The last elements of a row of floats, padded with zeros. Rows of other types consist of whole blocks.
#[inline(always)]
pub(super) fn partial_block<L: Lanes, S: Storage>(bytes: &[u8]) -> L {
    let mut padded = [0; LONGEST_BLOCK];
    padded[..bytes.len()].copy_from_slice(bytes);
    S::lanes::<L>(&padded[..S::BLOCK_BYTES], 0)
}

/// Q6_K's block.
const LONGEST_BLOCK: usize = 210;
