//! How a sequence hands over its tokens or logits, and how its caller stops it.

use super::engine::Shared;
use super::sequence::{Stats, Step};
use crate::error::{Error, Result};
use crate::model::Cancel;
use crate::sys::sync::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a caller waits before it checks again whether it was cancelled.
const WAIT_SLICE: Duration = Duration::from_millis(100);
/// How long a caller that was cancelled waits for the engine to end its sequence.
const LAST_WAIT: Duration = Duration::from_millis(50);

/// What a sink wants after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The next token.
    Continue,
    /// No more tokens until [`Ticket::resume`] is called.
    Pause,
    /// No more tokens: the sequence has ended, for example by a stop string.
    Stop,
}

/// Receives the tokens of a sequence. The engine's thread calls it, so it must neither block nor be slow.
pub trait TokenSink: Send {
    /// Takes a step and the counts so far. Nothing follows a step with a finish.
    ///
    /// # Errors
    /// Any error ends the sequence. It is then passed to [`TokenSink::fail`].
    fn step(&mut self, step: Step, stats: &Stats) -> Result<Flow>;

    /// Whether the reader waits for the end and wants no token before it. Prompts then delay the sequence's
    /// tokens longer.
    fn wants_whole(&self) -> bool {
        false
    }

    /// Tells the reader of the steps that were taken. If they ended the sequence, its blocks are free by now.
    fn deliver(&mut self);

    /// Tells the reader of the steps that were taken, and of the error that ends the sequence.
    fn fail(&mut self, error: Error);
}

/// Receives the logits of a sequence's rows, as [`TokenSink`] receives tokens.
pub(super) trait RowSink: Send {
    /// Takes the logits of the next rows, `(rows, vocab_size)`.
    ///
    /// # Errors
    /// Any error ends the sequence. It is then passed to [`RowSink::end`].
    fn rows(&mut self, logits: &[f32]) -> Result<()>;

    /// Ends the sequence: all rows were taken, or an error.
    fn end(&mut self, result: Result<()>);
}

/// Tells the engine what the caller of a sequence wants. Caller and engine share it.
pub struct Ticket {
    shared: Arc<Shared>,
    is_cancelled: AtomicBool,
    resumes: AtomicBool,
    /// Whether somebody waits for the next token.
    is_awaited: AtomicBool,
}

impl Ticket {
    pub(super) fn new(shared: &Arc<Shared>) -> Arc<Self> {
        let shared = Arc::clone(shared);
        let [is_cancelled, resumes, is_awaited] = [const { AtomicBool::new(false) }; 3];
        Arc::new(Ticket { shared, is_cancelled, resumes, is_awaited })
    }

    /// Ends the sequence, soon. Returns at once.
    pub fn cancel(&self) {
        if !self.is_cancelled.swap(true, Ordering::Relaxed) {
            self.shared.wake();
        }
    }

    /// Continues a paused sequence. Returns at once.
    pub fn resume(&self) {
        self.resumes.store(true, Ordering::Relaxed);
        self.shared.wake();
    }

    /// Says whether somebody waits for what comes next. The engine runs only while somebody waits; then it
    /// runs all sequences.
    pub fn set_awaited(&self, is_awaited: bool) {
        if self.is_awaited.swap(is_awaited, Ordering::Relaxed) != is_awaited && is_awaited {
            self.shared.wake();
        }
    }

    /// Checks that this is the process that made the engine. In another one, locks may be held forever.
    ///
    /// # Errors
    /// [`Error::Forked`]
    pub fn check_process(&self) -> Result<()> {
        self.shared.check_process()
    }

    /// Waits for what `take` finds, which it tries whenever `arrival` is signalled. Cancels the sequence once
    /// `cancel` fires, and then waits a little for its end.
    ///
    /// # Errors
    /// [`Error::Forked`]; [`Error::Generation`] on the engine's own thread; [`Error::Cancelled`] if cancelled
    /// and the engine is slow to end the sequence.
    pub fn wait<S, T>(
        &self,
        state: &Mutex<S>,
        arrival: &Condvar,
        cancel: &Cancel,
        mut take: impl FnMut(&mut S) -> Option<T>,
    ) -> Result<T> {
        self.shared.check_thread()?;
        let mut is_cancelled = false;
        let mut next_check = Instant::now() + WAIT_SLICE;
        let mut held = state.lock();
        loop {
            if let Some(found) = take(&mut held) {
                return Ok(found);
            }
            let is_late;
            (held, is_late) = arrival.wait_until(held, next_check);
            if !is_late {
                continue;
            }
            if is_cancelled {
                return Err(Error::Cancelled);
            }
            next_check = Instant::now() + WAIT_SLICE;
            // Without the lock: the check may wait for the GIL.
            drop(held);
            if cancel.is_cancelled() {
                self.cancel();
                is_cancelled = true;
                next_check = Instant::now() + LAST_WAIT;
            }
            held = state.lock();
        }
    }

    pub(super) fn is_awaited(&self) -> bool {
        self.is_awaited.load(Ordering::Relaxed)
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }

    /// Whether [`Ticket::resume`] was called since the last time.
    pub(super) fn takes_resume(&self) -> bool {
        self.resumes.swap(false, Ordering::Relaxed)
    }
}
