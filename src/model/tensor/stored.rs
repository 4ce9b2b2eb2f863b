//! Matrices as the checkpoint stores them, for the CPU: our kernels multiply with them, in f32.
//!
//! Candle's products with quantised matrices round activations to 8 bits, and run scalar code in a build for
//! any processor. Its other products need the matrices as floats.

use crate::checkpoint::Tensor as StoredTensor;
use crate::kernels::{Cancel, GemmInput, GemmScratch, Isa, Kernels, Output, Product, WeightRows};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, bail};
use std::sync::{Arc, Mutex, PoisonError};

/// Fewer rows than this are faster with the kernel for single rows.
const GEMM_ROWS: usize = 8;

/// Our kernels, which all matrices share.
pub(super) struct Multiplier {
    kernels: Kernels,
    /// Whether activations are f32 even where AMX would take about 16 bits of them.
    exact: bool,
    scratch: Mutex<GemmScratch>,
}

impl Multiplier {
    /// # Errors
    /// The system's error if a thread cannot be started.
    pub(super) fn new(isa: Isa, threads: usize, exact: bool) -> std::io::Result<Self> {
        Ok(Multiplier { kernels: Kernels::new(isa, threads)?, exact, scratch: Mutex::default() })
    }
}

/// A matrix, `(out_features, in_features)`.
pub(super) struct StoredMatrix {
    tensor: StoredTensor,
    rows: usize,
    cols: usize,
    multiplier: Arc<Multiplier>,
}

impl StoredMatrix {
    /// `tensor` has these rows and columns.
    pub(super) fn new(
        tensor: StoredTensor,
        (rows, cols): (usize, usize),
        multiplier: Arc<Multiplier>,
    ) -> Self {
        StoredMatrix { tensor, rows, cols, multiplier }
    }

    /// The rows with these numbers as f32, one after the other.
    pub(super) fn rows(&self, ids: &[u32]) -> Vec<f32> {
        let mut out = vec![0.0; ids.len() * self.cols];
        for (out, &id) in out.chunks_exact_mut(self.cols).zip(ids) {
            self.tensor.row_to_f32(id as usize, out);
        }
        out
    }
}

impl CustomOp1 for StoredMatrix {
    fn name(&self) -> &'static str {
        "stored-matmul"
    }

    /// The product `x · wᵀ` of an `x` of shape `(rows, in_features)`.
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, cols) = layout.shape().dims2()?;
        let (Some((start, end)), CpuStorage::F32(x)) = (layout.contiguous_offsets(), storage) else {
            bail!("the input of a stored matrix is contiguous and f32")
        };
        let weight = WeightRows::new(self.tensor.dtype(), self.tensor.bytes(), self.rows, self.cols);
        let (Some(weight), true) = (weight, cols == self.cols) else {
            bail!("{rows} x {cols} numbers for a matrix of {} x {}", self.rows, self.cols)
        };
        let mut out = vec![0.0; rows * self.rows];
        let mut products = [Product { weight, out: &mut out, output: Output::Set }];
        let (x, never) = (&x[start..end], Cancel::never());
        let Multiplier { kernels, exact, scratch } = &*self.multiplier;
        if *exact || rows < GEMM_ROWS {
            kernels.matmul(x, rows, &mut products, &never);
        } else {
            let mut scratch = scratch.lock().unwrap_or_else(PoisonError::into_inner);
            kernels.gemm(x, rows, GemmInput::Bf16Pairs, &mut products, &mut scratch, &never);
        }
        Ok((CpuStorage::F32(out), Shape::from((rows, self.rows))))
    }
}
