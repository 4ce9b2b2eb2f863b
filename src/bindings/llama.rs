//! `_core.Llama` and `_core.Stream`.

use super::convert::{self, Text, TokenIds};
use super::detach::{detach_engine, guarded};
use super::tokenizer::PyTokenizer;
use crate::checkpoint::tied::LmHead;
use crate::config::LlamaConfig;
use crate::error::{Error, printable};
use crate::llama::{Llama, LoadOptions, Prompt, TextStream};
use crate::model::{Cancel, Storage};
use crate::sys::Process;
use numpy::{PyArray1, PyArray2, PyArrayMethods};
use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long a thread waits for a stream that another thread is stepping, before it checks its signals again.
const LOCK_SLICE: Duration = Duration::from_millis(10);

/// A loaded model.
#[pyclass(frozen, name = "Llama", module = "candle_llama._core")]
pub(super) struct PyLlama(Llama);

enum PyPrompt {
    Text(Text),
    TokenIds(TokenIds),
}

impl<'a, 'py> FromPyObject<'a, 'py> for PyPrompt {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if value.is_instance_of::<PyString>() {
            value.extract().map(PyPrompt::Text)
        } else {
            value.extract().map(PyPrompt::TokenIds)
        }
    }
}

impl PyPrompt {
    fn prompt(self, is_chat: bool) -> Prompt {
        match self {
            PyPrompt::TokenIds(TokenIds(ids)) if is_chat => Prompt::Conversation(ids),
            prompt => prompt.into(),
        }
    }
}

impl From<PyPrompt> for Prompt {
    fn from(prompt: PyPrompt) -> Self {
        match prompt {
            PyPrompt::Text(Text(text)) => Prompt::Text(text),
            PyPrompt::TokenIds(TokenIds(ids)) => Prompt::TokenIds(ids),
        }
    }
}

#[pymethods]
impl PyLlama {
    #[new]
    fn new(py: Python<'_>, path: PathBuf, options: LoadOptions) -> PyResult<Self> {
        detach_engine(py, |cancel| Llama::load(&path, &options, cancel)).map(PyLlama)
    }

    /// The config: the keys of config.json and the values derived from them.
    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let mut config = config_json(self.0.config());
        if let Value::Object(fields) = &mut config {
            fields.insert("context_length".into(), json!(self.0.context_length()));
            fields.insert("eos_token_ids".into(), json!(self.0.eos_token_ids()));
        }
        convert::from_json(py, &config)
    }

    /// What was loaded, and how.
    #[getter]
    fn load_report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let report = self.0.load_report();
        let dict = PyDict::new(py);
        dict.set_item("engine", report.engine)?;
        dict.set_item("device", &report.device)?;
        dict.set_item("compute", report.compute)?;
        dict.set_item("kv_dtype", report.kv_dtype)?;
        dict.set_item("isa", report.isa)?;
        dict.set_item("threads", report.threads)?;
        dict.set_item("lm_head", head_name(report.lm_head))?;
        dict.set_item("lm_head_reason", printable(&report.lm_head_reason))?;
        dict.set_item("storage", storage(py, &report.storage)?)?;
        dict.set_item("warnings", messages(&report.warnings))?;
        dict.set_item("notes", messages(&report.notes))?;
        dict.set_item("seconds", report.elapsed.as_secs_f64())?;
        dict.set_item("bytes", report.bytes)?;
        Ok(dict)
    }

    /// The tokenizer.
    #[getter]
    fn tokenizer(&self, py: Python<'_>) -> PyResult<PyTokenizer> {
        detach_engine(py, |_| self.0.tokenizer()).map(PyTokenizer)
    }

    /// Continues a prompt; releases the GIL.
    fn generate<'py>(
        &self,
        py: Python<'py>,
        prompt: PyPrompt,
        options: &Bound<'py, PyDict>,
        is_chat: bool,
    ) -> PyResult<Bound<'py, PyDict>> {
        let options = convert::sampling_options(options)?;
        let prompt = prompt.prompt(is_chat);
        let completion = detach_engine(py, |cancel| self.0.generate(prompt, &options, cancel))?;
        guarded(py, || convert::completion(py, &completion))
    }

    /// Continues several prompts together; releases the GIL.
    fn generate_all<'py>(
        &self,
        py: Python<'py>,
        prompts: Vec<PyPrompt>,
        options: &Bound<'py, PyDict>,
    ) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let options = convert::sampling_options(options)?;
        let prompts: Vec<_> = prompts.into_iter().map(Into::into).collect();
        let completions = detach_engine(py, |cancel| self.0.generate_all(prompts, &options, cancel))?;
        guarded(py, || completions.iter().map(|one| convert::completion(py, one)).collect())
    }

    /// Continues a prompt, chunk by chunk.
    fn stream(
        &self,
        py: Python<'_>,
        prompt: PyPrompt,
        options: &Bound<'_, PyDict>,
        is_chat: bool,
    ) -> PyResult<PyStream> {
        let options = convert::sampling_options(options)?;
        let prompt = prompt.prompt(is_chat);
        let stream = detach_engine(py, |cancel| self.0.stream_unless_cancelled(prompt, &options, cancel))?;
        Ok(PyStream {
            process: Process::current(),
            stream: Mutex::new(Some(stream)),
            is_closed: AtomicBool::new(false),
        })
    }

    /// The log-probabilities of a text's tokens; releases the GIL.
    fn score<'py>(&self, py: Python<'py>, text: PyPrompt) -> PyResult<Bound<'py, PyDict>> {
        let score = detach_engine(py, |cancel| self.0.score(text.into(), cancel))?;
        guarded(py, || convert::score(py, &score))
    }

    /// The log-probabilities of a continuation's tokens; releases the GIL.
    fn loglikelihood<'py>(
        &self,
        py: Python<'py>,
        context: PyPrompt,
        continuation: PyPrompt,
    ) -> PyResult<Bound<'py, PyDict>> {
        let found =
            detach_engine(py, |cancel| self.0.loglikelihood(context.into(), continuation.into(), cancel))?;
        guarded(py, || convert::loglikelihood(py, &found))
    }

    /// The logits of the last `last` rows, or of all, `(rows, vocab_size)`; releases the GIL.
    #[pyo3(signature = (token_ids, last))]
    fn logits<'py>(
        &self,
        py: Python<'py>,
        token_ids: TokenIds,
        last: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let logits = detach_engine(py, |cancel| self.0.logits(&token_ids.0, last, cancel))?;
        let shape = [logits.rows(), logits.vocab_size];
        guarded(py, || PyArray1::from_vec(py, logits.values).reshape(shape))
    }

    /// Warnings about prompts that were used since the last call.
    fn take_warnings(&self) -> Vec<String> {
        self.0.take_warnings()
    }

    /// Waits for the running step, then frees the weights.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        detach_engine(py, |_| {
            self.0.close();
            Ok(())
        })
    }
}

/// The chunks of a completion.
#[pyclass(frozen, name = "Stream", module = "candle_llama._core")]
pub(super) struct PyStream {
    process: Process,
    /// None once closed.
    stream: Mutex<Option<TextStream>>,
    /// Set by `close`, also while another thread is stepping the stream.
    is_closed: AtomicBool,
}

#[pymethods]
impl PyStream {
    fn __iter__(stream: PyRef<'_, Self>) -> PyRef<'_, Self> {
        stream
    }

    /// The next chunk; releases the GIL.
    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let chunk = detach_engine(py, |cancel| {
            loop {
                // The lock may have been held when this process was forked.
                if !self.process.is_current() {
                    return Err(Error::Forked);
                }
                if cancel.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                if let Some(mut stream) = self.stream.try_lock_for(LOCK_SLICE) {
                    let is_stopped = || self.is_closed.load(Ordering::Relaxed) || cancel.is_cancelled();
                    let stop = AtomicBool::new(self.is_closed.load(Ordering::Relaxed));
                    let stop = Cancel::with_poll(&stop, &is_stopped);
                    let Some(open) = stream.as_mut() else { return Ok(None) };
                    let chunk = open.next_chunk(&stop);
                    if self.is_closed.load(Ordering::Relaxed) {
                        // Closed during the step. The stream has ended, so the cancelled step has no chunk.
                        *stream = None;
                        return Ok(None);
                    }
                    return chunk;
                }
            }
        })?;
        guarded(py, || chunk.map(|chunk| convert::chunk(py, &chunk)).transpose())
    }

    /// Cancels the running step and ends the stream.
    fn close(&self, py: Python<'_>) {
        self.is_closed.store(true, Ordering::Relaxed);
        if self.process.is_current() {
            py.detach(|| drop(self.stream.lock().take()));
        }
    }
}

/// Messages for people.
pub(super) fn messages(messages: &[String]) -> Vec<String> {
    messages.iter().map(|message| printable(message)).collect()
}

pub(super) fn head_name(lm_head: LmHead) -> &'static str {
    match lm_head {
        LmHead::Separate => "separate",
        LmHead::Tied => "tied",
    }
}

/// `{type: {"count", "bytes"}}`
pub(super) fn storage<'py>(py: Python<'py>, types: &[Storage]) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for Storage { dtype, count, bytes } in types {
        let entry = PyDict::new(py);
        entry.set_item("count", count)?;
        entry.set_item("bytes", bytes)?;
        dict.set_item(dtype, entry)?;
    }
    Ok(dict)
}

/// The keys of config.json as they are in the file, and the values derived from them.
pub(super) fn config_json(config: &LlamaConfig) -> Value {
    let mut rope = json!(config.rope.scaling);
    rope["rope_theta"] = config.rope.theta.into();
    if let Some(factors) = &config.rope.freq_factors {
        rope["rope_freqs"] = json!(factors);
    }
    let mut fields = config.raw.clone();
    let derived = json!({
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.hidden_act.name(),
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope.theta,
        "rope_parameters": rope,
    });
    if let Value::Object(derived) = derived {
        fields.extend(derived);
    }
    Value::Object(fields)
}
