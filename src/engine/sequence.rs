//! A prompt and what is generated after it.

use super::Engine;
use crate::error::Result;
use crate::model::{Cancel, Rows, SeqId, Span};
use crate::sampling::{OnOverflow, Sampler, SamplingParams, TokenLogprob, token_logprob};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why a sequence ended, in OpenAI's and vLLM's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token, a stop token or a stop string.
    Stop,
    /// `max_new_tokens`, or the end of the context.
    Length,
    /// `timeout`.
    Timeout,
    /// The caller cancelled.
    Cancelled,
}

impl FinishReason {
    /// "stop", "length", "timeout" or "cancelled".
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Timeout => "timeout",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// Which of the caller's stops it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// One of `stop_token_ids`.
    Token(u32),
    /// One of `stop`.
    String(String),
}

/// How a sequence ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// Which stop of the caller's it was; None for an end token.
    pub stop: Option<StopReason>,
}

impl From<FinishReason> for Finish {
    fn from(reason: FinishReason) -> Self {
        Finish { reason, stop: None }
    }
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability, if asked for.
    pub logprob: Option<TokenLogprob>,
    /// Whether it ended the sequence: an end or stop token, which is no part of the text.
    pub is_stop: bool,
}

/// What one step gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The token; None if the sequence ended before there was one.
    pub token: Option<Token>,
    /// Set on the last step.
    pub finish: Option<Finish>,
}

/// Counts and times of a sequence. Waiting between steps for the caller does not count.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them whose keys and values were there already.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// From the request to the first token; None without one.
    pub time_to_first_token: Option<Duration>,
    /// Reading the prompt and sampling the first token.
    pub prefill: Duration,
    /// Generating all tokens but the first.
    pub decode: Duration,
}

impl Stats {
    /// Tokens of the prompt read per second; None if none was.
    pub fn prefill_tokens_per_second(&self) -> Option<f64> {
        per_second(self.prompt_tokens - self.cached_tokens, self.prefill)
    }

    /// Tokens generated per second after the first; None without a second.
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        per_second(self.completion_tokens.saturating_sub(1), self.decode)
    }
}

fn per_second(count: usize, time: Duration) -> Option<f64> {
    (count > 0 && !time.is_zero()).then(|| count as f64 / time.as_secs_f64())
}

/// A sequence that is being generated. Dropping it gives its keys and values back.
pub struct Sequence {
    engine: Arc<Engine>,
    seq: SeqId,
    prompt: Vec<u32>,
    output: Vec<u32>,
    params: SamplingParams,
    sampler: Sampler,
    /// Tokens that end it: the model's, unless they are to be ignored.
    eos_token_ids: Vec<u32>,
    requested: Instant,
    stats: Stats,
    /// Tokens whose keys and values the model has.
    computed: usize,
    finished: bool,
}

impl Sequence {
    /// Prepares to generate after `prompt`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an empty prompt or ids out of range; [`Error::ContextLength`] if
    /// the prompt leaves no room for a token and is not to be truncated.
    pub fn new(
        engine: &Arc<Engine>,
        mut prompt: Vec<u32>,
        params: SamplingParams,
        eos_token_ids: &[u32],
    ) -> Result<Self> {
        Self::check(engine, &prompt, &params)?;
        let context_length = engine.context_length();
        if prompt.len() >= context_length {
            let room = params.max_new_tokens.clamp(1, context_length - 1);
            prompt.drain(..prompt.len() - (context_length - room));
        }
        let eos_token_ids = if params.ignore_eos { Vec::new() } else { eos_token_ids.to_vec() };
        Ok(Sequence {
            engine: Arc::clone(engine),
            seq: engine.new_seq(),
            sampler: Sampler::new(&params).with_eos_token_ids(&eos_token_ids),
            stats: Stats { prompt_tokens: prompt.len(), ..Stats::default() },
            prompt,
            output: Vec::new(),
            params,
            eos_token_ids,
            requested: Instant::now(),
            computed: 0,
            finished: false,
        })
    }

    /// Checks what [`Sequence::new`] does.
    ///
    /// # Errors
    /// Those of [`Sequence::new`].
    pub fn check(engine: &Engine, prompt: &[u32], params: &SamplingParams) -> Result<()> {
        engine.check_tokens(prompt)?;
        let context_length = engine.context_length();
        let is_refused = params.on_overflow == OnOverflow::Error || context_length < 2;
        if prompt.len() >= context_length && is_refused {
            return Err(engine.too_long(prompt.len()));
        }
        Ok(())
    }

    /// The parameters it is generated with.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Counts and times up to now.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Ends the sequence and gives its keys and values back.
    pub fn close(&mut self) {
        if !self.finished {
            self.finished = true;
            self.engine.free(self.seq);
        }
    }

    /// The next token; None after the last. The first step reads the prompt.
    ///
    /// # Errors
    /// Those of the model; the sequence has ended then.
    pub fn step(&mut self, cancel: &Cancel) -> Result<Option<Step>> {
        let engine = Arc::clone(&self.engine);
        Ok(engine.step(&mut [self], cancel)?.pop().flatten())
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finished
    }

    /// Whether its next step reads the prompt.
    pub(super) fn is_at_prompt(&self) -> bool {
        self.output.is_empty()
    }

    /// Tokens whose keys and values the model has.
    pub(super) fn computed(&self) -> usize {
        self.computed
    }

    /// Prompt and output together at their greatest length, if the context holds it.
    pub(super) fn most_tokens(&self) -> usize {
        self.prompt.len().saturating_add(self.params.max_new_tokens)
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.params.timeout.and_then(|timeout| self.requested.checked_add(timeout))
    }

    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompt.len()
    }

    /// What the model has not seen of the prompt, at most `most` tokens; logits are wanted after the last.
    pub(super) fn prompt_span(&self, most: usize) -> Span<'_> {
        let left = self.prompt.len() - self.computed;
        let tokens = &self.prompt[self.computed..][..left.min(most)];
        let rows = if left <= most { Rows::Last } else { Rows::None };
        Span { seq: self.seq, tokens, start: self.computed, rows }
    }

    /// Says that so many tokens of the prompt have been read.
    pub(super) fn add_read(&mut self, tokens: usize) {
        self.computed += tokens;
    }

    /// The first step, which the logits after the prompt give.
    pub(super) fn first_step(&mut self, logits: &mut [f32]) -> Result<Step> {
        let step = self.sample(logits)?;
        self.stats.time_to_first_token = Some(self.requested.elapsed());
        Ok(step)
    }

    pub(super) fn add_prefill_time(&mut self, took: Duration) {
        self.stats.prefill += took;
    }

    /// What the model has not seen after the first step: the newest token.
    pub(super) fn decode_span(&self) -> Span<'_> {
        let tokens = &self.output[self.output.len().saturating_sub(1)..];
        Span { seq: self.seq, tokens, start: self.computed, rows: Rows::Last }
    }

    /// The step that the logits of [`Self::decode_span`] give.
    pub(super) fn decoded(&mut self, logits: &mut [f32]) -> Result<Step> {
        self.computed += 1;
        self.sample(logits)
    }

    pub(super) fn add_decode_time(&mut self, took: Duration) {
        self.stats.decode += took;
    }

    /// The last step, if the caller has cancelled or it is too late.
    pub(super) fn stopped(&mut self, cancel: &Cancel) -> Option<Step> {
        let is_late = self.deadline().is_some_and(|deadline| Instant::now() >= deadline);
        (is_late || cancel.is_cancelled()).then(|| self.end(cancel))
    }

    fn end(&mut self, cancel: &Cancel) -> Step {
        self.close();
        let reason = if cancel.is_cancelled() { FinishReason::Cancelled } else { FinishReason::Timeout };
        Step { token: None, finish: Some(reason.into()) }
    }

    fn sample(&mut self, logits: &mut [f32]) -> Result<Step> {
        // Log-probabilities are those of the model, before the parameters change the logits.
        let unprocessed = self.params.logprobs.map(|top| (logits.to_vec(), top));
        let id = self.sampler.sample(logits, &self.prompt, &self.output)?;
        let logprob = unprocessed.map(|(logits, top)| token_logprob(&logits, id, top));
        self.output.push(id);
        self.stats.completion_tokens = self.output.len();
        let finish = self.finish_after(id);
        if finish.is_some() {
            self.close();
        }
        let is_stop = finish.as_ref().is_some_and(|finish| finish.reason == FinishReason::Stop);
        Ok(Step { token: Some(Token { id, logprob, is_stop }), finish })
    }

    fn finish_after(&self, id: u32) -> Option<Finish> {
        if self.params.stop_token_ids.contains(&id) {
            return Some(Finish { reason: FinishReason::Stop, stop: Some(StopReason::Token(id)) });
        }
        if self.eos_token_ids.contains(&id) {
            return Some(FinishReason::Stop.into());
        }
        let tokens = self.prompt.len() + self.output.len();
        let full = self.output.len() >= self.params.max_new_tokens || tokens >= self.engine.context_length();
        full.then(|| FinishReason::Length.into())
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.close();
    }
}
