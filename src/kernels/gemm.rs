//! The facade of the kernels for many rows of float activations.

use super::generic::gemm::{GemmTask, row_words};
use super::pack::TILE_ROWS;
use super::pool::{Cancel, SharedOut};
use super::{Kernels, Product, WeightType, dispatch};

/// How many times each thread draws work in one product, at least: so that the threads end together.
const DRAWS: usize = 4;

/// Rows of activations as [`Kernels::gemm`] lays them out; kept to be reused.
#[derive(Debug, Default)]
pub struct GemmScratch {
    words: Vec<u32>,
}

impl Kernels {
    /// Computes `out = x · wᵀ` as [`Kernels::matmul`] does, several times as fast where rows are many. Sums are
    /// in another order, so an output's last bits are not those of `matmul`; they too depend on nothing but
    /// the row and the weight's row.
    ///
    /// With `bf16` activations are rounded to bf16 for weights that are, if the processor multiplies such.
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
        let bf16_gemm = self.table.gemm_bf16.filter(|_| bf16 && dispatch::bf16_products());
        let pairs =
            |product: &Product| bf16_gemm.filter(|_| product.weight.dtype == WeightType::BF16).is_some();
        // Mixed types are rare; each kind has its own layout of x.
        for words_are_pairs in [true, false] {
            let chosen = products.iter_mut().filter(|product| pairs(product) == words_are_pairs);
            let kernel = if words_are_pairs { bf16_gemm } else { Some(self.table.gemm) };
            let mut chosen: Vec<&mut Product> = chosen.collect();
            if let (Some(kernel), false) = (kernel, chosen.is_empty()) {
                self.gemm_with(kernel, x, rows, words_are_pairs, &mut chosen, scratch, cancel);
            }
        }
    }

    #[allow(clippy::too_many_arguments)] // those of `gemm`, and the kernel
    fn gemm_with(
        &self,
        kernel: unsafe fn(&GemmTask),
        x: &[f32],
        rows: usize,
        bf16: bool,
        products: &mut [&mut Product],
        scratch: &mut GemmScratch,
        cancel: &Cancel,
    ) {
        if rows == 0 {
            return;
        }
        products.iter().for_each(|product| product.check(x, rows));
        let cols = x.len() / rows;
        let words = row_words(cols, bf16);
        let (panel_rows, tile_strips) = self.table.gemm_tile;
        scratch.words.resize(rows * words, 0);
        self.pool.for_each_chunk(&mut scratch.words, panel_rows * words, cancel, &|panel, out| {
            let rows = out.len() / words;
            let x = &x[panel * panel_rows * cols..][..rows * cols];
            // SAFETY: the table was chosen for this CPU.
            unsafe { (self.table.pack_rows)(x, rows, bf16, out) }
        });
        let targets: Vec<_> =
            products.iter_mut().map(|p| (p.weight, p.output, SharedOut::new(p.out))).collect();
        let strips: Vec<usize> = targets.iter().map(|(weight, ..)| weight.rows.div_ceil(TILE_ROWS)).collect();
        let draws = DRAWS * self.pool.threads();
        let per_task = (strips.iter().sum::<usize>() / draws).clamp(1, 8).next_multiple_of(tile_strips);
        self.pool.for_each_range(&strips, per_task, cancel, &|product, strips| {
            let (weight, output, out) = &targets[product];
            let task = GemmTask { x: &scratch.words, weight: *weight, strips, out, output: *output };
            // SAFETY: the table was chosen for this CPU, which has what `kernel` needs; lengths were
            // asserted above; the tasks' strips do not overlap.
            unsafe { kernel(&task) }
        });
    }
}
