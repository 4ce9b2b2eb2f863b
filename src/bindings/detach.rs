//! Runs work without the GIL. Stops it on Ctrl-C, and converts panics and errors to Python's exceptions.

use super::error::{internal_error, to_python};
use crate::error::{Error, Result};
use crate::model::Cancel;
use crate::sys::reserve;
use parking_lot::Mutex;
use pyo3::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

/// The last panic's message and source location.
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

/// Sets a panic hook that keeps the message and source location for the exception, instead of printing them.
pub(super) fn remember_panics() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let place = info.location().map(|place| format!(" at {place}")).unwrap_or_default();
        *LAST_PANIC.lock() = format!("{}{place}", text.unwrap_or("a panic"));
    }));
}

/// Runs `work` without the GIL. Between tasks the calling thread checks Python's signals. If a signal handler
/// raises, as on Ctrl-C, `work` is cancelled and the exception is returned. `work` is also cancelled when the
/// system has no memory left.
pub(super) fn detach_engine<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&Cancel) -> Result<T> + Send,
) -> PyResult<T> {
    reserve::refill().map_err(|error| to_python(py, error))?;
    let raised = Mutex::new(None);
    let is_exhausted = AtomicBool::new(false);
    let result = py.detach(|| {
        let flag = AtomicBool::new(false);
        let poll = || match Python::attach(|py| py.check_signals()) {
            Ok(()) if reserve::is_exhausted() => {
                is_exhausted.store(true, Ordering::Relaxed);
                true
            }
            Ok(()) => false,
            Err(error) => {
                *raised.lock() = Some(error);
                true
            }
        };
        catch_unwind(AssertUnwindSafe(|| work(&Cancel::with_poll(&flag, &poll))))
    });
    if let Some(error) = raised.into_inner() {
        return Err(error);
    }
    if is_exhausted.into_inner() {
        return Err(to_python(py, reserve::exhausted()));
    }
    match result {
        Ok(result) => result.map_err(|error| to_python(py, error)),
        Err(_) => Err(internal_error(py, LAST_PANIC.lock().clone())),
    }
}

/// Converts a result to Python's objects. A panic, as when pyo3 gets no memory for an object, becomes an
/// error.
pub(super) fn guarded<T>(py: Python<'_>, convert: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(convert)).unwrap_or_else(|_| {
        let reason = format!("the result could not be converted: {}", LAST_PANIC.lock());
        Err(to_python(py, Error::Generation { reason }))
    })
}
