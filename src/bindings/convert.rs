//! Converts JSON values and our records to Python's, and back.

use super::error::to_python;
use super::processor::logits_processor;
use crate::engine::{Finish, Metrics, Stats, StopReason};
use crate::llama::{Chunk, Completion, LogLikelihood, MemoryEstimate, Score};
use crate::sampling::{OnOverflow, SamplingOptions, TokenLogprob};
use crate::sys::reserve;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyList, PyString};
use serde_json::Value;

/// A text of any length from the caller.
pub(super) struct Text(pub(super) String);

/// Token ids of any number from the caller.
pub(super) struct TokenIds(pub(super) Vec<u32>);

impl<'a, 'py> FromPyObject<'a, 'py> for Text {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let text = value.cast::<PyString>()?;
        let text = text.to_str()?;
        let held = reserve::hold("a copy of the text", text.len());
        let _held = held.map_err(|error| to_python(value.py(), error))?;
        Ok(Text(text.to_owned()))
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for TokenIds {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let bytes = value.len()?.saturating_mul(size_of::<u32>());
        let held = reserve::hold("a copy of the token ids", bytes);
        let _held = held.map_err(|error| to_python(value.py(), error))?;
        Ok(TokenIds(value.extract()?))
    }
}

/// Converts JSON to Python values.
pub(super) fn from_json<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Null => py.None().into_bound(py),
        Value::Bool(value) => PyBool::new(py, *value).to_owned().into_any(),
        Value::String(value) => PyString::new(py, value).into_any(),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(value), _, _) => value.into_pyobject(py)?.into_any(),
            (_, Some(value), _) => value.into_pyobject(py)?.into_any(),
            (_, _, value) => PyFloat::new(py, value.unwrap_or(f64::NAN)).into_any(),
        },
        Value::Array(items) => {
            let items = items.iter().map(|item| from_json(py, item)).collect::<PyResult<Vec<_>>>()?;
            PyList::new(py, items)?.into_any()
        }
        Value::Object(map) => {
            let dict = PyDict::new(py);
            for (key, value) in map {
                dict.set_item(key, from_json(py, value)?)?;
            }
            dict.into_any()
        }
    })
}

/// Extracts the sampling parameters that a caller gave. A parameter that is None was not given.
pub(super) fn sampling_options(given: &Bound<'_, PyDict>) -> PyResult<SamplingOptions> {
    let mut options = SamplingOptions::default();
    for (name, value) in given.iter().filter(|(_, value)| !value.is_none()) {
        let name: String = name.extract()?;
        match name.as_str() {
            "max_new_tokens" => options.max_new_tokens = Some(value.extract()?),
            "temperature" => options.temperature = Some(value.extract()?),
            "top_k" => options.top_k = Some(value.extract()?),
            "top_p" => options.top_p = Some(value.extract()?),
            "min_p" => options.min_p = Some(value.extract()?),
            "repetition_penalty" => options.repetition_penalty = Some(value.extract()?),
            "presence_penalty" => options.presence_penalty = Some(value.extract()?),
            "frequency_penalty" => options.frequency_penalty = Some(value.extract()?),
            "logit_bias" => {
                let bias = value.cast::<PyDict>()?.iter();
                let pairs = bias.map(|(id, bias)| Ok((id.extract()?, bias.extract()?)));
                options.logit_bias = Some(pairs.collect::<PyResult<_>>()?);
            }
            "stop" => options.stop = Some(value.extract()?),
            "stop_token_ids" => options.stop_token_ids = Some(value.extract()?),
            "include_stop_str" => options.include_stop_str = Some(value.extract()?),
            "seed" => options.seed = Some(value.extract()?),
            "logprobs" => options.logprobs = Some(value.extract()?),
            "ignore_eos" => options.ignore_eos = Some(value.extract()?),
            "min_new_tokens" => options.min_new_tokens = Some(value.extract()?),
            "timeout" => options.timeout = Some(value.extract()?),
            "on_overflow" => {
                let name: String = value.extract()?;
                let parsed = OnOverflow::parse(&name);
                let py = value.py();
                options.on_overflow = Some(parsed.map_err(|error| to_python(py, error))?);
            }
            "cache_salt" => options.cache_salt = Some(value.extract()?),
            "json_schema" => options.json_schema = Some(value.extract()?),
            "regex" => options.regex = Some(value.extract()?),
            "grammar" => options.grammar = Some(value.extract()?),
            "choice" => options.choice = Some(value.extract()?),
            "logits_processors" => {
                let functions: Vec<Py<PyAny>> = value.extract()?;
                options.logits_processors = functions.into_iter().map(logits_processor).collect();
            }
            "skip_special_tokens" => options.skip_special_tokens = Some(value.extract()?),
            other => return Err(PyTypeError::new_err(format!("unknown sampling parameter {other:?}"))),
        }
    }
    Ok(options)
}

/// The keyword arguments of `types.Completion`.
pub(super) fn completion<'py>(py: Python<'py>, completion: &Completion) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("text", &completion.text)?;
    dict.set_item("token_ids", &completion.token_ids)?;
    set_finish(&dict, Some(&completion.finish))?;
    dict.set_item("prompt_tokens", completion.stats.prompt_tokens)?;
    dict.set_item("logprobs", logprobs(py, completion.logprobs.as_deref())?)?;
    dict.set_item("stats", stats(py, &completion.stats)?)?;
    Ok(dict)
}

/// The keyword arguments of `types.Chunk`.
pub(super) fn chunk<'py>(py: Python<'py>, chunk: &Chunk) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("text", &chunk.text)?;
    dict.set_item("token_ids", &chunk.token_ids)?;
    set_finish(&dict, chunk.finish.as_ref())?;
    dict.set_item("logprobs", logprobs(py, chunk.logprobs.as_deref())?)?;
    dict.set_item("stats", chunk.stats.as_ref().map(|value| stats(py, value)).transpose()?)?;
    Ok(dict)
}

/// The keyword arguments of `types.Score`.
pub(super) fn score<'py>(py: Python<'py>, score: &Score) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    // The first token has no log-probability, because nothing comes before it.
    let logprobs: Vec<Option<f32>> =
        [None].into_iter().chain(score.logprobs.iter().copied().map(Some)).collect();
    dict.set_item("logprobs", logprobs)?;
    dict.set_item("perplexity", score.perplexity())?;
    dict.set_item("token_ids", &score.token_ids)?;
    Ok(dict)
}

/// The keyword arguments of `types.LogLikelihood`.
pub(super) fn loglikelihood<'py>(py: Python<'py>, found: &LogLikelihood) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("sum", found.sum())?;
    dict.set_item("is_greedy", found.is_greedy)?;
    dict.set_item("logprobs", &found.logprobs)?;
    dict.set_item("token_ids", &found.token_ids)?;
    Ok(dict)
}

/// The keyword arguments of `types.MemoryEstimate`.
pub(super) fn memory_estimate<'py>(
    py: Python<'py>,
    estimate: &MemoryEstimate,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("weights", estimate.weights)?;
    dict.set_item("kv_cache", estimate.kv_cache)?;
    dict.set_item("scratch", estimate.scratch)?;
    dict.set_item("total", estimate.total())?;
    dict.set_item("context_length", estimate.context_length)?;
    dict.set_item("engine", estimate.engine)?;
    Ok(dict)
}

/// The keyword arguments of `types.Metrics`.
pub(super) fn metrics<'py>(py: Python<'py>, metrics: &Metrics) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("running", metrics.running)?;
    dict.set_item("waiting", metrics.waiting)?;
    dict.set_item("blocks_used", metrics.blocks_used)?;
    dict.set_item("blocks_free", metrics.blocks_free)?;
    dict.set_item("blocks_cached", metrics.blocks_cached)?;
    dict.set_item("prefix_hits", metrics.prefix_hits)?;
    dict.set_item("tokens_in", metrics.tokens_in)?;
    dict.set_item("tokens_cached", metrics.tokens_cached)?;
    dict.set_item("tokens_out", metrics.tokens_out)?;
    dict.set_item("ended", metrics.ended)?;
    dict.set_item("preemptions", metrics.preemptions)?;
    dict.set_item("busy_seconds", metrics.busy.as_secs_f64())?;
    Ok(dict)
}

fn set_finish(dict: &Bound<'_, PyDict>, finish: Option<&Finish>) -> PyResult<()> {
    dict.set_item("finish_reason", finish.map(|finish| finish.reason.name()))?;
    match finish.and_then(|finish| finish.stop.as_ref()) {
        Some(StopReason::Token(id)) => dict.set_item("stop_reason", id),
        Some(StopReason::String(stop)) => dict.set_item("stop_reason", stop),
        None => dict.set_item("stop_reason", dict.py().None()),
    }
}

fn logprobs<'py>(
    py: Python<'py>,
    tokens: Option<&[TokenLogprob]>,
) -> PyResult<Option<Vec<Bound<'py, PyDict>>>> {
    let entry = |token: &TokenLogprob| {
        let dict = PyDict::new(py);
        dict.set_item("token_id", token.token_id)?;
        dict.set_item("logprob", token.logprob)?;
        dict.set_item("top", &token.top)?;
        Ok(dict)
    };
    tokens.map(|tokens| tokens.iter().map(entry).collect()).transpose()
}

/// The keyword arguments of `types.Stats`.
fn stats<'py>(py: Python<'py>, stats: &Stats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("prompt_tokens", stats.prompt_tokens)?;
    dict.set_item("cached_tokens", stats.cached_tokens)?;
    dict.set_item("completion_tokens", stats.completion_tokens)?;
    dict.set_item("time_to_first_token", stats.time_to_first_token.map(|time| time.as_secs_f64()))?;
    dict.set_item("prefill_seconds", stats.prefill.as_secs_f64())?;
    dict.set_item("decode_seconds", stats.decode.as_secs_f64())?;
    dict.set_item("prefill_tokens_per_second", stats.prefill_tokens_per_second())?;
    dict.set_item("decode_tokens_per_second", stats.decode_tokens_per_second())?;
    Ok(dict)
}
