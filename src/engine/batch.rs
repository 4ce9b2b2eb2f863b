//! Batches: one pass over the weights generates a token for each of several sequences.

use super::{Engine, PREFILL_TOKENS, Sequence, Step};
use crate::error::{Error, Result};
use crate::kernels::KV_BLOCK_POSITIONS;
use crate::model::{Cancel, Rows, Span};
use std::time::Instant;

/// A sequence that has not ended, and the place for its next step.
struct Stepping<'a> {
    sequence: &'a mut Sequence,
    step: &'a mut Option<Step>,
}

impl Engine {
    /// Whether a sequence of at most `tokens` tokens may run together with `running`. The KV cache must have
    /// room for all of them at their maximum lengths. A sequence that would run alone is always admitted.
    ///
    /// # Errors
    /// [`Error::Cancelled`] if cancelled while another thread's step runs; those of [`Engine::check_open`].
    pub fn admits(&self, running: &[&Sequence], tokens: usize, cancel: &Cancel) -> Result<bool> {
        if running.is_empty() || running.len() >= self.max_num_seqs {
            return Ok(running.is_empty());
        }
        let blocks = |tokens: usize| tokens.min(self.context_length()).div_ceil(KV_BLOCK_POSITIONS);
        let growth =
            |running: &&Sequence| blocks(running.max_tokens()).saturating_sub(blocks(running.computed()));
        let wanted = running.iter().map(growth).fold(blocks(tokens), usize::saturating_add);
        Ok(wanted <= self.with_model(cancel, |model| Ok(model.free_blocks()))?)
    }

    /// Runs the next step of each sequence and returns the steps in the same order.
    ///
    /// First, new prompts are prefilled together, some hundred tokens at a time. Then one token is decoded
    /// for each of the other sequences, together. The result of a sequence does not depend on the others.
    ///
    /// A sequence that has ended gets None. None can also mean that another sequence's timeout interrupted
    /// this step; call again. All sequences must belong to this engine.
    ///
    /// # Errors
    /// Those of the model. An error ends all sequences.
    pub fn step(&self, sequences: &mut [&mut Sequence], cancel: &Cancel) -> Result<Vec<Option<Step>>> {
        let steps = self.try_step(sequences, cancel);
        if steps.is_err() {
            sequences.iter_mut().for_each(|sequence| sequence.close());
        }
        steps
    }

    fn try_step(&self, sequences: &mut [&mut Sequence], cancel: &Cancel) -> Result<Vec<Option<Step>>> {
        let mut steps: Vec<Option<Step>> = sequences.iter().map(|_| None).collect();
        let (mut prefilling, mut decoding): (Vec<Stepping>, Vec<Stepping>) = sequences
            .iter_mut()
            .zip(&mut steps)
            .map(|(sequence, step)| Stepping { sequence, step })
            .filter(|stepping| !stepping.sequence.is_finished())
            .partition(|stepping| stepping.sequence.needs_prefill());
        // The length of a prompt decides which kernels compute it. In this order, prompts that use the same
        // kernels go through the layers together.
        prefilling.sort_by_key(|stepping| stepping.sequence.prompt_tokens());
        while !prefilling.is_empty() {
            self.prefill(&mut prefilling, cancel)?;
            prefilling.retain(|stepping| stepping.step.is_none());
        }
        if !decoding.is_empty() {
            self.decode(&mut decoding, cancel)?;
        }
        Ok(steps)
    }

    /// Prefills the first prompts, up to `PREFILL_TOKENS` in total. Sequences whose prompt is complete, or
    /// that were stopped, get their step.
    fn prefill(&self, prefilling: &mut [Stepping], cancel: &Cancel) -> Result<()> {
        let started = Instant::now();
        let (mut spans, mut prompt_tokens, mut left) = (Vec::new(), Vec::new(), PREFILL_TOKENS);
        for Stepping { sequence, .. } in prefilling.iter() {
            if left > 0 {
                let span = sequence.prompt_span(left);
                left -= span.tokens.len();
                spans.push(span);
                prompt_tokens.push(sequence.prompt_tokens());
            }
        }
        let parts: Vec<(usize, Rows)> = spans.iter().map(|span| (span.tokens.len(), span.rows)).collect();
        let deadline = earliest_deadline(&prefilling[..parts.len()]);
        let logits =
            with_deadline(deadline, cancel, |cancel| self.prefill_spans(&spans, &prompt_tokens, cancel));
        let prefilling = &mut prefilling[..parts.len()];
        match logits {
            Ok(mut logits) => {
                let mut rows = logits.values.chunks_exact_mut(logits.vocab_size);
                for (Stepping { sequence, step }, (tokens, wanted)) in prefilling.iter_mut().zip(parts) {
                    sequence.add_prefilled(tokens);
                    if let (Rows::Last, Some(row)) = (wanted, rows.next()) {
                        **step = Some(sequence.first_step(row)?);
                    }
                }
            }
            Err(Error::Cancelled) => stop(prefilling, cancel),
            Err(error) => return Err(error),
        }
        let took = started.elapsed();
        prefilling.iter_mut().for_each(|stepping| stepping.sequence.add_prefill_time(took));
        Ok(())
    }

    fn decode(&self, decoding: &mut [Stepping], cancel: &Cancel) -> Result<()> {
        let started = Instant::now();
        let spans: Vec<Span> = decoding.iter().map(|stepping| stepping.sequence.decode_span()).collect();
        let logits = with_deadline(earliest_deadline(decoding), cancel, |cancel| {
            self.with_model(cancel, |model| model.forward(&spans, cancel))
        });
        match logits {
            Ok(mut logits) => {
                let rows = logits.values.chunks_exact_mut(logits.vocab_size);
                for (Stepping { sequence, step }, row) in decoding.iter_mut().zip(rows) {
                    **step = Some(sequence.next_step(row)?);
                }
            }
            Err(Error::Cancelled) => stop(decoding, cancel),
            Err(error) => return Err(error),
        }
        let took = started.elapsed();
        decoding.iter_mut().for_each(|stepping| stepping.sequence.add_decode_time(took));
        Ok(())
    }
}

fn earliest_deadline(sequences: &[Stepping]) -> Option<Instant> {
    sequences.iter().filter_map(|stepping| stepping.sequence.deadline()).min()
}

/// Ends the sequences whose deadline has passed, or all of them if the caller has cancelled.
fn stop(sequences: &mut [Stepping], cancel: &Cancel) {
    for Stepping { sequence, step } in sequences {
        **step = sequence.stopped(cancel);
    }
}

/// Runs `work` with a `Cancel` that also fires at the deadline.
pub(super) fn with_deadline<T>(
    deadline: Option<Instant>,
    cancel: &Cancel,
    work: impl FnOnce(&Cancel) -> Result<T>,
) -> Result<T> {
    let flag = std::sync::atomic::AtomicBool::new(false);
    let stop = || cancel.is_cancelled() || deadline.is_some_and(|deadline| Instant::now() >= deadline);
    // Checked here too, because a short step ends before its `Cancel` polls for the first time.
    if stop() { Err(Error::Cancelled) } else { work(&Cancel::with_poll(&flag, &stop)) }
}
