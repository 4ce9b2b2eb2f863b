//! Stored weights to f32.

use crate::kernels::WeightRows;
use crate::kernels::lanes::{LANES, Lanes, Storage, with_storage};

/// Writes row `row` of `rows` as f32 to `out`, `(cols,)`.
#[inline(always)]
pub(in crate::kernels) fn dequantize<L: Lanes>(rows: WeightRows, row: usize, out: &mut [f32]) {
    let bytes = rows.row(row);
    with_storage!(rows.dtype, dequantize_row::<L>(bytes, out));
}

#[inline(always)]
pub(super) fn dequantize_row<L: Lanes, S: Storage>(bytes: &[u8], out: &mut [f32]) {
    let mut units = bytes.chunks_exact(S::UNIT_BYTES);
    let mut chunks = out.chunks_exact_mut(LANES);
    for (unit, chunk) in (&mut units).zip(&mut chunks) {
        S::lanes::<L>(unit).store(chunk.try_into().expect("chunks of LANES"));
    }
    let tail = chunks.into_remainder();
    if !tail.is_empty() {
        let mut padded = [0.0; LANES];
        partial_unit::<L, S>(units.remainder()).store(&mut padded);
        tail.copy_from_slice(&padded[..tail.len()]);
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
