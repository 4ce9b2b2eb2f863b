//! The algorithms with AVX2, FMA and F16C.

mod lanes;
mod peak;
mod rows16;

use crate::dispatch::KernelTable;
pub(super) use lanes::Avx2Lanes;
pub(super) use peak::{PEAKS, sum_lanes};
pub(super) use rows16::{Avx2Rows, turn_8};

/// Every kernel of this level.
pub(crate) const TABLE: KernelTable = crate::dispatch::kernel_table!(
    Avx2Lanes, Avx2Rows<false>, packed: 6 x 1, gemm: 6 x 1, attention: 2, peaks: PEAKS,
    #[target_feature(enable = "avx2,fma,f16c")]
);
