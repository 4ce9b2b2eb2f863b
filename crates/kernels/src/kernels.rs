//! The facade: the kernels of one ISA and their threads. Lengths are checked here, before a kernel runs.

use crate::blocks::WeightType;
use crate::dispatch::{self, Isa};
use crate::generic::matmul::MatmulTask;
use crate::lanes::{self, LANES};
use crate::mlp::Activation;
use crate::output::{Output, SharedOut};
use crate::pages::Arena;
use crate::pool::{Cancel, Pool};
use crate::table::{Gemm, KernelTable};
use crate::weight::WeightRows;

/// The most f32 numbers of dequantised weights in one task: 512 KiB, which fits into L2.
const DEQUANTIZED_LEN: usize = 1 << 17;

/// Dequantises whole blocks to f32, with the same bits as ggml's reference.
///
/// - `bytes`: `out.len()` elements of `dtype`
/// - `out`: overwritten
///
/// # Panics
/// If `bytes` has another length.
pub fn dequantize(dtype: WeightType, bytes: &[u8], out: &mut [f32]) {
    if out.is_empty() && bytes.is_empty() {
        return;
    }
    let rows = WeightRows::new(dtype, bytes, 1, out.len()).expect("bytes have the length of out");
    // All ISAs give the same bits, so a wrong `CANDLE_LLAMA_ISA` is no error here. Loading a model reports
    // it.
    let table = Isa::detect().unwrap_or(Isa::Scalar).table();
    // SAFETY: the table was chosen for this CPU; `out` is the one row.
    unsafe { (table.dequantize)(rows, 0, out) }
}

/// One product of [`Kernels::matmul`].
pub struct Product<'a> {
    /// `(out_features, in_features)`
    pub weight: WeightRows<'a>,
    /// `(rows, out_features)`
    pub out: &'a mut [f32],
    /// Whether `out` is replaced or added to.
    pub output: Output,
}

impl Product<'_> {
    /// # Panics
    /// If `x` is not `(rows, in_features)`, or `out` not `(rows, out_features)`.
    pub(crate) fn check(&self, x: &[f32], rows: usize) {
        assert_eq!(x.len(), rows * self.weight.cols, "x is (rows, in_features)");
        assert_eq!(self.out.len(), rows * self.weight.rows, "out is (rows, out_features)");
    }
}

/// The kernels of one ISA, and the threads that run them.
pub struct Kernels {
    pub(crate) isa: Isa,
    pub(crate) table: &'static KernelTable,
    /// The table's products of bf16, where they are faster than those of floats. Virtual machines take long
    /// to answer which CPU this is, so they are asked once.
    pub(crate) gemm_bf16: Option<&'static Gemm>,
    pub(crate) pool: Pool,
    /// Memory of the packed weights.
    pub(crate) arena: Arena,
}

impl Kernels {
    /// The kernels of `isa` on `threads` threads, including the calling one.
    ///
    /// # Errors
    /// The system's error if a thread cannot be started.
    ///
    /// # Panics
    /// If this CPU does not have the ISA.
    pub fn new(isa: Isa, threads: usize) -> std::io::Result<Self> {
        let table = isa.table();
        dispatch::choose_prefetch();
        let bf16_is_fast = isa == Isa::Amx || dispatch::bf16_dot_is_fast();
        let gemm_bf16 = table.gemm_bf16.as_ref().filter(|_| bf16_is_fast);
        Ok(Kernels { isa, table, gemm_bf16, pool: Pool::new(threads)?, arena: Arena::default() })
    }

    /// The ISA in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Computes `out = x · wᵀ` for several weights that share an input.
    ///
    /// - `x`: `(rows, in_features)`
    /// - each weight: `(out_features, in_features)`
    /// - each `out`: `(rows, out_features)`
    ///
    /// An output depends only on its row of `x` and its row of the weight, bit for bit. If `cancel` fires,
    /// the outputs are incomplete.
    ///
    /// # Panics
    /// If a length disagrees with these shapes.
    pub fn matmul(&self, x: &[f32], rows: usize, products: &mut [Product], cancel: &Cancel) {
        if rows == 0 {
            return;
        }
        products.iter().for_each(|product| product.check(x, rows));
        let cols = x.len() / rows;
        let mut padded = Vec::new();
        let x = if cols.is_multiple_of(LANES) {
            x.as_chunks().0
        } else {
            for row in x.chunks_exact(cols) {
                let (lanes, tail) = row.as_chunks();
                padded.extend_from_slice(lanes);
                padded.push(lanes::padded(tail));
            }
            &padded
        };
        // Tasks must be small, so that all threads end at the same time, but large enough to be worth
        // claiming. They are a multiple of the microkernel's three weight rows.
        let per_task = match rows {
            1..4 => (32 * 1024 / cols).clamp(3, 96),
            _ => (DEQUANTIZED_LEN / cols).clamp(3, 48),
        } / 3
            * 3;
        let targets: Vec<_> =
            products.iter_mut().map(|p| (p.weight, p.output, SharedOut::new(p.out))).collect();
        let features: Vec<usize> = targets.iter().map(|(weight, ..)| weight.rows).collect();
        self.pool.for_each_range(&features, per_task, cancel, &|product, range| {
            let (weight, output, out) = &targets[product];
            let task = MatmulTask { x, weight: *weight, range, out, output: *output };
            // SAFETY: the table was chosen for this CPU; lengths were asserted above; the tasks'
            // ranges of columns do not overlap.
            unsafe { (self.table.matmul)(&task) }
        });
    }

    /// Writes row `row` of a weight as f32 to `out`, `(cols,)`.
    ///
    /// # Panics
    /// If `row` or the length of `out` is out of range.
    pub fn dequantize(&self, weight: WeightRows, row: usize, out: &mut [f32]) {
        assert!(row < weight.rows, "row {row} of {}", weight.rows);
        assert_eq!(out.len(), weight.cols, "out is one row");
        // SAFETY: the table was chosen for this CPU; lengths were asserted above.
        unsafe { (self.table.dequantize)(weight, row, out) }
    }

    /// RMSNorm of every row: `out = x / sqrt(mean(x²) + epsilon) * weight`.
    ///
    /// - `x`, `out`: `(rows, weight.len())`
    ///
    /// # Panics
    /// If a length disagrees with these shapes.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32], cancel: &Cancel) {
        let width = weight.len();
        assert_eq!(x.len(), out.len(), "out has the shape of x");
        assert!(width > 0 && x.len().is_multiple_of(width), "x is (rows, weight.len())");
        let rows = if x.len() <= ELEMENTWISE_TASK { x.len() } else { width };
        self.pool.for_each_chunk(out, rows.max(1), cancel, &|chunk, out| {
            let x = &x[chunk * rows..][..out.len()];
            for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                // SAFETY: the table was chosen for this CPU; lengths were asserted above.
                unsafe { (self.table.rms_norm)(x, weight, epsilon, out) }
            }
        });
    }

    /// `gate = activation(gate) * up`, elementwise.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn gate_mul(&self, activation: Activation, gate: &mut [f32], up: &[f32], cancel: &Cancel) {
        assert_eq!(gate.len(), up.len(), "up has the shape of gate");
        self.pool.for_each_chunk(gate, ELEMENTWISE_TASK, cancel, &|chunk, gate| {
            let up = &up[chunk * ELEMENTWISE_TASK..][..gate.len()];
            // SAFETY: the table was chosen for this CPU; lengths were asserted above.
            unsafe { (self.table.gate_mul)(activation, gate, up) }
        });
    }

    /// Rotates the halves of every head by its row's angles, in place (rotary position embedding).
    ///
    /// - `x`: `(rows, heads, head_dim)`
    /// - `cos`, `sin`: `(rows, head_dim / 2)`
    ///
    /// Source: Su et al., "RoFormer", arXiv 2104.09864, in the half-split order of `transformers`.
    ///
    /// # Panics
    /// If a length disagrees with these shapes.
    pub fn rope(&self, x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], cancel: &Cancel) {
        let half = head_dim / 2;
        assert_eq!(cos.len(), sin.len(), "sin has the shape of cos");
        assert!(
            half > 0 && head_dim.is_multiple_of(2) && cos.len().is_multiple_of(half),
            "(rows, head_dim / 2)"
        );
        let rows = cos.len() / half;
        if rows == 0 {
            return;
        }
        assert!(x.len().is_multiple_of(rows * head_dim), "x is (rows, heads, head_dim)");
        self.pool.for_each_chunk(x, x.len() / rows, cancel, &|row, heads| {
            let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
            for head in heads.chunks_exact_mut(head_dim) {
                let (first, second) = head.split_at_mut(half);
                for (((x, y), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
                }
            }
        });
    }
}

/// Elements of one task of elementwise work. With fewer, sharing them between threads costs more than it
/// saves.
const ELEMENTWISE_TASK: usize = 4096;
