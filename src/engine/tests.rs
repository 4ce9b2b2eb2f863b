//! Tests of the engine, over a model that only counts.

use super::output::{Flow, Ticket, TokenSink};
use super::*;
use crate::config::GenerationConfig;
use crate::error::{Error, Result};
use crate::kernels::KV_BLOCK_POSITIONS;
use crate::model::{Beginning, Cancel, KvBlocks, Logits, Model, Rows, SeqId, Span, Storage};
use crate::sampling::{OnOverflow, SamplingOptions, SamplingParams};
use crate::sys::sync::{Condvar, Mutex};
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

mod long_prompts;
mod rereads;

const VOCAB: usize = 50;

/// The spans of one forward pass: (start, tokens, rows of logits).
type Pass = Vec<(usize, usize, usize)>;

/// A span: its sequence, the position of its first token, and how many tokens it has.
type Place = (SeqId, usize, usize);

fn place(span: &Span) -> Place {
    (span.seq, span.start, span.tokens.len())
}

/// What a test sees of the model.
#[derive(Default)]
struct Seen {
    passes: Mutex<Vec<Pass>>,
    /// KV blocks that sequences hold.
    blocks: Mutex<usize>,
    /// How often a pass has paused.
    pauses: Mutex<usize>,
    /// Passes that failed.
    failures: Mutex<usize>,
}

/// A model whose next token follows from all tokens so far. It records its passes, counts KV blocks, and
/// keeps prefixes of whole blocks.
struct Counter {
    next: fn(&[u32]) -> u32,
    sequences: HashMap<SeqId, Vec<u32>>,
    prefixes: Option<Vec<Vec<u32>>>,
    /// Whether it keeps no prefix with the last token of a prompt, or with a generated one.
    keeps_prompts: bool,
    total_blocks: usize,
    max_spans: usize,
    /// Between these a pass over prompts can pause.
    stages: usize,
    /// The pass that pauses, and how many stages are done.
    paused: Option<(Vec<Place>, usize)>,
    /// A pass with this token fails.
    fails_at: Option<u32>,
    panics_at: Option<u32>,
    /// The time that a row takes.
    delay: Duration,
    seen: Arc<Seen>,
}

impl Default for Counter {
    fn default() -> Self {
        Counter {
            next: |tokens| (tokens[tokens.len() - 1] + 1) % VOCAB as u32,
            sequences: HashMap::new(),
            prefixes: None,
            keeps_prompts: false,
            total_blocks: 1000,
            max_spans: usize::MAX,
            stages: 8,
            paused: None,
            fails_at: None,
            panics_at: None,
            delay: Duration::ZERO,
            seen: Arc::default(),
        }
    }
}

/// A token that follows from all tokens so far.
fn mixed(tokens: &[u32]) -> u32 {
    tokens.iter().fold(7, |sum, token| (sum * 31 + token + 1) % VOCAB as u32)
}

fn blocks(tokens: usize) -> usize {
    tokens.div_ceil(KV_BLOCK_POSITIONS)
}

impl Counter {
    fn used(&self) -> usize {
        let held: usize = self.sequences.values().map(|tokens| blocks(tokens.len())).sum();
        let places = self.paused.iter().flat_map(|(places, _)| places);
        held + places.map(|&(_, start, len)| blocks(start + len) - blocks(start)).sum::<usize>()
    }

    /// Does nothing for as long as so many rows take.
    fn sleep(&self, rows: usize, cancel: &Cancel) -> Result<()> {
        for _ in 0..rows {
            std::thread::sleep(self.delay);
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
        }
        Ok(())
    }

    /// The stages of a pass that pauses. Returns whether all are done.
    fn run_stages(
        &mut self,
        spans: &[Span],
        pauses: &mut dyn FnMut() -> bool,
        cancel: &Cancel,
    ) -> Result<bool> {
        let places: Vec<Place> = spans.iter().map(place).collect();
        let (known, mut done) = self.paused.take().unwrap_or_else(|| (places.clone(), 0));
        assert_eq!(known, places, "the pass goes on with the same spans");
        let rows: usize = spans.iter().map(|span| span.tokens.len()).sum();
        while done < self.stages {
            let of_stage = rows * (done + 1) / self.stages - rows * done / self.stages;
            self.sleep(of_stage, cancel)?;
            done += 1;
            if done < self.stages && pauses() {
                self.paused = Some((places, done));
                assert!(self.used() <= self.total_blocks, "the scheduler counts blocks");
                *self.seen.pauses.lock() += 1;
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Model for Counter {
    fn forward(&mut self, spans: &[Span], cancel: &Cancel) -> Result<Logits> {
        assert!(!spans.is_empty() && spans.len() <= self.max_spans);
        let mut values = Vec::new();
        let mut after = self.sequences.clone();
        for span in spans {
            let tokens = after.entry(span.seq).or_default();
            assert_eq!(tokens.len(), span.start, "positions follow each other");
            for &token in span.tokens {
                self.sleep(1, cancel)?;
                assert!(self.panics_at != Some(token), "out of luck");
                if self.fails_at == Some(token) {
                    *self.seen.failures.lock() += 1;
                    return Err(Error::Generation { reason: "out of luck".into() });
                }
                tokens.push(token);
                let is_last = tokens.len() == span.start + span.tokens.len();
                if span.rows == Rows::All || span.rows == Rows::Last && is_last {
                    let mut row = vec![0.0; VOCAB];
                    row[(self.next)(tokens) as usize] = 9.0;
                    values.extend(row);
                }
            }
        }
        self.sequences = after;
        assert!(self.used() <= self.total_blocks, "the scheduler counts blocks");
        if let Some(prefixes) = &mut self.prefixes {
            let kept = |seq: &SeqId| {
                let none = |span: &Span| span.seq == *seq && span.rows == Rows::None;
                !self.keeps_prompts || spans.iter().any(none)
            };
            for (_, tokens) in self.sequences.iter().filter(|(seq, _)| kept(seq)) {
                let whole = tokens[..tokens.len() / KV_BLOCK_POSITIONS * KV_BLOCK_POSITIONS].to_vec();
                if !prefixes.contains(&whole) {
                    prefixes.push(whole);
                }
            }
        }
        *self.seen.blocks.lock() = self.used();
        let pass = spans.iter().map(|span| (span.start, span.tokens.len(), span.wanted())).collect();
        self.seen.passes.lock().push(pass);
        Ok(Logits { values, vocab_size: VOCAB })
    }

    fn forward_until(
        &mut self,
        spans: &[Span],
        pauses: &mut dyn FnMut() -> bool,
        cancel: &Cancel,
    ) -> Result<Option<Logits>> {
        if !self.run_stages(spans, pauses, cancel)? {
            return Ok(None);
        }
        let delay = std::mem::take(&mut self.delay);
        let logits = self.forward(spans, cancel);
        self.delay = delay;
        logits.map(Some)
    }

    fn stages(&self) -> usize {
        self.stages
    }

    fn begin(&mut self, seq: SeqId, beginning: &Beginning) -> usize {
        let known = self.prefixes.iter().flatten();
        let cached = known
            .filter(|prefix| prefix.len() <= beginning.reusable && beginning.tokens.starts_with(prefix))
            .map(Vec::len)
            .max()
            .unwrap_or(0);
        let before = self.sequences.insert(seq, beginning.tokens[..cached].to_vec());
        assert!(before.is_none(), "a sequence begins once");
        cached
    }

    fn free(&mut self, seq: SeqId) {
        assert!(self.sequences.remove(&seq).is_some(), "a sequence is freed once");
        if let Some((places, _)) = &mut self.paused {
            places.retain(|(other, ..)| *other != seq);
        }
        self.paused.take_if(|(places, _)| places.is_empty());
        *self.seen.blocks.lock() = self.used();
    }

    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn max_num_seqs(&self) -> usize {
        3
    }

    fn max_spans(&self) -> usize {
        self.max_spans
    }

    fn min_rows(&self) -> usize {
        16
    }

    fn shares_prefixes(&self) -> bool {
        self.prefixes.is_some()
    }

    fn kv_blocks(&self) -> KvBlocks {
        KvBlocks { total: self.total_blocks, free: self.total_blocks - self.used(), cached: 0 }
    }

    fn storage(&self) -> Vec<Storage> {
        Vec::new()
    }
}

fn start(model: Counter, context_length: usize) -> (Engine, Arc<Seen>) {
    let seen = Arc::clone(&model.seen);
    let options = EngineOptions { context_length, max_num_seqs: None };
    (Engine::new(Box::new(model), options).unwrap(), seen)
}

fn params(max_new_tokens: usize) -> SamplingParams {
    let options = SamplingOptions { max_new_tokens: Some(max_new_tokens as i64), ..Default::default() };
    SamplingParams::resolve(&options, &GenerationConfig::default(), VOCAB).unwrap()
}

/// What a reader was told.
#[derive(Default)]
struct Read {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    stats: Stats,
    end: Option<Result<Finish>>,
}

/// A sequence's tokens, for its reader.
struct Reader {
    place: Arc<(Mutex<Read>, Condvar)>,
    ticket: Arc<Ticket>,
}

struct Sink {
    place: Arc<(Mutex<Read>, Condvar)>,
    steps: Vec<(Step, Stats)>,
    /// Pauses after this many tokens.
    pauses_after: usize,
    wants_whole: bool,
}

impl TokenSink for Sink {
    fn wants_whole(&self) -> bool {
        self.wants_whole
    }

    fn step(&mut self, step: Step, stats: &Stats) -> Result<Flow> {
        self.steps.push((step, *stats));
        let count = self.place.0.lock().tokens.len() + self.steps.len();
        Ok(if count == self.pauses_after { Flow::Pause } else { Flow::Continue })
    }

    fn deliver(&mut self) {
        let (read, arrival) = &*self.place;
        let mut read = read.lock();
        for (step, stats) in self.steps.drain(..) {
            assert!(read.end.is_none(), "nothing follows the end");
            read.logprobs.extend(step.token.iter().filter_map(|token| Some(token.logprob.as_ref()?.logprob)));
            read.tokens.extend(step.token.iter().map(|token| token.id));
            read.stats = stats;
            read.end = step.finish.map(Ok);
        }
        arrival.notify_one();
    }

    fn fail(&mut self, error: Error) {
        self.deliver();
        self.place.0.lock().end = Some(Err(error));
        self.place.1.notify_one();
    }
}

impl Reader {
    fn new(engine: &Engine, prompt: Vec<u32>, params: SamplingParams) -> Result<Self> {
        Reader::pausing(engine, prompt, params, &[], usize::MAX)
    }

    /// A turn of a conversation.
    fn turn(engine: &Engine, prompt: Vec<u32>, params: SamplingParams) -> Self {
        Reader::with(engine, prompt, params, &[], usize::MAX, false, Sequence::set_turn).unwrap()
    }

    /// Waits only for the end.
    fn whole(engine: &Engine, prompt: Vec<u32>, params: SamplingParams) -> Self {
        Reader::with(engine, prompt, params, &[], usize::MAX, true, |_| ()).unwrap()
    }

    fn pausing(
        engine: &Engine,
        prompt: Vec<u32>,
        params: SamplingParams,
        eos_token_ids: &[u32],
        pauses_after: usize,
    ) -> Result<Self> {
        Reader::with(engine, prompt, params, eos_token_ids, pauses_after, false, |_| ())
    }

    fn with(
        engine: &Engine,
        prompt: Vec<u32>,
        params: SamplingParams,
        eos_token_ids: &[u32],
        pauses_after: usize,
        wants_whole: bool,
        prepare: fn(&mut Sequence),
    ) -> Result<Self> {
        let place = Arc::default();
        let sink = Box::new(Sink { place: Arc::clone(&place), steps: Vec::new(), pauses_after, wants_whole });
        let mut sequence = engine.generate(prompt, params, eos_token_ids, None, sink)?;
        prepare(&mut sequence);
        let ticket = sequence.ticket();
        ticket.set_awaited(true);
        engine.submit(vec![sequence])?;
        Ok(Reader { place, ticket })
    }

    /// Waits until so many tokens have come, or the end.
    fn wait(&self, tokens: usize) {
        let (read, arrival) = &*self.place;
        let enough = |read: &mut Read| (read.tokens.len() >= tokens || read.end.is_some()).then_some(());
        self.ticket.wait(read, arrival, &Cancel::never(), enough).unwrap();
    }

    /// Waits for the end; returns the tokens and the end.
    fn end(&self) -> (Vec<u32>, Result<Finish>) {
        self.wait(usize::MAX);
        let mut read = self.place.0.lock();
        assert_eq!(read.stats.completion_tokens, read.tokens.len());
        (read.tokens.clone(), read.end.take().unwrap())
    }
}

/// Runs a sequence to its end; returns its tokens and how it ended.
fn run(engine: &Engine, prompt: Vec<u32>, params: SamplingParams, eos: &[u32]) -> (Vec<u32>, Finish) {
    let (tokens, end) = Reader::pausing(engine, prompt, params, eos, usize::MAX).unwrap().end();
    (tokens, end.unwrap())
}

/// The tokens that [`mixed`] generates after a prompt.
fn reference(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(mixed(&tokens));
    }
    tokens.split_off(prompt.len())
}

#[test]
fn tokens_follow_until_the_length_is_reached() {
    let (engine, seen) = start(Counter::default(), 100);
    assert_eq!(run(&engine, vec![5, 6], params(3), &[]), (vec![7, 8, 9], FinishReason::Length.into()));
    assert_eq!(*seen.passes.lock(), [[(0, 2, 1)], [(2, 1, 1)], [(3, 1, 1)]]);
    assert_eq!(*seen.blocks.lock(), 0, "blocks are free when the reader knows of the end");
}

#[test]
fn eos_and_stop_tokens_end_a_sequence_and_are_reported() {
    let (engine, _) = start(Counter::default(), 100);
    let run = |params| run(&engine, vec![1], params, &[4]);
    assert_eq!(run(params(9)), (vec![2, 3, 4], FinishReason::Stop.into()));
    let ignoring = SamplingParams { ignore_eos: true, ..params(5) };
    assert_eq!(run(ignoring), (vec![2, 3, 4, 5, 6], FinishReason::Length.into()));
    let stopping = SamplingParams { stop_token_ids: vec![3], ..params(9) };
    let stop = Some(StopReason::Token(3));
    assert_eq!(run(stopping), (vec![2, 3], Finish { reason: FinishReason::Stop, stop }));
    let at_least = SamplingParams { min_new_tokens: 4, ..params(9) };
    let (tokens, _) = run(at_least);
    assert!(tokens.len() >= 4 && !tokens[..3].contains(&4), "{tokens:?}");
}

#[test]
fn a_full_context_finishes_with_length_and_a_longer_prompt_is_an_error() {
    let (engine, _) = start(Counter::default(), 4);
    assert_eq!(run(&engine, vec![1, 2], params(9), &[]), (vec![3, 4], FinishReason::Length.into()));
    for prompt in [vec![1; 4], vec![1; 9]] {
        let prompt_tokens = prompt.len();
        match Reader::new(&engine, prompt, params(1)).err() {
            Some(Error::ContextLength { prompt_tokens: got, context_length: 4 }) => {
                assert_eq!(got, prompt_tokens);
            }
            other => panic!("{other:?}"),
        }
    }
    for (min_new_tokens, tokens) in [(0, vec![3]), (2, vec![3, 4])] {
        let on_overflow = OnOverflow::TruncateLeft;
        let truncating = SamplingParams { on_overflow, min_new_tokens, ..params(2) };
        assert_eq!(engine.used_tokens(5, &truncating), 4 - tokens.len());
        assert_eq!(run(&engine, vec![9, 9, 9, 1, 2], truncating, &[]).0, tokens);
    }
}

#[test]
fn bad_prompts_are_refused() {
    let (engine, _) = start(Counter::default(), 100);
    for prompt in [vec![], vec![VOCAB as u32], vec![1, u32::MAX]] {
        assert!(matches!(Reader::new(&engine, prompt, params(1)), Err(Error::InvalidArgument { .. })));
    }
}

#[test]
fn long_prompts_take_several_passes() {
    let (engine, seen) = start(Counter::default(), 5000);
    let prompt: Vec<u32> = (0..1100).map(|i| i % VOCAB as u32).collect();
    let passes = || seen.passes.lock().drain(..).flatten().collect::<Pass>();
    assert_eq!(run(&engine, prompt.clone(), params(1), &[]).0, [1100 % VOCAB as u32]);
    assert_eq!(passes(), [(0, 512, 0), (512, 512, 0), (1024, 76, 1)]);

    let logits = engine.logits(&prompt, Some(90), &Cancel::never()).unwrap();
    assert_eq!(logits.rows(), 90);
    for (row, &token) in logits.values.chunks(VOCAB).zip(&prompt[1010..]) {
        assert_eq!(row[(token as usize + 1) % VOCAB], 9.0);
    }
    assert_eq!(passes(), [(0, 512, 0), (512, 498, 0), (1010, 90, 90)]);
    assert_eq!(engine.logits(&prompt, None, &Cancel::never()).unwrap().rows(), 1100);
    for last in [0, 1101] {
        assert!(engine.logits(&prompt, Some(last), &Cancel::never()).is_err());
    }
}

#[test]
fn given_tokens_are_scored_each_after_those_before_it() {
    let (engine, seen) = start(Counter::default(), 6);
    let likely = 9.0 - (9.0_f64.exp() + (VOCAB - 1) as f64).ln();
    let scores = engine.score(&[3, 4, 5, 9, 10, 11, 12], 2, &Cancel::never()).unwrap();
    let expected = [likely, likely - 9.0, likely, likely, likely];
    assert_eq!(scores.len(), expected.len());
    for (score, expected) in scores.iter().zip(expected) {
        assert!((f64::from(score.logprob) - expected).abs() < 1e-5);
        assert_eq!(score.is_greedy, expected == likely);
    }
    // The model does not process the last token, so one more than the context holds can be scored.
    assert_eq!(*seen.passes.lock(), [[(0, 1, 0)], [(1, 5, 5)]]);
    assert_eq!(*seen.blocks.lock(), 0);
    assert!(matches!(
        engine.score(&[1; 8], 1, &Cancel::never()),
        Err(Error::ContextLength { prompt_tokens: 8, context_length: 6 })
    ));
    for (tokens, first) in [(vec![], 1), (vec![1], 1), (vec![1, 2], 0), (vec![1, 2], 2), (vec![1, 50], 1)] {
        let error = engine.score(&tokens, first, &Cancel::never()).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
    }
}

#[test]
fn log_probabilities_come_from_the_model_s_logits() {
    let (engine, _) = start(Counter::default(), 100);
    let asking = SamplingParams { logprobs: Some(2), repetition_penalty: 1.5, ..params(1) };
    let reader = Reader::new(&engine, vec![1], asking).unwrap();
    assert_eq!(reader.end().0, [2]);
    let expected = 9.0 - (9.0_f64.exp() + (VOCAB - 1) as f64).ln();
    assert!((f64::from(reader.place.0.lock().logprobs[0]) - expected).abs() < 1e-5);
}

#[test]
fn cancelling_and_a_timeout_end_a_sequence_with_their_reason() {
    let (engine, seen) = start(Counter { delay: Duration::from_millis(4), ..Counter::default() }, 1000);
    let reader = Reader::new(&engine, vec![1], params(900)).unwrap();
    let late = SamplingParams { timeout: Some(Duration::from_millis(60)), ..params(900) };
    let late = Reader::new(&engine, vec![11], late).unwrap();
    let alive = Reader::new(&engine, vec![21], params(40)).unwrap();
    reader.wait(2);
    reader.ticket.cancel();
    assert_eq!(reader.end().1.unwrap(), FinishReason::Cancelled.into());
    let (tokens, end) = late.end();
    assert_eq!(end.unwrap(), FinishReason::Timeout.into());
    assert!(tokens.len() < 20, "{}", tokens.len());
    assert_eq!(alive.end().0, (22..62).map(|token| token % VOCAB as u32).collect::<Vec<_>>());
    assert_eq!(*seen.blocks.lock(), 0);
}

#[test]
fn a_long_prompt_is_cancelled_within_its_pass() {
    let (engine, seen) = start(Counter { delay: Duration::from_millis(5), ..Counter::default() }, 1000);
    let started = Instant::now();
    let poll = || started.elapsed() > Duration::from_millis(30);
    for scores in [false, true] {
        let flag = AtomicBool::new(false);
        let cancel = Cancel::with_poll(&flag, &poll);
        if scores {
            assert!(matches!(engine.score(&[1; 500], 1, &cancel), Err(Error::Cancelled)));
        } else {
            let reader = Reader::new(&engine, vec![1; 500], params(1)).unwrap();
            let (read, arrival) = &*reader.place;
            let end = reader.ticket.wait(read, arrival, &cancel, |read| read.end.take()).unwrap();
            assert_eq!(end.unwrap(), FinishReason::Cancelled.into());
        }
    }
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(*seen.blocks.lock(), 0);
}

#[test]
fn a_reader_gives_up_soon_after_it_is_cancelled() {
    let begun = |delay| {
        let (engine, _) = start(Counter { delay, ..Counter::default() }, 1000);
        let reader = Reader::new(&engine, vec![1], params(1)).unwrap();
        let (read, arrival) = &*reader.place;
        let (flag, begun) = (AtomicBool::new(false), Instant::now());
        let end =
            reader.ticket.wait(read, arrival, &Cancel::with_poll(&flag, &|| true), |read| read.end.take());
        assert!(matches!(end, Err(Error::Cancelled)));
        begun.elapsed()
    };
    // A row that cannot be interrupted. The best of three: a busy machine may delay any of them.
    let best = (0..3).map(|_| begun(Duration::from_millis(400))).min().unwrap();
    assert!(best < Duration::from_millis(190), "{best:?}");
}

#[test]
fn an_error_ends_only_the_sequence_that_causes_it() {
    let (engine, seen) = start(Counter { fails_at: Some(8), ..Counter::default() }, 1000);
    let readers = [1, 5, 20].map(|first| Reader::new(&engine, vec![first], params(9)).unwrap());
    let ends = readers.map(|reader| reader.end());
    assert!(matches!(ends[1].1, Err(Error::Generation { .. })));
    assert_eq!(ends[1].0, [6, 7, 8], "the token is generated; processing it fails");
    assert!(matches!(ends[0].1, Err(Error::Generation { .. })));
    assert_eq!(ends[2].0, (21..30).collect::<Vec<_>>());
    assert!(matches!(engine.score(&[7, 8, 9], 1, &Cancel::never()), Err(Error::Generation { .. })));
    assert_eq!(run(&engine, vec![1], params(1), &[]).0, [2], "the engine stays usable");
    assert_eq!(*seen.blocks.lock(), 0);
}

#[test]
fn a_panic_ends_all_sequences_and_later_calls_say_so() {
    let (engine, _) = start(Counter { panics_at: Some(9), ..Counter::default() }, 1000);
    let readers = [1, 7, 20].map(|first| Reader::new(&engine, vec![first], params(40)).unwrap());
    for reader in readers {
        assert!(matches!(reader.end().1, Err(Error::Internal { reason }) if reason.contains("out of luck")));
    }
    for _ in 0..2 {
        let error = engine.score(&[1, 2], 1, &Cancel::never()).unwrap_err();
        assert!(matches!(error, Error::Internal { reason } if reason.contains("has ended")));
    }
    engine.close();
}

#[test]
fn a_closed_engine_ends_its_sequences_and_refuses_others() {
    let (engine, _) = start(Counter { delay: Duration::from_millis(5), ..Counter::default() }, 1000);
    let running = Reader::new(&engine, vec![1; 400], params(9)).unwrap();
    let started = Instant::now();
    engine.close();
    assert!(started.elapsed() < Duration::from_secs(1), "the pass is interrupted");
    assert!(matches!(running.end().1, Err(Error::Closed { .. })));
    assert!(matches!(Reader::new(&engine, vec![1], params(1)), Err(Error::Closed { .. })));
    assert!(matches!(engine.logits(&[1], None, &Cancel::never()), Err(Error::Closed { .. })));
    assert!(matches!(engine.metrics(), Err(Error::Closed { .. })));
}

#[test]
fn sequences_share_passes_and_give_the_same_as_alone() {
    let (engine, seen) = start(Counter { next: mixed, ..Counter::default() }, 5000);
    // While this prompt is processed, the others arrive.
    let long = Reader::new(&engine, vec![3; 4000], params(5)).unwrap();
    let prompts: Vec<Vec<u32>> = (0..8).map(|first| vec![first; 10 + first as usize]).collect();
    let readers: Vec<Reader> =
        prompts.iter().map(|prompt| Reader::new(&engine, prompt.clone(), params(30)).unwrap()).collect();
    for (reader, prompt) in readers.iter().zip(&prompts) {
        assert_eq!(reader.end().0, reference(prompt, 30));
        assert!(reader.place.0.lock().stats.time_to_first_token.is_some());
    }
    assert_eq!(long.end().0, reference(&[3; 4000], 5));
    let passes = seen.passes.lock();
    assert!(passes.iter().all(|pass| pass.len() <= 3), "max_num_seqs is three");
    assert!(passes.iter().any(|pass| pass.len() > 1), "passes are shared");
}

#[test]
fn a_model_of_one_span_runs_its_sequences_in_turns() {
    let (engine, seen) = start(Counter { next: mixed, max_spans: 1, ..Counter::default() }, 5000);
    let prompts = [vec![1; 700], vec![2; 5], vec![3; 9]];
    let readers = prompts.clone().map(|prompt| Reader::new(&engine, prompt, params(40)).unwrap());
    for (reader, prompt) in readers.iter().zip(&prompts) {
        assert_eq!(reader.end().0, reference(prompt, 40));
    }
    assert!(seen.passes.lock().iter().all(|pass| pass.len() == 1));
}

#[test]
fn a_paused_sequence_leaves_its_place_and_continues_when_resumed() {
    let (engine, _) = start(Counter { next: mixed, total_blocks: 4, ..Counter::default() }, 256);
    let prompt = |first: u32| vec![first; 70];
    let paused: Vec<Reader> =
        (0..5).map(|first| Reader::pausing(&engine, prompt(first), params(20), &[], 6).unwrap()).collect();
    paused.iter().for_each(|reader| reader.wait(6));
    // More are paused than may run, and they hold all blocks: others run nevertheless.
    assert_eq!(run(&engine, prompt(9), params(5), &[]).0, reference(&prompt(9), 5));
    assert!(paused.iter().all(|reader| reader.place.0.lock().tokens.len() == 6));
    for (first, reader) in paused.iter().enumerate() {
        reader.ticket.resume();
        assert_eq!(reader.end().0, reference(&prompt(first as u32), 20));
    }
    let metrics = engine.metrics().unwrap();
    assert_eq!((metrics.running, metrics.waiting, metrics.blocks_used), (0, 0, 0));
    assert!(metrics.preemptions > 0);
}

#[test]
fn the_engine_runs_only_while_somebody_waits() {
    // Slow enough that a busy machine does not complete 900 tokens before `set_awaited`.
    let delay = Duration::from_micros(500);
    let (engine, seen) = start(Counter { delay, ..Counter::default() }, 1000);
    let [slow, other] = [5, 20].map(|first| Reader::new(&engine, vec![first], params(900)).unwrap());
    slow.wait(3);
    slow.ticket.set_awaited(false);
    other.ticket.cancel();
    other.end().1.unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let count = || (seen.passes.lock().len(), slow.place.0.lock().tokens.len());
    // On a busy machine, a pass that has begun may take a while.
    let mut before = count();
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(30));
        if std::mem::replace(&mut before, count()) == before {
            break;
        }
    }
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(count(), before, "nobody waits");
    assert!(before.1 < 900);
    assert_eq!(run(&engine, vec![1], params(3), &[]).0, [2, 3, 4]);
    assert!(count().1 > before.1, "it takes part in the passes of others");
    slow.ticket.set_awaited(true);
    assert_eq!(slow.end().0.len(), 900);
}

#[test]
fn a_paused_sequence_times_out_and_can_be_cancelled() {
    let (engine, seen) = start(Counter::default(), 256);
    let late = SamplingParams { timeout: Some(Duration::from_millis(50)), ..params(20) };
    let late = Reader::pausing(&engine, vec![1], late, &[], 3).unwrap();
    let cancelled = Reader::pausing(&engine, vec![1], params(20), &[], 3).unwrap();
    cancelled.wait(3);
    cancelled.ticket.cancel();
    let (tokens, end) = cancelled.end();
    assert_eq!((tokens, end.unwrap()), (vec![2, 3, 4], FinishReason::Cancelled.into()));
    assert_eq!(late.end().1.unwrap(), FinishReason::Timeout.into());
    assert_eq!(*seen.blocks.lock(), 0);
}

#[test]
fn equal_prompts_are_computed_once() {
    let (engine, seen) =
        start(Counter { next: mixed, prefixes: Some(Vec::new()), ..Counter::default() }, 999);
    let prompt = vec![5; 300];
    let readers = [0; 3].map(|_| Reader::new(&engine, prompt.clone(), params(4)).unwrap());
    for reader in &readers {
        assert_eq!(reader.end().0, reference(&prompt, 4));
    }
    let rows: usize = seen.passes.lock().iter().flatten().map(|(_, len, _)| len).sum();
    assert!(rows <= 300 + 2 * (300 - 256) + 3 * 3, "{rows} rows for three prompts of 300");
    let metrics = engine.metrics().unwrap();
    assert_eq!((metrics.prefix_hits, metrics.tokens_cached, metrics.tokens_in), (2, 512, 900));
    let again = Reader::new(&engine, prompt, params(1)).unwrap();
    again.wait(1);
    assert_eq!(again.place.0.lock().stats.cached_tokens, 256);
}

#[test]
fn a_prompt_longer_than_the_cache_is_an_error_and_leaves_others_alone() {
    let (engine, _) = start(Counter { total_blocks: 3, ..Counter::default() }, 5000);
    let fits = Reader::new(&engine, vec![1; 100], params(9)).unwrap();
    let long = Reader::new(&engine, vec![1; 200], params(9)).unwrap();
    let grows = Reader::new(&engine, vec![1; 190], params(9)).unwrap();
    assert!(matches!(long.end().1, Err(Error::Generation { reason }) if reason.contains("3 blocks")));
    assert_eq!(fits.end().0.len(), 9);
    let (tokens, end) = grows.end();
    assert_eq!(tokens.len(), 3, "the newest token needs no room");
    assert!(matches!(end, Err(Error::Generation { .. })));
}

#[test]
fn a_prompt_that_loses_its_blocks_in_its_first_pass_is_counted_once() {
    let delay = Duration::from_millis(2);
    let (engine, _) = start(Counter { delay, total_blocks: 5, stages: 250, ..Counter::default() }, 300);
    let oldest = Reader::new(&engine, vec![1; 10], params(90)).unwrap();
    oldest.wait(3);
    let other = Reader::new(&engine, vec![1; 250], params(3)).unwrap();
    assert_eq!((oldest.end().0.len(), other.end().0.len()), (90, 3));
    assert_eq!(engine.metrics().unwrap().tokens_in, 260);
}

/// A request of the property test.
#[derive(Clone, Debug)]
struct Arrival {
    prompt: usize,
    len: usize,
    new: usize,
    /// Microseconds before the next request.
    pause: u64,
    cancels_after: Option<usize>,
    pauses_after: usize,
}

fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let cancels = prop_oneof![3 => Just(None), 1 => (0_usize..20).prop_map(Some)];
    let pauses = prop_oneof![3 => Just(usize::MAX), 1 => 1_usize..20];
    let arrival = (0_usize..4, 1_usize..200, 1_usize..90, 0_u64..300, cancels, pauses).prop_map(
        |(prompt, len, new, pause, cancels_after, pauses_after)| Arrival {
            prompt,
            len,
            new,
            pause,
            cancels_after,
            pauses_after,
        },
    );
    prop::collection::vec(arrival, 1..14)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn random_requests_in_a_small_cache_give_the_same_as_alone(
        arrivals in arrivals(), caches in any::<bool>(), stages in prop_oneof![Just(1), Just(2), Just(8)]
    ) {
        let prefixes = caches.then(Vec::new);
        let model = Counter { next: mixed, prefixes, total_blocks: 6, stages, ..Counter::default() };
        let (engine, seen) = start(model, 300);
        let prompt = |arrival: &Arrival| -> Vec<u32> {
            (0..arrival.len).map(|i| ((i * (arrival.prompt + 1)) % VOCAB) as u32).collect()
        };
        let readers: Vec<Reader> = arrivals
            .iter()
            .map(|arrival| {
                std::thread::sleep(Duration::from_micros(arrival.pause));
                let params = params(arrival.new);
                Reader::pausing(&engine, prompt(arrival), params, &[], arrival.pauses_after).unwrap()
            })
            .collect();
        for (reader, arrival) in readers.iter().zip(&arrivals) {
            if let Some(count) = arrival.cancels_after {
                reader.wait(count.min(arrival.pauses_after));
                reader.ticket.cancel();
            }
            reader.wait(arrival.pauses_after);
            reader.ticket.resume();
        }
        for (reader, arrival) in readers.iter().zip(&arrivals) {
            let (tokens, end) = reader.end();
            let expected = reference(&prompt(arrival), arrival.new.min(300 - arrival.len));
            let reason = end.unwrap().reason;
            if arrival.cancels_after.is_some() && reason == FinishReason::Cancelled {
                prop_assert_eq!(&tokens[..], &expected[..tokens.len()]);
            } else {
                prop_assert_eq!(reason, FinishReason::Length);
                prop_assert_eq!(tokens, expected);
            }
        }
        let metrics = engine.metrics().unwrap();
        prop_assert_eq!((metrics.running, metrics.waiting, metrics.blocks_used), (0, 0, 0));
        prop_assert_eq!(*seen.blocks.lock(), 0);
    }
}
