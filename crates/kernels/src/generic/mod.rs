//! The algorithms, written once over [`super::lanes::Lanes`], [`super::word_lanes::WordLanes`] and
//! [`super::rows16::Rows16`], and compiled once per ISA.
//!
//! Everything here is `#[inline(always)]`: only code that is inlined into an ISA's `#[target_feature]`
//! function is compiled with the ISA's instructions.

pub(super) mod attention;
#[cfg(target_arch = "x86_64")] // only its ISAs multiply words
pub(super) mod attention_bits16;
pub(super) mod dequantize;
pub(super) mod dequantize_block;
pub(super) mod elementwise;
pub(super) mod gemm;
pub(super) mod gemm_task;
pub(super) mod matmul;
pub(super) mod packed;
pub(super) mod partial_attention;
pub(super) mod quantize;
#[cfg(target_arch = "x86_64")]
pub(super) mod rounding;
pub(super) mod storage;
pub(super) mod strip;
pub(super) mod tile;
pub(super) mod unpacked;
