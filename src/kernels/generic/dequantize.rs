//! Stored weights to f32.

use crate::kernels::WeightRows;
use crate::kernels::lanes::{LANES, Lanes, Storage, with_storage};

/// Writes row `row` of `rows` as f32 to `out`, `(cols,)`.
#[inline(always)]
pub(in crate::kernels) fn dequantize<L: Lanes>(rows: WeightRows, row: usize, out: &mut [f32]) {
    let bytes = rows.row(row);
    with_storage!(rows.dtype, dequantize_exactly::<L>(bytes, out));
}

#[inline(always)]
fn dequantize_exactly<L: Lanes, S: Storage>(bytes: &[u8], out: &mut [f32]) {
    let (chunks, tail) = out.as_chunks_mut();
    let (units, partial) = bytes.split_at(chunks.len() * S::UNIT_BYTES);
    dequantize_row::<L, S>(units, chunks);
    if !tail.is_empty() {
        let mut padded = [0.0; LANES];
        partial_unit::<L, S>(partial).store(&mut padded);
        tail.copy_from_slice(&padded[..tail.len()]);
    }
}

/// Writes a row as f32, padded with zeros to whole lanes.
#[inline(always)]
pub(super) fn dequantize_row<L: Lanes, S: Storage>(bytes: &[u8], out: &mut [[f32; LANES]]) {
    let units = bytes.chunks_exact(S::UNIT_BYTES);
    let tail = units.remainder();
    for (unit, out) in units.zip(out.iter_mut()) {
        S::lanes::<L>(unit).store(out);
    }
    if let (false, Some(last)) = (tail.is_empty(), out.last_mut()) {
        partial_unit::<L, S>(tail).store(last);
    }
}

/// The last elements of a float row, with zeros behind; block types have no partial units.
#[inline(always)]
pub(super) fn partial_unit<L: Lanes, S: Storage>(bytes: &[u8]) -> L {
    // The longest unit, that of F32.
    let mut padded = [0; 4 * LANES];
    padded[..bytes.len()].copy_from_slice(bytes);
    S::lanes::<L>(&padded[..S::UNIT_BYTES])
}
