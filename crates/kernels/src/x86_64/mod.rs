//! The kernels for x86-64, with one folder per ISA.

pub(super) mod amx;
pub(super) mod avx2;
pub(super) mod avx512;
pub(super) mod avxvnni;
pub(super) mod prefetch;
mod vectors;
