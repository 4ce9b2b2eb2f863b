//! A thread that runs Candle. A call into Candle cannot be interrupted and may take seconds. So the caller
//! waits for the result, or returns at once when it is cancelled. The thread then ends its work at the next
//! place where it looks, and the next request waits for that.

use crate::error::{Error, Result};
use crate::model::{Cancel, Logits, Rows, SeqId, Span};
use crate::sys::reserve;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the caller waits before it checks again whether it was cancelled.
const WAIT_SLICE: Duration = Duration::from_millis(10);

/// A [`Span`] that owns its tokens, so that it can be sent to the thread.
#[derive(Clone)]
pub(super) struct OwnedSpan {
    pub(super) seq: SeqId,
    pub(super) tokens: Vec<u32>,
    pub(super) start: usize,
    pub(super) rows: Rows,
}

impl OwnedSpan {
    /// The number of rows whose logits are wanted.
    pub(super) fn wanted(&self) -> usize {
        self.rows.count(self.tokens.len())
    }
}

/// What a worker runs, on its thread.
pub(super) trait Runner: Send + 'static {
    /// As [`super::Model::forward`]. Returns [`Error::Cancelled`] soon after `stop` is true.
    fn forward(&mut self, spans: &[OwnedSpan], stop: &AtomicBool) -> Result<Logits>;

    /// A sequence whose prompt has so many tokens begins.
    fn begin(&mut self, _seq: SeqId, _prompt_tokens: usize) {}

    /// Frees what a sequence holds.
    fn free(&mut self, seq: SeqId);
}

enum Request {
    Forward {
        spans: Vec<OwnedSpan>,
        stop: Arc<AtomicBool>,
        reply: Sender<std::thread::Result<Result<Logits>>>,
    },
    Begin(SeqId, usize),
    Free(SeqId),
}

/// The thread and the way to it. Dropping it waits for the thread.
pub(super) struct Worker {
    /// None while the worker is being dropped: the thread ends when this sender is gone.
    requests: Option<Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// # Errors
    /// [`Error::Generation`] if the thread cannot be started.
    pub(super) fn new(runner: impl Runner) -> Result<Self> {
        let (requests, received) = channel();
        reserve::check_threads(1)?;
        let thread = std::thread::Builder::new()
            .name("candle-llama-candle".into())
            .spawn(move || serve(runner, &received))
            .map_err(|error| Error::Generation { reason: format!("a thread cannot be started: {error}") })?;
        Ok(Worker { requests: Some(requests), thread: Some(thread) })
    }

    /// Runs the spans, unless `cancel` fires.
    ///
    /// # Errors
    /// As [`super::Model::forward`].
    pub(super) fn forward(&self, spans: &[Span], cancel: &Cancel) -> Result<Logits> {
        let owned = |span: &Span| OwnedSpan {
            seq: span.seq,
            tokens: span.tokens.to_vec(),
            start: span.start,
            rows: span.rows,
        };
        let stop = Arc::new(AtomicBool::new(false));
        let (reply, answer) = channel();
        let spans = spans.iter().map(owned).collect();
        self.send(Request::Forward { spans, stop: Arc::clone(&stop), reply })?;
        loop {
            match answer.recv_timeout(WAIT_SLICE) {
                Ok(Ok(result)) => return result,
                Ok(Err(panic)) => resume_unwind(panic),
                Err(RecvTimeoutError::Disconnected) => return Err(ended()),
                Err(RecvTimeoutError::Timeout) => {
                    if cancel.is_cancelled() {
                        stop.store(true, Ordering::Relaxed);
                        return Err(Error::Cancelled);
                    }
                }
            }
        }
    }

    /// Tells the runner that a sequence begins.
    pub(super) fn begin(&self, seq: SeqId, prompt_tokens: usize) {
        // If the thread has ended, the next pass says so.
        let _ = self.send(Request::Begin(seq, prompt_tokens));
    }

    /// Frees what a sequence holds.
    pub(super) fn free(&self, seq: SeqId) {
        // If the thread has ended, its sequences are gone too.
        let _ = self.send(Request::Free(seq));
    }

    fn send(&self, request: Request) -> Result<()> {
        let sent = self.requests.as_ref().is_some_and(|requests| requests.send(request).is_ok());
        if sent { Ok(()) } else { Err(ended()) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.requests.take());
        if let Some(thread) = self.thread.take() {
            // Panics inside requests went to their callers, so there is nothing left to report.
            let _ = thread.join();
        }
    }
}

fn ended() -> Error {
    Error::Generation { reason: "the thread that runs Candle has ended".into() }
}

fn serve(mut runner: impl Runner, requests: &Receiver<Request>) {
    for request in requests {
        match request {
            Request::Forward { spans, stop, reply } => {
                let result = catch_unwind(AssertUnwindSafe(|| runner.forward(&spans, &stop)));
                if result.is_err() {
                    spans.iter().for_each(|span| runner.free(span.seq));
                }
                // A cancelled caller no longer listens.
                let _ = reply.send(result);
            }
            Request::Begin(seq, prompt_tokens) => runner.begin(seq, prompt_tokens),
            Request::Free(seq) => runner.free(seq),
        }
    }
}
