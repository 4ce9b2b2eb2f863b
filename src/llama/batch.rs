//! Generates for several prompts at once.

use super::{Completion, Llama, Prompt, TextStream};
use crate::engine::FinishReason;
use crate::error::{Error, Result};
use crate::model::Cancel;
use crate::sampling::SamplingOptions;
use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;

/// Maximum prompts of a list that the engine knows at a time.
const MAX_SUBMITTED: usize = 1024;

impl Llama {
    /// Continues each prompt with its own options. The results are those of [`Llama::generate`], in the
    /// order of the prompts, but the engine runs many prompts together. An error of one prompt leaves the
    /// others alone. A cancellation ends the unfinished ones, with the finish reason "cancelled".
    ///
    /// The timeout of a prompt counts while it is tokenised, and then from the moment that the engine knows
    /// it. `progress` is called with the number of results from time to time.
    ///
    /// # Errors
    /// Those of [`Engine::check_open`](crate::engine::Engine::check_open); [`Error::Cancelled`] while prompts
    /// are tokenised. With `all_or_none`, also the first error of a bad prompt or option, before any prompt
    /// runs.
    pub fn generate_all(
        &self,
        prompts: Vec<(Prompt, SamplingOptions)>,
        all_or_none: bool,
        cancel: &Cancel,
        progress: &dyn Fn(usize),
    ) -> Result<Vec<Result<Completion>>> {
        self.engine.check_open()?;
        let mut requests = VecDeque::with_capacity(prompts.len());
        for (prompt, options) in prompts {
            match self.request(prompt, &options, cancel) {
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                Err(error) if all_or_none => return Err(error),
                request => requests.push_back(request),
            }
        }
        let mut results = Vec::with_capacity(requests.len());
        let mut streams: VecDeque<Result<TextStream>> = VecDeque::new();
        loop {
            let mut sequences = Vec::new();
            while streams.len() < MAX_SUBMITTED
                && let Some(request) = requests.pop_front()
            {
                let made = request.and_then(|request| match cancel.is_cancelled() {
                    true => Ok((TextStream::ended(&request.params, Some(FinishReason::Cancelled)), None)),
                    false => self.sequence(request),
                });
                streams.push_back(made.map(|(stream, sequence)| {
                    stream.wait_for_whole();
                    sequences.extend(sequence);
                    stream
                }));
            }
            self.engine.submit(sequences)?;
            let Some(oldest) = streams.pop_front() else { return Ok(results) };
            let flag = AtomicBool::new(false);
            let poll = || {
                let is_done =
                    |stream: &&Result<TextStream>| stream.as_ref().map_or(true, TextStream::is_done);
                progress(results.len() + streams.iter().filter(is_done).count());
                cancel.is_cancelled()
            };
            let result = oldest.and_then(|stream| stream.complete(&Cancel::with_poll(&flag, &poll)));
            if cancel.is_cancelled() {
                // All end together, so that none waits for the others.
                streams.iter().flatten().for_each(TextStream::cancel);
            }
            results.push(result);
            progress(results.len());
        }
    }
}
