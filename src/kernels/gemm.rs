//! The facade of the kernels for many rows of float activations.

use super::dispatch::Gemm;
use super::generic::gemm::{GemmTask, GemmWeight};
use super::pack::TILE_ROWS;
use super::pages::grown;
use super::pool::{Cancel, SharedOut};
use super::{Isa, Kernels, Output, PackedProduct, Product, WeightType, dispatch};

/// How many times each thread draws work in one product, at least: so that the threads end together.
const DRAWS: usize = 4;

/// Rows of activations as [`Kernels::gemm`] lays them out; kept to be reused.
#[derive(Debug, Default)]
pub struct GemmScratch {
    words: Vec<u32>,
}

/// A weight, `(rows, weight.rows())` outputs, and what becomes of what they hold.
type Target<'a> = (GemmWeight<'a>, SharedOut<'a>, Output);

impl Kernels {
    /// Computes `out = x · wᵀ` as [`Kernels::matmul`] does, several times as fast where rows are many. Sums are
    /// in another order, so an output's last bits are not those of `matmul`; they too depend on nothing but
    /// the row and the weight's row.
    ///
    /// With `bf16`, activations that meet weights in bf16 are rounded to it, if the processor multiplies such; where
    /// it does so in tiles, weights in blocks and activations that meet them are too. Without it, tiles take
    /// activations that meet weights in bf16 as sums of two: 16 bits of them count.
    ///
    /// # Panics
    /// As `matmul`.
    pub fn gemm(
        &self,
        x: &[f32],
        rows: usize,
        bf16: bool,
        products: &mut [Product],
        scratch: &mut GemmScratch,
        cancel: &Cancel,
    ) {
        products.iter().for_each(|product| product.check(x, rows));
        let special = if bf16 { self.gemm_bf16() } else { self.table.gemm_split.as_ref() };
        let takes = |dtype: WeightType| special.is_some_and(|gemm| (gemm.takes)(dtype));
        // Mixed types are rare; each kind has its own layout of x.
        for (gemm, is_special) in [(special, true), (Some(&self.table.gemm), false)] {
            let chosen = products.iter_mut().filter(|product| takes(product.weight.dtype) == is_special);
            let targets: Vec<Target> =
                chosen.map(|p| (GemmWeight::Rows(p.weight), SharedOut::new(p.out), p.output)).collect();
            if let (Some(gemm), false) = (gemm, targets.is_empty()) {
                self.gemm_with(gemm, x, rows, &targets, scratch, cancel);
            }
        }
    }

    /// Whether [`Kernels::gemm_packed`] can be had.
    pub fn has_gemm_packed(&self) -> bool {
        self.gemm_bf16().is_some_and(|gemm| gemm.takes_packed)
    }

    /// As [`Kernels::gemm`] with `bf16`, for packed weights.
    ///
    /// # Panics
    /// If a length disagrees with the shapes, or not [`Kernels::has_gemm_packed`].
    pub fn gemm_packed(
        &self,
        x: &[f32],
        rows: usize,
        products: &mut [PackedProduct],
        scratch: &mut GemmScratch,
        cancel: &Cancel,
    ) {
        let gemm = self.gemm_bf16().filter(|gemm| gemm.takes_packed).expect("there are such products");
        for product in products.iter() {
            assert_eq!(x.len(), rows * product.weight.cols(), "x is (rows, in_features)");
            assert_eq!(product.out.len(), rows * product.weight.rows(), "out is (rows, out_features)");
        }
        let targets: Vec<Target> = products
            .iter_mut()
            .map(|p| (GemmWeight::Packed(p.weight), SharedOut::new(p.out), p.output))
            .collect();
        if !targets.is_empty() {
            self.gemm_with(gemm, x, rows, &targets, scratch, cancel);
        }
    }

    fn gemm_bf16(&self) -> Option<&'static Gemm> {
        let is_fast = self.isa == Isa::Amx || dispatch::bf16_pairs_are_fast();
        self.table.gemm_bf16.as_ref().filter(|_| is_fast)
    }

    /// At least one product; their lengths have been checked.
    fn gemm_with(
        &self,
        gemm: &Gemm,
        x: &[f32],
        rows: usize,
        targets: &[Target],
        scratch: &mut GemmScratch,
        cancel: &Cancel,
    ) {
        if rows == 0 {
            return;
        }
        let cols = x.len() / rows;
        let words = (gemm.row_words)(cols);
        let laid_out_rows = if gemm.whole_panels { rows.next_multiple_of(gemm.panel_rows) } else { rows };
        let laid_out = grown(&mut scratch.words, laid_out_rows * words);
        self.pool.for_each_chunk(laid_out, gemm.panel_rows * words, cancel, &|panel, out| {
            let first = panel * gemm.panel_rows;
            let rows = gemm.panel_rows.min(rows - first);
            // SAFETY: the table was chosen for this CPU.
            unsafe { (gemm.pack_rows)(&x[first * cols..][..rows * cols], rows, out) }
        });
        let laid_out = &*laid_out;
        let strips: Vec<usize> =
            targets.iter().map(|(weight, ..)| weight.rows().div_ceil(TILE_ROWS)).collect();
        let draws = DRAWS * self.pool.threads();
        let per_task = (strips.iter().sum::<usize>() / draws).clamp(1, gemm.task_strips);
        let per_task = per_task.next_multiple_of(gemm.strips);
        self.pool.for_each_range(&strips, per_task, cancel, &|product, strips| {
            let (weight, out, output) = &targets[product];
            let task = GemmTask { x: laid_out, rows, weight: *weight, strips, out, output: *output };
            // SAFETY: the table was chosen for this CPU, which has what `gemm` needs; lengths were asserted before;
            // the tasks' strips do not overlap.
            unsafe { (gemm.run)(&task) }
        });
    }
}
