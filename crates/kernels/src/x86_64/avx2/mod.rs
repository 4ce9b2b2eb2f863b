//! The AVX2 ISA: AVX2, FMA and F16C.

mod lanes;
mod packed;
mod peak;
mod rows16;
mod word_lanes;

use crate::table::{KernelTable, kernel_table};
pub(super) use lanes::Avx2Lanes;
pub(super) use peak::{PEAKS, sum_lanes};
pub(super) use rows16::Avx2Rows;

/// Rows of a panel in products with packed weights.
pub(super) const PANEL_ROWS: usize = 6;

/// The kernels of this ISA.
pub(crate) const TABLE: KernelTable = kernel_table!(
    Avx2Lanes, Avx2Rows<false>,
    packed: packed::packed,
    panel_rows: PANEL_ROWS, gemm: 6 x 1, attention: 3, attention_bits16: 2 x 1, peaks: PEAKS,
    #[target_feature(enable = "avx2,fma,f16c")]
);
