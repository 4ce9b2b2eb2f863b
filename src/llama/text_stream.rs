//! Turns the tokens of a sequence into text, and ends it at stop strings.

use super::stop_strings::StopStrings;
use crate::engine::{Finish, FinishReason, Flow, Sequence, Stats, Step, StopReason, Ticket, TokenSink};
use crate::error::{Error, Result};
use crate::model::Cancel;
use crate::sampling::{SamplingParams, TokenLogprob};
use crate::sys::sync::{Condvar, Mutex};
use crate::tokenizer::DecodeStream;
use std::collections::VecDeque;
use std::sync::Arc;

/// A stream whose reader is this many tokens behind pauses.
const MAX_UNREAD: usize = 64;

/// What was generated since the last chunk.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chunk {
    /// New text. It never ends in a part of a character or in the start of a stop string.
    pub text: String,
    /// The new tokens: one, or more where chunks were joined.
    pub token_ids: Vec<u32>,
    /// One for each token, if requested.
    pub logprobs: Option<Vec<TokenLogprob>>,
    /// Set on the last chunk.
    pub finish: Option<Finish>,
    /// Set on the last chunk.
    pub stats: Option<Stats>,
}

impl Chunk {
    /// Appends the next chunk.
    fn add(&mut self, next: Chunk) {
        self.text += &next.text;
        self.token_ids.extend(next.token_ids);
        if let Some(new) = next.logprobs {
            self.logprobs.get_or_insert_default().extend(new);
        }
        self.finish = next.finish;
        self.stats = next.stats;
    }
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

impl From<Chunk> for Completion {
    fn from(whole: Chunk) -> Self {
        let Chunk { text, token_ids, logprobs, finish, stats } = whole;
        let finish = finish.unwrap_or_else(|| FinishReason::Cancelled.into());
        Completion { text, token_ids, logprobs, finish, stats: stats.unwrap_or_default() }
    }
}

/// What is called when a stream has something to read. It must be quick and must not read at once.
pub type Waker = Box<dyn Fn() + Send>;

/// Text on its way from the engine's thread to the reader.
#[derive(Default)]
struct Unread {
    /// The chunks that were not read yet, oldest first. If the reader wants the whole, they are joined.
    chunks: VecDeque<Chunk>,
    error: Option<Error>,
    /// Whether the engine is done with the sequence.
    is_done: bool,
    /// Whether the reader wants no more.
    is_closed: bool,
    /// Whether the reader wants everything at once, at the end.
    wants_whole: bool,
    /// Whether the engine waits until the chunk is read.
    is_paused: bool,
    /// Whether the waker is called at the end only.
    is_quiet: bool,
    waker: Option<Waker>,
}

impl Unread {
    fn is_ready(&self) -> bool {
        self.is_closed || self.is_done || !self.chunks.is_empty() && !self.wants_whole
    }

    fn add(&mut self, chunk: Chunk) {
        match self.chunks.back_mut() {
            Some(last) if self.wants_whole => last.add(chunk),
            _ => self.chunks.push_back(chunk),
        }
    }

    /// Joins the chunks.
    fn join(&mut self) {
        if let Some(mut joined) = self.chunks.pop_front() {
            self.chunks.drain(..).for_each(|chunk| joined.add(chunk));
            self.chunks.push_back(joined);
        }
    }

    /// The next chunk, or None after the last; an error once. To be called if there is something to read.
    fn take(&mut self) -> Result<Option<Chunk>> {
        if self.is_closed {
            return Ok(None);
        }
        match self.chunks.pop_front() {
            Some(chunk) => Ok(Some(chunk)),
            None => self.error.take().map_or(Ok(None), Err),
        }
    }
}

#[derive(Default)]
struct Outbox {
    unread: Mutex<Unread>,
    arrival: Condvar,
}

impl Outbox {
    /// Changes what is unread, and tells the reader if there is something new to read.
    fn put(&self, change: impl FnOnce(&mut Unread)) {
        let mut unread = self.unread.lock();
        let was_ready = unread.is_ready();
        change(&mut unread);
        if unread.is_ready() {
            self.arrival.notify_all();
            if unread.is_done || !was_ready && !unread.is_quiet {
                unread.waker.iter().for_each(|wake| wake());
            }
        }
    }
}

/// How tokens become text.
pub(super) struct Decoding {
    /// None if the model has no tokenizer. The text is empty then.
    pub(super) decoder: Option<DecodeStream>,
    /// The special tokens among the stop strings.
    pub(super) special_stops: Vec<(u32, String)>,
}

/// The engine's end of a stream.
pub(super) struct TextSink {
    decoding: Decoding,
    stops: StopStrings,
    include_stop_str: bool,
    has_logprobs: bool,
    /// What the reader was not told of yet.
    made: Chunk,
    outbox: Arc<Outbox>,
}

impl TextSink {
    /// Makes a chunk from a step of the sequence.
    fn chunk(&mut self, step: Step, stats: &Stats) -> Result<Chunk> {
        let mut finish = step.finish;
        let mut text = String::new();
        let Decoding { decoder, special_stops } = &mut self.decoding;
        if let Some(decoder) = decoder {
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
            finish = Some(Finish { reason: FinishReason::Stop, stop: Some(StopReason::String(stop)) });
        } else if finish.is_some() {
            text += &self.stops.finish();
        }
        if let Some(Finish { stop: Some(reason), .. }) = &mut finish
            && let StopReason::Token(id) = reason
            && let Some((_, stop)) = special_stops.iter().find(|(special, _)| special == id)
        {
            if self.include_stop_str {
                text += stop;
            }
            *reason = StopReason::String(stop.clone());
        }
        let stats = finish.is_some().then_some(*stats);
        let token_ids = step.token.iter().map(|token| token.id).collect();
        let logprobs =
            self.has_logprobs.then(|| step.token.into_iter().filter_map(|token| token.logprob).collect());
        Ok(Chunk { text, token_ids, logprobs, finish, stats })
    }
}

impl TokenSink for TextSink {
    fn step(&mut self, step: Step, stats: &Stats) -> Result<Flow> {
        let chunk = self.chunk(step, stats)?;
        self.made.add(chunk);
        if self.made.finish.is_some() {
            return Ok(Flow::Stop);
        }
        let mut unread = self.outbox.unread.lock();
        unread.is_paused = unread.chunks.len() + 1 >= MAX_UNREAD && !unread.wants_whole;
        Ok(if unread.is_paused { Flow::Pause } else { Flow::Continue })
    }

    fn wants_whole(&self) -> bool {
        self.outbox.unread.lock().wants_whole
    }

    fn deliver(&mut self) {
        let made = std::mem::take(&mut self.made);
        if made.token_ids.is_empty() && made.finish.is_none() {
            // A part of the prompt was processed.
            return;
        }
        self.outbox.put(|unread| {
            unread.is_done = made.finish.is_some();
            unread.add(made);
        });
    }

    fn fail(&mut self, error: Error) {
        self.deliver();
        self.outbox.put(|unread| (unread.error, unread.is_done) = (Some(error), true));
    }
}

/// A generation in progress. Dropping it ends the generation.
pub struct TextStream {
    outbox: Arc<Outbox>,
    /// None if the sequence ended before it began.
    ticket: Option<Arc<Ticket>>,
    /// The number of the prompt's tokens that are used.
    prompt_tokens: usize,
    has_logprobs: bool,
}

impl TextStream {
    /// A stream, and the sequence that `sequence` makes for it, which is not submitted yet.
    ///
    /// # Errors
    /// Those of `sequence`.
    pub(super) fn new(
        params: &SamplingParams,
        prompt_tokens: usize,
        decoding: Decoding,
        sequence: impl FnOnce(Box<TextSink>) -> Result<Sequence>,
    ) -> Result<(Self, Sequence)> {
        let mut stream = TextStream::ended(params, None);
        let sink = TextSink {
            decoding,
            // A stop string would cut a constrained text before it is complete.
            stops: match params.constraint {
                Some(_) => StopStrings::new(Vec::new(), false),
                None => StopStrings::new(params.stop.clone(), params.include_stop_str),
            },
            include_stop_str: params.include_stop_str,
            has_logprobs: stream.has_logprobs,
            made: Chunk::default(),
            outbox: Arc::clone(&stream.outbox),
        };
        stream.prompt_tokens = prompt_tokens;
        let sequence = sequence(Box::new(sink))?;
        stream.ticket = Some(sequence.ticket());
        Ok((stream, sequence))
    }

    /// A stream that ended before it began: `reason` is its only chunk.
    pub(super) fn ended(params: &SamplingParams, reason: Option<FinishReason>) -> Self {
        let has_logprobs = params.logprobs.is_some();
        let stream = TextStream { outbox: Arc::default(), ticket: None, prompt_tokens: 0, has_logprobs };
        if let Some(reason) = reason {
            let chunk = stream.last_chunk(reason);
            stream.outbox.put(|unread| {
                unread.add(chunk);
                unread.is_done = true;
            });
        }
        stream
    }

    fn last_chunk(&self, reason: FinishReason) -> Chunk {
        Chunk {
            logprobs: self.has_logprobs.then(Vec::new),
            finish: Some(reason.into()),
            stats: Some(Stats { prompt_tokens: self.prompt_tokens, ..Stats::default() }),
            ..Chunk::default()
        }
    }

    /// Waits for the next chunk; None after the last. If `cancel` fires, the chunk's finish reason is
    /// "cancelled".
    ///
    /// # Errors
    /// Those of the engine and the model; an error ends the stream. [`Error::Forked`].
    pub fn next_chunk(&self, cancel: &Cancel) -> Result<Option<Chunk>> {
        let take = |unread: &mut Unread| unread.is_ready().then(|| self.take(unread));
        match &self.ticket {
            None => self.take(&mut self.outbox.unread.lock()),
            Some(ticket) => match self.wait(ticket, cancel, take) {
                Err(Error::Cancelled) => {
                    let mut unread = self.outbox.unread.lock();
                    unread.chunks.push_back(self.last_chunk(FinishReason::Cancelled));
                    unread.join();
                    let chunk = unread.chunks.pop_front();
                    unread.is_closed = true;
                    Ok(chunk)
                }
                taken => taken?,
            },
        }
    }

    fn wait<T>(
        &self,
        ticket: &Ticket,
        cancel: &Cancel,
        take: impl FnMut(&mut Unread) -> Option<T>,
    ) -> Result<T> {
        let wants_whole = {
            ticket.check_process()?;
            let unread = self.outbox.unread.lock();
            if !unread.is_ready() {
                ticket.set_awaited(true);
            }
            unread.wants_whole
        };
        let found = ticket.wait(&self.outbox.unread, &self.outbox.arrival, cancel, take);
        ticket.set_awaited(wants_whole);
        found
    }

    /// What there is to read by now, joined to one chunk, without waiting. If there is a chunk and `quietly`,
    /// the waker is called for the end only, until the next chunk is asked for.
    ///
    /// # Errors
    /// As [`TextStream::next_chunk`].
    pub fn try_next_chunk(&self, quietly: bool) -> Result<Option<Chunk>> {
        self.check_process()?;
        let mut unread = self.outbox.unread.lock();
        unread.join();
        let chunk = self.take(&mut unread)?;
        unread.is_quiet = quietly && chunk.is_some();
        Ok(chunk)
    }

    /// Everything, once the engine is done, without waiting. To be called after
    /// [`TextStream::wait_for_whole`].
    ///
    /// # Errors
    /// As [`TextStream::next_chunk`].
    pub fn try_whole(&self) -> Result<Option<Completion>> {
        self.check_process()?;
        let mut unread = self.outbox.unread.lock();
        if !unread.is_done {
            return Ok(None);
        }
        match unread.error.take() {
            Some(error) => Err(error),
            None => Ok(self.take(&mut unread)?.map(Completion::from)),
        }
    }

    /// Takes what is unread, and continues the sequence if it was paused.
    fn take(&self, unread: &mut Unread) -> Result<Option<Chunk>> {
        self.resume(unread);
        unread.take()
    }

    /// Continues the sequence if it was paused.
    fn resume(&self, unread: &mut Unread) {
        if std::mem::take(&mut unread.is_paused)
            && let Some(ticket) = &self.ticket
        {
            ticket.resume();
        }
    }

    /// Whether the engine is done with the sequence.
    pub fn is_done(&self) -> bool {
        self.outbox.unread.lock().is_done
    }

    /// Whether nothing is left to read, now and later.
    pub fn has_ended(&self) -> bool {
        let unread = self.outbox.unread.lock();
        unread.is_closed || unread.is_done && unread.chunks.is_empty() && unread.error.is_none()
    }

    /// Reads everything at once from now on: the next chunk is the last.
    pub fn wait_for_whole(&self) {
        let mut unread = self.outbox.unread.lock();
        unread.wants_whole = true;
        unread.join();
        self.ticket.iter().for_each(|ticket| ticket.set_awaited(true));
        self.resume(&mut unread);
    }

    /// Calls `waker` from now on whenever there is something to read, on the engine's thread; at once if
    /// there is something already.
    pub fn set_waker(&self, waker: Waker) {
        let mut unread = self.outbox.unread.lock();
        if unread.is_ready() {
            waker();
        }
        self.ticket.iter().for_each(|ticket| ticket.set_awaited(true));
        unread.waker = Some(waker);
    }

    /// Generates to the end.
    ///
    /// # Errors
    /// Those of [`TextStream::next_chunk`].
    pub fn complete(self, cancel: &Cancel) -> Result<Completion> {
        self.check_process()?;
        self.wait_for_whole();
        let mut whole = Chunk { logprobs: self.has_logprobs.then(Vec::new), ..Chunk::default() };
        while let Some(chunk) = self.next_chunk(cancel)? {
            whole.add(chunk);
        }
        Ok(whole.into())
    }

    /// Ends the sequence. Returns at once; the last chunk can still be read.
    pub fn cancel(&self) {
        if let Some(ticket) = &self.ticket {
            ticket.cancel();
        }
    }

    /// Ends the stream and its sequence. Returns at once.
    pub fn close(&self) {
        if self.check_process().is_err() {
            return;
        }
        self.outbox.put(|unread| unread.is_closed = true);
        self.cancel();
    }

    /// # Errors
    /// [`Error::Forked`]: the stream's lock may have been held when this process was forked.
    fn check_process(&self) -> Result<()> {
        self.ticket.as_ref().map_or(Ok(()), |ticket| ticket.check_process())
    }
}

impl Drop for TextStream {
    fn drop(&mut self) {
        self.close();
    }
}
