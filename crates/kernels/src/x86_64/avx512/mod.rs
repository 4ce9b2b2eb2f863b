//! The algorithms with AVX-512F, BW and VNNI (and what comes with them: AVX2, FMA, F16C).

mod lanes;
mod peak;
mod rows16;

use crate::dispatch::{KernelTable, kernel_table, packed_kernel};
pub(super) use lanes::Avx512Lanes;
pub(super) use peak::PEAKS;
pub(super) use rows16::Avx512Rows;
use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};

/// See [`crate::rows16::PackedRows16::prefetch_stream`]. More lines can be on their way to the second-level cache
/// than to the first: they are brought to the one, and 2 KiB later to the other. Both so far ahead that a stop, as where
/// a strip ends, is made up for; measured on one kind of processor (docs/experiments.md).
#[inline(always)]
fn prefetch_stream(address: *const u8) {
    // SAFETY: a prefetch is a hint; it never faults, whatever the address.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(address.wrapping_add(10240).cast());
        _mm_prefetch::<_MM_HINT_T0>(address.wrapping_add(8192).cast());
    }
}

/// Rows of activations, and strips, that `packed` takes at once.
const PANEL_ROWS: usize = 6;
const STRIPS: usize = 2;

/// Every kernel of this level.
pub(crate) const TABLE: KernelTable = kernel_table!(
    Avx512Lanes, Avx512Rows,
    packed: packed_kernel!(Avx512Rows, PANEL_ROWS, STRIPS, #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]),
    panel_rows: PANEL_ROWS, gemm: 12 x 2, attention: 4, peaks: PEAKS,
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")],
    bf16: #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
);
