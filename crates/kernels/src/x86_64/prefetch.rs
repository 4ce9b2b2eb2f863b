//! Prefetches of x86-64. The best distances depend on the processor, not only on its ISA; see
//! docs/experiments.md.

use crate::prefetch::StreamPrefetch;
use std::arch::x86_64::*;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether this is a processor of AMD.
static OF_AMD: AtomicBool = AtomicBool::new(false);

/// Tells the kernels whether this is a processor of AMD.
pub(crate) fn set_of_amd(of_amd: bool) {
    OF_AMD.store(of_amd, Ordering::Relaxed);
}

/// Whether this is a processor of AMD.
#[inline(always)]
pub(super) fn is_of_amd() -> bool {
    OF_AMD.load(Ordering::Relaxed)
}

/// The distances for processors with AVX-VNNI or AVX-512. They are long enough to cover pauses of the stream,
/// such as at the end of a strip.
#[inline(always)]
pub(super) fn vnni_stream() -> StreamPrefetch {
    let (l1, l2) = if is_of_amd() {
        // Zen 5. A prefetch into L2 that is ahead of the one into L1 costs a tenth of the bandwidth. One of
        // the line that is read next gains up to 5 %: probably it keeps L2's own prefetcher going.
        (6144, 0)
    } else {
        // Intel with AMX.
        (8192, 10240)
    };
    StreamPrefetch { l1, l2: Some(l2), step: 64 }
}

/// Prefetches the cache line at `address` into L1; never faults.
#[inline(always)]
pub(crate) fn prefetch_l1(address: *const u8) {
    // SAFETY: a prefetch is a hint; it never faults, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

/// Prefetches into L2 only, which allows more outstanding loads than L1; never faults.
#[inline(always)]
pub(crate) fn prefetch_l2(address: *const u8) {
    // SAFETY: as above.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
}
