//! A model that several threads share, one step at a time.

use super::PREFILL_TOKENS;
use crate::error::{Error, Result};
use crate::model::{Cancel, Logits, Model, Rows, SeqId, Span};
use crate::sys::Process;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// How long a caller waits for the model before it looks at its own signals again.
const LOCK_SLICE: Duration = Duration::from_millis(10);

/// A model and its lock.
///
/// The lock is held for one step and never while a caller does something else, so sequences of one
/// thread or of several may be run in turn.
///
/// In a process forked from the one that made it, an engine refuses every step and waits for nothing:
/// a lock may be held by a thread that is not there, and the model's own threads are gone.
pub struct Engine {
    process: Process,
    /// None once closed and the last step has ended.
    model: Mutex<Option<Box<dyn Model>>>,
    vocab_size: usize,
    pub(super) max_num_seqs: usize,
    context_length: usize,
    next_seq: AtomicU64,
    closed: AtomicBool,
    /// Sequences that ended while the model was busy; forgotten before the next step.
    ended: Mutex<Vec<SeqId>>,
}

impl Engine {
    /// An engine over `model`, whose sequences have at most `context_length` tokens.
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

    /// The most tokens of a sequence, prompt and output together.
    pub fn context_length(&self) -> usize {
        self.context_length
    }

    /// Drops the model, once the step that is running has ended; later steps are refused.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        if self.process.is_current() {
            drop(self.model.lock().take());
        }
    }

    /// Whether a step could be taken now.
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

    /// The logits of the last `last` rows of `tokens` (None: of all), in steps.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no tokens, ids out of range or `last` of 0 or more than there
    /// are; [`Error::ContextLength`]; [`Error::Cancelled`]; those of [`Engine::check_open`].
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
        self.read(tokens, tokens.len() - rows, PREFILL_TOKENS, cancel, &mut |part| {
            logits.values.extend(part.values);
            Ok(())
        })?;
        Ok(logits)
    }

    /// Reads `tokens` as a sequence of its own, in steps, and hands on the logits of the rows from
    /// `first_row` on: at most `most_rows` at a time, in their order. The sequence is forgotten then.
    pub(super) fn read(
        &self,
        tokens: &[u32],
        first_row: usize,
        most_rows: usize,
        cancel: &Cancel,
        take: &mut dyn FnMut(Logits) -> Result<()>,
    ) -> Result<()> {
        let seq = self.new_seq();
        let mut start = 0;
        let mut result = Ok(());
        while start < tokens.len() && result.is_ok() {
            // A step never straddles the first wanted row: it wants all of its rows, or none.
            let wanted = start >= first_row;
            let (bound, most) = if wanted { (tokens.len(), most_rows) } else { (first_row, PREFILL_TOKENS) };
            let end = bound.min(start + most);
            let rows = if wanted { Rows::All } else { Rows::None };
            let span = Span { seq, tokens: &tokens[start..end], start, rows };
            let logits = self.read_spans(&[span], &[tokens.len()], cancel);
            result = logits.and_then(|logits| if wanted { take(logits) } else { Ok(()) });
            start = end;
        }
        self.free(seq);
        result
    }

    /// One step of the model that reads prompts, or parts of them; they have so many tokens.
    pub(super) fn read_spans(
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

    /// Does `work` with the model, as soon as no other thread has it.
    ///
    /// # Errors
    /// [`Error::Cancelled`] while it waits; those of [`Engine::check_open`]; those of `work`.
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
                self.forget_ended(model.as_mut());
                return work(model.as_mut());
            }
        }
    }

    pub(super) fn new_seq(&self) -> SeqId {
        SeqId(self.next_seq.fetch_add(1, Ordering::Relaxed))
    }

    /// Forgets a sequence, now or before the next step. Never waits: who drops a sequence may hold a
    /// lock (Python's) that the running step asks for.
    pub(super) fn free(&self, seq: SeqId) {
        if !self.process.is_current() {
            return;
        }
        self.ended.lock().push(seq);
        if let Some(Some(model)) = self.model.try_lock().as_deref_mut() {
            self.forget_ended(model.as_mut());
        }
    }

    fn forget_ended(&self, model: &mut dyn Model) {
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
        // In a forked process the model cannot be taken down: it would wait for threads that are not there.
        if !self.process.is_current() {
            std::mem::forget(self.model.get_mut().take());
        }
    }
}
