//! The dot-product ISA: NEON with `sdot`, which multiplies bytes and adds four products. The product with
//! packed weights is its own; all other kernels are those of `neon/`.

mod peak;

use super::neon::{self, NeonRows};
use crate::table::{KernelTable, packed_kernel};
pub(super) use peak::PEAKS;

/// Rows of a panel in products with packed weights.
const PANEL_ROWS: usize = 6;

/// The kernels of this ISA.
pub(crate) const TABLE: KernelTable = KernelTable {
    packed: packed_kernel!(NeonRows<true>, PANEL_ROWS, 1, #[target_feature(enable = "neon,dotprod")]),
    panel_rows: PANEL_ROWS,
    peaks: PEAKS,
    ..neon::TABLE
};
