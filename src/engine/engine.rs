//! A model that several threads share, one step at a time.

use super::PREFILL_TOKENS;
use crate::error::{Error, Result};
use crate::model::{Cancel, Logits, Model, Rows, SeqId, Span};
use crate::sys::Process;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// How long a caller waits for the model's lock before it checks again whether it was cancelled.
const LOCK_SLICE: Duration = Duration::from_millis(10);

/// A model and its lock.
///
/// The lock is held for one step only, so sequences of one thread or of several threads can take turns.
///
/// In a process that was forked after the engine was made, the engine refuses every step without waiting.
/// There the lock may be held by a thread that does not exist, and the model's own threads are gone.
pub struct Engine {
    process: Process,
    /// None after [`Engine::close`].
    model: Mutex<Option<Box<dyn Model>>>,
    vocab_size: usize,
    pub(super) max_num_seqs: usize,
    context_length: usize,
    next_seq: AtomicU64,
    closed: AtomicBool,
    /// Sequences that ended while the model was busy. They are freed before the next step.
    ended: Mutex<Vec<SeqId>>,
}

impl Engine {
    /// An engine that runs `model`. A sequence has at most `context_length` tokens.
    pub fn new(model: Box<dyn Model>, context_length: usize) -> Self {
        let (vocab_size, max_num_seqs) = (model.vocab_size(), model.max_num_seqs());
        Engine {
            process: Process::current(),
            model: Mutex::new(Some(model)),
            vocab_size,
            max_num_seqs,
            context_length,
            next_seq: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            ended: Mutex::new(Vec::new()),
        }
    }

    /// The length of a row of logits.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The maximum number of tokens of a sequence, prompt and output together.
    pub fn context_length(&self) -> usize {
        self.context_length
    }

    /// Waits for the running step, then drops the model. Later steps are refused.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        if self.process.is_current() {
            drop(self.model.lock().take());
        }
    }

    /// Checks that the engine can run a step.
    ///
    /// # Errors
    /// [`Error::Closed`] after [`Engine::close`]; [`Error::Forked`] in a forked process.
    pub fn check_open(&self) -> Result<()> {
        if !self.process.is_current() {
            return Err(Error::Forked);
        }
        if self.closed.load(Ordering::Relaxed) {
            return Err(Error::Closed { what: "the model" });
        }
        Ok(())
    }

    /// The logits of the last `last` rows of `tokens`, or of all rows if `last` is None. Long inputs take
    /// several steps.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there are no tokens, if ids are out of range, or if `last` is 0 or more
    /// than the number of tokens; [`Error::ContextLength`]; [`Error::Cancelled`]; those of
    /// [`Engine::check_open`].
    pub fn logits(&self, tokens: &[u32], last: Option<usize>, cancel: &Cancel) -> Result<Logits> {
        self.check_tokens(tokens)?;
        if tokens.len() > self.context_length {
            return Err(self.too_long(tokens.len()));
        }
        let rows = last.unwrap_or(tokens.len());
        if rows == 0 || rows > tokens.len() {
            return Err(Error::argument("last", format!("{rows} is not from 1 to {}", tokens.len())));
        }
        let mut logits = Logits { values: Vec::new(), vocab_size: self.vocab_size };
        let reserved = rows.checked_mul(self.vocab_size).map(|len| logits.values.try_reserve_exact(len));
        if !matches!(reserved, Some(Ok(()))) {
            let reason = format!("no memory for {rows} rows of {} logits", self.vocab_size);
            return Err(Error::Generation { reason });
        }
        self.prefill_in_steps(tokens, tokens.len() - rows, PREFILL_TOKENS, cancel, &mut |part| {
            logits.values.extend(part.values);
            Ok(())
        })?;
        Ok(logits)
    }

    /// Runs `tokens` as a temporary sequence, in steps. Passes the logits of the rows from `first_row` on to
    /// `take`, in their order and at most `max_rows` at a time.
    pub(super) fn prefill_in_steps(
        &self,
        tokens: &[u32],
        first_row: usize,
        max_rows: usize,
        cancel: &Cancel,
        take: &mut dyn FnMut(Logits) -> Result<()>,
    ) -> Result<()> {
        let seq = self.new_seq();
        let mut start = 0;
        let mut result = Ok(());
        while start < tokens.len() && result.is_ok() {
            // No step crosses `first_row`, so that it wants the logits of all of its rows or of none.
            let wanted = start >= first_row;
            let (bound, max) = if wanted { (tokens.len(), max_rows) } else { (first_row, PREFILL_TOKENS) };
            let end = bound.min(start + max);
            let rows = if wanted { Rows::All } else { Rows::None };
            let span = Span { seq, tokens: &tokens[start..end], start, rows };
            let logits = self.prefill_spans(&[span], &[tokens.len()], cancel);
            result = logits.and_then(|logits| if wanted { take(logits) } else { Ok(()) });
            start = end;
        }
        self.free(seq);
        result
    }

    /// One prefill step over prompts or parts of prompts. `prompt_tokens` has the length of each span's
    /// whole prompt.
    pub(super) fn prefill_spans(
        &self,
        spans: &[Span],
        prompt_tokens: &[usize],
        cancel: &Cancel,
    ) -> Result<Logits> {
        self.with_model(cancel, |model| {
            for (span, &prompt_tokens) in spans.iter().zip(prompt_tokens).filter(|(span, _)| span.start == 0)
            {
                model.begin(span.seq, prompt_tokens);
            }
            model.forward(spans, cancel)
        })
    }

    /// Runs `work` on the model as soon as no other thread holds its lock.
    ///
    /// # Errors
    /// [`Error::Cancelled`] if cancelled while waiting; those of [`Engine::check_open`]; those of `work`.
    pub(super) fn with_model<T>(
        &self,
        cancel: &Cancel,
        work: impl FnOnce(&mut dyn Model) -> Result<T>,
    ) -> Result<T> {
        loop {
            self.check_open()?;
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if let Some(mut model) = self.model.try_lock_for(LOCK_SLICE) {
                let Some(model) = model.as_mut() else { return Err(Error::Closed { what: "the model" }) };
                self.free_ended(model.as_mut());
                return work(model.as_mut());
            }
        }
    }

    pub(super) fn new_seq(&self) -> SeqId {
        SeqId(self.next_seq.fetch_add(1, Ordering::Relaxed))
    }

    /// Frees a sequence, now or before the next step. Never waits: the thread that drops a sequence may hold
    /// Python's GIL, which the running step may need.
    pub(super) fn free(&self, seq: SeqId) {
        if !self.process.is_current() {
            return;
        }
        self.ended.lock().push(seq);
        if let Some(Some(model)) = self.model.try_lock().as_deref_mut() {
            self.free_ended(model.as_mut());
        }
    }

    fn free_ended(&self, model: &mut dyn Model) {
        for seq in self.ended.lock().drain(..) {
            model.free(seq);
        }
    }

    pub(super) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::argument("prompt", "has no tokens"));
        }
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= self.vocab_size) {
            let reason = format!("{id} is not below vocab_size {}", self.vocab_size);
            return Err(Error::argument("token_ids", reason));
        }
        Ok(())
    }

    pub(super) fn too_long(&self, prompt_tokens: usize) -> Error {
        Error::ContextLength { prompt_tokens, context_length: self.context_length }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // In a forked process, dropping the model would wait for threads that do not exist there.
        if !self.process.is_current() {
            std::mem::forget(self.model.get_mut().take());
        }
    }
}
