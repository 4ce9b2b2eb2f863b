//! The CPU kernels of candle-llama. They take slices and write slices: the crate knows nothing of models,
//! files or Candle. docs/kernels.md explains the terms (tile, strip, panel, block, unit) and how a token is
//! decoded.
//!
//! | files | contents |
//! |---|---|
//! | `kernels.rs`, `packed.rs`, `gemm.rs`, `attention.rs` | the facade, which checks every length |
//! | `blocks.rs`, `weight.rs` | weights: storage types, matrices |
//! | `tile.rs`, `packable.rs`, `pack.rs` | packed weights: tiles, the types that can be packed, packing |
//! | `quantized_rows.rs`, `kv_block.rs`, `mlp.rs`, `output.rs` | other inputs, and outputs |
//! | `generic/` | the algorithms, written once over the traits of `lanes.rs` and `rows16.rs` |
//! | `scalar/`, `x86_64/*/`, `aarch64/*/` | those traits for each ISA, and its table of kernels |
//! | `table.rs`, `dispatch.rs` | what a table of kernels holds; which ISA runs |
//! | `pool.rs`, `pages.rs`, `prefetch.rs` | threads; memory in large pages; prefetching |
//! | `quantize.rs`, `quantize/` | float32 to the storage types |
//! | `peaks.rs`, `roofline.rs` | the highest throughput that the machine allows |
//!
//! Start reading at [`Kernels`], then `generic/matmul.rs`.
//!
//! SIMD needs `unsafe`, and this crate is the place for it. Kernels are called through the table that
//! [`Isa::detect`] chose for this CPU, with lengths that the facade has checked.
#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod attention;
pub mod blocks;
mod dispatch;
mod gemm;
mod generic;
mod kernels;
mod kv_block;
mod lanes;
mod mlp;
mod output;
mod pack;
mod packable;
mod packed;
mod pages;
mod peaks;
mod pool;
mod prefetch;
pub mod quantize;
mod quantized_rows;
mod roofline;
mod rows16;
mod scalar;
mod scratch;
mod table;
mod tile;
mod weight;
#[cfg(target_arch = "x86_64")]
mod word_lanes;
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
pub use scratch::{ScratchShape, thread_scratch_bytes};
pub use weight::{Weight, WeightRows};

/// What the tests in `tests/kernels` need beside the public interface. It may change at any time.
#[doc(hidden)]
pub mod internals {
    use crate::Isa;
    pub use crate::blocks::IQ4_VALUES;
    pub use crate::dispatch::bf16_dot_is_fast;
    pub use crate::lanes::LANES;
    use crate::peaks::Peaks;
    pub use crate::quantized_rows::{
        FLOAT_OFFSET, FLOAT_START, GROUPS, HALF_SUM, OFFSET, SCALE, START_8, START_128, TOTAL, block_words,
        group_word,
    };

    /// The loops that measure the highest throughput of an ISA.
    pub fn peaks(isa: Isa) -> &'static Peaks {
        &isa.table().peaks
    }

    /// Whether attention may round numbers to about 16 bits on this ISA.
    pub fn has_attention_bits16(isa: Isa) -> bool {
        isa.table().attention_bits16.is_some()
    }
}
