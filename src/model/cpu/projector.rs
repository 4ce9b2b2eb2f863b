//! Projections: chooses the kernel for each weight, and adds biases.

use super::arithmetic::{Arithmetic, ProductKind};
use super::weights::{Layer, Linear, Matrix};
use crate::kernels::{
    Activation, Cancel, GemmInput, GemmScratch, Kernels, Mlp, Output, PackedProduct, Product, QuantizedRows,
    Weight,
};

/// `out = x · weightᵀ + bias`, replacing what `out` holds, or added to it.
pub(super) struct Projection<'a> {
    pub(super) weight: &'a Matrix,
    pub(super) bias: Option<&'a [f32]>,
    /// `(rows, out_features)`
    pub(super) out: &'a mut [f32],
    pub(super) output: Output,
}

/// A projection that replaces what `out` holds.
pub(super) fn project<'a>(linear: &'a Linear, out: &'a mut [f32]) -> Projection<'a> {
    Projection { weight: &linear.weight, bias: linear.bias.as_deref(), out, output: Output::Set }
}

/// As [`project`], added to what `out` holds: the residual connection.
pub(super) fn project_onto<'a>(linear: &'a Linear, out: &'a mut [f32]) -> Projection<'a> {
    Projection { output: Output::Add, ..project(linear, out) }
}

/// Runs the projections of a chunk.
pub(super) struct Projector<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) arithmetic: Arithmetic,
    /// Scratch buffer: the input, quantised for packed weights.
    pub(super) quantized: &'a mut QuantizedRows,
    /// Scratch buffer: the input, laid out for [`Kernels::gemm`].
    pub(super) gemm: &'a mut GemmScratch,
    pub(super) cancel: &'a Cancel<'a>,
}

impl Projector<'_> {
    /// Runs projections of the same `x`, `(rows, in_features)`.
    pub(super) fn run<'a>(
        &mut self,
        x: &[f32],
        rows: usize,
        projections: impl IntoIterator<Item = Projection<'a>>,
    ) {
        if rows == 0 {
            return;
        }
        let (mut products, mut packed_products) = (Vec::new(), Vec::new());
        for Projection { weight, bias, out, mut output } in projections {
            if let Some(bias) = bias {
                put_bias(bias, out, output);
                output = Output::Add;
            }
            match weight.view() {
                Weight::Rows(weight) => products.push(Product { weight, out, output }),
                Weight::Packed(weight) => packed_products.push(PackedProduct { weight, out, output }),
            }
        }
        let Projector { kernels, arithmetic: Arithmetic { product, precision, .. }, cancel, .. } = *self;
        if !products.is_empty() {
            match product {
                ProductKind::Matmul => kernels.matmul(x, rows, &mut products, cancel),
                ProductKind::Gemm(input) => {
                    kernels.gemm(x, rows, input, &mut products, self.gemm, cancel);
                }
            }
        }
        if packed_products.is_empty() {
            return;
        }
        if product == ProductKind::Gemm(GemmInput::Bf16) && kernels.has_gemm_packed() {
            kernels.gemm_packed(x, rows, &mut packed_products, self.gemm, cancel);
        } else {
            kernels.quantize(x, &vec![precision; rows], self.quantized, cancel);
            kernels.matmul_packed(self.quantized, &mut packed_products, cancel);
        }
    }

    /// Adds a layer's MLP to `out` in one kernel call. Returns false, and does nothing, if the kernels have
    /// no such call for these weights.
    pub(super) fn run_mlp(
        &mut self,
        x: &[f32],
        rows: usize,
        layer: &Layer,
        activation: Activation,
        out: &mut [f32],
    ) -> bool {
        let Projector { kernels, arithmetic, ref mut gemm, cancel, .. } = *self;
        let ProductKind::Gemm(input) = arithmetic.product else { return false };
        let Layer { gate_proj, up_proj, down_proj, .. } = layer;
        let [gate, up, down] = [gate_proj, up_proj, down_proj].map(|linear| linear.weight.view());
        let mlp = Mlp { activation, gate, up, down };
        let is_taken =
            gate_proj.bias.is_none() && up_proj.bias.is_none() && kernels.has_gemm_mlp(input, &mlp);
        if is_taken {
            if let Some(bias) = &down_proj.bias {
                put_bias(bias, out, Output::Add);
            }
            kernels.gemm_mlp(x, rows, input, &mlp, out, gemm, cancel);
        }
        is_taken
    }
}

/// Sets or adds a bias to every row of `out`.
fn put_bias(bias: &[f32], out: &mut [f32], output: Output) {
    for row in out.chunks_exact_mut(bias.len()) {
        match output {
            Output::Set => row.copy_from_slice(bias),
            Output::Add => row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias),
        }
    }
}
