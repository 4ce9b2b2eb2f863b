//! The algorithms with AVX2, FMA, F16C and AVX-VNNI: those of `avx2/`, but for the products of bytes.

mod peak;

use super::avx2::{Avx2Lanes, Avx2Rows};
use crate::dispatch::KernelTable;

/// Every kernel of this level.
pub(crate) const TABLE: KernelTable = crate::dispatch::kernel_table!(
    Avx2Lanes, Avx2Rows<true>, packed: 6 x 1, gemm: 6 x 1, attention: 2, peaks: peak::PEAKS,
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
);
