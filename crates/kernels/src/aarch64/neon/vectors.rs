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
