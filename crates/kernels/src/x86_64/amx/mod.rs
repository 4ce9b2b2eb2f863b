//! AVX-512 with Intel's Advanced Matrix Extensions: products of many rows in tiles of bf16. All else is that of
//! `avx512/`.
//!
//! A tile product does sixteen times the operations of an AVX-512 instruction. Blocks of integers have a scale for
//! each 32 columns, which products of bytes would have to leave the tiles for, at most of their speed. So weights in
//! blocks are widened to bf16, and sums stay in the tiles; of the activations bf16 keeps more than 8-bit integers do.
//!
//! Source: Intel, "Architecture Instruction Set Extensions Programming Reference", 319433, chapter 3.

mod attention;
mod convert;
mod gemm;
mod peak;
mod tiles;

use super::avx512;
use crate::blocks::WeightType;
use crate::table::{Bf16PairAttention, Gemm, KernelTable};

/// Products of activations in bf16.
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

/// Every kernel of this level.
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
    attention_bf16_pairs: Some(Bf16PairAttention { run: attention::attention, takes: attention::takes }),
    peaks: peak::PEAKS,
    ..avx512::TABLE
};

pub(crate) use tiles::is_available;
