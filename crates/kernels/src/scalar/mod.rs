//! The algorithms on plain Rust lanes and rows: runs everywhere, and is what the others are tested against.

mod lanes;
mod packed;
mod peak;
mod rows16;

use crate::table::KernelTable;
pub(super) use lanes::ScalarLanes;
use rows16::ScalarRows;

/// Every kernel of this level.
pub(super) const TABLE: KernelTable = crate::table::kernel_table!(
    ScalarLanes, ScalarRows, packed: packed::packed, panel_rows: 2, gemm: 4 x 1, attention: 1, peaks: peak::PEAKS,
    #[cfg(all())] // nothing: the target's own instructions
);
