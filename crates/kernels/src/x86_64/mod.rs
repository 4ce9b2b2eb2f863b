//! Kernels for x86-64, one folder per level.

pub(super) mod amx;
pub(super) mod avx2;
pub(super) mod avx512;
pub(super) mod avxvnni;
