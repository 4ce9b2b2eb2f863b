//! Which instruction set runs: chosen once, when the process first needs a kernel.

use super::generic::attention::AttentionTask;
use super::generic::gemm::{GatedTask, GemmTask};
use super::generic::matmul::MatmulTask;
use super::generic::packed::PackedTask;
use super::roofline::Peaks;
use super::{Activation, Precision, WeightRows, WeightType};
use std::sync::OnceLock;

/// A level of instructions that the kernels exist in, lowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust for the target's baseline.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX2 and AVX-VNNI: products of bytes, four summed at once.
    AvxVnni,
    /// AVX-512F, BW and VNNI.
    Avx512,
    /// AVX-512 and BF16, and tiles of bf16 and bytes.
    Amx,
}

/// The environment variable that forces a level, by [`Isa::name`].
pub const ISA_VARIABLE: &str = "CANDLE_LLAMA_ISA";

impl Isa {
    /// Every level, lowest first.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512, Isa::Amx];

    /// The level's name, as `CANDLE_LLAMA_ISA` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }

    /// Whether products with packed weights are faster here than those with f32 activations: not where the
    /// compiler alone must find the instructions.
    pub fn packs(self) -> bool {
        self != Isa::Scalar
    }

    /// Whether this CPU has the level.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => Isa::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => {
                Isa::Avx512.is_available()
                    && is_x86_feature_detected!("avx512bf16")
                    && super::x86_64::amx::are_available()
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The levels of this CPU, lowest first.
    pub fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The level in use: the one that `CANDLE_LLAMA_ISA` names, else the highest of this CPU.
    ///
    /// # Errors
    /// A sentence, if the variable names no level or one that this CPU has not.
    pub fn detect() -> Result<Isa, &'static str> {
        static CHOSEN: OnceLock<Result<Isa, String>> = OnceLock::new();
        CHOSEN.get_or_init(choose).as_ref().copied().map_err(String::as_str)
    }

    pub(super) fn table(self) -> &'static KernelTable {
        assert!(self.is_available(), "{} is not available on this CPU", self.name());
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => &super::x86_64::amx::TABLE,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &super::x86_64::avx512::TABLE,
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => &super::x86_64::avxvnni::TABLE,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &super::x86_64::avx2::TABLE,
            _ => &super::scalar::TABLE,
        }
    }
}

fn choose() -> Result<Isa, String> {
    let available = || Isa::available().map(Isa::name).collect::<Vec<_>>().join(", ");
    let Some(name) = std::env::var_os(ISA_VARIABLE) else {
        return Ok(Isa::available().last().unwrap_or(Isa::Scalar));
    };
    Isa::available()
        .find(|isa| name == isa.name())
        .ok_or_else(|| format!("{ISA_VARIABLE}={}: this CPU has {}", name.to_string_lossy(), available()))
}

/// Whether this CPU multiplies pairs of bf16 faster than floats. Some with AVX-512 have no such instruction, and
/// Intel's do half of FMA's operations with it (Sapphire Rapids and later, measured: docs/experiments.md).
pub(super) fn bf16_pairs_are_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16") && !is_of_intel();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe)] // asking is safe in later versions of Rust
fn is_of_intel() -> bool {
    // SAFETY: every x86-64 has the instruction, and leaf 0.
    let id = unsafe { std::arch::x86_64::__cpuid(0) };
    [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}

/// One level's kernels. Every pointer needs the level's instructions; lengths are the callers' care
/// and are checked where the tasks are made, in `mod.rs`.
pub(super) struct KernelTable {
    pub(super) matmul: unsafe fn(&MatmulTask),
    pub(super) packed: unsafe fn(&PackedTask),
    /// Rows of activations that `packed` takes at once, when there are many.
    pub(super) panel_rows: usize,
    /// `(rows, cols)`, rows, and their panel.
    pub(super) quantize: unsafe fn(&[f32], usize, Precision, &mut [u32]),
    /// Products in f32.
    pub(super) gemm: Gemm,
    /// Products of bf16: at AVX-512 only where [`bf16_pairs_are_fast`].
    pub(super) gemm_bf16: Option<Gemm>,
    /// Products of weights in bf16 and activations that are sums of two bf16.
    pub(super) gemm_bf16_pairs: Option<Gemm>,
    pub(super) attention: unsafe fn(&AttentionTask),
    pub(super) attention_bf16_pairs: Option<Bf16PairAttention>,
    pub(super) dequantize: unsafe fn(WeightRows, usize, &mut [f32]),
    pub(super) rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    pub(super) gate_mul: unsafe fn(Activation, &mut [f32], &[f32]),
    pub(super) peaks: Peaks,
}

/// Attention of many rows, whose numbers are sums of two bf16.
#[derive(Clone, Copy)]
pub(super) struct Bf16PairAttention {
    /// Takes whole rows, not units.
    pub(super) run: unsafe fn(&AttentionTask),
    /// Which head_dim it takes.
    pub(super) takes: fn(usize) -> bool,
}

/// See [`Gemm::run_gated`].
pub(super) type RunGated = unsafe fn(&GatedTask);

/// Products of many rows of activations. A strip is 16 rows of weights.
#[derive(Clone, Copy)]
pub(super) struct Gemm {
    pub(super) run: unsafe fn(&GemmTask),
    /// Two products of the same x, one the other's gate; None if there is no such kernel.
    pub(super) run_gated: Option<RunGated>,
    /// Which weights it takes in rows.
    pub(super) takes: fn(WeightType) -> bool,
    /// Whether it takes packed weights too.
    pub(super) takes_packed: bool,
    /// Writes a panel: `(rows, cols)`, rows, and the panel.
    pub(super) pack_rows: unsafe fn(&[f32], usize, &mut [u32]),
    /// Words that a row of so many columns has in a panel.
    pub(super) row_words: fn(usize) -> usize,
    /// Rows of a panel.
    pub(super) panel_rows: usize,
    /// How many rows the last panel may have, ascending up to `panel_rows`; those that are missing are zeros.
    pub(super) tails: &'static [usize],
    /// Strips done at once: tasks have a multiple.
    pub(super) strips: usize,
    /// The most strips of a task.
    pub(super) task_strips: usize,
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
        use $crate::lanes::{LANES, Lanes, Storage, with_storage};
        #[$attribute]
        fn quantize(x: &[f32], rows: usize, precision: $crate::Precision, panel: &mut [u32]) {
            generic::quantize::quantize(x, rows, precision, panel);
        }
        #[$attribute]
        #[inline(never)]
        fn few_rows<L: Lanes, S: Storage>(task: &generic::matmul::MatmulTask, rows: usize) {
            generic::matmul::few_rows::<L, S>(task, rows);
        }
        #[$attribute]
        #[inline(never)]
        fn fill_panel<L: Lanes, S: Storage>(task: &generic::matmul::MatmulTask, panel: &mut [[f32; LANES]]) {
            generic::matmul::fill_panel::<L, S>(task, panel);
        }
        #[$attribute]
        fn matmul(task: &generic::matmul::MatmulTask) {
            let (dtype, rows) = (task.weight.dtype(), task.rows());
            if rows < generic::matmul::panel_from(dtype) {
                with_storage!(dtype, few_rows::<$lanes>(task, rows));
            } else {
                let mut panel = generic::matmul::take_panel(task);
                with_storage!(dtype, fill_panel::<$lanes>(task, &mut panel));
                generic::matmul::many_rows::<$lanes>(task, rows, &panel);
                generic::matmul::put_panel(panel);
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
        let gemm = $crate::dispatch::Gemm {
            run: gemm,
            run_gated: None,
            takes: |_| true,
            takes_packed: false,
            pack_rows,
            row_words: generic::gemm::row_words::<false>,
            panel_rows: $gemm_rows,
            tails: generic::gemm::tails($gemm_rows),
            strips: $gemm_strips,
            task_strips: 8,
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
                gemm_bf16 = Some($crate::dispatch::Gemm {
                    run,
                    takes: |dtype| matches!(dtype, $crate::WeightType::BF16),
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
        fn dequantize(rows: $crate::WeightRows, row: usize, out: &mut [f32]) {
            generic::dequantize::dequantize::<$lanes>(rows, row, out);
        }
        #[$attribute]
        fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
            generic::elementwise::rms_norm::<$lanes>(x, weight, epsilon, out);
        }
        #[$attribute]
        fn gate_mul(activation: $crate::Activation, gate: &mut [f32], up: &[f32]) {
            generic::elementwise::gate_mul(activation, gate, up);
        }
        $crate::dispatch::KernelTable {
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
pub(super) use kernel_table;

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
pub(super) use packed_kernel;
