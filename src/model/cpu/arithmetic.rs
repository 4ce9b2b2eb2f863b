//! How the products of a row are computed: which kernel, and how activations are rounded.
//!
//! Only the row's place in its sequence decides (prompt or generated, length of the prompt), never the batch,
//! so that a result does not depend on other sequences. docs/kernels.md has the table and the errors.

use crate::kernels::{GemmInput, Precision};
use std::ops::Range;

/// Prompts of up to this many tokens use the decode kernel, which is the fastest for so few rows.
const PHRASE: usize = 16;

/// Prompts of up to this many tokens use 16-bit activations.
const SHORT_PROMPT: usize = 128;

/// The part of its sequence that a token belongs to.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Phase {
    /// In a prompt of at most [`PHRASE`] tokens.
    Phrase,
    /// In a prompt of at most [`SHORT_PROMPT`] tokens, such as a chat's question: the answer depends on few
    /// tokens, and the prefill is short at any precision.
    ShortPrompt,
    /// In a longer prompt.
    Prompt,
    /// Generated.
    Decode,
}

impl Phase {
    /// The phase of the token at `position` of a sequence whose first `prompt_tokens` tokens are its prompt.
    pub(super) fn of(position: usize, prompt_tokens: usize) -> Self {
        match prompt_tokens {
            _ if position >= prompt_tokens => Phase::Decode,
            tokens if tokens <= PHRASE => Phase::Phrase,
            tokens if tokens <= SHORT_PROMPT => Phase::ShortPrompt,
            _ => Phase::Prompt,
        }
    }
}

/// The kernel for weights in rows, which are those that are not packed.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum ProductKind {
    /// [`crate::kernels::Kernels::matmul`]: f32 activations, one order of summation for any number of rows.
    Matmul,
    /// [`crate::kernels::Kernels::gemm`]: for many rows.
    Gemm(GemmInput),
}

impl ProductKind {
    /// All kinds.
    pub(super) const ALL: [ProductKind; 3] =
        [ProductKind::Matmul, ProductKind::Gemm(GemmInput::Bf16Pairs), ProductKind::Gemm(GemmInput::Bf16)];
}

/// How the products of a row are computed.
#[derive(Clone, Copy)]
pub(super) struct Arithmetic {
    /// The kernel for weights in rows.
    pub(super) product: ProductKind,
    /// How activations are quantised for packed weights.
    pub(super) precision: Precision,
    /// Whether attention may round numbers to about 16 bits.
    pub(super) attention_bits16: bool,
}

impl Arithmetic {
    /// f32 everywhere. Weights are not packed then, so `precision` decides nothing.
    const EXACT: Arithmetic =
        Arithmetic { product: ProductKind::Matmul, precision: Precision::Bits16, attention_bits16: false };

    /// The arithmetic of the decoder layers.
    pub(super) fn of_layers(phase: Phase, exact: bool) -> Self {
        let (product, precision) = match phase {
            _ if exact => return Arithmetic::EXACT,
            Phase::Phrase => (ProductKind::Matmul, Precision::Bits16),
            Phase::ShortPrompt => (ProductKind::Gemm(GemmInput::Bf16Pairs), Precision::Bits16),
            Phase::Prompt => (ProductKind::Gemm(GemmInput::Bf16), Precision::Mixed),
            Phase::Decode => (ProductKind::Matmul, Precision::Bits8),
        };
        Arithmetic { product, precision, attention_bits16: phase == Phase::Prompt }
    }

    /// The arithmetic of the output head. Its rounding error goes straight into the logits, so every row of
    /// a prompt has 16-bit activations there. The prompt's last row, where generation begins, uses the
    /// kernel of the shortest prompts.
    pub(super) fn of_head(phase: Phase, exact: bool, ends_prompt: bool) -> Self {
        match phase {
            Phase::Decode => Arithmetic::of_layers(phase, exact),
            _ if ends_prompt => Arithmetic::of_layers(Phase::Phrase, exact),
            _ => Arithmetic { precision: Precision::Bits16, ..Arithmetic::of_layers(phase, exact) },
        }
    }
}

/// Divides `rows` where `key` changes. Gives the ranges, each with the key of its rows.
pub(super) fn runs<K: PartialEq>(
    rows: &[Arithmetic],
    key: impl Fn(&Arithmetic) -> K,
) -> impl Iterator<Item = (Range<usize>, K)> {
    let mut end = 0;
    std::iter::from_fn(move || {
        let start = end;
        let first = key(rows.get(start)?);
        end += rows[start..].iter().take_while(|row| key(row) == first).count();
        Some((start..end, first))
    })
}
