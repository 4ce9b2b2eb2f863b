//! Runs work without the GIL. Stops it on Ctrl-C, and converts panics and errors to Python's exceptions.

use super::error::{internal_error, to_python};
use crate::error::{Error, Result};
use crate::model::Cancel;
use crate::sys::sync::Mutex;
use crate::sys::{self, panics, reserve};
use pyo3::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

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
        // Only the main thread handles signals. Another would wait for the GIL for nothing.
        let handles_signals = sys::is_main_thread();
        let check = || if handles_signals { Python::attach(|py| py.check_signals()) } else { Ok(()) };
        let poll = || match check() {
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
        Err(payload) => Err(internal_error(py, panics::describe(payload.as_ref()))),
    }
}

/// Does what [`detach_engine`] does, and cancels `work` when another thread sets `is_stopped`.
pub(super) fn detach_until<T: Send>(
    py: Python<'_>,
    is_stopped: &AtomicBool,
    work: impl FnOnce(&Cancel) -> Result<T> + Send,
) -> PyResult<T> {
    detach_engine(py, |cancel| {
        if is_stopped.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let poll = || is_stopped.load(Ordering::Relaxed) || cancel.is_cancelled();
        work(&Cancel::with_poll(&AtomicBool::new(false), &poll))
    })
}

/// `_core.Cancellation`: stops a call that runs in another thread.
#[pyclass(frozen, name = "Cancellation", module = "candle_llama._core")]
pub(super) struct PyCancellation(AtomicBool);

#[pymethods]
impl PyCancellation {
    #[new]
    fn new() -> Self {
        PyCancellation(AtomicBool::new(false))
    }

    /// Stops the calls that were given this object, those that run and those that begin.
    fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a call that was given `cancellation` watches.
pub(super) fn stop_of(cancellation: Option<&PyCancellation>) -> &AtomicBool {
    static NEVER: AtomicBool = AtomicBool::new(false);
    cancellation.map_or(&NEVER, |cancellation| &cancellation.0)
}

/// Converts a result to Python's objects. A panic, as when pyo3 gets no memory for an object, becomes an
/// error.
pub(super) fn guarded<T>(py: Python<'_>, convert: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(convert)).unwrap_or_else(|payload| {
        let reason = format!("the result could not be converted: {}", panics::describe(payload.as_ref()));
        Err(to_python(py, Error::Generation { reason }))
    })
}
