//! Logits and log-probabilities of given tokens, each after the tokens before it.

use super::Engine;
use super::output::RowSink;
use super::sequence::Task;
use crate::error::{Error, Result};
use crate::model::{Cancel, Logits};
use crate::sampling::{TokenScore, score_token};
use crate::sys::sync::{Condvar, Mutex};
use std::sync::Arc;

/// Maximum bytes of logits in memory at a time: a text's rows are scored in chunks.
const CHUNK_BYTES: usize = 64 << 20;

/// What is collected from a sequence's rows, and how the sequence ended.
struct Collected<T> {
    items: Vec<T>,
    result: Option<Result<()>>,
}

/// Adds what `add` makes of the rows.
struct Collector<T, F> {
    place: Arc<(Mutex<Collected<T>>, Condvar)>,
    add: F,
}

impl<T: Send, F: FnMut(&[f32], &mut Vec<T>) -> Result<()> + Send> RowSink for Collector<T, F> {
    fn rows(&mut self, logits: &[f32]) -> Result<()> {
        (self.add)(logits, &mut self.place.0.lock().items)
    }

    fn end(&mut self, result: Result<()>) {
        let (collected, arrival) = &*self.place;
        collected.lock().result = Some(result);
        arrival.notify_one();
    }
}

impl Engine {
    /// The logits of the last `last` rows of `tokens`, or of all rows if `last` is None.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there are no tokens, if ids are out of range, or if `last` is 0 or more
    /// than the number of tokens; [`Error::ContextLength`]; [`Error::Cancelled`]; those of
    /// [`Engine::check_open`].
    pub fn logits(&self, tokens: &[u32], last: Option<usize>, cancel: &Cancel) -> Result<Logits> {
        self.check_tokens(tokens)?;
        if tokens.len() > self.context_length() {
            return Err(self.too_long(tokens.len()));
        }
        let rows = last.unwrap_or(tokens.len());
        if rows == 0 || rows > tokens.len() {
            return Err(Error::argument("last", format!("{rows} is not from 1 to {}", tokens.len())));
        }
        let empty = Logits::with_capacity(rows, self.vocab_size())?;
        let add = |logits: &[f32], all: &mut Vec<f32>| {
            all.extend(logits);
            Ok(())
        };
        let values = self.collect(tokens, tokens.len() - rows, empty.values, add, cancel)?;
        Ok(Logits { values, ..empty })
    }

    /// Scores `tokens[first..]`, each after all tokens before it. The model does not process the last
    /// token, so there may be one token more than the context holds.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there are no tokens, if ids are out of range, or if `first` is not from
    /// 1 to the index of the last token; [`Error::ContextLength`]; [`Error::Generation`] if logits are NaN or
    /// infinite; [`Error::Cancelled`]; those of [`Engine::check_open`].
    pub fn score(&self, tokens: &[u32], first: usize, cancel: &Cancel) -> Result<Vec<TokenScore>> {
        self.check_tokens(tokens)?;
        let input = &tokens[..tokens.len() - 1];
        if first == 0 || first > input.len() {
            return Err(Error::argument("first", format!("{first} is not from 1 to {}", input.len())));
        }
        if input.len() > self.context_length() {
            return Err(self.too_long(tokens.len()));
        }
        let (vocab_size, wanted) = (self.vocab_size(), tokens[first..].to_vec());
        let add = move |logits: &[f32], scores: &mut Vec<TokenScore>| {
            for row in logits.chunks_exact(vocab_size) {
                let score = score_token(row, wanted[scores.len()])?;
                scores.push(score);
            }
            Ok(())
        };
        self.collect(input, first - 1, Vec::new(), add, cancel)
    }

    /// Runs `tokens` as a sequence of their own, and adds the logits of the rows from `first` on to `items`.
    fn collect<T: Send + 'static>(
        &self,
        tokens: &[u32],
        first: usize,
        items: Vec<T>,
        add: impl FnMut(&[f32], &mut Vec<T>) -> Result<()> + Send + 'static,
        cancel: &Cancel,
    ) -> Result<Vec<T>> {
        let place = Arc::new((Mutex::new(Collected { items, result: None }), Condvar::new()));
        let row_bytes = size_of::<f32>() * self.vocab_size().max(1);
        let max = (CHUNK_BYTES / row_bytes).max(1);
        let sink = Box::new(Collector { place: Arc::clone(&place), add });
        let task = Task::Rows { first, max, sink };
        let sequence = self.sequence(tokens.to_vec(), task, Arc::from(""));
        let ticket = sequence.ticket();
        ticket.set_awaited(true);
        self.submit(vec![sequence])?;
        let (collected, arrival) = &*place;
        ticket.wait(collected, arrival, cancel, |collected| {
            let result = collected.result.take()?;
            Some(result.map(|()| std::mem::take(&mut collected.items)))
        })?
    }
}
