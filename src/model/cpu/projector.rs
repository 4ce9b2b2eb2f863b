//! Projections: chooses the kernel for each weight, and adds biases.

use super::arithmetic::{Arithmetic, ProductKind, runs};
use super::weights::{Layer, Linear, Matrix};
use crate::kernels::{
    Activation, Cancel, GemmInput, GemmScratch, Kernels, Mlp, Output, PackedProduct, Product, QuantizedRows,
    Weight, grown,
};
use std::ops::Range;

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

/// Runs the projections of a chunk. Consecutive rows share a kernel call if their arithmetic allows it.
pub(super) struct Projector<'a> {
    pub(super) kernels: &'a Kernels,
    /// Scratch buffer: the input, quantised for packed weights.
    pub(super) quantized: &'a mut QuantizedRows,
    /// Scratch buffer: the input, laid out for [`Kernels::gemm`].
    pub(super) gemm: &'a mut GemmScratch,
    pub(super) cancel: &'a Cancel<'a>,
}

impl Projector<'_> {
    /// Runs projections of the same `x`, `(rows, in_features)`; `arithmetic` has one item for each row.
    pub(super) fn run<'a>(
        &mut self,
        x: &[f32],
        arithmetic: &[Arithmetic],
        projections: impl IntoIterator<Item = Projection<'a>>,
    ) {
        if arithmetic.is_empty() {
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
        if !products.is_empty() {
            self.run_rows(x, arithmetic, &mut products);
        }
        if !packed_products.is_empty() {
            self.run_packed(x, arithmetic, &mut packed_products);
        }
    }

    /// Products with weights in rows: one call for each run of rows with the same kernel.
    fn run_rows(&mut self, x: &[f32], arithmetic: &[Arithmetic], products: &mut [Product]) {
        let (kernels, cancel) = (self.kernels, self.cancel);
        let rows = arithmetic.len();
        for (run, kind) in runs(arithmetic, |row| row.product) {
            let x = &x[numbers_of(&run, x.len() / rows)];
            let of_run = products.iter_mut().map(|product| Product {
                out: &mut product.out[numbers_of(&run, product.weight.rows())],
                ..*product
            });
            let mut products: Vec<_> = of_run.collect();
            match kind {
                ProductKind::Matmul => kernels.matmul(x, run.len(), &mut products, cancel),
                ProductKind::Gemm(input) => {
                    kernels.gemm(x, run.len(), input, &mut products, self.gemm, cancel);
                }
            }
        }
    }

    /// Products with packed weights. All rows that are quantised share one call, whatever their precision.
    fn run_packed(&mut self, x: &[f32], arithmetic: &[Arithmetic], products: &mut [PackedProduct]) {
        let (kernels, cancel) = (self.kernels, self.cancel);
        let rows = arithmetic.len();
        let takes_gemm =
            |row: &Arithmetic| row.product == ProductKind::Gemm(GemmInput::Bf16) && kernels.has_gemm_packed();
        for (run, takes_gemm) in runs(arithmetic, takes_gemm) {
            let x = &x[numbers_of(&run, x.len() / rows)];
            let of_run = products.iter_mut().map(|product| PackedProduct {
                out: &mut product.out[numbers_of(&run, product.weight.rows())],
                ..*product
            });
            let mut products: Vec<_> = of_run.collect();
            if takes_gemm {
                kernels.gemm_packed(x, run.len(), &mut products, self.gemm, cancel);
            } else {
                let precisions: Vec<_> = arithmetic[run].iter().map(|row| row.precision).collect();
                kernels.quantize(x, &precisions, self.quantized, cancel);
                kernels.matmul_packed(self.quantized, &mut products, cancel);
            }
        }
    }

    /// Adds a layer's MLP to `out`.
    ///
    /// - `x`, `out`: `(rows, hidden_size)`
    /// - `arithmetic`: one item for each row
    /// - `buffers`: scratch buffers for gate and up, `(rows, intermediate_size)`
    pub(super) fn run_mlp(
        &mut self,
        x: &[f32],
        arithmetic: &[Arithmetic],
        layer: &Layer,
        activation: Activation,
        buffers: [&mut Vec<f32>; 2],
        out: &mut [f32],
    ) {
        let (kernels, cancel) = (self.kernels, self.cancel);
        let Layer { gate_proj, up_proj, down_proj, .. } = layer;
        let [gate, up, down] = [gate_proj, up_proj, down_proj].map(|linear| linear.weight.view());
        let mlp = Mlp { activation, gate, up, down };
        let (hidden, inner) = (gate.cols(), gate.rows());
        let has_bias = gate_proj.bias.is_some() || up_proj.bias.is_some();
        // The input of the kernel that runs the whole MLP, if there is one for these weights.
        let gemm_input = |row: &Arithmetic| match row.product {
            ProductKind::Gemm(input) if !has_bias && kernels.has_gemm_mlp(input, &mlp) => Some(input),
            _ => None,
        };
        let [gate, up] = buffers;
        for (run, gemm_input) in runs(arithmetic, gemm_input) {
            let numbers = numbers_of(&run, hidden);
            let (x, out) = (&x[numbers.clone()], &mut out[numbers]);
            if let Some(input) = gemm_input {
                if let Some(bias) = &down_proj.bias {
                    put_bias(bias, out, Output::Add);
                }
                kernels.gemm_mlp(x, run.len(), input, &mlp, out, self.gemm, cancel);
            } else {
                let (gate, up) = (grown(gate, run.len() * inner), grown(up, run.len() * inner));
                let arithmetic = &arithmetic[run];
                self.run(x, arithmetic, [project(gate_proj, gate), project(up_proj, up)]);
                kernels.gate_mul(activation, gate, up, cancel);
                self.run(gate, arithmetic, [project_onto(down_proj, out)]);
            }
        }
    }
}

/// Where `rows` are among rows of `width` numbers.
fn numbers_of(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
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
