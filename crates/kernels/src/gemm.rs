//! The facade for products with many rows of float activations.

use crate::generic::gemm_task::{GatedTask, GemmTask};
use crate::kernels::{Kernels, Product};
use crate::mlp::Mlp;
use crate::output::{Output, SharedOut};
use crate::packed::PackedProduct;
use crate::pages::grown;
use crate::pool::Cancel;
use crate::table::{Gemm, RunGated};
use crate::tile::TILE_ROWS;
use crate::weight::Weight;

/// Tasks per thread of one product, at least, so that all threads end at the same time.
const TASKS_PER_THREAD: usize = 4;

/// Scratch buffers of [`Kernels::gemm`] for activations in its layout. They can be reused.
#[derive(Debug, Default)]
pub struct GemmScratch {
    words: Vec<u32>,
    /// The MLP's inner activations, between the products of [`Kernels::gemm_mlp`].
    gated: Vec<u32>,
}

/// How [`Kernels::gemm`] rounds activations where the ISA multiplies bf16. Without such instructions, and for
/// weight types that they do not support, activations stay f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GemmInput {
    /// Each activation is the sum of two bf16 (about 16 bits) where the ISA has AMX tiles, else f32.
    Bf16Pairs,
    /// Each activation is rounded to bf16. Quantised weights are rounded to bf16 too with AMX tiles, F16
    /// weights without.
    Bf16,
}

/// A weight, its outputs `(rows, weight.rows())`, and whether they are set or added to.
type Target<'a> = (Weight<'a>, SharedOut<'a>, Output);

impl Kernels {
    /// Computes `out = x · wᵀ` like [`Kernels::matmul`], but several times faster for many rows. It sums in
    /// another order, so the last bits of an output differ from `matmul`'s. An output still depends only on
    /// its row and its weight's row.
    ///
    /// `input` says how activations may be rounded where that makes the product faster.
    ///
    /// # Panics
    /// As `matmul`.
    pub fn gemm(
        &self,
        x: &[f32],
        rows: usize,
        input: GemmInput,
        products: &mut [Product],
        scratch: &mut GemmScratch,
        cancel: &Cancel,
    ) {
        products.iter().for_each(|product| product.check(x, rows));
        if rows == 0 {
            return;
        }
        let rounded = self.gemm_for(input);
        let takes = |weight| rounded.is_some_and(|gemm| gemm.takes_weight(Weight::Rows(weight)));
        // Products whose weights the rounding kernel takes run first, the others after them in f32: each
        // needs its own layout of x. Both kinds in one call are rare.
        for (gemm, is_rounded) in [(rounded, true), (Some(&self.table.gemm), false)] {
            let chosen = products.iter_mut().filter(|product| takes(product.weight) == is_rounded);
            let targets: Vec<Target> =
                chosen.map(|p| (Weight::Rows(p.weight), SharedOut::new(p.out), p.output)).collect();
            if let (Some(gemm), false) = (gemm, targets.is_empty()) {
                let x = self.lay_out(gemm, x, rows, &mut scratch.words, cancel);
                self.run_gemm(gemm, x, rows, &targets, cancel);
            }
        }
    }

    /// Whether [`Kernels::gemm_packed`] is available.
    pub fn has_gemm_packed(&self) -> bool {
        self.gemm_bf16.is_some_and(|gemm| gemm.takes_packed)
    }

    /// Like [`Kernels::gemm`] with [`GemmInput::Bf16`], for packed weights.
    ///
    /// # Panics
    /// If a length disagrees with the shapes, or [`Kernels::has_gemm_packed`] is false.
    pub fn gemm_packed(
        &self,
        x: &[f32],
        rows: usize,
        products: &mut [PackedProduct],
        scratch: &mut GemmScratch,
        cancel: &Cancel,
    ) {
        let gemm = self.gemm_bf16.filter(|gemm| gemm.takes_packed).expect("the ISA has this kernel");
        for product in products.iter() {
            assert_eq!(x.len(), rows * product.weight.cols(), "x is (rows, in_features)");
            assert_eq!(product.out.len(), rows * product.weight.rows(), "out is (rows, out_features)");
        }
        let targets: Vec<Target> = products
            .iter_mut()
            .map(|p| (Weight::Packed(p.weight), SharedOut::new(p.out), p.output))
            .collect();
        if rows > 0 && !targets.is_empty() {
            let x = self.lay_out(gemm, x, rows, &mut scratch.words, cancel);
            self.run_gemm(gemm, x, rows, &targets, cancel);
        }
    }

    /// Whether [`Kernels::gemm_mlp`] is available for these weights.
    pub fn has_gemm_mlp(&self, input: GemmInput, mlp: &Mlp) -> bool {
        self.gated_gemm(input, mlp).is_some()
    }

    /// Adds the output of an MLP to `out`. The result is the same, bit for bit, as of three products by
    /// [`Kernels::gemm`] or [`Kernels::gemm_packed`] and [`Kernels::gate_mul`]. It is faster, because the
    /// gate and what it gates stay in the task that computes them.
    ///
    /// - `x`: `(rows, features)`
    /// - `out`: the same shape as `x`
    ///
    /// # Panics
    /// If a length disagrees with the shapes, or [`Kernels::has_gemm_mlp`] is false.
    #[allow(clippy::too_many_arguments)]
    pub fn gemm_mlp(
        &self,
        x: &[f32],
        rows: usize,
        input: GemmInput,
        mlp: &Mlp,
        out: &mut [f32],
        scratch: &mut GemmScratch,
        cancel: &Cancel,
    ) {
        let (gemm, run_gated) = self.gated_gemm(input, mlp).expect("the ISA has this kernel");
        let (features, inner) = (mlp.gate.cols(), mlp.gate.rows());
        assert_eq!(x.len(), rows * features, "x is (rows, features)");
        assert_eq!(out.len(), rows * features, "out has the shape of x");
        assert_eq!((mlp.up.rows(), mlp.up.cols()), (inner, features), "up has the shape of gate");
        assert_eq!(
            (mlp.down.rows(), mlp.down.cols()),
            (features, inner),
            "down is (features, inner features)"
        );
        if rows == 0 {
            return;
        }
        let x = self.lay_out(gemm, x, rows, &mut scratch.words, cancel);
        let gated = grown(&mut scratch.gated, gemm.laid_out_rows(rows) * (gemm.row_words)(inner));
        let strips = inner.div_ceil(TILE_ROWS);
        // A task has strips of two weights: the gate's and the up projection's.
        let per_task = self.strips_per_task(gemm, 2 * strips, gemm.max_task_strips / 2);
        let shared = SharedOut::new(gated);
        self.pool.for_each_range(&[strips], per_task, cancel, &|_, strips| {
            let task = GatedTask { x, rows, mlp, strips, out: &shared };
            // SAFETY: as in `run_gemm`.
            unsafe { run_gated(&task) }
        });
        let target = (mlp.down, SharedOut::new(out), Output::Add);
        self.run_gemm(gemm, gated, rows, &[target], cancel);
    }

    /// The kernel for `input`, if the ISA has one.
    fn gemm_for(&self, input: GemmInput) -> Option<&'static Gemm> {
        match input {
            GemmInput::Bf16 => self.gemm_bf16,
            GemmInput::Bf16Pairs => self.table.gemm_bf16_pairs.as_ref(),
        }
    }

    fn gated_gemm(&self, input: GemmInput, mlp: &Mlp) -> Option<(&'static Gemm, RunGated)> {
        let gemm = self.gemm_for(input)?;
        let takes_all = [mlp.gate, mlp.up, mlp.down].into_iter().all(|weight| gemm.takes_weight(weight));
        Some((gemm, gemm.run_gated.filter(|_| takes_all)?))
    }

    /// Writes activations in `gemm`'s layout to `words`. There is at least one row.
    fn lay_out<'a>(
        &self,
        gemm: &Gemm,
        x: &[f32],
        rows: usize,
        words: &'a mut Vec<u32>,
        cancel: &Cancel,
    ) -> &'a [u32] {
        let cols = x.len() / rows;
        let row_words = (gemm.row_words)(cols);
        let laid_out = grown(words, gemm.laid_out_rows(rows) * row_words);
        self.pool.for_each_chunk(laid_out, gemm.panel_rows * row_words, cancel, &|panel, out| {
            let first = panel * gemm.panel_rows;
            let rows = gemm.panel_rows.min(rows - first);
            // SAFETY: the table was chosen for this CPU.
            unsafe { (gemm.pack_rows)(&x[first * cols..][..rows * cols], rows, out) }
        });
        laid_out
    }

    /// Runs products whose lengths have been checked; `x` is in `gemm`'s layout. There is at least one
    /// product and one row.
    fn run_gemm(&self, gemm: &Gemm, x: &[u32], rows: usize, targets: &[Target], cancel: &Cancel) {
        let strips: Vec<usize> =
            targets.iter().map(|(weight, ..)| weight.rows().div_ceil(TILE_ROWS)).collect();
        let per_task = self.strips_per_task(gemm, strips.iter().sum(), gemm.max_task_strips);
        self.pool.for_each_range(&strips, per_task, cancel, &|product, strips| {
            let (weight, out, output) = &targets[product];
            let task = GemmTask { x, rows, weight: *weight, strips, out, output: *output };
            // SAFETY: the table was chosen for this CPU, which has what `gemm` needs; lengths were asserted
            // before; the tasks' strips do not overlap.
            unsafe { (gemm.run)(&task) }
        });
    }

    fn strips_per_task(&self, gemm: &Gemm, strips: usize, max: usize) -> usize {
        (strips / (TASKS_PER_THREAD * self.pool.threads())).clamp(1, max).next_multiple_of(gemm.strips)
    }
}

impl Gemm {
    fn takes_weight(&self, weight: Weight) -> bool {
        match weight {
            Weight::Rows(weight) => (self.takes)(weight.dtype),
            Weight::Packed(_) => self.takes_packed,
        }
    }

    fn laid_out_rows(&self, rows: usize) -> usize {
        let whole = rows / self.panel_rows * self.panel_rows;
        let left = rows - whole;
        let tail = self.tail_rows.iter().find(|&&tail| tail >= left).filter(|_| left > 0);
        whole + tail.copied().unwrap_or(0)
    }
}
