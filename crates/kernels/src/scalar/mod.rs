//! The scalar ISA: plain Rust. It runs on every processor, and the other ISAs are tested against it.

mod lanes;
mod packed;
mod peak;
mod rows16;

use crate::table::KernelTable;
pub(super) use lanes::ScalarLanes;
use rows16::ScalarRows;

/// The kernels of this ISA.
pub(super) const TABLE: KernelTable = crate::table::kernel_table!(
    ScalarLanes, ScalarRows, packed: packed::packed, panel_rows: 2,
    gemm: 4 x 1, attention: 1, peaks: peak::PEAKS,
    #[cfg(all())] // no attribute: only the target's baseline
);
