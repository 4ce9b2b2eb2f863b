//! The table of functions that an ISA provides, and the macros that build it from the generic algorithms.

use crate::blocks::WeightType;
use crate::generic::attention::AttentionTask;
use crate::generic::gemm_task::{GatedTask, GemmTask};
use crate::generic::matmul::MatmulTask;
use crate::generic::packed::PackedTask;
use crate::mlp::Activation;
use crate::peaks::Peaks;
use crate::quantized_rows::Precision;
use crate::weight::WeightRows;
use std::ops::RangeInclusive;

/// The kernels of one ISA. Every function needs the ISA's instructions. Lengths are the caller's
/// responsibility; the facade checks them where it makes the tasks.
pub(crate) struct KernelTable {
    pub(crate) matmul: unsafe fn(&MatmulTask),
    pub(crate) packed: unsafe fn(&PackedTask),
    /// Rows of a panel that `packed` is fastest with.
    pub(crate) panel_rows: usize,
    /// Quantises a panel: `x` as `(rows, cols)`, the precision of each row, the panel.
    pub(crate) quantize: unsafe fn(&[f32], &[Precision], &mut [u32]),
    /// Products of f32 numbers.
    pub(crate) gemm: Gemm,
    /// Products of bf16. Used only where [`bf16_dot_is_fast`](crate::dispatch::bf16_dot_is_fast), or with
    /// AMX.
    pub(crate) gemm_bf16: Option<Gemm>,
    /// Products of bf16 weights and activations that are each the sum of two bf16.
    pub(crate) gemm_bf16_pairs: Option<Gemm>,
    pub(crate) attention: unsafe fn(&AttentionTask),
    pub(crate) attention_bits16: Option<Bits16Attention>,
    pub(crate) dequantize: unsafe fn(WeightRows, usize, &mut [f32]),
    pub(crate) rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    pub(crate) gate_mul: unsafe fn(Activation, &mut [f32], &[f32]),
    pub(crate) peaks: Peaks,
}

/// Attention of many rows, where numbers are rounded to about 16 bits.
pub(crate) struct Bits16Attention {
    pub(crate) run: unsafe fn(&AttentionTask),
    /// Whether `run` takes tasks of single units too.
    pub(crate) takes_units: bool,
    /// Whether it takes this head_dim.
    pub(crate) takes: fn(usize) -> bool,
    /// Queries of one task: the most that leave enough tasks for all threads.
    pub(crate) task_queries: RangeInclusive<usize>,
}

/// See [`Gemm::run_gated`].
pub(crate) type RunGated = unsafe fn(&GatedTask);

/// A product for many rows of activations.
#[derive(Clone, Copy)]
pub(crate) struct Gemm {
    pub(crate) run: unsafe fn(&GemmTask),
    /// Computes two products of the same x and multiplies them, one as the gate of the other. None if the ISA
    /// has no such kernel.
    pub(crate) run_gated: Option<RunGated>,
    /// Whether it takes unpacked weights of this type.
    pub(crate) takes: fn(WeightType) -> bool,
    /// Whether it takes packed weights.
    pub(crate) takes_packed: bool,
    /// Writes a panel: `x` as `(rows, cols)`, the number of rows, the panel.
    pub(crate) pack_rows: unsafe fn(&[f32], usize, &mut [u32]),
    /// The words that a row of so many columns takes in a panel.
    pub(crate) row_words: fn(usize) -> usize,
    /// Rows of a panel.
    pub(crate) panel_rows: usize,
    /// Row counts that the last panel may be padded to with zeros, ascending up to `panel_rows`.
    pub(crate) tail_rows: &'static [usize],
    /// Strips that the microkernel computes at once. Tasks have a multiple of it.
    pub(crate) strips: usize,
    /// The most strips of one task.
    pub(crate) max_task_strips: usize,
}

/// Builds a [`KernelTable`] from the generic algorithms on `$lanes` and `$rows`, compiled with `$attribute`.
///
/// - `$packed`: the product with packed weights, for panels of `$panel_rows` rows
/// - `$gemm_rows`, `$gemm_strips`: rows and strips of GEMM's microkernel
/// - `$queries`: queries of attention's microkernel
/// - `$bits16_queries`, `$bits16_width`: queries and vectors of the microkernel of attention in 16-bit
///   integers, if the ISA has it
/// - `$peaks`: the ISA's [`Peaks`]
/// - `$bf16_rows`, `$bf16_strips`, `$bf16`: the microkernel for bf16, and the attribute that enables the dot
///   product of bf16, if the ISA has one
///
/// Each type of weights and of KV blocks has a function of its own, which is never inlined: LLVM takes
/// several times longer to compile one function that contains all of them.
macro_rules! kernel_table {
    (
        $lanes:ty, $rows:ty, packed: $packed:expr, panel_rows: $panel_rows:expr,
        gemm: $gemm_rows:literal x $gemm_strips:literal, attention: $queries:literal,
        $(attention_bits16: $bits16_queries:literal x $bits16_width:literal,)?
        peaks: $peaks:expr, #[$attribute:meta]
        $(, gemm_bf16: $bf16_rows:literal x $bf16_strips:literal, #[$bf16:meta])?
    ) => {{
        use $crate::generic;
        use $crate::generic::storage::{Storage, with_kv_storage, with_storage};
        use $crate::lanes::{LANES, Lanes};
        #[$attribute]
        fn quantize(x: &[f32], precisions: &[$crate::quantized_rows::Precision], panel: &mut [u32]) {
            generic::quantize::quantize(x, precisions, panel);
        }
        #[$attribute]
        #[inline(never)]
        fn few_rows<L: Lanes, S: Storage>(task: &generic::matmul::MatmulTask, rows: usize) {
            generic::matmul::few_rows::<L, S>(task, rows);
        }
        #[$attribute]
        #[inline(never)]
        fn dequantize_weights<L: Lanes, S: Storage>(
            task: &generic::matmul::MatmulTask,
            dequantized: &mut [[f32; LANES]],
        ) {
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
        fn gemm(task: &generic::gemm_task::GemmTask) {
            generic::gemm::gemm::<$lanes, $rows, _, $gemm_rows, $gemm_strips, false>(task);
        }
        #[$attribute]
        fn pack_rows(x: &[f32], rows: usize, panel: &mut [u32]) {
            generic::gemm::pack_rows::<$rows, false>(x, rows, panel);
        }
        let gemm = $crate::table::Gemm {
            run: gemm,
            run_gated: None,
            takes: |_| true,
            takes_packed: false,
            pack_rows,
            row_words: generic::gemm::row_words::<$rows, false>,
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
                fn run(task: &generic::gemm_task::GemmTask) {
                    generic::gemm::gemm::<$lanes, $rows, _, $bf16_rows, $bf16_strips, true>(task);
                }
                #[$bf16]
                fn run_gated(task: &generic::gemm_task::GatedTask) {
                    generic::gemm::gemm::<$lanes, $rows, _, $bf16_rows, $bf16_strips, true>(task);
                }
                #[$bf16]
                fn pack_rows(x: &[f32], rows: usize, panel: &mut [u32]) {
                    generic::gemm::pack_rows::<$rows, true>(x, rows, panel);
                }
                gemm_bf16 = Some($crate::table::Gemm {
                    run,
                    run_gated: Some(run_gated),
                    takes: |dtype| {
                        use $crate::blocks::WeightType;
                        matches!(dtype, WeightType::BF16 | WeightType::F16)
                    },
                    pack_rows,
                    row_words: generic::gemm::row_words::<$rows, true>,
                    panel_rows: $bf16_rows,
                    tail_rows: generic::gemm::tail_rows($bf16_rows),
                    strips: $bf16_strips,
                    max_task_strips: 2 * $bf16_strips,
                    ..gemm
                });
            )?
            gemm_bf16
        };
        #[$attribute]
        #[inline(never)]
        fn attend_kv_block<L: Lanes, S: Storage>(
            task: &generic::attention::AttentionTask,
            queries: &mut generic::attention::Queries,
            block: generic::attention::SeenKvBlock,
        ) {
            generic::attention::attend_kv_block::<L, S, $queries>(task, queries, block);
        }
        #[$attribute]
        fn attention(task: &generic::attention::AttentionTask) {
            generic::attention::attention::<$lanes, $queries>(task, |dtype, queries, block| {
                with_kv_storage!(dtype, attend_kv_block::<$lanes>(task, queries, block));
            });
        }
        #[allow(unused_mut, unused_assignments)] // without the instructions
        let attention_bits16 = {
            let mut attention_bits16 = None;
            $(
                #[$attribute]
                fn run(task: &generic::attention::AttentionTask) {
                    generic::attention_bits16::attention::<$lanes, $bits16_queries, $bits16_width>(
                        task,
                        |queries, block| {
                            attend_kv_block::<$lanes, generic::storage::F32>(task, queries, block);
                        },
                    );
                }
                attention_bits16 = Some($crate::table::Bits16Attention {
                    run,
                    takes_units: true,
                    takes: generic::attention_bits16::takes,
                    task_queries: generic::attention_bits16::TASK_QUERIES,
                });
            )?
            attention_bits16
        };
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
            attention_bits16,
            dequantize,
            rms_norm,
            gate_mul,
            peaks: $peaks,
        }
    }};
}
pub(crate) use kernel_table;

/// Builds [`KernelTable::packed`] on `$rows`, with a microkernel of `$panel_rows` rows and `$strips` strips,
/// compiled with `$attribute`. As in [`kernel_table`], each weight type has functions of its own, and each
/// number of rows has one. Unpacked tiles are the same for several types, and so are the functions that
/// multiply them.
macro_rules! packed_kernel {
    ($rows:ty, $panel_rows:expr, $strips:expr, #[$attribute:meta]) => {{
        use $crate::generic::packed::{self, PackedTask};
        use $crate::packable::{Packable, with_packable};
        use $crate::quantized_rows::Panel;
        #[$attribute]
        #[inline(never)]
        fn multiply<P: Packable, const M: usize>(
            task: &PackedTask,
            strips: &std::ops::Range<usize>,
            panel: &Panel,
        ) {
            packed::multiply_packed::<P, $rows, M, { $strips }>(task, strips, panel);
        }
        #[$attribute]
        fn many_rows<P: Packable>(task: &PackedTask) {
            packed::many_rows(task, |strips, panel| {
                packed::with_rows!(panel.rows, at most $panel_rows, M, multiply::<P, M>(task, strips, panel));
            });
        }
        #[$attribute]
        fn packed(task: &PackedTask) {
            if task.x.rows() <= $crate::quantized_rows::MAX_PANEL_ROWS {
                let few_rows = $crate::table::few_rows_kernel!($rows, #[$attribute]);
                return few_rows(task);
            }
            if !<$rows as $crate::rows16::PackedRows16>::UNPACKS {
                return with_packable!(task.weight.dtype(), many_rows::<_>(task));
            }
            let many_rows = $crate::table::unpacked_kernel!(
                $rows, $crate::generic::unpacked::UnpackedStrip, $panel_rows, $strips, #[$attribute]
            );
            many_rows(task);
        }
        packed
    }};
}
pub(crate) use packed_kernel;

/// Builds the product of up to [`MAX_PANEL_ROWS`](crate::quantized_rows::MAX_PANEL_ROWS) rows with packed
/// weights, on `$rows`, compiled with `$attribute`.
macro_rules! few_rows_kernel {
    ($rows:ty, #[$attribute:meta]) => {{
        use $crate::generic::packed::{self, PackedTask};
        use $crate::packable::{Packable, with_packable};
        // A function for each number of rows: in a larger one, the compiler keeps constants in memory.
        #[$attribute]
        #[inline(never)]
        fn of_number<P: Packable, const M: usize>(task: &PackedTask) {
            packed::few_rows::<P, $rows, M>(task);
        }
        #[$attribute]
        fn of_type<P: Packable>(task: &PackedTask) {
            packed::with_rows!(task.x.rows(), M, of_number::<P, M>(task));
        }
        #[$attribute]
        fn few_rows(task: &PackedTask) {
            with_packable!(task.weight.dtype(), of_type::<_>(task));
        }
        few_rows
    }};
}
pub(crate) use few_rows_kernel;

/// Builds the product of many rows with weights that are unpacked first. `$strip` makes an unpacked strip of
/// its tiles; the other arguments are those of [`packed_kernel`].
macro_rules! unpacked_kernel {
    ($rows:ty, $strip:path, $panel_rows:expr, $strips:expr, #[$attribute:meta]) => {{
        use $crate::generic::packed::{PackedTask, with_rows};
        use $crate::generic::unpacked::{self, NextStrips, UnpackedStrips};
        use $crate::packable::{Packable, with_packable};
        use $crate::quantized_rows::Panel;
        #[$attribute]
        #[inline(never)]
        fn unpack<P: Packable>(task: &PackedTask, unpacked: &mut UnpackedStrips) {
            unpacked::unpack::<P, $rows>(task, unpacked);
        }
        #[$attribute]
        #[inline(never)]
        fn multiply<const SCALES: usize, const MINS: usize, const M: usize>(
            task: &PackedTask,
            unpacked: &UnpackedStrips,
            panel: &Panel,
            next: &mut NextStrips,
        ) {
            unpacked::multiply::<$rows, _, SCALES, MINS, M, { $strips }>(task, unpacked, panel, next, $strip);
        }
        #[$attribute]
        fn many_rows(task: &PackedTask) {
            let (dtype, layout) = (task.weight.dtype(), task.weight.layout());
            unpacked::for_each_cached(
                task,
                $strips,
                |unpacked| with_packable!(dtype, unpack::<_>(task, unpacked)),
                |unpacked, panel, next| {
                    with_rows!(panel.rows, at most $panel_rows, M, match (layout.scales, layout.has_mins) {
                        (1, false) => multiply::<1, 0, M>(task, unpacked, panel, next),
                        (1, true) => multiply::<1, 1, M>(task, unpacked, panel, next),
                        (_, false) => multiply::<2, 0, M>(task, unpacked, panel, next),
                        (_, true) => multiply::<2, 2, M>(task, unpacked, panel, next),
                    });
                },
            );
        }
        many_rows
    }};
}
pub(crate) use unpacked_kernel;
