//! Opens a checkpoint: everything that is known before its weights are read.

use super::options::LoadOptions;
use crate::checkpoint::tied::{self, HeadChoice};
use crate::checkpoint::{Checkpoint, Format, names, recognise};
use crate::config::{GenerationConfig, LlamaConfig};
use crate::error::{Error, Result};
use crate::kernels::WeightType;
use crate::kv_cache::KvShape;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// A checkpoint whose weights have not been read.
pub(super) struct Opened {
    pub(super) checkpoint: Arc<Checkpoint>,
    pub(super) config: LlamaConfig,
    pub(super) generation: GenerationConfig,
    pub(super) head: HeadChoice,
}

impl Opened {
    pub(super) fn new(path: &Path, strict: bool) -> Result<Self> {
        let (mut checkpoint, config) = open_checkpoint(path)?;
        let generation = match checkpoint.format() {
            Format::Safetensors => GenerationConfig::from_folder(path)?,
            Format::Gguf => GenerationConfig::default(),
        };
        let head = tied::choose_head(&checkpoint, config.tie_word_embeddings, strict)?;
        tied::name_embedding(&mut checkpoint, &head);
        check_sizes(&checkpoint, &config)?;
        Ok(Opened { checkpoint: Arc::new(checkpoint), config, generation, head })
    }

    /// The requested context, or the model's own without a request.
    pub(super) fn requested_context(&self, options: &LoadOptions) -> Result<usize> {
        match options.context_length {
            Some(requested) if !(1..=crate::config::MAX_SIZE).contains(&requested) => {
                let reason = format!("{requested} is not from 1 to {}", crate::config::MAX_SIZE);
                Err(Error::argument("context_length", reason))
            }
            requested => Ok(requested.unwrap_or(self.config.context_length())),
        }
    }

    /// The shape of the cpu engine's KV cache.
    pub(super) fn kv_shape(&self, dtype: WeightType) -> KvShape {
        KvShape {
            layers: self.config.num_hidden_layers,
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
            dtype,
        }
    }

    /// The storage type of most bytes of the tensors; None if we cannot read that type.
    pub(super) fn stored_type(&self) -> Option<WeightType> {
        let mut totals = BTreeMap::<String, u64>::new();
        for info in self.checkpoint.infos() {
            *totals.entry(info.dtype).or_default() += info.bytes;
        }
        let (name, _) = totals.into_iter().max_by_key(|(_, bytes)| *bytes)?;
        WeightType::named(&name)
    }
}

/// Checks the config's sizes against one tensor of each shape. Without this, a config with a wrong size could
/// be refused for its memory instead of for the size.
fn check_sizes(checkpoint: &Checkpoint, config: &LlamaConfig) -> Result<()> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let query = config.num_attention_heads * config.head_dim;
    let key_value = config.num_key_value_heads * config.head_dim;
    checkpoint.check_shape(tied::EMBED_TOKENS, &[config.vocab_size, hidden])?;
    checkpoint.check_shape("model.layers.0.self_attn.q_proj.weight", &[query, hidden])?;
    checkpoint.check_shape("model.layers.0.self_attn.k_proj.weight", &[key_value, hidden])?;
    checkpoint.check_shape("model.layers.0.mlp.gate_proj.weight", &[inner, hidden])
}

/// Opens a checkpoint and reads its config, but no weights.
pub(super) fn open_checkpoint(path: &Path) -> Result<(Checkpoint, LlamaConfig)> {
    // A folder's config is read first, so that a missing config.json is reported before missing weights.
    if path.is_dir() {
        match LlamaConfig::from_folder(path) {
            Ok(config) => {
                let checkpoint = Checkpoint::open(path)?;
                recognise::refuse_foreign_tensors(&checkpoint)?;
                return Ok((checkpoint, config));
            }
            Err(error) => {
                let error = recognise::explain_missing_config(path, error);
                // A config may say that the weights are quantised although they are not.
                let is_quantization =
                    matches!(&error, Error::Unsupported { key, .. } if key == "quantization_config");
                let plain = Checkpoint::open(path).ok().filter(|_| is_quantization).filter(is_plain);
                let checkpoint = plain.ok_or(error)?;
                return Ok((checkpoint, LlamaConfig::from_folder_with_plain_weights(path)?));
            }
        }
    }
    let checkpoint = Checkpoint::open(path)?;
    let metadata =
        checkpoint.metadata().ok_or_else(|| Error::malformed(path, "is neither a folder nor a GGUF file"))?;
    let config = LlamaConfig::from_gguf(metadata, Some(&checkpoint))?;
    Ok((checkpoint, config))
}

/// Whether every tensor is one that a Llama has, in a float type.
fn is_plain(checkpoint: &Checkpoint) -> bool {
    checkpoint.infos().iter().all(|info| {
        let known = names::hf_to_gguf(&info.name).is_some() || info.name.ends_with(names::INV_FREQ);
        known && ["F32", "F16", "BF16"].contains(&info.dtype.as_str())
    })
}
