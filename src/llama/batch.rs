//! Generates for several prompts at once.

use super::{Completion, Llama, Prompt, TextStream};
use crate::engine::Sequence;
use crate::error::{Error, Result};
use crate::model::Cancel;
use crate::sampling::{SamplingOptions, SamplingParams};

/// A prompt whose answer is being generated.
struct Running {
    /// Its index in the list of prompts.
    index: usize,
    stream: TextStream,
    completion: Completion,
}

impl Llama {
    /// Continues each prompt, with the same results as [`Llama::generate`], but several prompts run together.
    /// Returns the completions in the order of the prompts. A cancellation ends the unfinished ones, with the
    /// finish reason "cancelled". The timeout of a prompt counts while it is tokenised, and then from its
    /// start on.
    ///
    /// # Errors
    /// Those of [`Llama::generate`]. All prompts are checked before the first one starts.
    pub fn generate_all(
        &self,
        prompts: Vec<Prompt>,
        options: &SamplingOptions,
        cancel: &Cancel,
    ) -> Result<Vec<Completion>> {
        self.engine.check_open()?;
        let params = SamplingParams::resolve(options, &self.generation, self.engine.vocab_size())?;
        let request = |prompt| self.request(prompt, &params, cancel);
        let prompts = prompts.into_iter().map(request).collect::<Result<Vec<_>>>()?;
        let mut known = prompts.iter().filter_map(|prompt| prompt.ids.as_ref());
        known.try_for_each(|ids| Sequence::check(&self.engine, ids, &params))?;
        let mut completions: Vec<Option<Completion>> = prompts.iter().map(|_| None).collect();
        let mut waiting = prompts.into_iter().enumerate().peekable();
        let mut running: Vec<Running> = Vec::new();
        loop {
            while let Some((_, prompt)) = waiting.peek() {
                let sequences: Vec<&Sequence> = running.iter().map(|one| one.stream.sequence()).collect();
                let prompt_tokens = prompt.ids.as_ref().map_or(0, Vec::len);
                let tokens = prompt_tokens.saturating_add(params.max_new_tokens);
                match self.engine.admits(&sequences, tokens, cancel) {
                    Ok(true) => {}
                    // After a cancellation the next step ends the running sequences.
                    Ok(false) | Err(Error::Cancelled) => break,
                    Err(error) => return Err(error),
                }
                let Some((index, prompt)) = waiting.next() else { break };
                let stream = self.stream_request(prompt, params.clone())?;
                running.push(Running { index, completion: Completion::new(&stream), stream });
            }
            if running.is_empty() {
                return Ok(completions.into_iter().flatten().collect());
            }
            let mut sequences: Vec<&mut Sequence> =
                running.iter_mut().map(|one| one.stream.sequence_mut()).collect();
            let steps = self.engine.step(&mut sequences, cancel)?;
            let mut unfinished = Vec::with_capacity(running.len());
            for (mut one, step) in running.into_iter().zip(steps) {
                let chunk = step.map(|step| one.stream.chunk(step)).transpose()?;
                let is_last = chunk.as_ref().is_some_and(|chunk| chunk.finish.is_some());
                chunk.into_iter().for_each(|chunk| one.completion.add(chunk));
                if is_last {
                    completions[one.index] = Some(one.completion);
                } else {
                    unfinished.push(one);
                }
            }
            running = unfinished;
        }
    }
}
