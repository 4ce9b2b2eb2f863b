//! Sequences that are generated together: one pass over the weights gives a token of each.

use super::{Engine, PREFILL_TOKENS, Sequence, Step};
use crate::error::{Error, Result};
use crate::kernels::KV_BLOCK_POSITIONS;
use crate::model::{Cancel, Rows, Span};
use std::time::Instant;

/// A sequence that has not ended, and the step that it is to get.
struct Stepping<'a> {
    sequence: &'a mut Sequence,
    step: &'a mut Option<Step>,
}

impl Engine {
    /// Whether a sequence of at most `tokens` tokens may be generated together with `running`: all of them
    /// must find room for their keys and values even if they grow to their greatest length. One alone always may.
    ///
    /// # Errors
    /// [`Error::Cancelled`] while it waits for a step of another thread; those of [`Engine::check_open`].
    pub fn admits(&self, running: &[&Sequence], tokens: usize, cancel: &Cancel) -> Result<bool> {
        if running.is_empty() || running.len() >= self.max_num_seqs {
            return Ok(running.is_empty());
        }
        let blocks = |tokens: usize| tokens.min(self.context_length()).div_ceil(KV_BLOCK_POSITIONS);
        let grows =
            |running: &&Sequence| blocks(running.most_tokens()).saturating_sub(blocks(running.computed()));
        let wanted = running.iter().map(grows).fold(blocks(tokens), usize::saturating_add);
        Ok(wanted <= self.with_model(cancel, |model| Ok(model.free_blocks()))?)
    }

    /// The next step of each sequence: prompts are read together, some hundred tokens at a time, and so are the
    /// newest tokens of the others. What a sequence gives does not depend on the others.
    ///
    /// A sequence gives None after its last step. It may also give None because another one's timeout stopped
    /// this step, for which the next call makes up. The sequences must be of this engine.
    ///
    /// # Errors
    /// Those of the model; all sequences have ended then.
    pub fn step(&self, sequences: &mut [&mut Sequence], cancel: &Cancel) -> Result<Vec<Option<Step>>> {
        let steps = self.try_step(sequences, cancel);
        if steps.is_err() {
            sequences.iter_mut().for_each(|sequence| sequence.close());
        }
        steps
    }

    fn try_step(&self, sequences: &mut [&mut Sequence], cancel: &Cancel) -> Result<Vec<Option<Step>>> {
        let mut steps: Vec<Option<Step>> = sequences.iter().map(|_| None).collect();
        let (mut reading, mut decoding): (Vec<Stepping>, Vec<Stepping>) = sequences
            .iter_mut()
            .zip(&mut steps)
            .map(|(sequence, step)| Stepping { sequence, step })
            .filter(|stepping| !stepping.sequence.is_finished())
            .partition(|stepping| stepping.sequence.is_at_prompt());
        // A prompt's length decides how it is computed: what is alike goes through the layers together.
        reading.sort_by_key(|stepping| stepping.sequence.prompt_tokens());
        while !reading.is_empty() {
            self.read_prompts(&mut reading, cancel)?;
            reading.retain(|stepping| stepping.step.is_none());
        }
        if !decoding.is_empty() {
            self.decode(&mut decoding, cancel)?;
        }
        Ok(steps)
    }

    /// Reads of the first prompts what one pass takes. Who has read all of theirs get their step, and who is stopped.
    fn read_prompts(&self, reading: &mut [Stepping], cancel: &Cancel) -> Result<()> {
        let started = Instant::now();
        let (mut spans, mut prompt_tokens, mut left) = (Vec::new(), Vec::new(), PREFILL_TOKENS);
        for Stepping { sequence, .. } in reading.iter() {
            if left > 0 {
                let span = sequence.prompt_span(left);
                left -= span.tokens.len();
                spans.push(span);
                prompt_tokens.push(sequence.prompt_tokens());
            }
        }
        let read: Vec<(usize, Rows)> = spans.iter().map(|span| (span.tokens.len(), span.rows)).collect();
        let logits = with_deadline(earliest(&reading[..read.len()]), cancel, |cancel| {
            self.read_spans(&spans, &prompt_tokens, cancel)
        });
        let reading = &mut reading[..read.len()];
        match logits {
            Ok(mut logits) => {
                let mut rows = logits.values.chunks_exact_mut(logits.vocab_size);
                for (Stepping { sequence, step }, (tokens, wanted)) in reading.iter_mut().zip(read) {
                    sequence.add_read(tokens);
                    if let (Rows::Last, Some(row)) = (wanted, rows.next()) {
                        **step = Some(sequence.first_step(row)?);
                    }
                }
            }
            Err(Error::Cancelled) => stop(reading, cancel),
            Err(error) => return Err(error),
        }
        let took = started.elapsed();
        reading.iter_mut().for_each(|stepping| stepping.sequence.add_prefill_time(took));
        Ok(())
    }

    fn decode(&self, decoding: &mut [Stepping], cancel: &Cancel) -> Result<()> {
        let started = Instant::now();
        let spans: Vec<Span> = decoding.iter().map(|stepping| stepping.sequence.decode_span()).collect();
        let logits = with_deadline(earliest(decoding), cancel, |cancel| {
            self.with_model(cancel, |model| model.forward(&spans, cancel))
        });
        match logits {
            Ok(mut logits) => {
                let rows = logits.values.chunks_exact_mut(logits.vocab_size);
                for (Stepping { sequence, step }, row) in decoding.iter_mut().zip(rows) {
                    **step = Some(sequence.decoded(row)?);
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

/// When the first of the sequences must end.
fn earliest(sequences: &[Stepping]) -> Option<Instant> {
    sequences.iter().filter_map(|stepping| stepping.sequence.deadline()).min()
}

/// Ends those of the sequences whose time is over, or all if the caller has cancelled.
fn stop(sequences: &mut [Stepping], cancel: &Cancel) {
    for Stepping { sequence, step } in sequences {
        **step = sequence.stopped(cancel);
    }
}

/// Does `work` with a `Cancel` that stops at the deadline, too.
pub(super) fn with_deadline<T>(
    deadline: Option<Instant>,
    cancel: &Cancel,
    work: impl FnOnce(&Cancel) -> Result<T>,
) -> Result<T> {
    let flag = std::sync::atomic::AtomicBool::new(false);
    let stop = || cancel.is_cancelled() || deadline.is_some_and(|deadline| Instant::now() >= deadline);
    // Asked here too: many steps end before a `Cancel` made for one of them is due to poll.
    if stop() { Err(Error::Cancelled) } else { work(&Cancel::with_poll(&flag, &stop)) }
}
