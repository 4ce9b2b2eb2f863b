//! `_core.inspect`, `_core.estimate_memory`, `_core.check_sampling` and `_core.doctor`.

use super::convert;
use super::detach::detach_engine;
use super::error::to_python;
use super::llama::{config_json, head_name, messages, storage};
use crate::checkpoint::Format;
use crate::error::printable;
use crate::kernels::Isa;
use crate::llama::LoadOptions;
use crate::{device, llama, sys};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;

/// Describes a checkpoint without loading its weights.
#[pyfunction]
pub(super) fn inspect(py: Python<'_>, path: PathBuf) -> PyResult<Bound<'_, PyDict>> {
    let found = detach_engine(py, |_| llama::inspect(&path))?;
    let dict = PyDict::new(py);
    dict.set_item("path", path.as_os_str())?;
    let format = match found.format {
        Format::Safetensors => "safetensors",
        Format::Gguf => "gguf",
    };
    dict.set_item("format", format)?;
    dict.set_item("config", convert::from_json(py, &config_json(&found.config))?)?;
    dict.set_item("parameters", found.parameters)?;
    dict.set_item("tensors", storage(py, &found.tensors)?)?;
    dict.set_item("lm_head", head_name(found.head.lm_head))?;
    dict.set_item("lm_head_reason", printable(&found.head.reason))?;
    let mut warnings: Vec<String> = found.head.warning.into_iter().chain(found.config.warnings).collect();
    let tokenizer = match &found.tokenizer {
        Ok(tokenizer) => {
            warnings.extend(tokenizer.warnings().iter().cloned());
            let fields = PyDict::new(py);
            fields.set_item("kind", tokenizer.kind())?;
            fields.set_item("vocab_size", tokenizer.vocab_size())?;
            fields.set_item("bos_token_id", tokenizer.bos_token_id())?;
            fields.set_item("eos_token_id", tokenizer.eos_token_id())?;
            fields.set_item("chat_template", tokenizer.chat_template().is_some())?;
            Some(fields)
        }
        Err(error) => {
            warnings.push(format!("no tokenizer: {error}"));
            None
        }
    };
    dict.set_item("warnings", messages(&warnings))?;
    dict.set_item("notes", messages(&found.notes))?;
    dict.set_item("tokenizer", tokenizer)?;
    Ok(dict)
}

/// Estimates the memory that a model needs, before it is loaded.
#[pyfunction]
pub(super) fn estimate_memory(
    py: Python<'_>,
    path: PathBuf,
    options: LoadOptions,
) -> PyResult<Bound<'_, PyDict>> {
    let estimate = detach_engine(py, |_| llama::estimate_memory(&path, &options))?;
    convert::memory_estimate(py, &estimate)
}

/// Refuses sampling parameters that are invalid for every model.
#[pyfunction]
pub(super) fn check_sampling(given: &Bound<'_, PyDict>) -> PyResult<()> {
    let options = convert::sampling_options(given)?;
    options.check().map_err(|error| to_python(given.py(), error))
}

/// Describes this build and this machine.
#[pyfunction]
pub(super) fn doctor(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("version", env!("CARGO_PKG_VERSION"))?;
    dict.set_item("cpu", sys::cpu_name())?;
    // A forced ISA that is not available is no failure here, because doctor is there to report it.
    dict.set_item("isa", Isa::detect().map_or_else(str::to_owned, |isa| isa.name().to_owned()))?;
    dict.set_item("isa_available", Isa::available().map(Isa::name).collect::<Vec<_>>())?;
    dict.set_item("cores", sys::usable_cores())?;
    dict.set_item("quota", sys::cpu_quota())?;
    dict.set_item("threads", sys::default_threads())?;
    let memory = sys::memory();
    dict.set_item("memory_total", memory.map(|memory| memory.total))?;
    dict.set_item("memory_available", memory.map(|memory| memory.available))?;
    dict.set_item("features", device::features())?;
    dict.set_item("devices", py.detach(device::available))?;
    Ok(dict)
}
