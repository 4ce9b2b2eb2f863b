//! Products of many rows with weights and activations in bf16. `bfmmla` multiplies 4 columns of two rows of
//! activations with 4 columns of two rows of weights, for all numbers of rows. How it rounds a result depends
//! on nothing but that result's two rows.

use crate::aarch64::neon::{NeonLanes, NeonRows};
use crate::blocks::WeightType;
use crate::generic::gemm;
use crate::generic::gemm_task::{GatedTask, GemmTask};
use crate::table::Gemm;

type Rows = NeonRows<true, true>;

/// Rows of a panel: their sums take 24 of 32 registers.
const PANEL_ROWS: usize = 6;

/// Takes only bf16 weights: others would be rounded.
pub(super) const BF16: Gemm = Gemm {
    run,
    run_gated: Some(run_gated),
    takes: |dtype| dtype == WeightType::BF16,
    takes_packed: false,
    pack_rows,
    row_words: gemm::row_words::<Rows, true>,
    panel_rows: PANEL_ROWS,
    // Pairs of rows.
    tail_rows: &[2, 4, PANEL_ROWS],
    strips: 1,
    max_task_strips: 8,
};

#[target_feature(enable = "neon,bf16")]
fn run(task: &GemmTask) {
    gemm::gemm::<NeonLanes, Rows, _, PANEL_ROWS, 1, true>(task);
}

#[target_feature(enable = "neon,bf16")]
fn run_gated(task: &GatedTask) {
    gemm::gemm::<NeonLanes, Rows, _, PANEL_ROWS, 1, true>(task);
}

#[target_feature(enable = "neon,bf16")]
fn pack_rows(x: &[f32], rows: usize, panel: &mut [u32]) {
    gemm::pack_rows::<Rows, true>(x, rows, panel);
}
