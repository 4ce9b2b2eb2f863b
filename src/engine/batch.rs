//! Sequences that are generated together: one pass over the weights gives a token of each.

use super::{Engine, Sequence, Step};
use crate::error::{Error, Result};
use crate::kernels::BLOCK_POSITIONS;
use crate::model::{Cancel, Span};
use std::time::Instant;

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
        let blocks = |tokens: usize| tokens.min(self.context_length()).div_ceil(BLOCK_POSITIONS);
        let grows =
            |running: &&Sequence| blocks(running.most_tokens()).saturating_sub(blocks(running.computed()));
        let wanted = running.iter().map(grows).fold(blocks(tokens), usize::saturating_add);
        Ok(wanted <= self.with_model(cancel, |model| Ok(model.free_blocks()))?)
    }

    /// The next step of each sequence: prompts are read one after the other, and the sequences whose prompt
    /// has been read go through the model together. What a sequence gives does not depend on the others.
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
        let mut steps = Vec::with_capacity(sequences.len());
        let mut decoding = Vec::new();
        for sequence in sequences.iter_mut() {
            let reads_prompt = !sequence.is_finished() && sequence.is_at_prompt();
            steps.push(if reads_prompt { Some(sequence.prefill(cancel)?) } else { None });
            decoding.push(!sequence.is_finished() && !reads_prompt);
        }
        let mut together: Vec<(&mut Option<Step>, &mut Sequence)> = steps
            .iter_mut()
            .zip(sequences.iter_mut())
            .zip(decoding)
            .filter_map(|((step, sequence), decodes)| decodes.then_some((step, &mut **sequence)))
            .collect();
        if together.is_empty() {
            return Ok(steps);
        }
        let started = Instant::now();
        let spans: Vec<Span> = together.iter().map(|(_, sequence)| sequence.decode_span()).collect();
        let deadline = together.iter().filter_map(|(_, sequence)| sequence.deadline()).min();
        let logits = with_deadline(deadline, cancel, |cancel| {
            self.with_model(cancel, |model| model.forward(&spans, cancel))
        });
        match logits {
            Ok(mut logits) => {
                let rows = logits.values.chunks_exact_mut(logits.vocab_size);
                for ((step, sequence), row) in together.iter_mut().zip(rows) {
                    **step = Some(sequence.decoded(row)?);
                }
            }
            Err(Error::Cancelled) => {
                for (step, sequence) in &mut together {
                    **step = sequence.stopped(cancel);
                }
            }
            Err(error) => return Err(error),
        }
        let took = started.elapsed();
        together.iter_mut().for_each(|(_, sequence)| sequence.add_decode_time(took));
        Ok(steps)
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
