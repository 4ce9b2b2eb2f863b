//! Prefetches of 64-bit Arm. No distance was measured.

use std::arch::asm;

/// Prefetches the cache line at `address` into L1; never faults.
#[inline(always)]
pub(crate) fn prefetch_l1(address: *const u8) {
    // SAFETY: a prefetch is a hint; it never faults, whatever the address.
    unsafe { asm!("prfm pldl1keep, [{}]", in(reg) address, options(nomem, nostack, preserves_flags)) }
}

/// Prefetches into L2 only, which allows more outstanding loads than L1; never faults.
#[inline(always)]
pub(crate) fn prefetch_l2(address: *const u8) {
    // SAFETY: as above.
    unsafe { asm!("prfm pldl2keep, [{}]", in(reg) address, options(nomem, nostack, preserves_flags)) }
}
