//! Turns the tokens of a sequence into text, and ends it at stop strings.

use super::stop_strings::StopStrings;
use crate::engine::{Finish, FinishReason, Sequence, Stats, Step, StopReason};
use crate::error::Result;
use crate::model::Cancel;
use crate::sampling::TokenLogprob;
use crate::tokenizer::DecodeStream;

/// The result of one step of a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunk {
    /// New text. It never ends in a part of a character or in the start of a stop string.
    pub text: String,
    /// The step's token, if there is one.
    pub token_ids: Vec<u32>,
    /// One for each token, if requested.
    pub logprobs: Option<Vec<TokenLogprob>>,
    /// Set on the last chunk.
    pub finish: Option<Finish>,
    /// Set on the last chunk.
    pub stats: Option<Stats>,
}

/// The whole result of a generation.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The text, without the EOS token or stop string that ended it.
    pub text: String,
    /// All tokens, including the EOS or stop token that ended the text.
    pub token_ids: Vec<u32>,
    /// One for each token, if requested.
    pub logprobs: Option<Vec<TokenLogprob>>,
    /// How it ended.
    pub finish: Finish,
    /// Counts and times.
    pub stats: Stats,
}

impl Completion {
    /// An empty completion, for the chunks of `stream`.
    pub(super) fn new(stream: &TextStream) -> Self {
        Completion {
            text: String::new(),
            token_ids: Vec::new(),
            logprobs: stream.sequence.params().logprobs.map(|_| Vec::new()),
            finish: FinishReason::Cancelled.into(),
            stats: Stats::default(),
        }
    }

    pub(super) fn add(&mut self, chunk: Chunk) {
        self.text += &chunk.text;
        self.token_ids.extend(chunk.token_ids);
        if let (Some(all), Some(new)) = (&mut self.logprobs, chunk.logprobs) {
            all.extend(new);
        }
        self.finish = chunk.finish.unwrap_or_else(|| self.finish.clone());
        self.stats = chunk.stats.unwrap_or(self.stats);
    }
}

/// A generation in progress. Dropping it ends the generation.
pub struct TextStream {
    sequence: Sequence,
    /// None if the model has no tokenizer. The text is empty then.
    decoder: Option<DecodeStream>,
    stops: StopStrings,
    /// The special tokens among the stop strings.
    special_stops: Vec<(u32, String)>,
}

impl TextStream {
    pub(super) fn new(
        sequence: Sequence,
        decoder: Option<DecodeStream>,
        special_stops: Vec<(u32, String)>,
    ) -> Self {
        let params = sequence.params();
        let stops = StopStrings::new(params.stop.clone(), params.include_stop_str);
        TextStream { sequence, decoder, stops, special_stops }
    }

    /// The next chunk; None after the last.
    ///
    /// # Errors
    /// Those of [`Sequence::step`]. An error ends the stream.
    pub fn next_chunk(&mut self, cancel: &Cancel) -> Result<Option<Chunk>> {
        self.sequence.step(cancel)?.map(|step| self.chunk(step)).transpose()
    }

    /// Makes a chunk from a step of the sequence.
    pub(super) fn chunk(&mut self, step: Step) -> Result<Chunk> {
        let mut finish = step.finish;
        let mut text = String::new();
        if let Some(decoder) = &mut self.decoder {
            if let Some(token) = step.token.as_ref().filter(|token| !token.is_stop) {
                text += &decoder.push(token.id)?;
            }
            if finish.is_some() {
                text += &decoder.finish()?;
            }
        }
        let passed = self.stops.push(&text);
        let mut text = passed.text;
        if let Some(stop) = passed.stop {
            self.sequence.close();
            finish = Some(Finish { reason: FinishReason::Stop, stop: Some(StopReason::String(stop)) });
        } else if finish.is_some() {
            text += &self.stops.finish();
        }
        if let Some(Finish { stop: Some(reason), .. }) = &mut finish
            && let StopReason::Token(id) = reason
            && let Some((_, stop)) = self.special_stops.iter().find(|(special, _)| special == id)
        {
            if self.sequence.params().include_stop_str {
                text += stop;
            }
            *reason = StopReason::String(stop.clone());
        }
        let stats = finish.is_some().then(|| self.sequence.stats());
        let logprobs = self
            .sequence
            .params()
            .logprobs
            .map(|_| step.token.iter().filter_map(|token| token.logprob.clone()).collect());
        let token_ids = step.token.iter().map(|token| token.id).collect();
        Ok(Chunk { text, token_ids, logprobs, finish, stats })
    }

    /// Generates to the end.
    ///
    /// # Errors
    /// Those of [`TextStream::next_chunk`].
    pub fn complete(mut self, cancel: &Cancel) -> Result<Completion> {
        let mut completion = Completion::new(&self);
        while let Some(chunk) = self.next_chunk(cancel)? {
            completion.add(chunk);
        }
        Ok(completion)
    }

    pub(super) fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    pub(super) fn sequence_mut(&mut self) -> &mut Sequence {
        &mut self.sequence
    }

    /// Ends the stream and frees its keys and values.
    pub fn close(&mut self) {
        self.sequence.close();
    }
}
