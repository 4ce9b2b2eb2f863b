//! The AVX-VNNI ISA: AVX2 with `vpdpbusd`, which multiplies bytes and adds four products. The product with
//! packed weights is its own; all other kernels are those of `avx2/`.

mod peak;

use super::avx2::{self, Avx2Rows};
use crate::table::{KernelTable, packed_kernel};

/// The kernels of this ISA.
pub(crate) const TABLE: KernelTable = KernelTable {
    packed: packed_kernel!(
        Avx2Rows<true>, avx2::PANEL_ROWS, 1, #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    ),
    peaks: peak::PEAKS,
    ..avx2::TABLE
};
