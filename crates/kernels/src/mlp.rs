//! What follows attention in a layer.

use crate::weight::Weight;

/// The function on the MLP's gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// `x * Phi(x)`, with the normal distribution's Phi
    Gelu,
    /// GELU with a tanh for Phi
    GeluTanh,
    /// `x * sigmoid(1.702 x)`
    QuickGelu,
}

impl Activation {
    /// transformers' name, as `hidden_act` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Activation::Silu => "silu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
            Activation::QuickGelu => "quick_gelu",
        }
    }
}

/// What follows attention in a layer: `(activation(x · gateᵀ) * (x · upᵀ)) · downᵀ`.
///
/// Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
#[derive(Clone, Copy)]
pub struct Mlp<'a> {
    /// The function on the gate.
    pub activation: Activation,
    /// `(inner features, features)`
    pub gate: Weight<'a>,
    /// As `gate`.
    pub up: Weight<'a>,
    /// `(features, inner features)`
    pub down: Weight<'a>,
}
