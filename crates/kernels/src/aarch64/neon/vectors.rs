//! Instructions that [`NeonLanes`](super::NeonLanes) and [`NeonRows`](super::NeonRows) share, and for which
//! stable Rust has no intrinsics.

use std::arch::aarch64::*;
use std::arch::asm;

/// Floats from 8 f16.
#[inline(always)]
pub(in crate::aarch64) fn from_halves(halves: uint16x8_t) -> [float32x4_t; 2] {
    let (low, high);
    // SAFETY: NEON is part of 64-bit Arm; nothing but these registers is touched.
    unsafe {
        asm!(
            "fcvtl {low:v}.4s, {halves:v}.4h",
            "fcvtl2 {high:v}.4s, {halves:v}.8h",
            halves = in(vreg) halves,
            low = out(vreg) low,
            high = lateout(vreg) high,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    [low, high]
}

/// Prefetches the cache line at `address` into L1; never faults.
#[inline(always)]
pub(super) fn prefetch_l1(address: *const u8) {
    // SAFETY: a prefetch is a hint; it never faults, whatever the address.
    unsafe { asm!("prfm pldl1keep, [{}]", in(reg) address, options(nomem, nostack, preserves_flags)) }
}

/// Prefetches the cache line at `address` into L2; never faults.
#[inline(always)]
pub(super) fn prefetch_l2(address: *const u8) {
    // SAFETY: as above.
    unsafe { asm!("prfm pldl2keep, [{}]", in(reg) address, options(nomem, nostack, preserves_flags)) }
}

/// See [`crate::rows16::PackedRows16::prefetch_stream`]. The distance is AVX2's; none was measured on Arm.
#[inline(always)]
pub(super) fn prefetch_stream(address: *const u8) {
    prefetch_l1(address.wrapping_add(2048));
}
