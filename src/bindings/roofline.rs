//! `_core.roofline_peaks`.

use super::detach::detach_engine;
use crate::llama;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Measures the machine's peak rates of reading memory and of computing; releases the GIL.
#[pyfunction]
#[pyo3(signature = (*, threads, buffer_bytes))]
pub(super) fn roofline_peaks(
    py: Python<'_>,
    threads: Option<usize>,
    buffer_bytes: usize,
) -> PyResult<Bound<'_, PyDict>> {
    let (isa, peaks) = detach_engine(py, |cancel| llama::roofline_peaks(threads, buffer_bytes, cancel))?;
    let dict = PyDict::new(py);
    dict.set_item("isa", isa.name())?;
    dict.set_item("read_bytes_per_second", peaks.read_bytes_per_second)?;
    dict.set_item("int8_operations_per_second", peaks.int8_operations_per_second)?;
    dict.set_item("bf16_operations_per_second", peaks.bf16_operations_per_second)?;
    dict.set_item("f32_operations_per_second", peaks.f32_operations_per_second)?;
    Ok(dict)
}
