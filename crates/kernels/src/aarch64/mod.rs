//! The kernels for 64-bit Arm, with one folder per ISA.

pub(super) mod dotprod;
pub(super) mod i8mm;
pub(super) mod neon;
pub(super) mod prefetch;
