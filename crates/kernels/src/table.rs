//! One level's kernels, as a table of functions.

use crate::blocks::WeightType;
use crate::generic::attention::AttentionTask;
use crate::generic::gemm::{GatedTask, GemmTask};
use crate::generic::matmul::MatmulTask;
use crate::generic::packed::PackedTask;
use crate::mlp::Activation;
use crate::peaks::Peaks;
use crate::quantized_rows::Precision;
use crate::weight::WeightRows;

/// One level's kernels. Every pointer needs the level's instructions; lengths are the callers' care
/// and are checked where the tasks are made, in `mod.rs`.
pub(crate) struct KernelTable {
    pub(crate) matmul: unsafe fn(&MatmulTask),
    pub(crate) packed: unsafe fn(&PackedTask),
    /// Rows of activations that `packed` takes at once, when there are many.
    pub(crate) panel_rows: usize,
    /// `(rows, cols)`, rows, and their panel.
    pub(crate) quantize: unsafe fn(&[f32], usize, Precision, &mut [u32]),
    /// Products in f32.
    pub(crate) gemm: Gemm,
    /// Products of bf16: at AVX-512 only where [`bf16_dot_is_fast`].
    pub(crate) gemm_bf16: Option<Gemm>,
    /// Products of weights in bf16 and activations that are sums of two bf16.
    pub(crate) gemm_bf16_pairs: Option<Gemm>,
    pub(crate) attention: unsafe fn(&AttentionTask),
    pub(crate) attention_bf16_pairs: Option<Bf16PairAttention>,
    pub(crate) dequantize: unsafe fn(WeightRows, usize, &mut [f32]),
    pub(crate) rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    pub(crate) gate_mul: unsafe fn(Activation, &mut [f32], &[f32]),
    pub(crate) peaks: Peaks,
}

/// Attention of many rows, whose numbers are sums of two bf16.
#[derive(Clone, Copy)]
pub(crate) struct Bf16PairAttention {
    /// Takes whole rows, not units.
    pub(crate) run: unsafe fn(&AttentionTask),
    /// Which head_dim it takes.
    pub(crate) takes: fn(usize) -> bool,
}

/// See [`Gemm::run_gated`].
pub(crate) type RunGated = unsafe fn(&GatedTask);

/// Products of many rows of activations. A strip is 16 rows of weights.
#[derive(Clone, Copy)]
pub(crate) struct Gemm {
    pub(crate) run: unsafe fn(&GemmTask),
    /// Two products of the same x, one the other's gate; None if there is no such kernel.
    pub(crate) run_gated: Option<RunGated>,
    /// Which weights it takes in rows.
    pub(crate) takes: fn(WeightType) -> bool,
    /// Whether it takes packed weights too.
    pub(crate) takes_packed: bool,
    /// Writes a panel: `(rows, cols)`, rows, and the panel.
    pub(crate) pack_rows: unsafe fn(&[f32], usize, &mut [u32]),
    /// Words that a row of so many columns has in a panel.
    pub(crate) row_words: fn(usize) -> usize,
    /// Rows of a panel.
    pub(crate) panel_rows: usize,
    /// How many rows the last panel may have, ascending up to `panel_rows`; those that are missing are zeros.
    pub(crate) tail_rows: &'static [usize],
    /// Strips done at once: tasks have a multiple.
    pub(crate) strips: usize,
    /// The most strips of a task.
    pub(crate) max_task_strips: usize,
}

/// A [`KernelTable`] of the generic algorithms on `$lanes` and `$rows`, each compiled with `$attribute`.
/// `$packed` is the product with packed weights, which takes `$panel_rows` rows of activations at once. Products with
/// many rows of floats take `$gemm_rows` rows and `$gemm_strips` strips at once, attention `$queries` queries; `$bf16` are the instructions for bf16.
/// `$peaks` are the level's own [`Peaks`].
///
/// Each weight type has a function of its own, which is never inlined: LLVM takes several times longer for one
/// function with all of them.
macro_rules! kernel_table {
    (
        $lanes:ty, $rows:ty, packed: $packed:expr, panel_rows: $panel_rows:expr,
        gemm: $gemm_rows:literal x $gemm_strips:literal, attention: $queries:literal,
        peaks: $peaks:expr, #[$attribute:meta] $(, bf16: #[$bf16:meta])?
    ) => {{
        use $crate::generic;
        use $crate::generic::storage::{Storage, with_storage};
        use $crate::lanes::{LANES, Lanes};
        #[$attribute]
        fn quantize(x: &[f32], rows: usize, precision: $crate::quantized_rows::Precision, panel: &mut [u32]) {
            generic::quantize::quantize(x, rows, precision, panel);
        }
        #[$attribute]
        #[inline(never)]
        fn few_rows<L: Lanes, S: Storage>(task: &generic::matmul::MatmulTask, rows: usize) {
            generic::matmul::few_rows::<L, S>(task, rows);
        }
        #[$attribute]
        #[inline(never)]
        fn dequantize_weights<L: Lanes, S: Storage>(task: &generic::matmul::MatmulTask, dequantized: &mut [[f32; LANES]]) {
            generic::matmul::dequantize_weights::<L, S>(task, dequantized);
        }
        #[$attribute]
        fn matmul(task: &generic::matmul::MatmulTask) {
            let (dtype, rows) = (task.weight.dtype(), task.rows());
            if rows < generic::matmul::dequantize_from(dtype) {
                with_storage!(dtype, few_rows::<$lanes>(task, rows));
            } else {
                let mut dequantized = generic::matmul::take_buffer(task);
                with_storage!(dtype, dequantize_weights::<$lanes>(task, &mut dequantized));
                generic::matmul::many_rows::<$lanes>(task, rows, &dequantized);
                generic::matmul::return_buffer(dequantized);
            }
        }
        #[$attribute]
        fn gemm(task: &generic::gemm::GemmTask) {
            generic::gemm::gemm::<$lanes, $rows, $gemm_rows, $gemm_strips, false>(task);
        }
        #[$attribute]
        fn pack_rows(x: &[f32], rows: usize, panel: &mut [u32]) {
            generic::gemm::pack_rows::<false>(x, rows, panel);
        }
        let gemm = $crate::table::Gemm {
            run: gemm,
            run_gated: None,
            takes: |_| true,
            takes_packed: false,
            pack_rows,
            row_words: generic::gemm::row_words::<false>,
            panel_rows: $gemm_rows,
            tail_rows: generic::gemm::tail_rows($gemm_rows),
            strips: $gemm_strips,
            max_task_strips: 8,
        };
        #[allow(unused_mut, unused_assignments)] // without the instructions
        let gemm_bf16 = {
            let mut gemm_bf16 = None;
            $(
                #[$bf16]
                fn run(task: &generic::gemm::GemmTask) {
                    generic::gemm::gemm::<$lanes, $rows, $gemm_rows, $gemm_strips, true>(task);
                }
                #[$bf16]
                fn pack_rows(x: &[f32], rows: usize, panel: &mut [u32]) {
                    generic::gemm::pack_rows::<true>(x, rows, panel);
                }
                gemm_bf16 = Some($crate::table::Gemm {
                    run,
                    takes: |dtype| matches!(dtype, $crate::blocks::WeightType::BF16),
                    pack_rows,
                    row_words: generic::gemm::row_words::<true>,
                    ..gemm
                });
            )?
            gemm_bf16
        };
        #[$attribute]
        fn attention(task: &generic::attention::AttentionTask) {
            generic::attention::attention::<$lanes, $queries>(task);
        }
        #[$attribute]
        fn dequantize(rows: $crate::weight::WeightRows, row: usize, out: &mut [f32]) {
            generic::dequantize::dequantize::<$lanes>(rows, row, out);
        }
        #[$attribute]
        fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
            generic::elementwise::rms_norm::<$lanes>(x, weight, epsilon, out);
        }
        #[$attribute]
        fn gate_mul(activation: $crate::mlp::Activation, gate: &mut [f32], up: &[f32]) {
            generic::elementwise::gate_mul(activation, gate, up);
        }
        $crate::table::KernelTable {
            matmul,
            packed: $packed,
            panel_rows: $panel_rows,
            quantize,
            gemm,
            gemm_bf16,
            gemm_bf16_pairs: None,
            attention,
            attention_bf16_pairs: None,
            dequantize,
            rms_norm,
            gate_mul,
            peaks: $peaks,
        }
    }};
}
pub(crate) use kernel_table;

/// [`KernelTable::packed`] on `$rows`, `$panel_rows` rows of activations and `$strips` strips at once, compiled with
/// `$attribute`; a function for each weight type, as in [`kernel_table`].
macro_rules! packed_kernel {
    ($rows:ty, $panel_rows:expr, $strips:expr, #[$attribute:meta]) => {{
        use $crate::generic::packed::{self, PackedTask};
        use $crate::pack::{Layout, with_layout};
        #[$attribute]
        #[inline(never)]
        fn of_type<L: Layout>(task: &PackedTask) {
            packed::packed::<L, $rows, { $panel_rows }, { $strips }>(task);
        }
        #[$attribute]
        fn packed(task: &PackedTask) {
            with_layout!(task.weight.dtype(), of_type::<_>(task));
        }
        packed
    }};
}
pub(crate) use packed_kernel;
