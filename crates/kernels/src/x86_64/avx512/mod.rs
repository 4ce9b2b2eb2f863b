//! The AVX-512 ISA: AVX-512F, BW and VNNI, and with them AVX2, FMA and F16C.

mod lanes;
mod peak;
mod rows16;
mod word_lanes;

use crate::table::{KernelTable, kernel_table, packed_kernel};
pub(super) use lanes::Avx512Lanes;
pub(super) use peak::PEAKS;
pub(super) use rows16::Avx512Rows;

/// Rows of a panel, and strips of the microkernel, in products with packed weights.
const PANEL_ROWS: usize = 6;
const STRIPS: usize = 2;

/// The kernels of this ISA.
pub(crate) const TABLE: KernelTable = kernel_table!(
    Avx512Lanes, Avx512Rows,
    packed: packed_kernel!(
        Avx512Rows, PANEL_ROWS, STRIPS,
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
    ),
    panel_rows: PANEL_ROWS, gemm: 12 x 2, attention: 4, attention_bits16: 4 x 2, peaks: PEAKS,
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")],
    gemm_bf16: 8 x 3, #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
);
