//! Products of many rows with weights and activations in bf16.

use crate::aarch64::neon::{NeonLanes, NeonRows};
use crate::blocks::WeightType;
use crate::generic::gemm;
use crate::generic::gemm_task::{GatedTask, GemmTask};
use crate::table::Gemm;

type Rows = NeonRows<true>;

/// Rows of a panel: their sums take 24 of 32 registers.
const PANEL_ROWS: usize = 6;

/// Takes only bf16 weights: others would be rounded.
pub(super) const BF16: Gemm = Gemm {
    run,
    run_gated: Some(run_gated),
    takes: |dtype| dtype == WeightType::BF16,
    takes_packed: false,
    pack_rows,
    row_words: gemm::row_words::<true>,
    panel_rows: PANEL_ROWS,
    tail_rows: gemm::tail_rows(PANEL_ROWS),
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
