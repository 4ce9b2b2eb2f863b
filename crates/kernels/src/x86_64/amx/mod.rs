//! The AMX ISA: AVX-512 and Intel's Advanced Matrix Extensions. Products and attention of many rows use AMX
//! tiles of bf16; all other kernels are those of `avx512/`.
//!
//! A product of AMX tiles does sixteen times as many operations as an AVX-512 instruction. Quantised weights
//! are converted to bf16 for it, instead of multiplying bytes: blocks have a scale for every 32 columns, so
//! sums of bytes would have to leave the AMX tiles and be scaled that often, which costs most of the speed.
//! bf16 also keeps activations more precisely than 8-bit integers.
//!
//! Source: Intel, "Architecture Instruction Set Extensions Programming Reference", 319433, chapter 3.

mod attention;
mod convert;
mod gemm;
mod peak;
mod tiles;

use super::avx512;
use crate::blocks::WeightType;
use crate::table::{Bits16Attention, Gemm, KernelTable};

/// Products with activations in bf16.
const GEMM_BF16: Gemm = Gemm {
    run: gemm::gemm::<1>,
    run_gated: Some(gemm::gated::<1>),
    pack_rows: gemm::pack_rows::<1>,
    takes: |dtype| dtype == WeightType::BF16 || dtype.block_len() > 1,
    row_words: gemm::row_words::<1>,
    panel_rows: gemm::PANEL_ROWS,
    tail_rows: &[gemm::PANEL_ROWS],
    takes_packed: true,
    strips: gemm::STRIPS,
    max_task_strips: gemm::MAX_TASK_STRIPS,
};

/// The kernels of this ISA.
pub(crate) const TABLE: KernelTable = KernelTable {
    gemm_bf16: Some(GEMM_BF16),
    gemm_bf16_pairs: Some(Gemm {
        run: gemm::gemm::<2>,
        run_gated: Some(gemm::gated::<2>),
        pack_rows: gemm::pack_rows::<2>,
        takes: |dtype| dtype == WeightType::BF16,
        row_words: gemm::row_words::<2>,
        takes_packed: false,
        ..GEMM_BF16
    }),
    attention_bits16: Some(Bits16Attention {
        run: attention::attention,
        takes_units: false,
        takes: attention::takes,
        task_queries: attention::TASK_QUERIES,
    }),
    peaks: peak::PEAKS,
    ..avx512::TABLE
};

pub(crate) use tiles::is_available;
