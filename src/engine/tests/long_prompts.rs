//! Long prompts beside other sequences.

use super::*;

#[test]
fn a_long_prompt_pauses_for_decoding_sequences() {
    let (engine, seen) = start(Counter { delay: Duration::from_micros(200), ..Counter::default() }, 5000);
    let running = Reader::new(&engine, vec![1], params(3000)).unwrap();
    running.wait(20);
    let before = running.place.0.lock().tokens.len();
    assert_eq!(run(&engine, vec![7; 600], params(1), &[]).0, [8]);
    let after = running.place.0.lock().tokens.len();
    running.ticket.cancel();
    // 600 rows are at least three passes of eight stages. A stage takes as long as several tokens, so each is
    // a slice of its own.
    assert!(*seen.pauses.lock() >= 14, "{}", *seen.pauses.lock());
    assert!(after - before >= 16, "{}", after - before);
    // Only the last tokens of the prompt are few enough for a pass with others.
    let rows = |pass: &Pass| pass.iter().map(|(_, len, _)| len).sum::<usize>();
    assert!(seen.passes.lock().iter().filter(|pass| pass.len() > 1).all(|pass| rows(pass) <= 16));
}

#[test]
fn a_long_prompt_pauses_seldom_for_sequences_whose_end_is_awaited() {
    let tokens = |read: fn(&Engine, Vec<u32>, SamplingParams) -> Reader| {
        let (engine, _) = start(Counter { delay: Duration::from_micros(200), ..Counter::default() }, 5000);
        let running = read(&engine, vec![1], params(3000));
        running.wait(20);
        let before = running.place.0.lock().tokens.len();
        assert_eq!(run(&engine, vec![7; 600], params(1), &[]).0, [8]);
        let after = running.place.0.lock().tokens.len();
        running.ticket.cancel();
        after - before
    };
    let streamed = tokens(|engine, prompt, params| Reader::new(engine, prompt, params).unwrap());
    let whole = tokens(Reader::whole);
    assert!(2 * whole < streamed, "{whole} tokens of 600 beside {streamed}");
    assert!(whole > 2, "{whole}");
}

#[test]
fn a_sequence_may_leave_a_paused_pass() {
    let (engine, seen) = start(Counter { delay: Duration::from_micros(500), ..Counter::default() }, 5000);
    let running = Reader::new(&engine, vec![1], params(3000)).unwrap();
    running.wait(10);
    let prompts = [vec![5; 60], vec![6; 60]];
    let [leaves, stays] = prompts.map(|prompt| Reader::new(&engine, prompt, params(1)).unwrap());
    let end = Instant::now() + Duration::from_secs(10);
    while *seen.pauses.lock() == 0 {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_micros(100));
    }
    leaves.ticket.cancel();
    assert_eq!(leaves.end().1.unwrap(), FinishReason::Cancelled.into());
    // The model sees to it that the pass goes on.
    assert_eq!(stays.end().0, [7]);
    running.ticket.cancel();
    running.end().1.unwrap();
    assert_eq!(*seen.blocks.lock(), 0);
}

#[test]
fn short_prompts_and_a_long_one_take_turns() {
    let (engine, seen) = start(Counter { delay: Duration::from_micros(50), ..Counter::default() }, 5000);
    let long = Reader::new(&engine, vec![1; 1500], params(1)).unwrap();
    // There is always a short one.
    let mut short = 0;
    while long.place.0.lock().end.is_none() {
        short += 1;
        assert!(short < 1500, "the long prompt waits");
        assert_eq!(run(&engine, vec![7; 12], params(1), &[]).0, [8]);
    }
    assert!(short > 3, "{short}");
    assert!(*seen.pauses.lock() > 0);
}

#[test]
fn a_prompt_runs_beside_decoding_sequences_in_short_passes() {
    let delay = Duration::from_micros(100);
    let (engine, seen) = start(Counter { delay, stages: 1, ..Counter::default() }, 5000);
    let running = Reader::new(&engine, vec![1], params(3000)).unwrap();
    running.wait(20);
    seen.passes.lock().clear();
    assert_eq!(run(&engine, vec![7; 300], params(1), &[]).0, [8]);
    running.ticket.cancel();
    let passes = seen.passes.lock();
    let beside: Vec<_> = passes.iter().filter(|pass| pass.len() > 1).collect();
    // Their size depends on measured times, which a busy machine makes longer.
    assert!(beside.len() >= 2, "{passes:?}");
    assert!(beside.iter().all(|pass| pass[0].1 == 1 && pass[1].1 < 300), "{passes:?}");
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one() {
    let (engine, _) = start(Counter { delay: Duration::from_micros(500), ..Counter::default() }, 5000);
    let long = Reader::new(&engine, vec![1; 4000], params(1)).unwrap();
    std::thread::sleep(Duration::from_millis(30));
    let started = Instant::now();
    assert_eq!(run(&engine, vec![7; 20], params(1), &[]).0, [8]);
    assert!(started.elapsed() < Duration::from_millis(1500), "{:?}", started.elapsed());
    assert!(long.place.0.lock().end.is_none());
    long.ticket.cancel();
}
