//! The algorithms, written once over [`super::lanes::Lanes`]; compiled once per level.
//!
//! Everything here is `#[inline(always)]`: it must become part of the level's own function to be
//! compiled with the level's instructions.

pub(super) mod attention;
pub(super) mod dequantize;
pub(super) mod dequantize_block;
pub(super) mod elementwise;
pub(super) mod gemm;
pub(super) mod matmul;
pub(super) mod packed;
pub(super) mod partial_attention;
pub(super) mod quantize;
pub(super) mod storage;
mod strip;
mod unpacked;
