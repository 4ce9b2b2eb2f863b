//! The algorithms, written once over [`super::lanes::Lanes`] and [`super::rows16::Rows16`], and compiled once
//! per ISA.
//!
//! Everything here is `#[inline(always)]`: only code that is inlined into an ISA's `#[target_feature]`
//! function is compiled with the ISA's instructions.

pub(super) mod attention;
pub(super) mod dequantize;
pub(super) mod dequantize_block;
pub(super) mod elementwise;
pub(super) mod gemm;
pub(super) mod gemm_task;
pub(super) mod matmul;
pub(super) mod packed;
pub(super) mod partial_attention;
pub(super) mod quantize;
pub(super) mod storage;
pub(super) mod strip;
pub(super) mod tile;
pub(super) mod unpacked;
