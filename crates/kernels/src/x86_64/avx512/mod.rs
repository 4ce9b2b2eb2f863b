//! The algorithms with AVX-512F, BW and VNNI (and what comes with them: AVX2, FMA, F16C).

mod lanes;
mod peak;
mod rows16;

use crate::dispatch::KernelTable;
pub(super) use lanes::Avx512Lanes;
pub(super) use peak::PEAKS;
pub(super) use rows16::Avx512Rows;
use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};

/// See [`crate::rows16::Rows16::prefetch_stream`]. More lines can be on their way to the second-level cache
/// than to the first: they are brought to the one, and 2 KiB later to the other. Both so far ahead that a stop, as where
/// a strip ends, is made up for; measured on one kind of processor (docs/performance.md).
#[inline(always)]
fn prefetch_stream(address: *const u8) {
    // SAFETY: a prefetch is a hint; it never faults, whatever the address.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(address.wrapping_add(10240).cast());
        _mm_prefetch::<_MM_HINT_T0>(address.wrapping_add(8192).cast());
    }
}

/// Every kernel of this level.
pub(crate) const TABLE: KernelTable = crate::dispatch::kernel_table!(
    Avx512Lanes, Avx512Rows, packed: 6 x 2, gemm: 12 x 2, attention: 4, peaks: PEAKS,
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")],
    bf16: #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
);
