//! `_core.Llama`.

use super::convert::{self, Text, TokenIds};
use super::detach::{PyCancellation, detach_engine, detach_until, guarded, stop_of};
use super::error::to_python;
use super::stream::{PyRequest, PyStream};
use super::tokenizer::PyTokenizer;
use crate::checkpoint::tied::LmHead;
use crate::config::LlamaConfig;
use crate::error::printable;
use crate::llama::{Llama, LoadOptions, Prompt};
use crate::model::Storage;
use crate::sys::sync::Mutex;
use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The shortest time between two reports of progress.
const REPORT_EVERY: Duration = Duration::from_millis(100);

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

impl Drop for PyLlama {
    /// Waits for the engine's thread without the GIL, which a logits processor may need to end.
    fn drop(&mut self) {
        Python::try_attach(|py| py.detach(|| self.0.close()));
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

    /// Continues several prompts together; releases the GIL. `options` has a dict for each prompt. The result
    /// has an exception in the place of a prompt that failed; with `all_or_none`, a bad prompt or option
    /// raises before any prompt runs. `progress` is called with the number of results.
    fn generate_all<'py>(
        &self,
        py: Python<'py>,
        prompts: Vec<PyPrompt>,
        options: Vec<Bound<'py, PyDict>>,
        all_or_none: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let options = options.iter().map(convert::sampling_options).collect::<PyResult<Vec<_>>>()?;
        let prompts: Vec<_> = prompts.into_iter().map(Into::into).zip(options).collect();
        let (reported, raised) = (Mutex::new((0, Instant::now())), Mutex::new(None));
        let is_stopped = AtomicBool::new(false);
        let report = |count: usize| {
            let Some(progress) = &progress else { return };
            let mut reported = reported.lock();
            if count <= reported.0 || reported.1.elapsed() < REPORT_EVERY {
                return;
            }
            *reported = (count, Instant::now());
            if let Err(error) = Python::attach(|py| progress.call1(py, (count,))) {
                is_stopped.store(true, Ordering::Relaxed);
                raised.lock().get_or_insert(error);
            }
        };
        let results = detach_until(py, &is_stopped, |cancel| {
            self.0.generate_all(prompts, all_or_none, cancel, &report)
        });
        if let Some(error) = raised.into_inner() {
            return Err(error);
        }
        let item = |result| match result {
            Ok(one) => guarded(py, || Ok(convert::completion(py, &one)?.into_any())),
            Err(error) => Ok(to_python(py, error).into_value(py).into_bound(py).into_any()),
        };
        results?.into_iter().map(item).collect()
    }

    /// Tokenises and checks a prompt; releases the GIL.
    fn request(
        &self,
        py: Python<'_>,
        prompt: PyPrompt,
        options: &Bound<'_, PyDict>,
        is_chat: bool,
    ) -> PyResult<PyRequest> {
        let options = convert::sampling_options(options)?;
        let prompt = prompt.prompt(is_chat);
        detach_engine(py, |cancel| self.0.request(prompt, &options, cancel)).map(PyRequest::new)
    }

    /// Continues a prompt, chunk by chunk. A request can be used once.
    fn start(&self, py: Python<'_>, request: &PyRequest) -> PyResult<PyStream> {
        let request = request.take();
        detach_engine(py, |_| self.0.start(request?)).map(PyStream::new)
    }

    /// What the engine does and has done.
    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let metrics = self.0.metrics().map_err(|error| to_python(py, error))?;
        convert::metrics(py, &metrics)
    }

    /// The log-probabilities of a text's tokens; releases the GIL.
    #[pyo3(signature = (text, cancellation=None))]
    fn score<'py>(
        &self,
        py: Python<'py>,
        text: PyPrompt,
        cancellation: Option<&PyCancellation>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let is_stopped = stop_of(cancellation);
        let score = detach_until(py, is_stopped, |cancel| self.0.score(text.into(), cancel))?;
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
    #[pyo3(signature = (token_ids, last, cancellation=None))]
    fn logits<'py>(
        &self,
        py: Python<'py>,
        token_ids: TokenIds,
        last: Option<usize>,
        cancellation: Option<&PyCancellation>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let is_stopped = stop_of(cancellation);
        let logits = detach_until(py, is_stopped, |cancel| self.0.logits(&token_ids.0, last, cancel))?;
        let shape = [logits.rows(), logits.vocab_size];
        guarded(py, || PyArray1::from_vec(py, logits.values).reshape(shape))
    }

    /// Warnings about prompts that were used since the last call.
    fn take_warnings(&self) -> Vec<String> {
        self.0.take_warnings()
    }

    /// Ends all work, then frees the weights.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        detach_engine(py, |_| {
            self.0.close();
            Ok(())
        })
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
