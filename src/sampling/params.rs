//! Sampling parameters: [`SamplingOptions`] as the caller gave them, [`SamplingParams`] after checking.

use std::time::Duration;

use super::constraint::{Constraint, SharedProcessor};
use crate::config::GenerationConfig;
use crate::error::{Error, Result};
use crate::model::MAX_SALT_BYTES;

/// `max_new_tokens` if neither the caller nor the model sets it.
const DEFAULT_MAX_NEW_TOKENS: usize = 256;
/// Presence and frequency penalties beyond this are refused, as OpenAI's API does.
const MAX_PENALTY: f64 = 2.0;
/// About thirty years, so that a deadline does not overflow the clock.
const MAX_TIMEOUT_SECONDS: f64 = 1e9;

/// What to do with a prompt that is longer than the context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnOverflow {
    /// Refuse it.
    #[default]
    Error,
    /// Drop tokens from its left end until it fits.
    TruncateLeft,
}

impl OnOverflow {
    /// Reads `"error"` or `"truncate_left"`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for anything else.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "error" => Ok(OnOverflow::Error),
            "truncate_left" => Ok(OnOverflow::TruncateLeft),
            other => Err(Error::argument(
                "on_overflow",
                format!("{other:?} is not one of \"error\", \"truncate_left\""),
            )),
        }
    }
}

/// The parameters that the caller gave; `None` means not given. The types hold every value that a caller can
/// write, so that [`SamplingParams::resolve`] is the only place that refuses values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingOptions {
    /// Maximum number of tokens to generate; -1 generates to the end of the context.
    pub max_new_tokens: Option<i64>,
    /// Divisor of the logits; 0 is greedy.
    pub temperature: Option<f64>,
    /// Keep the k most likely tokens; 0 or -1 keeps all.
    pub top_k: Option<i64>,
    /// Keep the fewest most likely tokens whose probabilities sum to this; 1 or -1 keeps all.
    pub top_p: Option<f64>,
    /// Keep tokens at least this likely relative to the most likely one; 0 or -1 keeps all.
    pub min_p: Option<f64>,
    /// Divides (or multiplies, if negative) the logits of tokens in prompt and output; 1 is off.
    pub repetition_penalty: Option<f64>,
    /// Subtracted from the logits of tokens in the output; 0 is off.
    pub presence_penalty: Option<f64>,
    /// Subtracted once per occurrence in the output; 0 is off.
    pub frequency_penalty: Option<f64>,
    /// Added to the logits of single tokens.
    pub logit_bias: Option<Vec<(i64, f64)>>,
    /// Strings that end the text.
    pub stop: Option<Vec<String>>,
    /// Tokens that end the text, in addition to EOS.
    pub stop_token_ids: Option<Vec<i64>>,
    /// Whether the text keeps the stop string that ended it.
    pub include_stop_str: Option<bool>,
    /// Seed of the random draws.
    pub seed: Option<u64>,
    /// How many alternatives to report per token; 0 reports the chosen token alone.
    pub logprobs: Option<i64>,
    /// Continue after EOS.
    pub ignore_eos: Option<bool>,
    /// Number of tokens to generate before EOS or a stop token is allowed.
    pub min_new_tokens: Option<i64>,
    /// Seconds after which generation ends with the tokens so far.
    pub timeout: Option<f64>,
    /// What to do with a prompt longer than the context.
    pub on_overflow: Option<OnOverflow>,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: Option<bool>,
    /// Only calls with equal salts share cached prefixes.
    pub cache_salt: Option<String>,
    /// A JSON schema, as JSON, that the answer must follow.
    pub json_schema: Option<String>,
    /// A regular expression that must match the answer as a whole.
    pub regex: Option<String>,
    /// A grammar, in llguidance's dialect of Lark, that the answer must follow.
    pub grammar: Option<String>,
    /// Texts, of which the answer must be one.
    pub choice: Option<Vec<String>>,
    /// Functions that change logits before a token is drawn, in this order.
    pub logits_processors: Vec<SharedProcessor>,
}

impl SamplingOptions {
    /// Refuses values that are invalid for every model. [`SamplingParams::resolve`] also checks what depends
    /// on the model: its vocabulary and its defaults.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with the parameter, its value and the range.
    pub fn check(&self) -> Result<()> {
        // The model's default for max_new_tokens is not known here, so min_new_tokens is only compared with
        // a limit that the caller gave.
        let given =
            SamplingOptions { max_new_tokens: self.max_new_tokens.or(Some(i64::MAX)), ..self.clone() };
        SamplingParams::resolve(&given, &GenerationConfig::default(), u32::MAX as usize).map(drop)
    }
}

/// Checked sampling parameters, with defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Maximum number of tokens to generate; at least 1. `usize::MAX` means to the end of the context.
    pub max_new_tokens: usize,
    /// Divisor of the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 is off.
    pub top_k: usize,
    /// Nucleus mass in (0, 1]; 1 is off.
    pub top_p: f32,
    /// Smallest probability relative to the most likely token, in [0, 1]; 0 is off.
    pub min_p: f32,
    /// Hugging Face's repetition penalty; 1 is off.
    pub repetition_penalty: f32,
    /// OpenAI's presence penalty; 0 is off.
    pub presence_penalty: f32,
    /// OpenAI's frequency penalty; 0 is off.
    pub frequency_penalty: f32,
    /// (token id, bias) pairs, added to the logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Strings that end the text; none is empty.
    pub stop: Vec<String>,
    /// Tokens that end the text, in addition to EOS.
    pub stop_token_ids: Vec<u32>,
    /// Whether the text keeps the stop string that ended it.
    pub include_stop_str: bool,
    /// Seed of the random draws; `None` takes one from the operating system.
    pub seed: Option<u64>,
    /// How many alternatives to report per token; `None` reports no log-probabilities.
    pub logprobs: Option<usize>,
    /// Continue after EOS.
    pub ignore_eos: bool,
    /// Number of tokens to generate before EOS or a stop token is allowed.
    pub min_new_tokens: usize,
    /// Time after which generation ends with the tokens so far.
    pub timeout: Option<Duration>,
    /// What to do with a prompt longer than the context.
    pub on_overflow: OnOverflow,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Only calls with equal salts share cached prefixes.
    pub cache_salt: String,
    /// What the answer must be.
    pub constraint: Option<Constraint>,
    /// Functions that change logits before a token is drawn, in this order.
    pub logits_processors: Vec<SharedProcessor>,
}

impl SamplingParams {
    /// Checks `given` and fills in what is missing: from the model's generation_config.json, else greedy
    /// and 256 new tokens.
    ///
    /// A generation config that says `do_sample: false`, or names no temperature and does not say
    /// `do_sample: true`, means temperature 0; `do_sample: true` without a temperature means 1. A caller
    /// who gives only `top_p` to a greedy model stays greedy.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with the parameter, its value and the range.
    pub fn resolve(given: &SamplingOptions, defaults: &GenerationConfig, vocab_size: usize) -> Result<Self> {
        let max_new_tokens = match given.max_new_tokens {
            Some(-1) => Some(usize::MAX),
            given => count("max_new_tokens", given, 1, "at least 1, or -1 for the rest of the context")?,
        };
        let max_new_tokens = match (max_new_tokens, defaults.max_new_tokens) {
            (Some(max), _) => max,
            (None, Some(0)) => {
                return Err(out_of_range("max_new_tokens", 0, "at least 1", Source::GenerationConfig));
            }
            (None, Some(max)) => max,
            (None, None) => DEFAULT_MAX_NEW_TOKENS,
        };
        let min_new_tokens = count("min_new_tokens", given.min_new_tokens, 0, "at least 0")?;
        let min_new_tokens = match (min_new_tokens, defaults.min_new_tokens) {
            (Some(min), _) => min,
            // The model's default must not exceed the caller's limit.
            (None, default) => default.unwrap_or(0).min(max_new_tokens),
        };
        if min_new_tokens > max_new_tokens {
            return Err(Error::argument(
                "min_new_tokens",
                format!("got {min_new_tokens}, but max_new_tokens is {max_new_tokens}"),
            ));
        }
        Ok(SamplingParams {
            max_new_tokens,
            temperature: temperature(given, defaults)?,
            top_k: top_k(given.top_k, defaults.top_k)?,
            top_p: top_p(given.top_p, defaults.top_p)?,
            min_p: min_p(given.min_p, defaults.min_p)?,
            repetition_penalty: repetition_penalty(given, defaults)?,
            presence_penalty: additive_penalty("presence_penalty", given.presence_penalty)?,
            frequency_penalty: additive_penalty("frequency_penalty", given.frequency_penalty)?,
            logit_bias: logit_bias(given.logit_bias.as_deref().unwrap_or_default(), vocab_size)?,
            stop: stop(given.stop.as_deref().unwrap_or_default())?,
            stop_token_ids: given
                .stop_token_ids
                .iter()
                .flatten()
                .map(|&id| token_id("stop_token_ids", id, vocab_size))
                .collect::<Result<_>>()?,
            include_stop_str: given.include_stop_str.unwrap_or(false),
            seed: given.seed,
            logprobs: logprobs(given.logprobs, vocab_size)?,
            ignore_eos: given.ignore_eos.unwrap_or(false),
            min_new_tokens,
            timeout: given.timeout.map(timeout).transpose()?,
            on_overflow: given.on_overflow.unwrap_or_default(),
            skip_special_tokens: given.skip_special_tokens.unwrap_or(true),
            cache_salt: cache_salt(given.cache_salt.as_deref().unwrap_or_default())?,
            constraint: constraint(given)?,
            logits_processors: given.logits_processors.clone(),
        })
    }
}

fn constraint(given: &SamplingOptions) -> Result<Option<Constraint>> {
    let given = [
        given.json_schema.clone().map(Constraint::JsonSchema),
        given.regex.clone().map(Constraint::Regex),
        given.grammar.clone().map(Constraint::Grammar),
        given.choice.clone().map(Constraint::Choice),
    ];
    let mut given = given.into_iter().flatten();
    let first = given.next();
    if let (Some(first), Some(second)) = (&first, given.next()) {
        let reason = format!("cannot be combined with {}", second.name());
        return Err(Error::argument(first.name(), reason));
    }
    first.map(Constraint::check).transpose()
}

fn cache_salt(given: &str) -> Result<String> {
    if given.len() > MAX_SALT_BYTES {
        let (got, range) = (format!("{} bytes", given.len()), format!("at most {MAX_SALT_BYTES}"));
        return Err(out_of_range("cache_salt", got, &range, Source::Caller));
    }
    Ok(given.to_owned())
}

/// Where a value came from, so that an error does not blame the caller for a bad default.
#[derive(Clone, Copy)]
enum Source {
    Caller,
    GenerationConfig,
}

fn out_of_range(argument: &str, value: impl std::fmt::Display, range: &str, source: Source) -> Error {
    let place = match source {
        Source::Caller => "",
        Source::GenerationConfig => " from generation_config.json",
    };
    Error::argument(argument, format!("got {value}{place}, expected {range}"))
}

/// The caller's value if there is one, else the model's default, together with its source.
fn pick<T>(given: Option<T>, default: Option<impl Into<T>>) -> Option<(T, Source)> {
    given
        .map(|value| (value, Source::Caller))
        .or(default.map(|value| (value.into(), Source::GenerationConfig)))
}

fn count(argument: &str, given: Option<i64>, least: i64, range: &str) -> Result<Option<usize>> {
    given
        .map(|value| match usize::try_from(value) {
            Ok(count) if value >= least => Ok(count),
            _ => Err(out_of_range(argument, value, range, Source::Caller)),
        })
        .transpose()
}

fn temperature(given: &SamplingOptions, defaults: &GenerationConfig) -> Result<f32> {
    let default = match (defaults.do_sample, defaults.temperature) {
        (Some(false), _) | (None, None) => 0.0,
        (Some(true), None) => 1.0,
        (_, Some(temperature)) => temperature,
    };
    match pick(given.temperature, Some(default)) {
        // A temperature too small for float32 rounds to 0, which is its limit: greedy.
        Some((value, _)) if value >= 0.0 && value <= f64::from(f32::MAX) => Ok(value as f32),
        Some((value, source)) => {
            Err(out_of_range("temperature", value, "a finite number, at least 0", source))
        }
        None => Ok(0.0),
    }
}

fn top_k(given: Option<i64>, default: Option<i64>) -> Result<usize> {
    match pick(given, default) {
        None | Some((0 | -1, _)) => Ok(0),
        Some((value, source)) => usize::try_from(value)
            .map_err(|_| out_of_range("top_k", value, "at least 1, or 0 or -1 for off", source)),
    }
}

fn top_p(given: Option<f64>, default: Option<f32>) -> Result<f32> {
    match pick(given, default) {
        None | Some((-1.0, _)) => Ok(1.0),
        // Loading adds a note. From a caller it is an error: some peers keep one token at 0, others keep all.
        Some((0.0, Source::GenerationConfig)) => Ok(1.0),
        // A value too small for float32 must not round to 0.
        Some((value, _)) if value > 0.0 && value <= 1.0 => Ok((value as f32).max(f32::MIN_POSITIVE)),
        Some((value, source)) => {
            let range = "a number above 0, at most 1 (1 or -1 turns the filter off; temperature 0 is greedy)";
            Err(out_of_range("top_p", value, range, source))
        }
    }
}

fn min_p(given: Option<f64>, default: Option<f32>) -> Result<f32> {
    match pick(given, default) {
        None | Some((-1.0, _)) => Ok(0.0),
        Some((value, _)) if (0.0..=1.0).contains(&value) => Ok(value as f32),
        Some((value, source)) => {
            Err(out_of_range("min_p", value, "a number from 0 to 1 (0 or -1 turns the filter off)", source))
        }
    }
}

fn repetition_penalty(given: &SamplingOptions, defaults: &GenerationConfig) -> Result<f32> {
    match pick(given.repetition_penalty, defaults.repetition_penalty) {
        None => Ok(1.0),
        Some((value, source)) => {
            // Checked as float32 too, because the logits are divided by the float32 value.
            let rounded = value as f32;
            if value.is_finite() && rounded.is_finite() && rounded > 0.0 {
                Ok(rounded)
            } else {
                Err(out_of_range("repetition_penalty", value, "a finite number above 0 (1 is off)", source))
            }
        }
    }
}

fn additive_penalty(argument: &str, given: Option<f64>) -> Result<f32> {
    match given {
        None => Ok(0.0),
        Some(value) if (-MAX_PENALTY..=MAX_PENALTY).contains(&value) => Ok(value as f32),
        Some(value) => Err(out_of_range(argument, value, "a number in [-2, 2]", Source::Caller)),
    }
}

fn token_id(argument: &str, id: i64, vocab_size: usize) -> Result<u32> {
    u32::try_from(id)
        .ok()
        .filter(|&id| (id as usize) < vocab_size)
        .ok_or_else(|| out_of_range(argument, id, &format!("a token id below {vocab_size}"), Source::Caller))
}

fn logit_bias(given: &[(i64, f64)], vocab_size: usize) -> Result<Vec<(u32, f32)>> {
    given
        .iter()
        .map(|&(id, bias)| {
            let id = token_id("logit_bias", id, vocab_size)?;
            let rounded = bias as f32;
            if !rounded.is_finite() {
                let value = format!("{bias} for token {id}");
                return Err(out_of_range("logit_bias", value, "a finite number", Source::Caller));
            }
            Ok((id, rounded))
        })
        .collect()
}

fn stop(given: &[String]) -> Result<Vec<String>> {
    if given.iter().any(String::is_empty) {
        return Err(out_of_range("stop", "\"\"", "strings that are not empty", Source::Caller));
    }
    Ok(given.to_vec())
}

fn logprobs(given: Option<i64>, vocab_size: usize) -> Result<Option<usize>> {
    given
        .map(|value| {
            usize::try_from(value).ok().filter(|&count| count <= vocab_size).ok_or_else(|| {
                out_of_range("logprobs", value, &format!("a number in [0, {vocab_size}]"), Source::Caller)
            })
        })
        .transpose()
}

fn timeout(seconds: f64) -> Result<Duration> {
    if seconds > 0.0 && seconds <= MAX_TIMEOUT_SECONDS {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(out_of_range("timeout", seconds, "seconds in (0, 1e9]", Source::Caller))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB_SIZE: usize = 100;

    fn resolve(given: SamplingOptions) -> Result<SamplingParams> {
        SamplingParams::resolve(&given, &GenerationConfig::default(), VOCAB_SIZE)
    }

    fn refused(given: SamplingOptions) -> String {
        match resolve(given) {
            Err(Error::InvalidArgument { argument, reason }) => format!("{argument}: {reason}"),
            other => panic!("expected InvalidArgument, got {other:?}"),
        }
    }

    #[test]
    fn nothing_given_is_greedy_with_256_tokens() {
        let params = resolve(SamplingOptions::default()).unwrap();
        assert_eq!((params.temperature, params.max_new_tokens), (0.0, 256));
        assert_eq!((params.top_k, params.top_p, params.min_p), (0, 1.0, 0.0));
        assert_eq!(params.repetition_penalty, 1.0);
        assert_eq!((params.seed, params.logprobs, params.timeout), (None, None, None));
        assert_eq!(params.on_overflow, OnOverflow::Error);
    }

    #[test]
    fn the_generation_config_gives_defaults_and_the_caller_overrides_them() {
        let defaults = GenerationConfig {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_p: Some(0.9),
            top_k: Some(50),
            max_new_tokens: Some(7),
            repetition_penalty: Some(1.1),
            ..Default::default()
        };
        let given = SamplingOptions { top_p: Some(0.5), ..Default::default() };
        let params = SamplingParams::resolve(&given, &defaults, VOCAB_SIZE).unwrap();
        assert_eq!((params.temperature, params.top_k, params.top_p), (0.6, 50, 0.5));
        assert_eq!((params.max_new_tokens, params.repetition_penalty), (7, 1.1));
    }

    #[test]
    fn do_sample_decides_the_default_temperature() {
        let temperature = |do_sample, temperature| {
            let defaults = GenerationConfig { do_sample, temperature, ..Default::default() };
            let given = SamplingOptions { top_p: Some(0.9), ..Default::default() };
            SamplingParams::resolve(&given, &defaults, VOCAB_SIZE).unwrap().temperature
        };
        assert_eq!(temperature(Some(false), Some(0.7)), 0.0);
        assert_eq!(temperature(Some(true), None), 1.0);
        assert_eq!(temperature(None, None), 0.0);
        assert_eq!(temperature(None, Some(0.7)), 0.7);
    }

    #[test]
    fn zero_and_minus_one_turn_filters_off() {
        for off in [0.0, -1.0] {
            let params = resolve(SamplingOptions {
                top_k: Some(off as i64),
                top_p: Some(-1.0),
                min_p: Some(off),
                ..Default::default()
            })
            .unwrap();
            assert_eq!((params.top_k, params.top_p, params.min_p), (0, 1.0, 0.0));
        }
    }

    #[test]
    fn values_out_of_range_are_named() {
        let none = SamplingOptions::default;
        let cases: Vec<(SamplingOptions, &str)> = vec![
            (
                SamplingOptions { max_new_tokens: Some(0), ..none() },
                "max_new_tokens: got 0, expected at least 1",
            ),
            (SamplingOptions { max_new_tokens: Some(-2), ..none() }, "max_new_tokens: got -2"),
            (SamplingOptions { min_new_tokens: Some(300), ..none() }, "min_new_tokens: got 300"),
            (SamplingOptions { temperature: Some(-0.5), ..none() }, "temperature: got -0.5"),
            (SamplingOptions { temperature: Some(f64::NAN), ..none() }, "temperature: got NaN"),
            (SamplingOptions { temperature: Some(f64::INFINITY), ..none() }, "temperature: got inf"),
            (SamplingOptions { top_k: Some(-2), ..none() }, "top_k: got -2"),
            (SamplingOptions { top_p: Some(1.5), ..none() }, "top_p: got 1.5"),
            (SamplingOptions { top_p: Some(f64::NAN), ..none() }, "top_p: got NaN"),
            (SamplingOptions { top_p: Some(0.0), ..none() }, "top_p: got 0, expected a number above 0"),
            (SamplingOptions { min_p: Some(f64::NAN), ..none() }, "min_p: got NaN"),
            (SamplingOptions { min_p: Some(-0.1), ..none() }, "min_p: got -0.1"),
            (SamplingOptions { repetition_penalty: Some(0.0), ..none() }, "repetition_penalty: got 0"),
            (
                SamplingOptions { repetition_penalty: Some(f64::INFINITY), ..none() },
                "repetition_penalty: got inf",
            ),
            (SamplingOptions { presence_penalty: Some(2.5), ..none() }, "presence_penalty: got 2.5"),
            (SamplingOptions { frequency_penalty: Some(-3.0), ..none() }, "frequency_penalty: got -3"),
            (SamplingOptions { logit_bias: Some(vec![(100, 1.0)]), ..none() }, "logit_bias: got 100"),
            (
                SamplingOptions { logit_bias: Some(vec![(1, f64::NAN)]), ..none() },
                "logit_bias: got NaN for token 1",
            ),
            (SamplingOptions { stop: Some(vec![String::new()]), ..none() }, "stop: got \"\""),
            (SamplingOptions { stop_token_ids: Some(vec![-1]), ..none() }, "stop_token_ids: got -1"),
            (
                SamplingOptions { logprobs: Some(101), ..none() },
                "logprobs: got 101, expected a number in [0, 100]",
            ),
            (SamplingOptions { timeout: Some(0.0), ..none() }, "timeout: got 0"),
            (SamplingOptions { timeout: Some(f64::NAN), ..none() }, "timeout: got NaN"),
        ];
        for (given, expected) in cases {
            let message = refused(given);
            assert!(message.starts_with(expected), "{message}");
        }
        assert!(OnOverflow::parse("drop").is_err());
        assert_eq!(OnOverflow::parse("truncate_left").unwrap(), OnOverflow::TruncateLeft);
    }

    #[test]
    fn minus_one_new_tokens_are_those_to_the_end_of_the_context() {
        let given = SamplingOptions { max_new_tokens: Some(-1), ..Default::default() };
        assert!(given.check().is_ok());
        let defaults = GenerationConfig { max_new_tokens: Some(7), ..Default::default() };
        let params = SamplingParams::resolve(&given, &defaults, VOCAB_SIZE).unwrap();
        assert_eq!(params.max_new_tokens, usize::MAX);
    }

    #[test]
    fn a_generation_config_with_top_p_0_keeps_all_tokens() {
        let defaults = GenerationConfig { top_p: Some(0.0), ..Default::default() };
        let params = SamplingParams::resolve(&SamplingOptions::default(), &defaults, VOCAB_SIZE).unwrap();
        assert_eq!(params.top_p, 1.0);
    }

    #[test]
    fn options_are_checked_without_a_model() {
        let none = SamplingOptions::default;
        assert!(none().check().is_ok());
        // A model's generation config may allow this many tokens.
        assert!(SamplingOptions { min_new_tokens: Some(300), ..none() }.check().is_ok());
        // A model's vocabulary may be this large.
        assert!(SamplingOptions { stop_token_ids: Some(vec![200_000]), ..none() }.check().is_ok());
        let bad = [
            SamplingOptions { min_new_tokens: Some(3), max_new_tokens: Some(2), ..none() },
            SamplingOptions { temperature: Some(-1.0), ..none() },
            SamplingOptions { logit_bias: Some(vec![(1, f64::NEG_INFINITY)]), ..none() },
            SamplingOptions { stop_token_ids: Some(vec![-1]), ..none() },
        ];
        for given in bad {
            assert!(matches!(given.check(), Err(Error::InvalidArgument { .. })), "{given:?}");
        }
    }

    #[test]
    fn a_bad_generation_config_is_named_and_can_be_overridden() {
        let defaults = GenerationConfig { do_sample: Some(true), top_p: Some(7.0), ..Default::default() };
        let error = SamplingParams::resolve(&SamplingOptions::default(), &defaults, VOCAB_SIZE).unwrap_err();
        assert!(error.to_string().contains("generation_config.json"), "{error}");
        let given = SamplingOptions { top_p: Some(0.9), ..Default::default() };
        assert!(SamplingParams::resolve(&given, &defaults, VOCAB_SIZE).is_ok());
    }

    #[test]
    fn tiny_values_keep_their_meaning_in_float32() {
        let params =
            resolve(SamplingOptions { top_p: Some(1e-60), temperature: Some(1e-60), ..Default::default() })
                .unwrap();
        assert!(params.top_p > 0.0, "a tiny top_p keeps one token and does not turn the filter off");
        assert_eq!(params.temperature, 0.0);
    }
}
