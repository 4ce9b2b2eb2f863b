//! Random use of the KV cache, compared with a simple model of it.

use super::tests::{assert_contents, context, forward, pool};
use super::*;
use crate::kv_cache::KvBlocks;
use proptest::prelude::*;

/// Tokens up to the end of a block, with their salt.
type Path = (&'static str, Vec<u32>);

/// The pool as sets of paths.
struct Simple {
    total: usize,
    sequences: Vec<Option<SimpleSequence>>,
    /// Cached paths, the next to be evicted first. None: no sequence can find it any more.
    cached: Vec<Option<Path>>,
}

struct SimpleSequence {
    salt: &'static str,
    max_shared: usize,
    tokens: Vec<u32>,
    /// The path of each block; None for a block of its own.
    blocks: Vec<Option<Path>>,
}

impl Simple {
    fn users(&self, path: &Path) -> usize {
        let blocks = self.sequences.iter().flatten().flat_map(|sequence| &sequence.blocks);
        blocks.flatten().filter(|other| *other == path).count()
    }

    fn blocks(&self) -> KvBlocks {
        let blocks = || self.sequences.iter().flatten().flat_map(|sequence| &sequence.blocks);
        let mut shared: Vec<_> = blocks().flatten().collect();
        shared.sort();
        shared.dedup();
        let in_use = shared.len() + blocks().filter(|block| block.is_none()).count();
        KvBlocks { total: self.total, free: self.total - in_use, cached: self.cached.len() }
    }

    /// A path that is no longer in the index takes those that continue it along.
    fn forget(&mut self, gone: &Path) {
        for path in &mut self.cached {
            if path.as_ref().is_some_and(|path| path.0 == gone.0 && path.1.starts_with(&gone.1)) {
                *path = None;
            }
        }
    }

    fn take(&mut self) -> bool {
        let KvBlocks { free, cached, .. } = self.blocks();
        if free == 0 {
            return false;
        }
        if free == cached
            && let Some(path) = self.cached.remove(0)
        {
            self.forget(&path);
        }
        true
    }

    /// Uses a path that is known.
    fn find(&mut self, path: &Path) -> bool {
        if self.users(path) > 0 {
            return true;
        }
        let cached = self.cached.iter().position(|cached| cached.as_ref() == Some(path));
        cached.map(|at| self.cached.remove(at)).is_some()
    }

    fn begin(&mut self, index: usize, salt: &'static str, max_shared: usize, tokens: &[u32]) -> usize {
        self.truncate(index, 0);
        let mut blocks = Vec::new();
        for end in (64..=tokens.len().min(max_shared)).step_by(64) {
            let path = (salt, tokens[..end].to_vec());
            if !self.find(&path) {
                break;
            }
            blocks.push(Some(path));
        }
        let cached_tokens = 64 * blocks.len();
        let tokens = tokens[..cached_tokens].to_vec();
        self.sequences[index] = Some(SimpleSequence { salt, max_shared, tokens, blocks });
        cached_tokens
    }

    fn truncate(&mut self, index: usize, position: usize) {
        while let Some(sequence) = &mut self.sequences[index]
            && sequence.blocks.len() > position.div_ceil(64)
        {
            let path = sequence.blocks.pop().flatten();
            if let Some(path) = path.filter(|path| self.users(path) == 0) {
                self.cached.push(Some(path));
            }
        }
        if let Some(sequence) = &mut self.sequences[index] {
            sequence.tokens.truncate(position);
        }
    }

    fn forward(&mut self, index: usize, start: usize, tokens: &[u32]) -> bool {
        self.truncate(index, start);
        let blocks = |simple: &Simple| simple.sequences[index].as_ref().unwrap().blocks.len();
        if let Some(Some(path)) = self.sequences[index].as_ref().unwrap().blocks.get(start / 64).cloned() {
            if self.users(&path) == 1 {
                self.sequences[index].as_mut().unwrap().blocks[start / 64] = None;
                self.forget(&path);
            } else if self.take() {
                self.sequences[index].as_mut().unwrap().blocks[start / 64] = None;
            } else {
                return false;
            }
        }
        while 64 * blocks(self) < start + tokens.len() {
            if !self.take() {
                self.truncate(index, start);
                return false;
            }
            self.sequences[index].as_mut().unwrap().blocks.push(None);
        }
        self.sequences[index].as_mut().unwrap().tokens.extend(tokens);
        for block in 0..blocks(self) {
            let SimpleSequence { salt, max_shared, tokens, blocks } = self.sequences[index].as_ref().unwrap();
            let end = 64 * (block + 1);
            if blocks[block].is_none() && end <= tokens.len().min(*max_shared) {
                let path = (*salt, tokens[..end].to_vec());
                self.find(&path);
                self.sequences[index].as_mut().unwrap().blocks[block] = Some(path);
            }
        }
        true
    }
}

/// What happens to one of a few sequences.
#[derive(Clone, Debug)]
enum Event {
    /// It ends, and another begins: salt, tokens that may be shared, prompt.
    Begin(&'static str, usize, Vec<u32>),
    /// It returns by some positions and runs this many tokens of one kind.
    Forward(usize, usize, u32),
    Free,
}

fn event() -> impl Strategy<Value = Event> {
    // Few kinds of prompts, so that many begin alike.
    let prompt = (0_u32..2, 0_usize..3, 0_u32..2, 0_usize..150).prop_map(|(first, blocks, then, len)| {
        let mut prompt = vec![first; 64 * blocks];
        prompt.resize(64 * blocks + len, then);
        prompt
    });
    let max_shared = prop_oneof![Just(usize::MAX), 0_usize..300];
    let salt = prop_oneof![4 => Just(""), 1 => Just("x")];
    let back = prop_oneof![3 => Just(0), 1 => 0_usize..140];
    prop_oneof![
        3 => (salt, max_shared, prompt).prop_map(|(salt, max, prompt)| Event::Begin(salt, max, prompt)),
        6 => (back, 1_usize..130, 0_u32..2).prop_map(|(back, len, token)| Event::Forward(back, len, token)),
        1 => Just(Event::Free),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_use_is_as_in_a_simple_model(
        total in 1_usize..9,
        events in proptest::collection::vec((0_usize..3, event()), 1..60),
    ) {
        let mut pool = pool(total);
        let mut simple = Simple { total, sequences: vec![None, None, None], cached: Vec::new() };
        let mut sequences: Vec<Option<PagedKv>> = vec![None, None, None];
        // Of each sequence, what it has been told to run.
        let mut prompts = vec![Vec::new(); 3];
        for (index, event) in events {
            match event {
                Event::Begin(salt, max_shared, prompt) => {
                    if let Some(mut kv) = sequences[index].take() {
                        kv.truncate(0, &mut pool);
                    }
                    let kv = PagedKv::shared(context(salt), max_shared, &prompt, &mut pool);
                    prop_assert_eq!(kv.cached_tokens(), simple.begin(index, salt, max_shared, &prompt));
                    sequences[index] = Some(kv);
                    prompts[index] = prompt;
                }
                Event::Forward(back, len, token) => {
                    let (Some(kv), Some(sequence)) = (&mut sequences[index], &simple.sequences[index]) else {
                        continue;
                    };
                    let (salt, start) = (sequence.salt, sequence.tokens.len().saturating_sub(back));
                    let mut tokens = sequence.tokens[..start].to_vec();
                    // First the prompt, then what is generated.
                    tokens.extend(prompts[index].iter().skip(start).take(len));
                    tokens.resize(start + len, token);
                    let ran = forward(kv, salt, &tokens, start, &mut pool).is_ok();
                    prop_assert_eq!(ran, simple.forward(index, start, &tokens[start..]));
                }
                Event::Free => {
                    if let Some(mut kv) = sequences[index].take() {
                        kv.truncate(0, &mut pool);
                    }
                    simple.truncate(index, 0);
                    simple.sequences[index] = None;
                }
            }
            prop_assert_eq!(pool.blocks(), simple.blocks());
            for (kv, sequence) in sequences.iter().zip(&simple.sequences) {
                if let (Some(kv), Some(sequence)) = (kv, sequence) {
                    assert_contents(kv, sequence.salt, &sequence.tokens, &pool);
                }
            }
        }
        sequences.iter_mut().flatten().for_each(|kv| kv.truncate(0, &mut pool));
        prop_assert_eq!(pool.blocks().free, total);
    }
}
