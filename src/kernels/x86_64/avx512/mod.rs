//! The algorithms with AVX-512F (and what comes with it: AVX2, FMA, F16C).

mod lanes;

use crate::kernels::dispatch::KernelTable;
use lanes::Avx512Lanes;

/// Every kernel of this level.
pub(in crate::kernels) const TABLE: KernelTable =
    crate::kernels::dispatch::kernel_table!(Avx512Lanes, #[target_feature(enable = "avx512f,avx2,fma,f16c")]);
