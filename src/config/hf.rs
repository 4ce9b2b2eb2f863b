//! Reads `config.json` as transformers 4 and 5 write it.
//!
//! Source: transformers, `configuration_llama.py`, `configuration_utils.py` and
//! `modeling_rope_utils.py`.

use std::path::Path;

use serde_json::Value;

use super::{LlamaConfig, Rope, RopeScaling, rope::yarn_mscale};
use crate::checkpoint::json::{Object, brief};
use crate::error::{Error, Result, quoted};
use crate::kernels::Activation;

/// Keys that [`parse`] reads.
const READ: &[&str] = &[
    "architectures",
    "attention_bias",
    "attention_chunk_size",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "is_causal",
    "max_position_embeddings",
    "max_sequence_length",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "quantization_config",
    "rms_norm_eps",
    "rope_interleaved",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "torch_dtype",
    "use_sliding_window",
    "vocab_size",
];

/// Keys without effect on the mathematics of a forward pass: keys that transformers writes into every config,
/// old generation settings, and keys that training tools leave behind.
const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "add_cross_attention",
    "attention_dropout",
    "attn_implementation",
    "attn_pdrop",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "language",
    "length_penalty",
    "max_length",
    "max_window_layers",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    // It once split a matrix product into parts; the product is the same.
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_dropout",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// Keys that change the mathematics in models related to Llama. None of them is implemented. The number, if
/// there is one, is the value that changes nothing (false and null never do).
const CHANGES_MATHEMATICS: &[(&str, Option<f64>)] = &[
    ("alibi", None),
    ("attention_multiplier", None),
    ("attention_out_bias", None),
    ("attention_qkv_bias", None),
    ("attention_scale", None),
    ("attn_logit_softcapping", Some(0.0)),
    ("attn_temperature_tuning", Some(0.0)),
    ("bias", None),
    ("clip_qkv", None),
    ("dim_model_base", None),
    ("embedding_multiplier", Some(1.0)),
    ("embedding_scale", Some(1.0)),
    ("final_logit_softcapping", Some(0.0)),
    ("layer_norm_eps", None),
    ("layer_types", None),
    ("logit_scale", Some(1.0)),
    ("logits_scaling", Some(1.0)),
    ("lm_head_bias", None),
    ("moe_intermediate_size", None),
    ("moe_num_experts", Some(0.0)),
    ("mup_scale_emb", Some(1.0)),
    ("no_rope_layers", None),
    ("nope_layer_interval", None),
    ("norm_bias", None),
    ("num_experts", Some(0.0)),
    ("num_experts_per_tok", Some(0.0)),
    ("num_local_experts", Some(0.0)),
    ("n_routed_experts", Some(0.0)),
    ("parallel_attn", None),
    ("qk_layernorm", None),
    ("qk_norm", None),
    ("qkv_bias", None),
    ("query_pre_attn_scalar", None),
    ("residual_multiplier", Some(1.0)),
    ("rotary_pct", Some(1.0)),
    ("rope_ratio", Some(1.0)),
    ("scale_depth", None),
    ("scale_emb", Some(1.0)),
    ("shared_attention_layers", None),
    ("use_bias", None),
    ("use_parallel_residual", None),
    ("use_qk_norm", None),
    ("use_qkv_bias", None),
];

/// Reads a config.json. `plain_weights` tells that no tensor is quantised, whatever the config says.
pub(super) fn read(path: &Path, plain_weights: bool) -> Result<LlamaConfig> {
    let object = Object::read(path).map_err(|error| match error {
        Error::NotFound { path, .. } => Error::NotFound { what: "config.json".into(), path },
        other => other,
    })?;
    parse(object, plain_weights)
}

fn parse(config: Object, plain_weights: bool) -> Result<LlamaConfig> {
    refuse_other_models(&config)?;
    refuse_unsupported(&config)?;
    let mut warnings = unknown_keys(&config);
    warnings.extend(quantization(&config, plain_weights)?);

    let size = |key: &str| config.usize(key)?.ok_or_else(|| config.malformed(key, "is missing"));
    let hidden_size = size("hidden_size")?;
    let num_attention_heads = size("num_attention_heads")?;
    let head_dim = match config.usize("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_attention_heads) => {
            hidden_size.checked_div(num_attention_heads).unwrap_or(0)
        }
        None => {
            let reason = format!("is {num_attention_heads}, which does not divide hidden_size {hidden_size}");
            return Err(config.malformed("num_attention_heads", reason));
        }
    };
    let max_position_embeddings = config.usize("max_position_embeddings")?.unwrap_or(2048);
    let parsed = LlamaConfig {
        vocab_size: size("vocab_size")?,
        hidden_size,
        intermediate_size: size("intermediate_size")?,
        num_hidden_layers: size("num_hidden_layers")?,
        num_attention_heads,
        num_key_value_heads: config.usize("num_key_value_heads")?.unwrap_or(num_attention_heads),
        head_dim,
        // Defaults are those of transformers' LlamaConfig, which leaves out keys with their default value.
        rms_norm_eps: config.f64("rms_norm_eps")?.unwrap_or(1e-6),
        attention_bias: config.bool("attention_bias")?.unwrap_or(false),
        mlp_bias: config.bool("mlp_bias")?.unwrap_or(false),
        hidden_act: hidden_act(&config)?,
        rope: rope(&config, max_position_embeddings, &mut warnings)?,
        max_position_embeddings,
        tie_word_embeddings: config.bool("tie_word_embeddings")?,
        bos_token_id: config.token_id("bos_token_id")?,
        eos_token_ids: config.token_ids("eos_token_id")?.unwrap_or_default(),
        torch_dtype: torch_dtype(&config, &mut warnings)?,
        raw: config.map().clone(),
        warnings,
    };
    refuse_windows(&config, parsed.context_length())?;
    let section = if config.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
    parsed.validated(config.path(), |field| match field {
        "factor" | "low_freq_factor" | "high_freq_factor" | "attention_factor" | "beta_fast"
        | "beta_slow" => {
            format!("{section}.{field}")
        }
        _ => field.into(),
    })
}

fn refuse_other_models(config: &Object) -> Result<()> {
    const LLAMA: &str = "LlamaForCausalLM";
    // The first conversions of LLaMA were written before transformers settled on a spelling.
    let is_llama = |name: &&str| name.eq_ignore_ascii_case(LLAMA);
    let model_type = config.string("model_type")?;
    if let Some(other) = model_type.filter(|model_type| *model_type != "llama") {
        return Err(Error::unsupported("model_type", format!("{other:?}, only \"llama\"")));
    }
    let architectures = config.strings("architectures")?.unwrap_or_default();
    match architectures[..] {
        [] if model_type.is_none() => {
            Err(Error::unsupported("model_type", "absent, and so is architectures; only \"llama\""))
        }
        [] => Ok(()),
        _ if architectures.iter().any(is_llama) => Ok(()),
        _ => Err(Error::unsupported("architectures", format!("{architectures:?}, only {LLAMA:?}"))),
    }
}

fn refuse_unsupported(config: &Object) -> Result<()> {
    let refuse = |key: &str, supported: &str| {
        let value = config.get(key).map(brief).unwrap_or_default();
        Err(Error::unsupported(config.full_key(key), format!("{value}{supported}")))
    };
    if config.bool("rope_interleaved")? == Some(true) {
        return refuse("rope_interleaved", ", only false");
    }
    if config.bool("is_causal")? == Some(false) {
        return refuse("is_causal", ", only true");
    }
    if config.f64("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return refuse("partial_rotary_factor", ", only 1.0");
    }
    for &(key, neutral) in CHANGES_MATHEMATICS {
        let Some(value) = config.get(key) else { continue };
        let is_neutral = neutral.is_some() && value.as_f64() == neutral;
        if *value != Value::Bool(false) && !is_neutral && !is_full_attention(key, value) {
            return refuse(key, "");
        }
    }
    Ok(())
}

/// Refuses attention that sees less than the whole context. A window that is switched off, or not smaller
/// than the context, changes nothing.
fn refuse_windows(config: &Object, context_length: usize) -> Result<()> {
    if config.bool("use_sliding_window")? == Some(false) {
        return Ok(());
    }
    for key in ["sliding_window", "attention_chunk_size"] {
        let Some(value) = config.get(key).filter(|value| **value != Value::Bool(false)) else { continue };
        if value.as_u64().is_none_or(|window| window < context_length as u64) {
            let supported = format!("{}, only null, or at least the context, {context_length}", brief(value));
            return Err(Error::unsupported(key, supported));
        }
    }
    if config.bool("use_sliding_window")? == Some(true) && config.get("sliding_window").is_none() {
        return Err(Error::unsupported("use_sliding_window", "true"));
    }
    Ok(())
}

/// Refuses quantised weights. Tools that merge an adapter often leave the key in the config although they
/// save plain weights; then it is only a warning.
fn quantization(config: &Object, plain_weights: bool) -> Result<Option<String>> {
    let Some(quantization) = config.object("quantization_config")? else { return Ok(None) };
    let method = quantization.string("quant_method")?.unwrap_or("unnamed").to_owned();
    if plain_weights {
        let reason = "is ignored, because no tensor is quantised; remove the key from config.json";
        return Ok(Some(format!("config.json: quantization_config ({}) {reason}", quoted(&method))));
    }
    let value = format!("{method:?}; take a checkpoint that is not quantised, or a GGUF file");
    Err(Error::unsupported("quantization_config", value))
}

/// transformers also writes `layer_types` for models whose layers are all alike.
fn is_full_attention(key: &str, value: &Value) -> bool {
    key == "layer_types"
        && value.as_array().is_some_and(|layers| layers.iter().all(|layer| layer == "full_attention"))
}

/// Warnings about unknown keys that seem to be switched on.
fn unknown_keys(config: &Object) -> Vec<String> {
    let known = |key: &str| {
        READ.contains(&key)
            || HARMLESS.contains(&key)
            || CHANGES_MATHEMATICS.iter().any(|(other, _)| *other == key)
    };
    let unknown = config
        .map()
        .iter()
        .filter(|(key, value)| !known(key) && !matches!(value, Value::Null | Value::Bool(false)));
    unknown
        .map(|(key, value)| format!("config.json: unknown key {key} ({}) is ignored", brief(value)))
        .collect()
}

/// Reads an activation by its name in transformers' `ACT2FN`. Several names mean the same function, or differ
/// only in the rounding of a constant.
fn hidden_act(config: &Object) -> Result<Activation> {
    match config.string("hidden_act")? {
        None | Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu" | "gelu_python") => Ok(Activation::Gelu),
        Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_accurate" | "gelu_fast") => {
            Ok(Activation::GeluTanh)
        }
        Some("quick_gelu") => Ok(Activation::QuickGelu),
        Some(other) => {
            Err(Error::unsupported("hidden_act", format!("{other:?}, only silu and the variants of gelu")))
        }
    }
}

/// Reads `dtype` (transformers 5) or `torch_dtype` (transformers 4). It only describes the weights: their
/// type is in their file.
fn torch_dtype(config: &Object, warnings: &mut Vec<String>) -> Result<Option<String>> {
    let (old, new) = (config.string("torch_dtype")?, config.string("dtype")?);
    if let (Some(old), Some(new)) = (old, new)
        && old != new
    {
        let (old, new) = (quoted(old), quoted(new));
        warnings.push(format!("config.json: dtype is {new}, but torch_dtype is {old}; the weights decide"));
    }
    Ok(new.or(old).map(str::to_owned))
}

/// Reads RoPE from `rope_theta` and `rope_scaling` (transformers 4), from `rope_parameters` (transformers 5),
/// or from both if they agree.
fn rope(config: &Object, max_position_embeddings: usize, warnings: &mut Vec<String>) -> Result<Rope> {
    let mut theta = config.f64("rope_theta")?;
    let mut scaling = None;
    for section in ["rope_scaling", "rope_parameters"] {
        let Some(object) = config.object(section)? else { continue };
        if let Some(inner) = object.f64("rope_theta")? {
            if theta.is_some_and(|theta| theta != inner) {
                let reason = format!("is {inner}, but rope_theta is {}", theta.unwrap_or_default());
                return Err(object.malformed("rope_theta", reason));
            }
            theta = Some(inner);
        }
        let inner = rope_scaling(config, section, &object, max_position_embeddings, warnings)?;
        if scaling.as_ref().is_some_and(|scaling| *scaling != inner) {
            return Err(config.malformed(section, "disagrees with rope_scaling"));
        }
        scaling = Some(inner);
    }
    Ok(Rope {
        theta: theta.unwrap_or(10_000.0),
        scaling: scaling.unwrap_or(RopeScaling::Default),
        freq_factors: None,
    })
}

/// Keys of a RoPE section that at least one type uses. transformers ignores them for the other types.
const ROPE_KEYS: &[&str] = &[
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "short_factor",
    "long_factor",
    "truncate",
    "finetuned",
];

fn rope_scaling(
    config: &Object,
    section: &str,
    rope: &Object,
    max_position_embeddings: usize,
    warnings: &mut Vec<String>,
) -> Result<RopeScaling> {
    if let Some(factor) = rope.f64("partial_rotary_factor")?.filter(|factor| *factor != 1.0) {
        let value = format!("{factor}, only 1.0");
        return Err(Error::unsupported(rope.full_key("partial_rotary_factor"), value));
    }
    let rope_type = match (rope.string("rope_type")?, rope.string("type")?) {
        (Some(new), Some(old)) if new != old => {
            return Err(rope.malformed("rope_type", format!("is {new:?}, but type is {old:?}")));
        }
        (new, old) => new.or(old),
    };
    let rope_type = match rope_type {
        Some(rope_type) => rope_type,
        // transformers 5 leaves the type out. A section with a factor needs one: it must say how to scale.
        None if rope.get("factor").is_none() => "default",
        None => return Err(config.malformed(section, "has a factor but no rope_type")),
    };
    let used: &[&str] = match rope_type {
        "default" => &[],
        "linear" | "dynamic" => &["factor"],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor", CONTEXT],
        "yarn" => &[
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            CONTEXT,
        ],
        _ => {
            let known = "only default, linear, dynamic, llama3 and yarn";
            return Err(Error::unsupported(rope.full_key("rope_type"), format!("{rope_type:?}, {known}")));
        }
    };
    for (key, value) in rope.map() {
        let common = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
        if common.contains(&key.as_str()) || used.contains(&key.as_str()) || value.is_null() {
            continue;
        }
        if !ROPE_KEYS.contains(&key.as_str()) {
            return Err(Error::unsupported(rope.full_key(key), brief(value)));
        }
        warnings.push(format!(
            "config.json: {} ({}) is ignored, as {rope_type:?} does not use it",
            rope.full_key(key),
            brief(value)
        ));
    }
    let number = |key| rope.f64(key)?.ok_or_else(|| rope.malformed(key, "is missing"));
    let context = || match (rope.usize(CONTEXT)?, config.usize(CONTEXT)?) {
        (Some(inner), Some(outer)) if inner != outer => {
            Err(rope.malformed(CONTEXT, format!("is {inner}, but {CONTEXT} is {outer}")))
        }
        (inner, outer) => Ok(inner.or(outer)),
    };
    Ok(match rope_type {
        "linear" => RopeScaling::Linear { factor: number("factor")? },
        "dynamic" => RopeScaling::Dynamic {
            factor: number("factor")?,
            original_max_position_embeddings: max_position_embeddings,
        },
        "llama3" => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: context()?
                .ok_or_else(|| rope.malformed(CONTEXT, "is missing"))?,
        },
        "yarn" => yarn(rope, context()?.unwrap_or(max_position_embeddings), max_position_embeddings)?,
        _ => RopeScaling::Default,
    })
}

const CONTEXT: &str = "original_max_position_embeddings";

/// Fills in missing values as transformers does: null and, for some keys, 0 mean the default.
fn yarn(rope: &Object, original: usize, max_position_embeddings: usize) -> Result<RopeScaling> {
    let nonzero = |key| Ok::<_, Error>(rope.f64(key)?.filter(|number| *number != 0.0));
    let factor = rope.f64("factor")?.unwrap_or(max_position_embeddings as f64 / original as f64);
    let attention_factor = match (nonzero("mscale")?, nonzero("mscale_all_dim")?) {
        (Some(mscale), Some(all)) => yarn_mscale(factor, mscale) / yarn_mscale(factor, all),
        _ => yarn_mscale(factor, 1.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor: rope.f64("attention_factor")?.unwrap_or(attention_factor),
        beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
        beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
        original_max_position_embeddings: original,
        truncate: rope.bool("truncate")?.unwrap_or(true),
    })
}
