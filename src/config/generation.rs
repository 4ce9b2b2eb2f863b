//! Reads `generation_config.json`: the sampling parameters that a checkpoint's authors recommend.

use std::path::Path;

use serde_json::Value;

use crate::checkpoint::json::{Object, brief};
use crate::error::{Error, Result};

/// Defaults for sampling, in Hugging Face's spelling. None means that the file does not set the value.
///
/// Values have the right type, but their range is not checked here. That happens where they are used,
/// together with the caller's values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// False means greedy, whatever the other values are.
    pub do_sample: Option<bool>,
    /// The divisor of the logits.
    pub temperature: Option<f32>,
    /// Keep this many of the likeliest tokens. 0 or -1 keeps all.
    pub top_k: Option<i64>,
    /// Keep the likeliest tokens up to this total probability.
    pub top_p: Option<f32>,
    /// Keep tokens at least this likely, relative to the likeliest.
    pub min_p: Option<f32>,
    /// The penalty for tokens that have occurred.
    pub repetition_penalty: Option<f32>,
    /// The most tokens to generate.
    pub max_new_tokens: Option<usize>,
    /// The fewest tokens to generate.
    pub min_new_tokens: Option<usize>,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text or a turn.
    pub eos_token_ids: Option<Vec<u32>>,
    /// Warnings about settings that would change the output but are not supported.
    pub warnings: Vec<String>,
}

/// Settings that would change the output but are not supported, each with the values that switch it off. null
/// always does.
const UNSUPPORTED: &[(&str, &[&str])] = &[
    ("num_beams", &["1"]),
    ("num_beam_groups", &["1"]),
    ("penalty_alpha", &["0", "0.0"]),
    ("dola_layers", &[]),
    ("typical_p", &["1", "1.0"]),
    ("epsilon_cutoff", &["0", "0.0"]),
    ("eta_cutoff", &["0", "0.0"]),
    ("top_h", &[]),
    ("diversity_penalty", &["0", "0.0"]),
    ("encoder_repetition_penalty", &["1", "1.0"]),
    ("no_repeat_ngram_size", &["0"]),
    ("encoder_no_repeat_ngram_size", &["0"]),
    ("bad_words_ids", &["[]"]),
    ("force_words_ids", &["[]"]),
    ("constraints", &["[]"]),
    ("forced_bos_token_id", &[]),
    ("forced_eos_token_id", &[]),
    ("exponential_decay_length_penalty", &[]),
    ("suppress_tokens", &["[]"]),
    ("begin_suppress_tokens", &["[]"]),
    ("forced_decoder_ids", &["[]"]),
    ("sequence_bias", &["{}", "[]"]),
    ("guidance_scale", &["1", "1.0"]),
    ("watermarking_config", &[]),
    ("stop_strings", &["[]"]),
    ("num_return_sequences", &["1"]),
    ("min_length", &["0"]),
    ("max_time", &[]),
];

impl GenerationConfig {
    /// Reads `generation_config.json` in `dir`. A folder without one gives the default.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the file is not a JSON object or a value has the wrong type, [`Error::Io`] if
    /// it cannot be read.
    pub fn from_folder(dir: &Path) -> Result<Self> {
        match Object::read(&dir.join("generation_config.json")) {
            Ok(object) => Self::from_object(&object),
            Err(Error::NotFound { .. }) => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    fn from_object(object: &Object) -> Result<Self> {
        let single = |key| Ok(object.f64(key)?.map(|number| number as f32));
        Ok(Self {
            do_sample: object.bool("do_sample")?,
            temperature: single("temperature")?,
            top_k: object.i64("top_k")?,
            top_p: single("top_p")?,
            min_p: single("min_p")?,
            repetition_penalty: single("repetition_penalty")?,
            max_new_tokens: object.usize("max_new_tokens")?,
            min_new_tokens: object.usize("min_new_tokens")?,
            bos_token_id: object.token_id("bos_token_id")?,
            eos_token_ids: object.token_ids("eos_token_id")?,
            warnings: warnings(object),
        })
    }
}

fn warnings(object: &Object) -> Vec<String> {
    let is_on = |value: &Value, off: &[&str]| {
        *value != Value::Bool(false) && !off.contains(&value.to_string().as_str())
    };
    UNSUPPORTED
        .iter()
        .filter_map(|(key, off)| {
            let value = object.get(key).filter(|value| is_on(value, off))?;
            Some(format!("generation_config.json: {key} ({}) is not supported and is ignored", brief(value)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<GenerationConfig> {
        let object = Object::parse(Path::new("generation_config.json"), text.as_bytes())?;
        GenerationConfig::from_object(&object)
    }

    #[test]
    fn an_absent_file_gives_the_default() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(GenerationConfig::from_folder(dir.path()).unwrap(), GenerationConfig::default());
    }

    #[test]
    fn llama_3s_file_is_read_whole() {
        let config = parse(
            r#"{"bos_token_id": 128000, "do_sample": true, "eos_token_id": [128001, 128008, 128009],
                "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.45.0.dev0"}"#,
        )
        .unwrap();
        let expected = GenerationConfig {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_p: Some(0.9),
            bos_token_id: Some(128_000),
            eos_token_ids: Some(vec![128_001, 128_008, 128_009]),
            ..GenerationConfig::default()
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn one_eos_is_a_list_of_one() {
        assert_eq!(parse(r#"{"eos_token_id": 2}"#).unwrap().eos_token_ids, Some(vec![2]));
    }

    #[test]
    fn wrong_types_are_malformed() {
        for text in [
            r#"{"temperature": "hot"}"#,
            r#"{"top_k": 1.5}"#,
            r#"{"do_sample": 1}"#,
            r#"{"eos_token_id": [1.5]}"#,
            r#"{"max_new_tokens": -5}"#,
            r#"[]"#,
        ] {
            assert!(matches!(parse(text), Err(Error::Malformed { .. })), "{text}");
        }
    }

    #[test]
    fn unsupported_settings_give_a_warning_only_when_they_are_on() {
        let config = parse(r#"{"num_beams": 1, "typical_p": 1.0, "min_length": 0, "suppress_tokens": null}"#);
        assert_eq!(config.unwrap().warnings, [] as [&str; 0]);
        let config = parse(r#"{"num_beams": 4}"#).unwrap();
        assert_eq!(
            config.warnings,
            ["generation_config.json: num_beams (4) is not supported and is ignored"]
        );
    }
}
