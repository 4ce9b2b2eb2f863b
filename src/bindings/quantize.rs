//! `_core.quantize`.

use super::detach::detach_engine;
use super::llama::{messages, storage};
use crate::llama::{self, QuantizeOptions};
use crate::sys::sync::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;

/// Writes a checkpoint as a GGUF file; releases the GIL. `progress` is called with the number of elements
/// done and the total. An exception that it raises ends the work.
#[pyfunction]
#[pyo3(signature = (source, destination, *, dtype, force, allow_requantize, tokenizer, threads, progress))]
#[allow(clippy::too_many_arguments)] // Python passes them as keywords.
pub(super) fn quantize(
    py: Python<'_>,
    source: PathBuf,
    destination: PathBuf,
    dtype: String,
    force: bool,
    allow_requantize: bool,
    tokenizer: bool,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'_, PyDict>> {
    let options = QuantizeOptions { dtype, force, allow_requantize, tokenizer, threads };
    let raised = Mutex::new(None);
    let mut report_progress = |done: u64, total: u64| match &progress {
        None => true,
        Some(progress) => match Python::attach(|py| progress.call1(py, (done, total))) {
            Ok(_) => true,
            Err(error) => {
                *raised.lock() = Some(error);
                false
            }
        },
    };
    let result = detach_engine(py, |cancel| {
        llama::quantize(&source, &destination, &options, &mut report_progress, cancel)
    });
    if let Some(error) = raised.into_inner() {
        return Err(error);
    }
    let report = result?;
    let dict = PyDict::new(py);
    dict.set_item("path", destination.as_os_str())?;
    dict.set_item("bytes", report.bytes)?;
    dict.set_item("seconds", report.elapsed.as_secs_f64())?;
    dict.set_item("tensors", storage(py, &report.tensors)?)?;
    dict.set_item("warnings", messages(&report.warnings))?;
    dict.set_item("notes", messages(&report.notes))?;
    Ok(dict)
}
