//! A prompt and the tokens after it: plain data.

use super::output::{Flow, RowSink, Ticket, TokenSink};
use crate::error::{Error, Result};
use crate::kernels::KV_BLOCK_POSITIONS;
use crate::model::{Beginning, Rows, SeqId, Span};
use crate::sampling::{Sampler, SamplingParams, TokenLogprob, token_logprob};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why a sequence ended, in OpenAI's and vLLM's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An EOS token, a stop token or a stop string was generated, or a constrained text is complete.
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

/// Token counts and times of a sequence. Pauses for a slow reader are not counted.
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
    /// Time of the forward passes up to the first token, and to sample it.
    pub prefill: Duration,
    /// Time of the passes that generated all tokens but the first.
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

/// What a sequence is run for.
pub(super) enum Task {
    /// To generate tokens after its prompt.
    Generate(Box<Generate>),
    /// For the logits of given tokens.
    Rows {
        /// The first row whose logits are wanted; all later ones are wanted too.
        first: usize,
        /// Maximum rows of logits at a time.
        max: usize,
        /// Takes them.
        sink: Box<dyn RowSink>,
    },
}

/// How a sequence ended.
pub(super) enum Ending {
    /// All tokens were generated, or all rows computed.
    Complete,
    /// By its caller or its deadline.
    Stopped(FinishReason),
    Failed(Error),
}

/// How to choose tokens, and who receives them.
pub(super) struct Generate {
    pub(super) params: SamplingParams,
    pub(super) sampler: Sampler,
    /// The model's EOS tokens, which end the sequence; empty with `ignore_eos`.
    pub(super) eos_token_ids: Vec<u32>,
    /// Whether a prompt that begins with the prompt and the answer will probably follow.
    pub(super) is_turn: bool,
    pub(super) sink: Box<dyn TokenSink>,
}

/// A sequence of tokens and its state. [`super::Engine`] makes and runs it.
pub struct Sequence {
    /// Its number, in the order of requests.
    pub(super) seq: SeqId,
    /// The prompt and the tokens generated so far.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_tokens: usize,
    /// Number of tokens whose keys and values are in the KV cache.
    pub(super) computed: usize,
    /// Number of tokens that have room in the KV cache, if that is more: those of a pass that pauses.
    pub(super) reserved: usize,
    /// Whether the model knows the sequence.
    pub(super) has_begun: bool,
    /// Whether its prompt is in the metrics.
    pub(super) is_counted: bool,
    /// Only sequences with equal salts share keys and values.
    pub(super) salt: Arc<str>,
    pub(super) task: Task,
    pub(super) ticket: Arc<Ticket>,
    pub(super) requested: Instant,
    pub(super) deadline: Option<Instant>,
    pub(super) stats: Stats,
    /// The number of the last pass that it was in; 0 before the first.
    pub(super) last_pass: u64,
    /// Whether its reader is slow, so that it must pause after the pass.
    pub(super) is_paused: bool,
}

impl Sequence {
    /// What its caller stops it with.
    pub fn ticket(&self) -> Arc<Ticket> {
        Arc::clone(&self.ticket)
    }

    /// Says that this is a turn of a conversation: the next prompt will probably begin with the prompt and
    /// the answer. The engine prepares that when it has nothing else to do.
    pub fn set_turn(&mut self) {
        if let Task::Generate(generate) = &mut self.task {
            generate.is_turn = true;
        }
    }

    /// Number of tokens whose keys and values are not in the KV cache.
    pub(super) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// KV blocks that the next `tokens` tokens need.
    pub(super) fn growth(&self, tokens: usize) -> usize {
        blocks(self.computed + tokens).saturating_sub(blocks(self.computed.max(self.reserved)))
    }

    /// Whether only the newest token is to be processed, and it was generated.
    pub(super) fn decodes(&self) -> bool {
        self.pending() == 1 && self.tokens.len() > self.prompt_tokens
    }

    /// Whether the reader waits for the next token, not only for the end.
    pub(super) fn is_streamed(&self) -> bool {
        matches!(&self.task, Task::Generate(generate) if !generate.sink.wants_whole())
    }

    /// How many leading tokens need not be processed if their keys and values are cached: logits are wanted
    /// of a later token.
    pub(super) fn reusable(&self) -> usize {
        match &self.task {
            Task::Generate(_) => self.tokens.len() - 1,
            Task::Rows { first, .. } => *first,
        }
    }

    /// What the model needs to know before the first span.
    pub(super) fn beginning(&self) -> Beginning<'_> {
        Beginning {
            tokens: &self.tokens,
            prompt_tokens: self.prompt_tokens,
            reusable: self.reusable(),
            salt: &self.salt,
        }
    }

    /// The next span, of at most `max` tokens. Its rows of logits are wanted, or only the one after the
    /// newest token, or none.
    pub(super) fn span(&self, max: usize) -> Span<'_> {
        let (start, left) = (self.computed, self.pending());
        let (len, rows) = match &self.task {
            Task::Generate(_) if left <= max => (left, Rows::Last),
            Task::Generate(_) => (max, Rows::None),
            // No span crosses `first`, so that the logits of all of its rows or of none are wanted.
            Task::Rows { first, .. } if start < *first => (max.min(*first - start), Rows::None),
            Task::Rows { max: most, .. } => (left.min(max).min(*most), Rows::All),
        };
        Span { seq: self.seq, tokens: &self.tokens[start..start + len], start, rows }
    }

    /// Whether the caller has cancelled or the deadline has passed.
    pub(super) fn stop_reason(&self, now: Instant) -> Option<FinishReason> {
        if self.ticket.is_cancelled() {
            Some(FinishReason::Cancelled)
        } else {
            self.deadline.is_some_and(|deadline| now >= deadline).then_some(FinishReason::Timeout)
        }
    }

    /// Passes on what a forward pass gave: a step, no step yet, or an error.
    ///
    /// # Errors
    /// The error, or one of the sink's.
    pub(super) fn take(&mut self, step: Result<Option<Step>>) -> Result<Flow> {
        let is_complete = self.pending() == 0;
        match (step?, &mut self.task) {
            (Some(step), Task::Generate(generate)) => {
                let is_last = step.finish.is_some();
                let flow = generate.sink.step(step, &self.stats)?;
                Ok(if is_last { Flow::Stop } else { flow })
            }
            (None, Task::Rows { .. }) if is_complete => Ok(Flow::Stop),
            _ => Ok(Flow::Continue),
        }
    }

    /// Tells the reader how the sequence has ended.
    pub(super) fn end(self, ending: Ending) {
        match (self.task, ending) {
            (Task::Generate(mut generate), Ending::Complete) => generate.sink.deliver(),
            (Task::Generate(mut generate), Ending::Stopped(reason)) => {
                let step = Step { token: None, finish: Some(reason.into()) };
                match generate.sink.step(step, &self.stats) {
                    Ok(_) => generate.sink.deliver(),
                    Err(error) => generate.sink.fail(error),
                }
            }
            (Task::Generate(mut generate), Ending::Failed(error)) => generate.sink.fail(error),
            (Task::Rows { mut sink, .. }, Ending::Complete) => sink.end(Ok(())),
            (Task::Rows { mut sink, .. }, Ending::Stopped(_)) => sink.end(Err(Error::Cancelled)),
            (Task::Rows { mut sink, .. }, Ending::Failed(error)) => sink.end(Err(error)),
        }
    }
}

/// The number of KV blocks of so many tokens.
pub(super) fn blocks(tokens: usize) -> usize {
    tokens.div_ceil(KV_BLOCK_POSITIONS)
}

impl Generate {
    /// Draws the next token from a row of logits.
    ///
    /// # Errors
    /// Those of [`Sampler::sample`] and [`Sampler::accept`].
    pub(super) fn sample(
        &mut self,
        logits: &mut [f32],
        tokens: &mut Vec<u32>,
        prompt_tokens: usize,
        context_length: usize,
    ) -> Result<Step> {
        // Log-probabilities are reported from the model's logits, before sampling parameters change them.
        let unprocessed = self.params.logprobs.map(|top| (logits.to_vec(), top));
        let id = self.sampler.sample(logits, tokens, prompt_tokens)?;
        let logprob = unprocessed.map(|(logits, top)| token_logprob(&logits, id, top));
        tokens.push(id);
        let stop = self.stop_at(id);
        let is_stop = stop.is_some();
        let finish = match stop {
            Some(finish) => Some(finish),
            None if self.sampler.accept(id)? => Some(FinishReason::Stop.into()),
            None => {
                let count = tokens.len() - prompt_tokens;
                let is_last = count >= self.params.max_new_tokens || tokens.len() >= context_length;
                is_last.then(|| FinishReason::Length.into())
            }
        };
        Ok(Step { token: Some(Token { id, logprob, is_stop }), finish })
    }

    /// How the sequence ends if `id` is an EOS or stop token.
    fn stop_at(&self, id: u32) -> Option<Finish> {
        if self.params.stop_token_ids.contains(&id) {
            return Some(Finish { reason: FinishReason::Stop, stop: Some(StopReason::Token(id)) });
        }
        self.eos_token_ids.contains(&id).then(|| FinishReason::Stop.into())
    }
}
