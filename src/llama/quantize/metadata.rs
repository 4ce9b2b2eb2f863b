//! Config and tokenizer as metadata of the new file.

use super::{FileType, is_gguf};
use crate::checkpoint::background;
use crate::checkpoint::gguf::{Metadata, Value};
use crate::config::GenerationConfig;
use crate::error::{Error, Result};
use crate::kernels::Cancel;
use crate::llama::opened::Opened;
use crate::tokenizer::{Tokenizer, no_tokenizer};
use std::path::Path;

/// Keys that describe how a GGUF file was written, not its model.
const OF_THE_FILE: [&str; 3] = ["general.alignment", "general.file_type", "general.quantization_version"];
const VOCAB_SIZE: &str = "llama.vocab_size";
/// ggml's `GGML_QNT_VERSION`.
const QUANTIZATION_VERSION: u32 = 2;

type Entries = Vec<(String, Value)>;

/// The metadata, and the divisors of the RoPE frequencies if the model has some.
pub(super) fn metadata(
    source: &Path,
    opened: &Opened,
    file_type: FileType,
    with_tokenizer: bool,
    warnings: &mut Vec<String>,
    cancel: &Cancel,
) -> Result<(Entries, Option<Vec<f32>>)> {
    let (mut metadata, rope_freqs) = match opened.checkpoint.metadata() {
        Some(metadata) if is_gguf(&opened.checkpoint) => {
            (copied(metadata, opened, with_tokenizer), opened.config.rope.freq_factors.clone())
        }
        _ => {
            let config = opened.config.to_gguf()?;
            let mut metadata = config.metadata;
            metadata.extend(name(source).map(|name| ("general.name".to_owned(), Value::String(name))));
            metadata.extend(tokenizer(source, opened, with_tokenizer, warnings, cancel)?);
            (metadata, config.rope_freqs)
        }
    };
    metadata.push(("general.file_type".into(), Value::U32(file_type.number())));
    metadata.push(("general.quantization_version".into(), Value::U32(QUANTIZATION_VERSION)));
    // The same order as in files of other writers: programs look for the general keys first.
    let section = |key: &str| ["general.", "llama."].iter().position(|start| key.starts_with(start));
    metadata.sort_by_key(|(key, _)| section(key).unwrap_or(2));
    Ok((metadata, rope_freqs))
}

/// The folder's name, which in most cases is the model's name.
fn name(source: &Path) -> Option<String> {
    let folder = source.canonicalize().ok()?;
    folder.file_name()?.to_str().map(str::to_owned)
}

/// Copies all metadata that describe the model of a GGUF file.
fn copied(metadata: &Metadata, opened: &Opened, with_tokenizer: bool) -> Entries {
    let stays = |key: &str| {
        !OF_THE_FILE.contains(&key)
            && !key.starts_with("split.")
            && (with_tokenizer || !key.starts_with("tokenizer."))
    };
    let mut entries: Entries = metadata
        .iter()
        .filter(|(key, _)| stays(key))
        .map(|(key, value)| (key.to_owned(), value.clone()))
        .collect();
    if !with_tokenizer {
        entries.extend(no_tokenizer(opened.config.bos_token_id, &opened.config.eos_token_ids));
        // Without a tokenizer nothing else in the metadata has the vocabulary's size.
        if metadata.get(VOCAB_SIZE).is_none() {
            entries.push((VOCAB_SIZE.into(), Value::U32(opened.config.vocab_size as u32)));
        }
    }
    entries
}

/// The tokenizer's metadata, or those of a file without a tokenizer.
fn tokenizer(
    source: &Path,
    opened: &Opened,
    with_tokenizer: bool,
    warnings: &mut Vec<String>,
    cancel: &Cancel,
) -> Result<Entries> {
    let config = &opened.config;
    let eos_token_ids = GenerationConfig::from_folder(source)?.eos_token_ids;
    let mut eos_token_ids = eos_token_ids.unwrap_or_else(|| config.eos_token_ids.clone());
    eos_token_ids.retain(|&id| (id as usize) < config.vocab_size);
    if !with_tokenizer {
        return Ok(no_tokenizer(config.bos_token_id, &eos_token_ids));
    }
    let (path, vocab_size) = (source.to_owned(), config.vocab_size);
    // Reading, converting and checking a large vocabulary takes about a second, so it must be cancellable.
    let converted = background::run(cancel, move || {
        let tokenizer = Tokenizer::open(&path)?;
        let converted = tokenizer.to_gguf(vocab_size, &eos_token_ids)?;
        Ok((tokenizer.warnings().to_vec(), converted))
    })?;
    let (own, converted) = converted.map_err(|error| match error {
        Error::NotFound { what, path } => {
            Error::NotFound { what: format!("{what} (not needed with --no-tokenizer)"), path }
        }
        other => other,
    })?;
    warnings.extend(own);
    warnings.extend(converted.warnings);
    Ok(converted.metadata)
}
