//! Answers of chats that are read again while nobody waits.

use super::*;

/// The spans that were run for no logits and no reader.
fn rereads(seen: &Seen) -> Vec<(usize, usize)> {
    let passes = seen.passes.lock();
    passes
        .iter()
        .flatten()
        .filter(|(_, _, wanted)| *wanted == 0)
        .map(|&(start, len, _)| (start, len))
        .collect()
}

/// Waits until there are so many.
fn wait_for_rereads(seen: &Seen, count: usize) {
    let end = Instant::now() + Duration::from_secs(10);
    while rereads(seen).len() < count {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn the_answer_of_a_turn_is_read_again_for_the_next_one() {
    let (engine, seen) = start(
        Counter { next: mixed, prefixes: Some(Vec::new()), keeps_prompts: true, ..Counter::default() },
        999,
    );
    let prompt = vec![5; 70];
    let plain = Reader::new(&engine, prompt.clone(), params(200)).unwrap();
    assert_eq!(plain.end().0.len(), 200);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(rereads(&seen), [], "not for other prompts");

    let turn = Reader::turn(&engine, prompt.clone(), params(200));
    let mut next = [prompt, turn.end().0].concat();
    wait_for_rereads(&seen, 2);
    assert_eq!(rereads(&seen), [(0, 128), (128, 128)]);
    next.extend([7; 9]);
    let again = Reader::turn(&engine, next.clone(), params(5));
    assert_eq!(again.end().0, reference(&next, 5));
    assert_eq!(again.place.0.lock().stats.cached_tokens, 256);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(rereads(&seen).len(), 2, "the new answer fills no block");
    assert_eq!(*seen.blocks.lock(), 0);
}

#[test]
fn reading_answers_again_gives_way_to_requests() {
    let delay = Duration::from_millis(4);
    let (engine, seen) =
        start(Counter { prefixes: Some(Vec::new()), keeps_prompts: true, delay, ..Counter::default() }, 999);
    Reader::turn(&engine, vec![5; 70], params(130)).end().1.unwrap();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(60));
        let begun = Instant::now();
        Reader::new(&engine, vec![9; 3], params(1)).unwrap().end().1.unwrap();
        assert!(begun.elapsed() < Duration::from_millis(250), "a pass takes half a second");
    }
    wait_for_rereads(&seen, 2);
    assert_eq!(rereads(&seen), [(0, 128), (128, 64)]);
}

#[test]
fn what_cannot_be_read_again_is_forgotten() {
    // It fails at the answer's last token, which only reading it again processes.
    let model = Counter { prefixes: Some(Vec::new()), keeps_prompts: true, ..Counter::default() };
    let (engine, seen) = start(Counter { fails_at: Some(49), ..model }, 999);
    let turn = Reader::turn(&engine, vec![48; 127], params(1));
    assert_eq!(turn.end().0, [49]);
    let end = Instant::now() + Duration::from_secs(10);
    while *seen.failures.lock() == 0 {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(2));
    }
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(*seen.failures.lock(), 1, "it is not tried again");
    assert_eq!(rereads(&seen), []);
    assert_eq!(Reader::new(&engine, vec![1; 9], params(3)).unwrap().end().0, [2, 3, 4]);
    assert_eq!(*seen.blocks.lock(), 0);
}
