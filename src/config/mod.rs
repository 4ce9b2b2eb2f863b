//! `config.json` or GGUF metadata to a [`LlamaConfig`].
//!
//! The whole config is honoured or refused: a key that changes the mathematics and is not supported
//! is [`Error::Unsupported`](crate::Error::Unsupported) with its name and value; a key that nobody
//! knows is a warning. Start reading at [`LlamaConfig`]; `hf.rs` and `gguf.rs` fill it,
//! `to_gguf.rs` writes it down.

// A file decides every number here: arithmetic and indexing say what they do when it lies.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

mod generation;
mod gguf;
mod hf;
mod rope;
mod to_gguf;

use std::path::Path;

pub use generation::GenerationConfig;
pub use gguf::ROPE_FREQS;
pub use rope::{Rope, RopeScaling};
pub use to_gguf::GgufConfig;

use crate::checkpoint::{Checkpoint, gguf::Metadata};
use crate::error::{Error, Result};
use crate::kernels::Activation;

/// Larger than any real size, small enough that products of two never overflow.
pub(crate) const MAX_SIZE: usize = 1 << 24;
const MAX_LAYERS: usize = 4096;

/// What a Llama's config says, in config.json's spelling.
#[derive(Clone, Debug)]
pub struct LlamaConfig {
    /// Rows of the embedding and of the output head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of a head; even. Not always `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Whether the projections of the attention have biases. Of a GGUF file: whether any has one, as
    /// there the tensors say it, each for itself.
    pub attention_bias: bool,
    /// As `attention_bias`, of the MLP.
    pub mlp_bias: bool,
    /// The function on the gate.
    pub hidden_act: Activation,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Positions that the model was made for.
    pub max_position_embeddings: usize,
    /// The flag; None if the config does not have it, which GGUF never does.
    pub tie_word_embeddings: Option<bool>,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text or a turn. Empty if the config names none.
    pub eos_token_ids: Vec<u32>,
    /// The type that the config says the weights have, such as "bfloat16".
    pub torch_dtype: Option<String>,
    /// config.json as it is, or the same built from GGUF metadata.
    pub raw: serde_json::Map<String, serde_json::Value>,
    /// What was read with a reservation, such as keys that nobody knows.
    pub warnings: Vec<String>,
}

impl LlamaConfig {
    /// Reads `config.json` in `dir`, in the spelling of transformers 4 or 5.
    ///
    /// # Errors
    /// - [`Error::NotFound`]: there is no config.json
    /// - [`Error::Malformed`]: it is no JSON object, or a value has the wrong type or range
    /// - [`Error::Unsupported`]: it asks for mathematics that is not implemented
    pub fn from_folder(dir: &Path) -> Result<Self> {
        hf::read(&dir.join("config.json"))
    }

    /// Reads the config out of a GGUF file's metadata. With `checkpoint`, also what only tensors
    /// tell: `rope_freqs.weight`, and the vocabulary's size where no key has it.
    ///
    /// # Errors
    /// [`Error::Malformed`] and [`Error::Unsupported`] as [`LlamaConfig::from_folder`], and
    /// whatever reading `rope_freqs.weight` gives.
    pub fn from_gguf(metadata: &Metadata, checkpoint: Option<&Checkpoint>) -> Result<Self> {
        gguf::read(metadata, checkpoint)
    }

    /// The longest sequence that the model was made for: with dynamic RoPE a multiple of
    /// `max_position_embeddings`.
    pub fn context_length(&self) -> usize {
        match self.rope.scaling {
            RopeScaling::Dynamic { factor, .. } => {
                ((self.max_position_embeddings as f64 * factor) as usize).min(MAX_SIZE)
            }
            _ => self.max_position_embeddings,
        }
    }

    /// Checks everything that one key alone does not tell, and drops end tokens that the
    /// vocabulary does not have. `path` and the function `key`, which turns a field's name into
    /// the file's spelling, are for messages.
    fn validated(mut self, path: &Path, key: impl Fn(&str) -> String) -> Result<Self> {
        let malformed =
            |field: &str, reason: String| Error::malformed(path, format!("{} {reason}", key(field)));
        let sizes = [
            ("vocab_size", self.vocab_size, MAX_SIZE),
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_SIZE),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_SIZE),
            ("num_key_value_heads", self.num_key_value_heads, MAX_SIZE),
            ("head_dim", self.head_dim, MAX_SIZE),
            ("max_position_embeddings", self.max_position_embeddings, MAX_SIZE),
        ];
        for (field, size, limit) in sizes {
            if !(1..=limit).contains(&size) {
                return Err(malformed(field, format!("is {size}, expected 1 to {limit}")));
            }
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(malformed(
                "num_key_value_heads",
                format!("is {kv_heads}, which does not divide {heads} heads"),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(malformed("head_dim", format!("is {}, expected an even number", self.head_dim)));
        }
        if heads.checked_mul(self.head_dim).is_none_or(|width| width > MAX_SIZE) {
            let reason = format!("is {heads}, which with heads of {} is too wide", self.head_dim);
            return Err(malformed("num_attention_heads", reason));
        }
        // As a single, because that is what it is used as.
        let eps = self.rms_norm_eps as f32;
        if !(eps.is_finite() && eps > 0.0) {
            return Err(malformed(
                "rms_norm_eps",
                format!("is {}, expected a positive number", self.rms_norm_eps),
            ));
        }
        self.rope.check(self.head_dim).map_err(|(field, reason)| malformed(field, reason))?;

        let vocab_size = self.vocab_size;
        let (known, unknown) =
            self.eos_token_ids.iter().partition(|&&id| usize::try_from(id).is_ok_and(|id| id < vocab_size));
        self.eos_token_ids = known;
        let unknown: Vec<u32> = unknown;
        if !unknown.is_empty() {
            self.warnings.push(format!(
                "{} {unknown:?} is outside the vocabulary of {vocab_size} and is ignored",
                key("eos_token_id")
            ));
        }
        Ok(self)
    }
}
