//! The facade for products with packed weights and quantised activations.

use crate::blocks::WeightType;
use crate::generic::packed::PackedTask;
use crate::kernels::Kernels;
use crate::output::{Output, SharedOut};
use crate::pack::{NoMemory, PackedRows};
use crate::pool::Cancel;
use crate::quantized_rows::{MAX_PANEL_ROWS, Precision, QuantizedRows};
use crate::tile::{TILE_COLS, TILE_ROWS};

/// Tasks per thread of one product, at least, so that all threads end at the same time.
const TASKS_PER_THREAD: usize = 8;

/// One product of [`Kernels::matmul_packed`].
pub struct PackedProduct<'a> {
    /// `(out_features, in_features)`
    pub weight: &'a PackedRows,
    /// `(rows, out_features)`
    pub out: &'a mut [f32],
    /// Whether `out` is replaced or added to.
    pub output: Output,
}

impl Kernels {
    /// Packs `rows` x `cols` weights. `fill` writes the blocks of one row. Returns None if the type or the
    /// shape cannot be packed, or if `cancel` fires.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn pack(
        &self,
        dtype: WeightType,
        rows: usize,
        cols: usize,
        cancel: &Cancel,
        fill: &(dyn Fn(usize, &mut [u8]) + Sync),
    ) -> Result<Option<PackedRows>, NoMemory> {
        let Some(mut packed) = PackedRows::zeroed(&self.arena, dtype, rows, cols)? else { return Ok(None) };
        let row_bytes = dtype.bytes_for(cols).expect("the columns are whole blocks");
        let strip_bytes = packed.strip_bytes();
        self.pool.for_each_chunk(packed.bytes_mut(), strip_bytes, cancel, &|strip, tiles| {
            let first = strip * TILE_ROWS;
            let lanes = TILE_ROWS.min(rows - first);
            let mut blocks = vec![0; lanes * row_bytes];
            for (lane, row) in blocks.chunks_exact_mut(row_bytes).enumerate() {
                fill(first + lane, row);
            }
            PackedRows::pack_strip(dtype, &blocks, tiles);
        });
        Ok((!cancel.is_cancelled()).then_some(packed))
    }

    /// Rows of a full panel: products with packed weights are the fastest per row for a multiple of it.
    pub fn panel_rows(&self) -> usize {
        self.table.panel_rows
    }

    /// Quantises activations, `(rows, cols)`, with one scale for every 32 columns of a row. `precisions` has
    /// each row's. Rows of the same precision should be neighbours: a panel with residuals has room for them
    /// in all of its rows.
    ///
    /// # Panics
    /// If `x` has another length, or `cols` is not a multiple of 32.
    pub fn quantize(&self, x: &[f32], precisions: &[Precision], out: &mut QuantizedRows, cancel: &Cancel) {
        let rows = precisions.len();
        let cols = x.len().checked_div(rows).unwrap_or(0);
        assert!(x.len() == rows * cols && cols.is_multiple_of(TILE_COLS), "(rows, cols), whole blocks");
        // As few panels as possible. They are even, because small panels take longer per row: reading the
        // weights takes as long for one row as for several.
        let panels = match rows {
            _ if x.is_empty() => 0,
            ..=MAX_PANEL_ROWS => 1,
            _ => rows.div_ceil(self.table.panel_rows),
        };
        (out.rows, out.cols, out.panel_count) = (rows, cols, panels);
        let len = if panels > 0 { out.panel(panels - 1).1.end } else { 0 };
        let mut words = std::mem::take(&mut out.words);
        words.resize(len, 0);
        let shared = SharedOut::new(&mut words);
        self.pool.run(panels, cancel, &|panel| {
            let (rows, words) = out.panel(panel);
            // SAFETY: every panel comes once, and the words of panels do not overlap.
            let words = unsafe { shared.slice_mut(words.start, words.len()) };
            let x = &x[rows.start * cols..rows.end * cols];
            // SAFETY: the table was chosen for this CPU.
            unsafe { (self.table.quantize)(x, &precisions[rows], words) }
        });
        out.words = words;
    }

    /// Computes `out = x · wᵀ` for several packed weights that share an input.
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
    pub fn matmul_packed(&self, x: &QuantizedRows, products: &mut [PackedProduct], cancel: &Cancel) {
        for product in products.iter() {
            assert_eq!(x.cols, product.weight.cols(), "x is (rows, in_features)");
            assert_eq!(product.out.len(), x.rows * product.weight.rows(), "out is (rows, out_features)");
        }
        if x.rows == 0 {
            return;
        }
        let targets: Vec<_> =
            products.iter_mut().map(|p| (p.weight, p.output, SharedOut::new(p.out))).collect();
        let strips: Vec<usize> = targets.iter().map(|(weight, ..)| weight.strips()).collect();
        let tasks = TASKS_PER_THREAD * self.pool.threads();
        // Even, because some ISAs compute two strips at once.
        let per_task = (strips.iter().sum::<usize>() / tasks).clamp(1, 64).next_multiple_of(2);
        self.pool.for_each_range(&strips, per_task, cancel, &|product, strips| {
            let (weight, output, out) = &targets[product];
            let task = PackedTask { x, weight, strips, out, output: *output };
            // SAFETY: the table was chosen for this CPU; lengths were asserted above; the tasks' strips do
            // not overlap.
            unsafe { (self.table.packed)(&task) }
        });
    }
}
