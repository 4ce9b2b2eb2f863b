//! The matrix ISA: the dot product, and instructions for matrices of bytes and for bf16. Products of many
//! rows with packed weights and products of bf16 are its own; all other kernels are those of `dotprod/`.

mod gemm;
mod packed;
mod peak;

use super::dotprod;
use crate::table::KernelTable;

/// The kernels of this ISA.
pub(crate) const TABLE: KernelTable = KernelTable {
    packed: packed::packed,
    panel_rows: packed::PANEL_ROWS,
    gemm_bf16: Some(gemm::BF16),
    peaks: peak::PEAKS,
    ..dotprod::TABLE
};
