//! Calls logits processors: Python functions that change logits.

use super::detach::guarded;
use crate::error::{Error, Result};
use crate::sampling::{LogitsProcessor, SharedProcessor};
use numpy::{PyArray1, PyArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::Arc;

/// A Python function `f(token_ids, logits)`.
struct PyProcessor(Py<PyAny>);

pub(super) fn logits_processor(function: Py<PyAny>) -> SharedProcessor {
    SharedProcessor(Arc::new(PyProcessor(function)))
}

impl LogitsProcessor for PyProcessor {
    fn process(&self, tokens: &[u32], logits: &mut [f32]) -> Result<()> {
        // There is no Python any more once the interpreter ends.
        let called = Python::try_attach(|py| guarded(py, || self.call(py, tokens, logits)));
        let called = called.ok_or(Error::Cancelled)?;
        called.map_err(|raised| Error::Callback { source: Box::new(raised) })
    }
}

impl PyProcessor {
    /// Calls the function with arrays of its own, which it may keep: a copy takes microseconds, and a view of
    /// the engine's memory would outlive it.
    fn call(&self, py: Python<'_>, tokens: &[u32], logits: &mut [f32]) -> PyResult<()> {
        let token_ids = PyArray1::from_iter(py, tokens.iter().map(|&id| i64::from(id)));
        let row = PyArray1::from_slice(py, logits);
        let returned = self.0.bind(py).call1((token_ids, &row))?;
        let changed = if returned.is_none() {
            row.into_any()
        } else {
            py.import("numpy")?.call_method1("ascontiguousarray", (returned, "float32"))?
        };
        let shape = changed.getattr("shape")?;
        let refuse = || {
            let expected = logits.len();
            PyValueError::new_err(format!(
                "a logits processor must return None or an array of shape ({expected},), not of {shape}"
            ))
        };
        let changed = changed.cast_into::<PyArray1<f32>>().map_err(|_| refuse())?;
        let changed = changed.try_readonly()?;
        let values = changed.as_slice()?;
        if values.len() != logits.len() {
            return Err(refuse());
        }
        logits.copy_from_slice(values);
        Ok(())
    }
}
