//! The algorithms on plain Rust lanes: runs everywhere, and is what the others are tested against.

mod lanes;

pub(super) use lanes::ScalarLanes;

use super::dispatch::KernelTable;

/// Every kernel of this level.
pub(super) const TABLE: KernelTable = super::dispatch::kernel_table!(ScalarLanes, #[inline]);
