//! The NEON ISA: what every 64-bit Arm processor has.

mod lanes;
mod peak;
mod rows16;
mod vectors;

use crate::table::{KernelTable, kernel_table, packed_kernel};
pub(super) use lanes::NeonLanes;
pub(super) use peak::PEAKS;
pub(super) use rows16::{NeonRows, scaled};

/// Rows of a panel in products with packed weights.
const PANEL_ROWS: usize = 4;

/// The kernels of this ISA.
pub(crate) const TABLE: KernelTable = kernel_table!(
    NeonLanes, NeonRows<false>,
    packed: packed_kernel!(NeonRows<false>, PANEL_ROWS, 1, #[target_feature(enable = "neon")]),
    panel_rows: PANEL_ROWS, gemm: 6 x 1, attention: 2, peaks: PEAKS,
    #[target_feature(enable = "neon")]
);
