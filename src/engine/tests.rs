//! Tests of the engine, over a model that only counts.

use super::*;
use crate::config::GenerationConfig;
use crate::error::{Error, Result};
use crate::model::{Cancel, Logits, Model, SeqId, Span, Storage};
use crate::sampling::{OnOverflow, SamplingOptions, SamplingParams};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const VOCAB: usize = 50;

/// The spans that the model was given: (sequence, start, tokens, rows of logits).
type Calls = Arc<Mutex<Vec<(SeqId, usize, usize, usize)>>>;

/// A model that predicts token t + 1 after token t, and records its calls.
struct Counter {
    lengths: HashMap<SeqId, usize>,
    calls: Calls,
    freed: Arc<Mutex<Vec<SeqId>>>,
    fail_at: Option<usize>,
    delay: Duration,
}

impl Model for Counter {
    fn forward(&mut self, spans: &[Span], cancel: &Cancel) -> Result<Logits> {
        let before = self.lengths.clone();
        // A failed step may be run again.
        self.count(spans, cancel).inspect_err(|_| self.lengths = before)
    }

    fn free(&mut self, seq: SeqId) {
        self.lengths.remove(&seq);
        self.freed.lock().unwrap().push(seq);
    }

    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn max_num_seqs(&self) -> usize {
        3
    }

    fn free_blocks(&self) -> usize {
        4
    }

    fn storage(&self) -> Vec<Storage> {
        Vec::new()
    }
}

impl Counter {
    fn count(&mut self, spans: &[Span], cancel: &Cancel) -> Result<Logits> {
        let mut values = Vec::new();
        for span in spans {
            let length = self.lengths.entry(span.seq).or_default();
            assert_eq!(*length, span.start, "positions follow each other");
            std::thread::sleep(self.delay);
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if self.fail_at.is_some_and(|at| span.start + span.tokens.len() > at) {
                return Err(Error::Generation { reason: "out of luck".into() });
            }
            *length += span.tokens.len();
            let rows = match span.rows {
                crate::model::Rows::None => 0,
                crate::model::Rows::Last => 1,
                crate::model::Rows::All => span.tokens.len(),
            };
            self.calls.lock().unwrap().push((span.seq, span.start, span.tokens.len(), rows));
            for &token in &span.tokens[span.tokens.len() - rows..] {
                let mut row = vec![0.0; VOCAB];
                row[(token as usize + 1) % VOCAB] = 9.0;
                values.extend(row);
            }
        }
        Ok(Logits { values, vocab_size: VOCAB })
    }
}

struct Setup {
    engine: Arc<Engine>,
    calls: Calls,
    freed: Arc<Mutex<Vec<SeqId>>>,
}

fn setup_with(context_length: usize, fail_at: Option<usize>, delay: Duration) -> Setup {
    let (calls, freed) = (Calls::default(), Arc::default());
    let model = Counter {
        lengths: HashMap::new(),
        calls: Arc::clone(&calls),
        freed: Arc::clone(&freed),
        fail_at,
        delay,
    };
    Setup { engine: Arc::new(Engine::new(Box::new(model), context_length)), calls, freed }
}

fn setup(context_length: usize) -> Setup {
    setup_with(context_length, None, Duration::ZERO)
}

fn params(max_new_tokens: usize) -> SamplingParams {
    let options = SamplingOptions { max_new_tokens: Some(max_new_tokens as i64), ..Default::default() };
    SamplingParams::resolve(&options, &GenerationConfig::default(), VOCAB).unwrap()
}

/// Runs a sequence to its end; returns its tokens and how it ended.
fn run(mut sequence: Sequence) -> (Vec<u32>, Finish) {
    let mut tokens = Vec::new();
    loop {
        let step = sequence.step(&Cancel::never()).unwrap().expect("a finish comes before the end");
        tokens.extend(step.token.map(|token| token.id));
        if let Some(finish) = step.finish {
            assert!(sequence.step(&Cancel::never()).unwrap().is_none(), "nothing comes after the end");
            assert_eq!(sequence.stats().completion_tokens, tokens.len());
            return (tokens, finish);
        }
    }
}

#[test]
fn tokens_follow_until_the_length_is_reached() {
    let Setup { engine, calls, freed } = setup(100);
    let sequence = Sequence::new(&engine, vec![5, 6], params(3), &[]).unwrap();
    assert_eq!(run(sequence), (vec![7, 8, 9], FinishReason::Length.into()));
    let seq = freed.lock().unwrap()[0];
    assert_eq!(*calls.lock().unwrap(), [(seq, 0, 2, 1), (seq, 2, 1, 1), (seq, 3, 1, 1)]);
    assert_eq!(freed.lock().unwrap().len(), 1, "freed once");
}

#[test]
fn eos_and_stop_tokens_end_a_sequence_and_are_reported() {
    let Setup { engine, .. } = setup(100);
    let new = |params| Sequence::new(&engine, vec![1], params, &[4]).unwrap();
    assert_eq!(run(new(params(9))), (vec![2, 3, 4], FinishReason::Stop.into()));
    let ignoring = SamplingParams { ignore_eos: true, ..params(5) };
    assert_eq!(run(new(ignoring)), (vec![2, 3, 4, 5, 6], FinishReason::Length.into()));
    let stopping = SamplingParams { stop_token_ids: vec![3], ..params(9) };
    let stop = Some(StopReason::Token(3));
    assert_eq!(run(new(stopping)), (vec![2, 3], Finish { reason: FinishReason::Stop, stop }));
    let at_least = SamplingParams { min_new_tokens: 4, ..params(9) };
    let (tokens, _) = run(new(at_least));
    assert!(tokens.len() >= 4 && !tokens[..3].contains(&4), "{tokens:?}");
}

#[test]
fn a_full_context_finishes_with_length_and_a_longer_prompt_is_an_error() {
    let Setup { engine, .. } = setup(4);
    let sequence = Sequence::new(&engine, vec![1, 2], params(9), &[]).unwrap();
    assert_eq!(run(sequence), (vec![3, 4], FinishReason::Length.into()));
    for prompt in [vec![1; 4], vec![1; 9]] {
        let prompt_tokens = prompt.len();
        match Sequence::new(&engine, prompt, params(1), &[]).err() {
            Some(Error::ContextLength { prompt_tokens: got, context_length: 4 }) => {
                assert_eq!(got, prompt_tokens);
            }
            other => panic!("{other:?}"),
        }
    }
    let truncating = SamplingParams { on_overflow: OnOverflow::TruncateLeft, ..params(2) };
    let sequence = Sequence::new(&engine, vec![9, 9, 9, 1, 2], truncating, &[]).unwrap();
    assert_eq!(sequence.stats().prompt_tokens, 3);
    assert_eq!(run(sequence).0, [3]);
    let truncating = SamplingParams { on_overflow: OnOverflow::TruncateLeft, min_new_tokens: 2, ..params(2) };
    let sequence = Sequence::new(&engine, vec![9, 9, 9, 1, 2], truncating, &[]).unwrap();
    assert_eq!(sequence.stats().prompt_tokens, 2);
    assert_eq!(run(sequence).0, [3, 4]);
}

#[test]
fn bad_prompts_are_refused() {
    let Setup { engine, .. } = setup(100);
    for prompt in [vec![], vec![VOCAB as u32], vec![1, u32::MAX]] {
        assert!(matches!(Sequence::new(&engine, prompt, params(1), &[]), Err(Error::InvalidArgument { .. })));
    }
}

#[test]
fn long_prompts_are_prefilled_in_steps() {
    let Setup { engine, calls, .. } = setup(5000);
    let prompt: Vec<u32> = (0..1100).map(|i| i % VOCAB as u32).collect();
    let (tokens, _) = run(Sequence::new(&engine, prompt.clone(), params(1), &[]).unwrap());
    assert_eq!(tokens, [1100 % VOCAB as u32]);
    let steps: Vec<_> =
        calls.lock().unwrap().drain(..).map(|(_, start, len, rows)| (start, len, rows)).collect();
    assert_eq!(steps, [(0, 512, 0), (512, 512, 0), (1024, 76, 1)]);

    let logits = engine.logits(&prompt, Some(90), &Cancel::never()).unwrap();
    assert_eq!(logits.rows(), 90);
    for (row, &token) in logits.values.chunks(VOCAB).zip(&prompt[1010..]) {
        assert_eq!(row[(token as usize + 1) % VOCAB], 9.0);
    }
    let steps: Vec<_> =
        calls.lock().unwrap().drain(..).map(|(_, start, len, rows)| (start, len, rows)).collect();
    assert_eq!(steps, [(0, 512, 0), (512, 498, 0), (1010, 90, 90)]);
    assert_eq!(engine.logits(&prompt, None, &Cancel::never()).unwrap().rows(), 1100);
    for last in [0, 1101] {
        assert!(engine.logits(&prompt, Some(last), &Cancel::never()).is_err());
    }
}

#[test]
fn sequences_may_take_turns() {
    let Setup { engine, freed, .. } = setup(100);
    let mut one = Sequence::new(&engine, vec![1], params(3), &[]).unwrap();
    let mut two = Sequence::new(&engine, vec![11], params(3), &[]).unwrap();
    for step in 0..3 {
        for (sequence, first) in [(&mut one, 2), (&mut two, 12)] {
            let token = sequence.step(&Cancel::never()).unwrap().unwrap().token.unwrap();
            assert_eq!(token.id, first + step);
        }
    }
    assert_eq!(freed.lock().unwrap().len(), 2);
}

#[test]
fn cancelling_and_a_timeout_end_a_sequence_with_their_reason() {
    let Setup { engine, freed, .. } = setup_with(100, None, Duration::from_millis(15));
    let flag = AtomicBool::new(false);
    let mut sequence = Sequence::new(&engine, vec![1], params(50), &[]).unwrap();
    sequence.step(&Cancel::new(&flag)).unwrap().unwrap();
    flag.store(true, Ordering::Relaxed);
    let step = sequence.step(&Cancel::new(&flag)).unwrap().unwrap();
    assert_eq!(step, Step { token: None, finish: Some(FinishReason::Cancelled.into()) });

    let late = SamplingParams { timeout: Some(Duration::from_millis(40)), ..params(50) };
    let (tokens, finish) = run(Sequence::new(&engine, vec![1], late, &[]).unwrap());
    assert_eq!(finish, FinishReason::Timeout.into());
    assert!(tokens.len() < 10);
    assert_eq!(freed.lock().unwrap().len(), 2);
}

#[test]
fn steps_shorter_than_the_polling_interval_are_cancelled_too() {
    let Setup { engine, .. } = setup_with(5000, None, Duration::from_millis(1));
    let late = SamplingParams { timeout: Some(Duration::from_millis(40)), ..params(4000) };
    let (tokens, finish) = run(Sequence::new(&engine, vec![1], late, &[]).unwrap());
    assert_eq!(finish, FinishReason::Timeout.into());
    assert!(tokens.len() <= 40);

    let (flag, started) = (AtomicBool::new(false), Instant::now());
    let poll = || started.elapsed() > Duration::from_millis(40);
    let cancel = Cancel::with_poll(&flag, &poll);
    let mut sequence = Sequence::new(&engine, vec![1], params(4000), &[]).unwrap();
    let mut last = None;
    while let Some(step) = sequence.step(&cancel).unwrap() {
        last = step.finish;
    }
    assert_eq!(last, Some(FinishReason::Cancelled.into()));
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_failed_step_ends_the_sequence_and_leaves_the_engine_usable() {
    let Setup { engine, freed, .. } = setup_with(100, Some(3), Duration::ZERO);
    let mut sequence = Sequence::new(&engine, vec![1, 2], params(9), &[]).unwrap();
    assert!(sequence.step(&Cancel::never()).is_ok());
    assert!(sequence.step(&Cancel::never()).is_ok());
    assert!(matches!(sequence.step(&Cancel::never()), Err(Error::Generation { .. })));
    assert!(sequence.step(&Cancel::never()).unwrap().is_none());
    assert_eq!(freed.lock().unwrap().len(), 1);
    assert_eq!(run(Sequence::new(&engine, vec![1], params(1), &[]).unwrap()).0, [2]);
}

#[test]
fn a_dropped_sequence_is_freed_even_while_the_model_is_busy() {
    let Setup { engine, freed, .. } = setup_with(100, None, Duration::from_millis(50));
    let mut sequence = Sequence::new(&engine, vec![1], params(9), &[]).unwrap();
    sequence.step(&Cancel::never()).unwrap();
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| engine.logits(&[1], None, &Cancel::never()).unwrap());
        std::thread::sleep(Duration::from_millis(10));
        let started = std::time::Instant::now();
        drop(sequence);
        assert!(started.elapsed() < Duration::from_millis(30), "dropping does not wait");
        busy.join().unwrap();
    });
    engine.logits(&[1], None, &Cancel::never()).unwrap();
    assert_eq!(freed.lock().unwrap().len(), 3);
}

#[test]
fn a_closed_engine_refuses_further_steps() {
    let Setup { engine, .. } = setup(100);
    let mut sequence = Sequence::new(&engine, vec![1], params(9), &[]).unwrap();
    sequence.step(&Cancel::never()).unwrap();
    engine.close();
    assert!(matches!(sequence.step(&Cancel::never()), Err(Error::Closed { .. })));
    assert!(matches!(engine.logits(&[1], None, &Cancel::never()), Err(Error::Closed { .. })));
}

#[test]
fn log_probabilities_come_from_the_model_s_logits() {
    let Setup { engine, .. } = setup(100);
    let asking = SamplingParams { logprobs: Some(2), repetition_penalty: 1.5, ..params(1) };
    let mut sequence = Sequence::new(&engine, vec![1], asking, &[]).unwrap();
    let token = sequence.step(&Cancel::never()).unwrap().unwrap().token.unwrap();
    let logprob = token.logprob.unwrap();
    let expected = 9.0 - (9.0_f64.exp() + (VOCAB - 1) as f64).ln();
    assert!((f64::from(logprob.logprob) - expected).abs() < 1e-5);
    assert_eq!((logprob.token_id, logprob.top.len()), (2, 2));
}

#[test]
fn given_tokens_are_scored_each_after_those_before_it() {
    let Setup { engine, calls, freed } = setup(6);
    let likely = 9.0 - (9.0_f64.exp() + (VOCAB - 1) as f64).ln();
    let tokens = [3, 4, 5, 9, 10, 11, 12];
    let scores = engine.score(&tokens, 2, &Cancel::never()).unwrap();
    let expected = [likely, likely - 9.0, likely, likely, likely];
    assert_eq!(scores.len(), expected.len());
    for (score, expected) in scores.iter().zip(expected) {
        assert!((f64::from(score.logprob) - expected).abs() < 1e-5);
        assert_eq!(score.is_greedy, expected == likely);
    }
    // The model does not process the last token, so one more than the context holds can be scored.
    let steps: Vec<_> =
        calls.lock().unwrap().drain(..).map(|(_, start, len, rows)| (start, len, rows)).collect();
    assert_eq!(steps, [(0, 1, 0), (1, 5, 5)]);
    assert_eq!(freed.lock().unwrap().len(), 1);
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
fn scoring_is_cancelled_and_fails_like_generating() {
    let tokens: Vec<u32> = (0..2000).map(|i| i % VOCAB as u32).collect();
    let Setup { engine, calls, freed } = setup_with(5000, None, Duration::from_millis(15));
    let (flag, started) = (AtomicBool::new(false), Instant::now());
    let poll = || started.elapsed() > Duration::from_millis(20);
    let result = engine.score(&tokens, 1, &Cancel::with_poll(&flag, &poll));
    assert!(matches!(result, Err(Error::Cancelled)));
    assert!(calls.lock().unwrap().len() < 4, "the remaining tokens are not processed");
    assert_eq!(freed.lock().unwrap().len(), 1);

    let Setup { engine, .. } = setup_with(5000, Some(600), Duration::ZERO);
    assert!(matches!(engine.score(&tokens, 1, &Cancel::never()), Err(Error::Generation { .. })));
    assert_eq!(engine.score(&tokens[..500], 1, &Cancel::never()).unwrap().len(), 499);
    engine.close();
    assert!(matches!(engine.score(&tokens, 1, &Cancel::never()), Err(Error::Closed { .. })));
}

#[test]
fn long_texts_are_scored_in_chunks_of_bounded_size() {
    let Setup { engine, calls, .. } = setup(5000);
    let tokens: Vec<u32> = (0..1501).map(|i| i % VOCAB as u32).collect();
    let scores = engine.score(&tokens, 700, &Cancel::never()).unwrap();
    assert_eq!(scores.len(), 801);
    assert!(scores.iter().all(|score| score.is_greedy));
    let steps: Vec<_> =
        calls.lock().unwrap().drain(..).map(|(_, start, len, rows)| (start, len, rows)).collect();
    assert_eq!(steps, [(0, 512, 0), (512, 187, 0), (699, 512, 512), (1211, 289, 289)]);
}

/// Steps all sequences to their ends; returns the tokens of each.
fn run_together(engine: &Engine, sequences: &mut [Sequence]) -> Vec<Vec<u32>> {
    let mut tokens: Vec<Vec<u32>> = sequences.iter().map(|_| Vec::new()).collect();
    let mut ended = 0;
    while ended < sequences.len() {
        let mut all: Vec<&mut Sequence> = sequences.iter_mut().collect();
        for (step, tokens) in engine.step(&mut all, &Cancel::never()).unwrap().into_iter().zip(&mut tokens) {
            let Some(step) = step else { continue };
            tokens.extend(step.token.map(|token| token.id));
            ended += usize::from(step.finish.is_some());
        }
    }
    tokens
}

#[test]
fn sequences_decoded_together_give_the_same_as_alone() {
    let Setup { engine, calls, freed } = setup(1000);
    let new =
        |first: u32, count| Sequence::new(&engine, vec![first, first + 1], params(count), &[9]).unwrap();
    // The first ends at once, the second by its EOS token, the third by its length.
    let mut sequences = [new(20, 1), new(5, 20), new(30, 4)];
    let tokens = run_together(&engine, &mut sequences);
    assert_eq!(tokens, [vec![22], vec![7, 8, 9], vec![32, 33, 34, 35]]);
    assert_eq!(freed.lock().unwrap().len(), 3);
    for (sequence, tokens) in sequences.iter().zip(&tokens) {
        let stats = sequence.stats();
        assert_eq!((stats.prompt_tokens, stats.completion_tokens), (2, tokens.len()));
        assert!(stats.time_to_first_token.is_some());
    }
    let shapes: Vec<_> = calls.lock().unwrap().iter().map(|(_, start, len, _)| (*start, *len)).collect();
    // Three prompts, then two steps of two sequences each, then one sequence alone.
    assert_eq!(shapes, [(0, 2), (0, 2), (0, 2), (2, 1), (2, 1), (3, 1), (3, 1), (4, 1)]);
}

#[test]
fn prompts_are_prefilled_together_shortest_first_and_512_tokens_at_a_time() {
    let Setup { engine, calls, .. } = setup(1000);
    let new = |len| Sequence::new(&engine, vec![7; len], params(1), &[]).unwrap();
    let mut sequences = [new(400), new(3), new(500)];
    let ids: Vec<SeqId> = sequences.iter().map(|sequence| sequence.decode_span().seq).collect();
    assert_eq!(run_together(&engine, &mut sequences), [[8], [8], [8]]);
    let expected = [(1, 0, 3, 1), (0, 0, 400, 1), (2, 0, 109, 0), (2, 109, 391, 1)];
    let expected = expected.map(|(index, start, len, rows): (usize, _, _, _)| (ids[index], start, len, rows));
    assert_eq!(*calls.lock().unwrap(), expected);
}

#[test]
fn a_timeout_in_prefill_does_not_end_the_other_prompts() {
    let Setup { engine, .. } = setup_with(1000, None, Duration::from_millis(30));
    let late = SamplingParams { timeout: Some(Duration::from_millis(45)), ..params(5) };
    let mut sequences = [
        Sequence::new(&engine, vec![1, 2], params(2), &[]).unwrap(),
        Sequence::new(&engine, vec![11, 12, 13], late, &[]).unwrap(),
        Sequence::new(&engine, vec![21, 22, 23, 24], params(2), &[]).unwrap(),
    ];
    let mut all: Vec<&mut Sequence> = sequences.iter_mut().collect();
    let steps = engine.step(&mut all, &Cancel::never()).unwrap();
    let ids = |steps: &[Option<Step>]| -> Vec<Option<u32>> {
        steps.iter().map(|step| step.as_ref()?.token.as_ref().map(|token| token.id)).collect()
    };
    assert_eq!(ids(&steps), [Some(3), None, Some(25)]);
    assert_eq!(steps[1].as_ref().unwrap().finish, Some(FinishReason::Timeout.into()));
    assert_eq!(ids(&engine.step(&mut all, &Cancel::never()).unwrap()), [Some(4), None, Some(26)]);
}

#[test]
fn a_timeout_in_decode_does_not_end_the_other_sequences() {
    let Setup { engine, .. } = setup_with(1000, None, Duration::from_millis(4));
    let late = SamplingParams { timeout: Some(Duration::from_millis(60)), ..params(50) };
    let mut sequences = [
        Sequence::new(&engine, vec![1], params(30), &[]).unwrap(),
        Sequence::new(&engine, vec![11], late, &[]).unwrap(),
    ];
    let tokens = run_together(&engine, &mut sequences);
    assert_eq!(tokens[0], (2..32).collect::<Vec<_>>());
    assert!(tokens[1].len() < 20, "{}", tokens[1].len());
}

#[test]
fn cancelling_or_an_error_ends_all_sequences_of_a_step() {
    let flag = AtomicBool::new(false);
    let Setup { engine, freed, .. } = setup_with(1000, Some(4), Duration::ZERO);
    let pair = || [1, 11].map(|first| Sequence::new(&engine, vec![first, 5], params(9), &[]).unwrap());
    let mut sequences = pair();
    let mut step = |cancel: &Cancel| {
        let mut all: Vec<&mut Sequence> = sequences.iter_mut().collect();
        engine.step(&mut all, cancel)
    };
    step(&Cancel::new(&flag)).unwrap();
    flag.store(true, Ordering::Relaxed);
    let cancelled = Some(Step { token: None, finish: Some(FinishReason::Cancelled.into()) });
    assert_eq!(step(&Cancel::new(&flag)).unwrap(), [cancelled.clone(), cancelled]);
    assert_eq!(step(&Cancel::never()).unwrap(), [None, None]);
    assert_eq!(freed.lock().unwrap().len(), 2);

    let mut sequences = pair();
    let mut all: Vec<&mut Sequence> = sequences.iter_mut().collect();
    for _ in 0..3 {
        engine.step(&mut all, &Cancel::never()).unwrap();
    }
    assert!(matches!(engine.step(&mut all, &Cancel::never()), Err(Error::Generation { .. })));
    assert_eq!(engine.step(&mut all, &Cancel::never()).unwrap(), [None, None]);
    assert_eq!(freed.lock().unwrap().len(), 4);
}

#[test]
fn a_sequence_is_admitted_if_all_have_room_to_grow() {
    let Setup { engine, .. } = setup(1000);
    let new = |tokens: usize| Sequence::new(&engine, vec![1; 10], params(tokens - 10), &[]).unwrap();
    let admits = |running: &[&Sequence], tokens| engine.admits(running, tokens, &Cancel::never()).unwrap();
    let (small, large) = (new(64), new(128));
    assert!(admits(&[], 1_000_000), "a sequence alone is always admitted");
    assert!(admits(&[&small], 3 * 64));
    assert!(!admits(&[&small], 3 * 64 + 1), "four blocks in all");
    assert!(!admits(&[&small, &large], 65));
    assert!(admits(&[&small, &large], 64));
    assert!(!admits(&[&small, &small, &small], 1), "max_num_seqs is three");
    engine.close();
    assert!(matches!(engine.admits(&[&small], 1, &Cancel::never()), Err(Error::Closed { .. })));
}
