//! A prompt and the tokens generated after it.

use super::Engine;
use crate::error::Result;
use crate::model::{Cancel, Rows, SeqId, Span};
use crate::sampling::{OnOverflow, Sampler, SamplingParams, TokenLogprob, token_logprob};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why a sequence ended, in OpenAI's and vLLM's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An EOS token, a stop token or a stop string was generated.
    Stop,
    /// `max_new_tokens` or the end of the context was reached.
    Length,
    /// `timeout` was over.
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

/// The caller's stop token or stop string that ended a sequence.
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
    /// The kind of end.
    pub reason: FinishReason,
    /// The caller's stop token or stop string that was generated; None for an EOS token or another reason.
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
    /// Its log-probability, if requested.
    pub logprob: Option<TokenLogprob>,
    /// Whether this is the EOS or stop token that ended the sequence. It is not part of the text.
    pub is_stop: bool,
}

/// The result of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The token; None if the sequence was cancelled or timed out.
    pub token: Option<Token>,
    /// Set on the last step.
    pub finish: Option<Finish>,
}

/// Token counts and times of a sequence. Pauses between steps, made by the caller, are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens whose keys and values were already cached.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Time from the request to the first token; None before it.
    pub time_to_first_token: Option<Duration>,
    /// Time to prefill the prompt and sample the first token.
    pub prefill: Duration,
    /// Time to generate all tokens but the first.
    pub decode: Duration,
}

impl Stats {
    /// Prompt tokens prefilled per second; None if there were none.
    pub fn prefill_tokens_per_second(&self) -> Option<f64> {
        per_second(self.prompt_tokens - self.cached_tokens, self.prefill)
    }

    /// Tokens generated per second, without the first token; None for fewer than two tokens.
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        per_second(self.completion_tokens.saturating_sub(1), self.decode)
    }
}

fn per_second(count: usize, time: Duration) -> Option<f64> {
    (count > 0 && !time.is_zero()).then(|| count as f64 / time.as_secs_f64())
}

/// A sequence that is being generated. Dropping it frees its keys and values.
pub struct Sequence {
    engine: Arc<Engine>,
    seq: SeqId,
    prompt: Vec<u32>,
    output: Vec<u32>,
    params: SamplingParams,
    sampler: Sampler,
    /// The model's EOS tokens, which end the sequence; empty with `ignore_eos`.
    eos_token_ids: Vec<u32>,
    requested: Instant,
    stats: Stats,
    /// Number of tokens whose keys and values are in the KV cache.
    computed: usize,
    finished: bool,
}

impl Sequence {
    /// A new sequence that continues `prompt`. Runs nothing yet.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an empty prompt or ids out of range; [`Error::ContextLength`] if
    /// the prompt leaves no room for a token and `on_overflow` does not truncate it.
    ///
    /// Truncation keeps the longest end of the prompt that leaves room for one token, or for
    /// `min_new_tokens`. So a longer prompt never keeps less than one that fits.
    pub fn new(
        engine: &Arc<Engine>,
        mut prompt: Vec<u32>,
        params: SamplingParams,
        eos_token_ids: &[u32],
    ) -> Result<Self> {
        Self::check(engine, &prompt, &params)?;
        let context_length = engine.context_length();
        if params.on_overflow == OnOverflow::TruncateLeft {
            let room = params.min_new_tokens.clamp(1, context_length - 1);
            prompt.drain(..prompt.len().saturating_sub(context_length - room));
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

    /// A sequence whose timeout was over before its prompt had tokens. Its first step is its last.
    pub fn timed_out(engine: &Arc<Engine>, mut params: SamplingParams) -> Self {
        params.timeout = Some(Duration::ZERO);
        Sequence {
            engine: Arc::clone(engine),
            seq: engine.new_seq(),
            sampler: Sampler::new(&params),
            stats: Stats::default(),
            prompt: Vec::new(),
            output: Vec::new(),
            params,
            eos_token_ids: Vec::new(),
            requested: Instant::now(),
            computed: 0,
            finished: false,
        }
    }

    /// Makes the checks of [`Sequence::new`] without making a sequence.
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

    /// The sampling parameters.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Counts and times so far.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Ends the sequence and frees its keys and values.
    pub fn close(&mut self) {
        if !self.finished {
            self.finished = true;
            self.engine.free(self.seq);
        }
    }

    /// Generates the next token; None after the last. The first step prefills the prompt.
    ///
    /// # Errors
    /// Those of the model. An error ends the sequence.
    pub fn step(&mut self, cancel: &Cancel) -> Result<Option<Step>> {
        let engine = Arc::clone(&self.engine);
        Ok(engine.step(&mut [self], cancel)?.pop().flatten())
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finished
    }

    /// Whether the prompt is still to be prefilled, in whole or in part.
    pub(super) fn needs_prefill(&self) -> bool {
        self.output.is_empty()
    }

    /// Number of tokens whose keys and values are in the KV cache.
    pub(super) fn computed(&self) -> usize {
        self.computed
    }

    /// Maximum length of prompt and output together. The context may be shorter.
    pub(super) fn max_tokens(&self) -> usize {
        self.prompt.len().saturating_add(self.params.max_new_tokens)
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.params.timeout.and_then(|timeout| self.requested.checked_add(timeout))
    }

    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompt.len()
    }

    /// The next `max` tokens of the prompt to prefill, or all if fewer are left. Logits are wanted only after
    /// the prompt's last token.
    pub(super) fn prompt_span(&self, max: usize) -> Span<'_> {
        let left = self.prompt.len() - self.computed;
        let tokens = &self.prompt[self.computed..][..left.min(max)];
        let rows = if left <= max { Rows::Last } else { Rows::None };
        Span { seq: self.seq, tokens, start: self.computed, rows }
    }

    /// Records that the next `tokens` tokens of the prompt have been prefilled.
    pub(super) fn add_prefilled(&mut self, tokens: usize) {
        self.computed += tokens;
    }

    /// Samples the first token from the logits after the prompt.
    pub(super) fn first_step(&mut self, logits: &mut [f32]) -> Result<Step> {
        let step = self.sample(logits)?;
        self.stats.time_to_first_token = Some(self.requested.elapsed());
        Ok(step)
    }

    pub(super) fn add_prefill_time(&mut self, took: Duration) {
        self.stats.prefill += took;
    }

    /// The newest token, which the model has not processed yet.
    pub(super) fn decode_span(&self) -> Span<'_> {
        let tokens = &self.output[self.output.len().saturating_sub(1)..];
        Span { seq: self.seq, tokens, start: self.computed, rows: Rows::Last }
    }

    /// Samples the next token from the logits of [`Self::decode_span`].
    pub(super) fn next_step(&mut self, logits: &mut [f32]) -> Result<Step> {
        self.computed += 1;
        self.sample(logits)
    }

    pub(super) fn add_decode_time(&mut self, took: Duration) {
        self.stats.decode += took;
    }

    /// Ends the sequence if the caller has cancelled or its deadline has passed. Returns its last step then.
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
        // Log-probabilities are reported from the model's logits, before sampling parameters change them.
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
