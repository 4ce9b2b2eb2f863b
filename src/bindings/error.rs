//! Converts our errors to Python's exceptions. There is one match without a wildcard, so that a new variant
//! does not compile until someone chooses its exception.

use crate::error::{Error, printable};
use pyo3::exceptions::{PyMemoryError, PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// The exception for an error, with the facts as attributes. A `MemoryError` if Python has no memory for it:
/// pyo3 panics then. An exception that a function of the caller raised stays what it is.
pub(super) fn to_python(py: Python<'_>, error: Error) -> PyErr {
    let error = match error {
        Error::Callback { source } => match source.downcast::<PyErr>() {
            Ok(raised) => return *raised,
            Err(source) => Error::Callback { source },
        },
        error => error,
    };
    let convert = AssertUnwindSafe(|| exception(py, &error));
    catch_unwind(convert).unwrap_or_else(|_| PyMemoryError::new_err(()))
}

fn exception(py: Python<'_>, error: &Error) -> PyErr {
    let message = match error.hint() {
        Some(hint) => format!("{error}; {hint}"),
        None => error.to_string(),
    };
    let message = printable(&message);
    let facts = PyDict::new(py);
    // If an attribute cannot be set, the error is still raised without it.
    let path = |path: &Path| _ = facts.set_item("path", path.as_os_str());
    let text = |name: &str, value: &str| _ = facts.set_item(name, value);
    let count = |name: &str, value: u64| _ = facts.set_item(name, value);
    let shape = |name: &str, value: &[usize]| _ = facts.set_item(name, value);
    let class = match error {
        Error::NotFound { path, .. } => return os_error(libc::ENOENT, message, path),
        Error::Io { path, source } | Error::Write { path, source } => {
            return os_error(source.raw_os_error().unwrap_or(libc::EIO), message, path);
        }
        Error::Exists { path } => return os_error(libc::EEXIST, message, path),
        Error::InvalidArgument { .. } | Error::Closed { .. } | Error::Text { .. } => {
            return PyValueError::new_err(message);
        }
        Error::Malformed { path: file, .. } => {
            path(file);
            "CheckpointError"
        }
        Error::Truncated { path: file, expected, got, .. } => {
            path(file);
            count("expected", *expected);
            count("got", *got);
            "CheckpointError"
        }
        Error::MissingTensor { tensor, path: file } => {
            path(file);
            text("tensor", tensor);
            "CheckpointError"
        }
        Error::TensorShape { tensor, got, expected, path: file } => {
            path(file);
            text("tensor", tensor);
            shape("got", got);
            shape("expected", expected);
            "CheckpointError"
        }
        Error::TensorType { tensor, dtype, path: file } => {
            path(file);
            text("tensor", tensor);
            text("key", "dtype");
            text("value", dtype);
            "UnsupportedModelError"
        }
        Error::TensorValue { tensor, value, dtype, path: file, .. } => {
            path(file);
            text("tensor", tensor);
            _ = facts.set_item("got", *value);
            text("expected", &format!("a number that {dtype} can hold"));
            "CheckpointError"
        }
        Error::Strict { .. } => "CheckpointError",
        Error::Unsupported { key, value } => {
            text("key", key);
            text("value", value);
            "UnsupportedModelError"
        }
        Error::ContextLength { prompt_tokens, context_length }
        | Error::TextLength { prompt_tokens, context_length, .. } => {
            count("prompt_tokens", *prompt_tokens as u64);
            count("context_length", *context_length as u64);
            "ContextLengthError"
        }
        Error::Device { device, .. } => {
            text("device", device);
            "DeviceError"
        }
        Error::OutOfMemory { needed, available, .. } => {
            text("device", "cpu");
            count("needed", *needed);
            count("available", *available);
            "DeviceError"
        }
        Error::Generation { .. } | Error::Callback { .. } | Error::Cancelled | Error::Forked => {
            "GenerationError"
        }
        Error::Internal { .. } => "InternalError",
    };
    raise(py, class, message, &facts)
}

/// An `InternalError`: a caught panic.
pub(super) fn internal_error(py: Python<'_>, reason: String) -> PyErr {
    to_python(py, Error::Internal { reason })
}

fn raise(py: Python<'_>, class: &str, message: String, facts: &Bound<'_, PyDict>) -> PyErr {
    let error = || py.import("candle_llama.errors")?.getattr(class)?.call((message,), Some(facts));
    match error() {
        Ok(error) => PyErr::from_value(error),
        Err(cause) => cause,
    }
}

/// An `OSError`; Python makes it the subclass that belongs to the number, such as FileNotFoundError.
fn os_error(errno: i32, message: String, path: &Path) -> PyErr {
    Python::attach(|py| {
        let path = path
            .as_os_str()
            .into_pyobject(py)
            .map_or_else(|_| PyString::new(py, "").unbind(), |path| path.to_owned().unbind());
        PyOSError::new_err((errno, message, path))
    })
}
