//! Reads a GGUF file's metadata as a config.
//!
//! Source: ggml, `docs/gguf.md`; llama.cpp, `src/llama-arch.cpp` (the keys) and
//! `src/llama-model.cpp` (the defaults).

use std::collections::HashSet;

use serde_json::{Map, Value as Json, json};

use super::{LlamaConfig, Rope, RopeScaling, rope::yarn_mscale};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::gguf::{Metadata, Value};
use crate::checkpoint::tied::EMBED_TOKENS;
use crate::error::{Error, Result};
use crate::kernels::Activation;

/// The tensor of a GGUF file that holds the divisors of the rotary frequencies.
pub const ROPE_FREQS: &str = "rope_freqs.weight";

/// `llama.*` keys that [`read`] reads.
const READ: &[&str] = &[
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.value_length",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scale_linear",
    "llama.rope.scaling.attn_factor",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.type",
    "llama.rope.scaling.yarn_attn_factor",
    "llama.rope.scaling.yarn_beta_fast",
    "llama.rope.scaling.yarn_beta_slow",
    "llama.rope.scaling.yarn_log_multiplier",
    "llama.vocab_size",
];

/// `llama.*` keys without effect on the mathematics.
const HARMLESS: &[&str] = &[
    "llama.rope.scaling.finetuned",
    // It describes the order of rows in formats older than GGUF.
    "llama.tensor_data_layout",
];

/// `llama.*` keys that change the mathematics and are not implemented. The number, if there is one, is the
/// value that changes nothing.
const CHANGES_MATHEMATICS: &[(&str, Option<f64>)] = &[
    ("llama.attention.clamp_kqv", Some(0.0)),
    ("llama.attention.layer_norm_epsilon", None),
    ("llama.attention.max_alibi_bias", Some(0.0)),
    ("llama.attention.scale", None),
    ("llama.attention.temperature_scale", None),
    ("llama.attn_logit_softcapping", Some(0.0)),
    ("llama.embedding_scale", Some(1.0)),
    ("llama.expert_count", Some(0.0)),
    ("llama.expert_used_count", Some(0.0)),
    ("llama.final_logit_softcapping", Some(0.0)),
    ("llama.logit_scale", Some(1.0)),
    ("llama.residual_scale", Some(1.0)),
    ("llama.rope.scaling.alpha", Some(0.0)),
    ("llama.rope.scaling.yarn_ext_factor", Some(1.0)),
    ("llama.use_parallel_residual", None),
];

const SLIDING_WINDOW: &str = "llama.attention.sliding_window";

/// Reads the config. `checkpoint` is the same file, opened with its tensors.
pub(super) fn read(metadata: &Metadata, checkpoint: Option<&Checkpoint>) -> Result<LlamaConfig> {
    metadata.require_llama()?;
    let mut warnings = unknown_keys(metadata);
    warnings.extend_from_slice(metadata.warnings());

    let optional = |key: &str| -> Result<Option<usize>> {
        let number = metadata.u64_or_uniform(key)?;
        number
            .map(|number| {
                usize::try_from(number).map_err(|_| metadata.malformed(key, format!("is {number}")))
            })
            .transpose()
    };
    let size = |key: &str| optional(key)?.ok_or_else(|| metadata.malformed(key, "is missing"));

    let hidden_size = size("llama.embedding_length")?;
    let num_attention_heads = size("llama.attention.head_count")?;
    let rms_norm_eps = metadata
        .f64("llama.attention.layer_norm_rms_epsilon")?
        .ok_or_else(|| metadata.malformed("llama.attention.layer_norm_rms_epsilon", "is missing"))?;
    let head_dim = head_dim(metadata, &optional, hidden_size, num_attention_heads)?;
    let max_position_embeddings = size("llama.context_length")?;
    refuse_unsupported(metadata, max_position_embeddings)?;
    let mut config = LlamaConfig {
        vocab_size: vocab_size(metadata, optional("llama.vocab_size")?, checkpoint, &mut warnings)?,
        hidden_size,
        intermediate_size: size("llama.feed_forward_length")?,
        num_hidden_layers: size("llama.block_count")?,
        num_attention_heads,
        num_key_value_heads: optional("llama.attention.head_count_kv")?.unwrap_or(num_attention_heads),
        head_dim,
        rms_norm_eps,
        attention_bias: has_bias(checkpoint, ".self_attn."),
        mlp_bias: has_bias(checkpoint, ".mlp."),
        hidden_act: Activation::Silu,
        rope: Rope {
            theta: metadata.f64("llama.rope.freq_base")?.unwrap_or(10_000.0),
            scaling: rope_scaling(metadata, max_position_embeddings)?,
            freq_factors: freq_factors(checkpoint, head_dim)?,
        },
        max_position_embeddings,
        tie_word_embeddings: None,
        bos_token_id: metadata.token_id("tokenizer.ggml.bos_token_id")?,
        eos_token_ids: eos_token_ids(metadata)?,
        torch_dtype: None,
        raw: Map::new(),
        warnings,
    };
    config.raw = raw(&config);
    config.validated(metadata.path(), |field| spelling(field).into())
}

/// The file's key for a config field.
fn spelling(field: &str) -> &str {
    match field {
        "hidden_size" => "llama.embedding_length",
        "intermediate_size" => "llama.feed_forward_length",
        "num_hidden_layers" => "llama.block_count",
        "num_attention_heads" => "llama.attention.head_count",
        "num_key_value_heads" => "llama.attention.head_count_kv",
        "head_dim" => "llama.attention.key_length",
        "rms_norm_eps" => "llama.attention.layer_norm_rms_epsilon",
        "max_position_embeddings" => "llama.context_length",
        "rope_theta" => "llama.rope.freq_base",
        "factor" => "llama.rope.scaling.factor",
        "attention_factor" => "llama.rope.scaling.attn_factor",
        "beta_fast" => "llama.rope.scaling.yarn_beta_fast",
        "beta_slow" => "llama.rope.scaling.yarn_beta_slow",
        "original_max_position_embeddings" => "llama.rope.scaling.original_context_length",
        "vocab_size" => "llama.vocab_size",
        "eos_token_id" => "tokenizer.ggml.eos_token_id",
        other => other,
    }
}

fn refuse_unsupported(metadata: &Metadata, context_length: usize) -> Result<()> {
    if metadata.bool("llama.attention.causal")? == Some(false) {
        return Err(Error::unsupported("llama.attention.causal", "false, only true"));
    }
    // A window that is not smaller than the context changes nothing.
    let sees_all =
        |value: &Value| number(value).is_some_and(|window| window == 0.0 || window >= context_length as f64);
    if let Some(value) = metadata.get(SLIDING_WINDOW).filter(|value| !is_off(value) && !sees_all(value)) {
        let supported = format!("{}, only 0, or at least the context, {context_length}", brief(value));
        return Err(Error::unsupported(SLIDING_WINDOW, supported));
    }
    for &(key, neutral) in CHANGES_MATHEMATICS {
        let Some(value) = metadata.get(key) else { continue };
        if !is_off(value) && (neutral.is_none() || number(value) != neutral) {
            return Err(Error::unsupported(key, brief(value)));
        }
    }
    Ok(())
}

fn unknown_keys(metadata: &Metadata) -> Vec<String> {
    let known = |key: &str| {
        ["llama.attention.causal", SLIDING_WINDOW].contains(&key)
            || READ.contains(&key)
            || HARMLESS.contains(&key)
            || CHANGES_MATHEMATICS.iter().any(|(other, _)| *other == key)
    };
    let unknown =
        metadata.iter().filter(|(key, value)| key.starts_with("llama.") && !known(key) && !is_off(value));
    unknown.map(|(key, value)| format!("unknown metadata key {key} ({}) is ignored", brief(value))).collect()
}

fn is_off(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn number(value: &Value) -> Option<f64> {
    match *value {
        Value::U8(number) => Some(number.into()),
        Value::I8(number) => Some(number.into()),
        Value::U16(number) => Some(number.into()),
        Value::I16(number) => Some(number.into()),
        Value::U32(number) => Some(number.into()),
        Value::I32(number) => Some(number.into()),
        Value::F32(number) => Some(number.into()),
        Value::F64(number) => Some(number),
        // Numbers beyond 2^53 are rounded, but no neutral value is that large.
        Value::U64(number) => Some(number as f64),
        Value::I64(number) => Some(number as f64),
        Value::Bool(_) | Value::String(_) | Value::Array(_) => None,
    }
}

/// A value for use in a message.
fn brief(value: &Value) -> String {
    match value {
        Value::String(string) if string.len() <= 60 => format!("{string:?}"),
        Value::String(_) => "a long string".into(),
        Value::Bool(value) => value.to_string(),
        Value::Array(_) => "an array".into(),
        other => number(other).map(|number| number.to_string()).unwrap_or_default(),
    }
}

fn head_dim(
    metadata: &Metadata,
    optional: &impl Fn(&str) -> Result<Option<usize>>,
    hidden_size: usize,
    heads: usize,
) -> Result<usize> {
    const KEY: &str = "llama.attention.key_length";
    const VALUE: &str = "llama.attention.value_length";
    const ROPE: &str = "llama.rope.dimension_count";
    // This is llama.cpp's default for all three keys.
    let default = hidden_size.checked_div(heads).filter(|_| hidden_size.is_multiple_of(heads));
    let (key, value, rope) = (optional(KEY)?, optional(VALUE)?, optional(ROPE)?);
    let head_dim = key.or(value).or(default).ok_or_else(|| {
        let reason = format!("is {heads}, which does not divide the embedding length {hidden_size}");
        metadata.malformed("llama.attention.head_count", reason)
    })?;
    let value = value.or(default).unwrap_or(head_dim);
    if value != head_dim {
        return Err(Error::unsupported(VALUE, format!("{value}, only the same as {KEY}, {head_dim}")));
    }
    match rope {
        Some(rope) if rope != head_dim => {
            Err(Error::unsupported(ROPE, format!("{rope}, only the whole head of {head_dim}")))
        }
        _ => Ok(head_dim),
    }
}

/// The number of rows of the embedding. A file whose vocabulary was extended may keep the old number in its
/// key: the tokens and the embedding count, if they agree.
fn vocab_size(
    metadata: &Metadata,
    key: Option<usize>,
    checkpoint: Option<&Checkpoint>,
    warnings: &mut Vec<String>,
) -> Result<usize> {
    const KEY: &str = "llama.vocab_size";
    let rows = checkpoint.and_then(|checkpoint| checkpoint.shape(EMBED_TOKENS)?.first().copied());
    let tokens = metadata.strings("tokenizer.ggml.tokens")?.map(<[String]>::len);
    if let (Some(stale), Some(size)) = (key, tokens.filter(|tokens| rows.is_none_or(|rows| rows == *tokens)))
        && stale != size
    {
        warnings.push(format!("{KEY} is {stale} and is ignored: the vocabulary has {size} tokens"));
        return Ok(size);
    }
    key.or(tokens).or(rows).ok_or_else(|| metadata.malformed(KEY, "is missing, and so are the tokens"))
}

/// Reads `llama.rope.scaling.*`. As in llama.cpp, a factor without a type means linear scaling, and a factor
/// of 0 means none.
///
/// Source: llama.cpp, `llama-context.cpp`, for the meaning of YaRN's keys.
fn rope_scaling(metadata: &Metadata, context_length: usize) -> Result<RopeScaling> {
    const TYPE: &str = "llama.rope.scaling.type";
    let number = |key: &str| metadata.f64(&format!("llama.rope.{key}"));
    let factor = match number("scaling.factor")? {
        None => number("scale_linear")?,
        factor => factor,
    };
    let factor = factor.filter(|factor| *factor != 0.0).unwrap_or(1.0);
    match metadata.string(TYPE)? {
        Some("none") => Ok(RopeScaling::Default),
        None | Some("linear") if factor == 1.0 => Ok(RopeScaling::Default),
        None | Some("linear") => Ok(RopeScaling::Linear { factor }),
        Some("yarn") => {
            let original = metadata.u64_or_uniform("llama.rope.scaling.original_context_length")?;
            let original = original.map(|length| usize::try_from(length).unwrap_or(usize::MAX));
            let log_multiplier = number("scaling.yarn_log_multiplier")?.unwrap_or(0.0);
            let over = if log_multiplier == 0.0 { 1.0 } else { yarn_mscale(factor, log_multiplier) };
            // The converter writes config.json's attention_factor here, if it has one.
            let attention_factor = number("scaling.yarn_attn_factor")?;
            let attention_factor = attention_factor.unwrap_or(yarn_mscale(factor, 1.0) / over);
            Ok(RopeScaling::Yarn {
                factor,
                attention_factor: attention_factor * number("scaling.attn_factor")?.unwrap_or(1.0),
                beta_fast: number("scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: number("scaling.yarn_beta_slow")?.unwrap_or(1.0),
                original_max_position_embeddings: original.unwrap_or(context_length),
                truncate: true,
            })
        }
        Some(other) => Err(Error::unsupported(TYPE, format!("{other:?}, only none, linear and yarn"))),
    }
}

/// Reads the divisors of the frequencies, a tensor into which llama.cpp's converter turns llama3 scaling.
fn freq_factors(checkpoint: Option<&Checkpoint>, head_dim: usize) -> Result<Option<Vec<f32>>> {
    let Some(checkpoint) = checkpoint else { return Ok(None) };
    for name in ["rope_factors_long.weight", "rope_factors_short.weight"] {
        if checkpoint.contains(name) {
            return Err(Error::unsupported(name, "frequencies that depend on the length of the context"));
        }
    }
    if !checkpoint.contains(ROPE_FREQS) {
        return Ok(None);
    }
    Ok(Some(checkpoint.tensor_with_shape(ROPE_FREQS, &[head_dim / 2])?.to_f32()))
}

/// Whether a layer's projections have biases. Only the tensors tell.
fn has_bias(checkpoint: Option<&Checkpoint>, module: &str) -> bool {
    checkpoint.is_some_and(|checkpoint| {
        checkpoint.infos().iter().any(|info| info.name.ends_with(".bias") && info.name.contains(module))
    })
}

/// The tokens that end the text, and those that end a turn or message, which chat models emit instead.
fn eos_token_ids(metadata: &Metadata) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        ids.extend(metadata.token_id(&format!("tokenizer.ggml.{key}"))?);
    }
    const MANY: &str = "tokenizer.ggml.eos_token_ids";
    for id in metadata.ints(MANY)?.unwrap_or_default() {
        ids.push(u32::try_from(id).map_err(|_| metadata.malformed(MANY, format!("has {id}")))?);
    }
    // The first one stays first: programs that write only one write it.
    let mut seen = HashSet::new();
    ids.retain(|id| seen.insert(*id));
    Ok(ids)
}

/// The config in config.json's spelling.
fn raw(config: &LlamaConfig) -> Map<String, Json> {
    let eos_token_id = match config.eos_token_ids[..] {
        [] => Json::Null,
        [one] => one.into(),
        ref several => several.into(),
    };
    [
        ("architectures", json!(["LlamaForCausalLM"])),
        ("model_type", "llama".into()),
        ("vocab_size", config.vocab_size.into()),
        ("hidden_size", config.hidden_size.into()),
        ("intermediate_size", config.intermediate_size.into()),
        ("num_hidden_layers", config.num_hidden_layers.into()),
        ("num_attention_heads", config.num_attention_heads.into()),
        ("num_key_value_heads", config.num_key_value_heads.into()),
        ("head_dim", config.head_dim.into()),
        ("hidden_act", config.hidden_act.name().into()),
        ("rms_norm_eps", config.rms_norm_eps.into()),
        ("attention_bias", config.attention_bias.into()),
        ("mlp_bias", config.mlp_bias.into()),
        ("rope_theta", config.rope.theta.into()),
        ("max_position_embeddings", config.max_position_embeddings.into()),
        ("bos_token_id", config.bos_token_id.into()),
        ("eos_token_id", eos_token_id),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect()
}
