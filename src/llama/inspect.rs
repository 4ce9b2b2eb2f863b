//! Describes a checkpoint without loading its weights.

use super::opened::open_checkpoint;
use crate::checkpoint::tied::{HeadChoice, choose_head};
use crate::checkpoint::{Format, TensorInfo};
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::model::Storage;
use crate::tokenizer::Tokenizer;
use std::collections::BTreeMap;
use std::path::Path;

/// A checkpoint, as its headers describe it.
pub struct Inspection {
    /// safetensors or GGUF.
    pub format: Format,
    /// The config.
    pub config: LlamaConfig,
    /// Number of elements of all tensors.
    pub parameters: u64,
    /// The tensors by storage type.
    pub tensors: Vec<Storage>,
    /// Facts about the files that may be worth knowing but are not problems.
    pub notes: Vec<String>,
    /// Which tensor is the output head, and why.
    pub head: HeadChoice,
    /// The tokenizer, or why it cannot be read.
    pub tokenizer: Result<Tokenizer>,
}

/// Reads headers, config and tokenizer. Of the weights it reads at most two tensors, to choose the head.
///
/// # Errors
/// As [`super::Llama::load`], except those that need the weights to be read.
pub fn inspect(path: &Path) -> Result<Inspection> {
    let (checkpoint, config) = open_checkpoint(path)?;
    let head = choose_head(&checkpoint, config.tie_word_embeddings, false)?;
    let mut types = BTreeMap::<String, Storage>::new();
    let mut parameters = 0_u64;
    for TensorInfo { dtype, shape, bytes, .. } in checkpoint.infos() {
        let elements = shape.iter().try_fold(1_u64, |product, &size| product.checked_mul(size as u64));
        let total = elements.and_then(|elements| parameters.checked_add(elements));
        parameters = total.ok_or_else(|| Error::malformed(path, "has more elements than can be counted"))?;
        let storage = types.entry(dtype.clone()).or_insert(Storage { dtype, count: 0, bytes: 0 });
        storage.count += 1;
        storage.bytes += bytes;
    }
    Ok(Inspection {
        format: checkpoint.format(),
        config,
        parameters,
        tensors: types.into_values().collect(),
        notes: checkpoint.notes().to_vec(),
        head,
        tokenizer: Tokenizer::open(path),
    })
}
