//! The MLP of a layer and its activation function.

use crate::weight::Weight;

/// The function that is applied to the MLP's gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// `x * Phi(x)`; Phi is the cumulative normal distribution
    Gelu,
    /// GELU with a tanh instead of Phi
    GeluTanh,
    /// `x * sigmoid(1.702 x)`
    QuickGelu,
}

impl Activation {
    /// The name that transformers gives it in `hidden_act`.
    pub const fn name(self) -> &'static str {
        match self {
            Activation::Silu => "silu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
            Activation::QuickGelu => "quick_gelu",
        }
    }
}

/// The MLP of a layer: `(activation(x · gateᵀ) * (x · upᵀ)) · downᵀ`.
///
/// Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
#[derive(Clone, Copy)]
pub struct Mlp<'a> {
    /// The function that is applied to the gate.
    pub activation: Activation,
    /// `(inner features, features)`
    pub gate: Weight<'a>,
    /// The same shape as `gate`.
    pub up: Weight<'a>,
    /// `(features, inner features)`
    pub down: Weight<'a>,
}
