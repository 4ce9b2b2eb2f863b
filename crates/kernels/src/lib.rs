//! The CPU kernels of candle-llama. Slices in, slices out: the crate knows nothing of models, files or Candle.
//!
//! - `blocks.rs`: how weights are stored
//! - `generic/`: the algorithms, written once over `lanes.rs` and `rows16.rs`
//! - `scalar/`, `x86_64/{avx2,avxvnni,avx512}/`: the lanes and rows of each level, `x86_64/amx/`: tiles;
//!   `dispatch.rs` chooses one
//! - `pack.rs`, `quantized_rows.rs`: weights in tiles, activations in 8 bits
//! - `pool.rs`: the threads; `pages.rs`: memory for weights
//! - `quantize.rs`: float32 to storage types
//! - `roofline.rs`: how fast the machine is at most
//! - this file, `packed.rs`, `gemm.rs`, `attention.rs`: the facade, which checks every length before a kernel runs
//!
//! Start reading at [`Kernels`], then `generic/matmul.rs`.
//!
//! This crate is the home of SIMD `unsafe`: a kernel is called through a table that [`Isa::detect`] chose for
//! this CPU, on lengths that the facade has checked.
#![allow(unsafe_code)]

mod attention;
#[cfg(test)]
mod attention_tests;
pub mod blocks;
mod dispatch;
mod gemm;
#[cfg(test)]
mod gemm_tests;
mod generic;
mod kernels;
mod kv_block;
mod lanes;
mod mlp;
mod output;
mod pack;
mod packed;
#[cfg(test)]
mod packed_tests;
mod pages;
mod peaks;
mod pool;
pub mod quantize;
mod quantized_rows;
mod roofline;
mod rows16;
mod scalar;
mod table;
#[cfg(test)]
mod tests;
mod weight;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use attention::AttentionSpan;
pub use blocks::WeightType;
pub use dispatch::{ISA_VARIABLE, Isa};
pub use gemm::{GemmInput, GemmScratch};
pub use generic::elementwise::exp;
pub use kernels::{Kernels, Product, dequantize};
pub use kv_block::{KV_BLOCK_POSITIONS, KvBlock};
pub use mlp::{Activation, Mlp};
pub use output::Output;
pub use pack::{NoMemory, PackedRows};
pub use packed::PackedProduct;
pub use pages::{Arena, Piece, grown};
pub use pool::{Cancel, Pool};
pub use quantized_rows::{Precision, QuantizedRows};
pub use roofline::{RooflineError, RooflinePeaks};
pub use weight::{Weight, WeightRows};
