//! `_core.Request`, `_core.Stream` and `_core.Mailbox`: completions that are read while they are generated.

use super::convert;
use super::detach::{detach_engine, guarded};
use super::error::to_python;
use crate::error::{Error, Result};
use crate::llama::{Request, TextStream};
use crate::sys::Process;
use crate::sys::sync::{Condvar, Mutex};
use pyo3::exceptions::{PyRuntimeError, PyStopIteration};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::sync::Arc;

/// A prompt whose answer is to be generated.
#[pyclass(frozen, name = "Request", module = "candle_llama._core")]
pub(super) struct PyRequest(Mutex<Option<Request>>);

impl PyRequest {
    pub(super) fn new(request: Request) -> Self {
        PyRequest(Mutex::new(Some(request)))
    }

    /// # Errors
    /// [`Error::Closed`] if it was used before.
    pub(super) fn take(&self) -> Result<Request> {
        self.0.lock().take().ok_or(Error::Closed { what: "the request" })
    }
}

/// A completion that is being generated.
#[pyclass(frozen, name = "Stream", module = "candle_llama._core")]
pub(super) struct PyStream(TextStream);

impl PyStream {
    pub(super) fn new(stream: TextStream) -> Self {
        PyStream(stream)
    }
}

#[pymethods]
impl PyStream {
    fn __iter__(stream: PyRef<'_, Self>) -> PyRef<'_, Self> {
        stream
    }

    /// Waits for the next chunk; releases the GIL.
    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let chunk = detach_engine(py, |cancel| self.0.next_chunk(cancel));
        // That of a logits processor would look like the end of the stream.
        let chunk = chunk.map_err(|error| match error.is_instance_of::<PyStopIteration>(py) {
            true => {
                let raised = PyRuntimeError::new_err("a logits processor raised StopIteration");
                raised.set_cause(py, Some(error));
                raised
            }
            false => error,
        })?;
        guarded(py, || chunk.map(|chunk| convert::chunk(py, &chunk)).transpose())
    }

    /// The next chunk if there is one by now. After one that was read `quietly`, only the end is posted until
    /// the next call.
    fn try_next<'py>(&self, py: Python<'py>, quietly: bool) -> PyResult<Option<Bound<'py, PyDict>>> {
        let chunk = self.0.try_next_chunk(quietly).map_err(|error| to_python(py, error))?;
        guarded(py, || chunk.map(|chunk| convert::chunk(py, &chunk)).transpose())
    }

    /// Whether nothing more will be generated.
    fn is_done(&self) -> bool {
        self.0.is_done()
    }

    /// Whether nothing is left to read, now and later.
    fn has_ended(&self) -> bool {
        self.0.has_ended()
    }

    /// The whole completion if it has ended by now. `post_to` must have been called with `whole`.
    fn try_whole<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let whole = self.0.try_whole().map_err(|error| to_python(py, error))?;
        guarded(py, || whole.map(|whole| convert::completion(py, &whole)).transpose())
    }

    /// Posts `number` to a mailbox whenever there is something to read; with `whole`, only at the end.
    fn post_to(&self, mailbox: &PyMailbox, number: u64, whole: bool) {
        let mailbox = Arc::clone(&mailbox.0);
        if whole {
            self.0.wait_for_whole();
        }
        self.0.set_waker(Box::new(move || mailbox.post(number)));
    }

    /// Ends the stream and stops the work.
    fn close(&self) {
        self.0.close();
    }
}

/// Tells an event loop which streams have something to read, through a pipe that the loop watches.
#[pyclass(frozen, name = "Mailbox", module = "candle_llama._core")]
pub(super) struct PyMailbox(Arc<Mailbox>);

struct Mailbox {
    process: Process,
    posted: Mutex<Posted>,
    arrival: Condvar,
    reader: PipeReader,
    writer: PipeWriter,
}

#[derive(Default)]
struct Posted {
    numbers: Vec<u64>,
    /// Whether the pipe holds a byte, or will in a moment. It never holds more, so that writing never waits.
    is_signalled: bool,
    is_closed: bool,
}

impl Mailbox {
    fn post(&self, number: u64) {
        let was_signalled = {
            let mut posted = self.posted.lock();
            posted.numbers.push(number);
            self.arrival.notify_one();
            std::mem::replace(&mut posted.is_signalled, true)
        };
        // Without the lock: the reader may run at once in the place of this thread, and would wait for it.
        if !was_signalled {
            // It cannot fail: that would mean that the pipe is closed, and `self` owns both ends.
            let _ = (&self.writer).write_all(&[0]);
        }
    }

    fn take(&self) -> Vec<u64> {
        let mut posted = self.posted.lock();
        if std::mem::take(&mut posted.is_signalled) {
            // The byte is there, or will be in a moment.
            let _ = (&self.reader).read_exact(&mut [0]);
        }
        let mut numbers = std::mem::take(&mut posted.numbers);
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }
}

#[pymethods]
impl PyMailbox {
    #[new]
    fn new() -> PyResult<Self> {
        let (reader, writer) = std::io::pipe()?;
        let (process, posted, arrival) = (Process::current(), Mutex::default(), Condvar::new());
        Ok(PyMailbox(Arc::new(Mailbox { process, posted, arrival, reader, writer })))
    }

    /// The file descriptor that is readable while something is posted; None on Windows, where an event loop
    /// cannot watch a pipe.
    fn fileno(&self) -> Option<i32> {
        #[cfg(unix)]
        return Some(std::os::fd::AsRawFd::as_raw_fd(&self.0.reader));
        #[cfg(not(unix))]
        None
    }

    /// The numbers posted since the last call, each once; does not wait.
    fn take(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        if !self.0.process.is_current() {
            return Err(to_python(py, Error::Forked));
        }
        Ok(self.0.take())
    }

    /// Waits until something is posted or the mailbox is closed; releases the GIL. Returns whether it is
    /// open.
    fn wait(&self, py: Python<'_>) -> bool {
        py.detach(|| {
            let mut posted = self.0.posted.lock();
            while posted.numbers.is_empty() && !posted.is_closed {
                posted = self.0.arrival.wait(posted);
            }
            !posted.is_closed
        })
    }

    /// Ends the waiting.
    fn close(&self) {
        if self.0.process.is_current() {
            self.0.posted.lock().is_closed = true;
            self.0.arrival.notify_all();
        }
    }
}
