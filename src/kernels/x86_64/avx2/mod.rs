//! The algorithms with AVX2, FMA and F16C.

mod lanes;

use crate::kernels::dispatch::KernelTable;
use lanes::Avx2Lanes;

/// Every kernel of this level.
pub(in crate::kernels) const TABLE: KernelTable =
    crate::kernels::dispatch::kernel_table!(Avx2Lanes, #[target_feature(enable = "avx2,fma,f16c")]);
