//! Reads `config.json` or GGUF metadata into a [`LlamaConfig`].
//!
//! Every key of a config is honoured, or the config is refused. A key that changes the mathematics and is not
//! supported is an [`Error::Unsupported`] with its name and value. An unknown key is a warning. Start reading
//! at [`LlamaConfig`]; `hf.rs` and `gguf.rs` fill it, `to_gguf.rs` writes it as GGUF metadata.

// Every number here comes from a file. Arithmetic and indexing must handle wrong numbers explicitly.
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

/// The largest allowed size. Any real size is smaller, and a product of two never overflows.
pub(crate) const MAX_SIZE: usize = 1 << 24;
const MAX_LAYERS: usize = 4096;

/// A Llama's config. Fields have config.json's names.
#[derive(Clone, Debug)]
pub struct LlamaConfig {
    /// The number of rows of the embedding and of the output head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// The width inside the MLP.
    pub intermediate_size: usize,
    /// The number of decoder layers.
    pub num_hidden_layers: usize,
    /// The number of query heads.
    pub num_attention_heads: usize,
    /// The number of key and value heads. It divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// The width of a head: an even number, not always `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// The number added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Whether the attention's projections have biases. For a GGUF file, whether any of them has one: there
    /// each tensor decides for itself.
    pub attention_bias: bool,
    /// As `attention_bias`, for the MLP.
    pub mlp_bias: bool,
    /// The activation applied to the gate.
    pub hidden_act: Activation,
    /// Rotary position embedding.
    pub rope: Rope,
    /// The number of positions that the model was trained for.
    pub max_position_embeddings: usize,
    /// The flag. None if the config does not have it, as in every GGUF file.
    pub tie_word_embeddings: Option<bool>,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text or a turn. Empty if the config names none.
    pub eos_token_ids: Vec<u32>,
    /// The weights' type according to the config, such as "bfloat16".
    pub torch_dtype: Option<String>,
    /// The content of config.json, or its equivalent built from GGUF metadata.
    pub raw: serde_json::Map<String, serde_json::Value>,
    /// Warnings for the user, such as unknown keys.
    pub warnings: Vec<String>,
}

impl LlamaConfig {
    /// Reads `config.json` in `dir`, in the spelling of transformers 4 or 5.
    ///
    /// # Errors
    /// - [`Error::NotFound`]: there is no config.json
    /// - [`Error::Malformed`]: it is not a JSON object, or a value has the wrong type or is out of range
    /// - [`Error::Unsupported`]: it requires mathematics that is not implemented
    pub fn from_folder(dir: &Path) -> Result<Self> {
        hf::read(&dir.join("config.json"), false)
    }

    /// As [`LlamaConfig::from_folder`], for a folder without quantised tensors: a `quantization_config` is a
    /// warning.
    pub(crate) fn from_folder_with_plain_weights(dir: &Path) -> Result<Self> {
        hf::read(&dir.join("config.json"), true)
    }

    /// Reads the config from a GGUF file's metadata. With `checkpoint` it also reads what only the tensors
    /// tell: `rope_freqs.weight`, and the vocabulary's size if no key has it.
    ///
    /// # Errors
    /// [`Error::Malformed`] and [`Error::Unsupported`] as [`LlamaConfig::from_folder`], and any error from
    /// reading `rope_freqs.weight`.
    pub fn from_gguf(metadata: &Metadata, checkpoint: Option<&Checkpoint>) -> Result<Self> {
        gguf::read(metadata, checkpoint)
    }

    /// The longest sequence that the model supports: `max_position_embeddings`, times the factor with dynamic
    /// RoPE. With linear RoPE, `max_sequence_length` may extend it up to that factor: configs of 2023, such
    /// as vicuna-7b-v1.5-16k's, keep the original length in `max_position_embeddings`.
    pub fn context_length(&self) -> usize {
        let own = self.max_position_embeddings;
        let times = |factor: f64| ((own as f64 * factor) as usize).min(MAX_SIZE);
        match self.rope.scaling {
            RopeScaling::Dynamic { factor, .. } => times(factor),
            RopeScaling::Linear { factor } => {
                let extended = self.raw.get("max_sequence_length").and_then(serde_json::Value::as_u64);
                let extended = extended.and_then(|length| usize::try_from(length).ok()).unwrap_or(own);
                extended.min(times(factor)).max(own)
            }
            _ => own,
        }
    }

    /// Checks ranges and how keys fit together, and drops end tokens that are outside the vocabulary. `path`
    /// and the function `key`, which turns a field's name into the file's spelling, are used in messages.
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
        // Checked as an f32, because that is how it is used.
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
