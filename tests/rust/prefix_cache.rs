//! Tests of the cpu model's prefix cache: what is reused, and that it changes no bit.

use candle_llama::checkpoint::Checkpoint;
use candle_llama::checkpoint::tied::LmHead;
use candle_llama::config::LlamaConfig;
use candle_llama::error::Error;
use candle_llama::kernels::{Isa, KV_BLOCK_POSITIONS, WeightType};
use candle_llama::kv_cache::KvShape;
use candle_llama::model::cpu::{CpuModel, CpuOptions, Types};
use candle_llama::model::{Beginning, Cancel, KvBlocks, Logits, Model, Rows, SeqId, Span};
use proptest::prelude::*;
use std::sync::atomic::AtomicBool;
use tempfile::TempDir;

use crate::checkpoint_files::{
    Entry, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, VOCAB, llama_config, llama_weights_with, write_safetensors,
};

/// Attention has kernels of its own for multiples of 32.
const WIDE_HEAD: usize = 32;

/// A tiny checkpoint, and how it is loaded.
struct Setup {
    dir: TempDir,
    exact: bool,
    types: Types,
    kv_blocks: usize,
    prefix_cache: bool,
}

impl Setup {
    fn new(exact: bool) -> Self {
        Setup::with_config(exact, serde_json::json!({}))
    }

    /// `more` is added to the config.
    fn with_config(exact: bool, more: serde_json::Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let weights = llama_weights_with(HIDDEN, INTERMEDIATE, WIDE_HEAD);
        let entries: Vec<_> =
            weights.iter().map(|(name, shape, values)| Entry::f32(name, shape, values)).collect();
        write_safetensors(&dir.path().join("model.safetensors"), &entries);
        let mut config = llama_config();
        config["head_dim"] = WIDE_HEAD.into();
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        Setup { dir, exact, types: Types::default(), kv_blocks: 100, prefix_cache: true }
    }

    /// With all matrices in this type.
    fn quantized(exact: bool, dtype: WeightType) -> Self {
        let matrices = llama_weights_with(HIDDEN, INTERMEDIATE, WIDE_HEAD)
            .into_iter()
            .filter(|(_, shape, _)| shape.len() == 2);
        let quantize = matrices.map(|(name, ..)| (name, dtype)).collect();
        Setup { types: Types { quantize, ..Types::default() }, ..Setup::new(exact) }
    }

    fn load(&self) -> CpuModel {
        let kv_dtype = if self.exact { WeightType::F32 } else { WeightType::F16 };
        let shape = KvShape { layers: LAYERS, kv_heads: KV_HEADS, head_dim: WIDE_HEAD, dtype: kv_dtype };
        let options = CpuOptions {
            isa: Isa::detect().unwrap(),
            threads: 2,
            lm_head: LmHead::Tied,
            types: self.types.clone(),
            exact: self.exact,
            kv_dtype,
            kv_bytes: (self.kv_blocks * shape.block_bytes().unwrap()) as u64,
            prefix_cache: self.prefix_cache,
            cached_kv_bytes: u64::MAX,
        };
        let config = LlamaConfig::from_folder(self.dir.path()).unwrap();
        let checkpoint = Checkpoint::open(self.dir.path()).unwrap();
        CpuModel::new(config, &checkpoint, &options, &Cancel::never()).unwrap()
    }
}

/// `len` tokens, the same for the same seed.
fn tokens(seed: u32, len: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % VOCAB as u32
    };
    std::iter::repeat_with(&mut next).take(len).collect()
}

fn begin(model: &mut CpuModel, seq: u64, tokens: &[u32], prompt_tokens: usize, salt: &str) -> usize {
    // The last prompt token is always computed, for its logits.
    let reusable = tokens.len() - 1;
    model.begin(SeqId(seq), &Beginning { tokens, prompt_tokens, reusable, salt })
}

/// The bits of the logits of `tokens[start..]`, after `tokens[..start]`.
fn forward(model: &mut CpuModel, seq: u64, tokens: &[u32], start: usize) -> Vec<u32> {
    let span = Span { seq: SeqId(seq), tokens: &tokens[start..], start, rows: Rows::All };
    bits(&model.forward(&[span], &Cancel::never()).unwrap())
}

fn bits(logits: &Logits) -> Vec<u32> {
    logits.values.iter().map(|value| value.to_bits()).collect()
}

/// What a sequence computed.
struct Run {
    cached_tokens: usize,
    /// The logits of all rows that were computed.
    logits: Vec<u32>,
}

/// Runs `tokens`, whose first `prompt_tokens` are the prompt; the others are decoded one by one.
fn run(model: &mut CpuModel, seq: u64, tokens: &[u32], prompt_tokens: usize) -> Run {
    let cached_tokens = begin(model, seq, &tokens[..prompt_tokens], prompt_tokens, "");
    let mut logits = forward(model, seq, &tokens[..prompt_tokens], cached_tokens);
    for end in prompt_tokens + 1..=tokens.len() {
        logits.extend(forward(model, seq, &tokens[..end], end - 1));
    }
    Run { cached_tokens, logits }
}

/// As [`run`], in a sequence of its own that is freed.
fn run_and_free(model: &mut CpuModel, tokens: &[u32], prompt_tokens: usize) -> Run {
    let run = run(model, 1000, tokens, prompt_tokens);
    model.free(SeqId(1000));
    run
}

#[test]
fn reused_blocks_change_no_bit_of_the_logits() {
    for exact in [false, true] {
        let bf16 = Types { dtype: Some(WeightType::BF16), ..Types::default() };
        let setups = [
            Setup::new(exact),
            Setup { types: bf16, ..Setup::new(exact) },
            Setup::quantized(exact, WeightType::Q4_0),
            Setup::quantized(exact, WeightType::Q8_0),
        ];
        for (setup, name) in setups.iter().zip(["F32", "BF16", "Q4_0", "Q8_0"]) {
            let mut model = setup.load();
            let mut uncached = Setup { prefix_cache: false, ..Setup::new(exact) };
            uncached.types = setup.types.clone();
            let mut uncached = uncached.load();
            // First, a long prompt of each class, with other tokens at its end.
            for (len, same) in [(128, 120), (700, 650)] {
                run_and_free(&mut model, &[tokens(1, same), tokens(2, len - same)].concat(), len);
            }
            for (len, cached_tokens) in
                [(64, 0), (65, 64), (100, 64), (120, 64), (129, 128), (192, 128), (193, 192), (600, 576)]
            {
                let tokens = tokens(1, len + 3);
                let expected = run_and_free(&mut uncached, &tokens, len);
                let got = run_and_free(&mut model, &tokens, len);
                assert_eq!((expected.cached_tokens, got.cached_tokens), (0, cached_tokens), "{name} {len}");
                let computed = &expected.logits[cached_tokens * VOCAB..];
                assert!(got.logits == computed, "{name}, {len} tokens, exact: {exact}");
            }
        }
    }
}

#[test]
fn generated_blocks_are_reused_in_exact_mode_only() {
    for (exact, cached_tokens) in [(true, 192), (false, 128)] {
        let mut model = Setup::new(exact).load();
        let answered = tokens(1, 210);
        run_and_free(&mut model, &answered, 150);
        let next = [answered, tokens(2, 30)].concat();
        let got = run_and_free(&mut model, &next, next.len());
        assert_eq!(got.cached_tokens, cached_tokens);
        let mut uncached = Setup { prefix_cache: false, ..Setup::new(exact) }.load();
        let expected = run_and_free(&mut uncached, &next, next.len());
        assert!(got.logits == expected.logits[cached_tokens * VOCAB..]);
    }
}

#[test]
fn a_sequence_that_was_preempted_goes_on_with_the_same_bits() {
    for (exact, cached_tokens) in [(true, 256), (false, 128)] {
        let mut model = Setup::new(exact).load();
        let all = tokens(1, 300);
        let expected = run(&mut model, 1, &all, 140);
        model.free(SeqId(1));
        // In another prompt, the tokens that were generated here are read, with other kernels.
        run_and_free(&mut model, &all, 300);
        assert_eq!(begin(&mut model, 2, &all[..280], 140, ""), cached_tokens);
        let mut logits = forward(&mut model, 2, &all[..280], cached_tokens);
        logits.extend(forward(&mut model, 2, &all, 280));
        assert!(logits == expected.logits[cached_tokens * VOCAB..]);
    }
}

#[test]
fn reusable_bounds_what_is_reused() {
    let mut model = Setup::new(false).load();
    let tokens = tokens(1, 200);
    run_and_free(&mut model, &tokens, 200);
    for (reusable, cached_tokens) in [(0, 0), (63, 0), (64, 64), (191, 128), (200, 192), (usize::MAX, 192)] {
        let beginning = Beginning { tokens: &tokens, prompt_tokens: 200, reusable, salt: "" };
        assert_eq!(model.begin(SeqId(1), &beginning), cached_tokens);
    }
    model.free(SeqId(1));
    assert_eq!(model.kv_blocks(), KvBlocks { total: 100, free: 100, cached: 3 });
}

#[test]
fn other_salts_and_other_classes_of_prompts_share_nothing() {
    let cached_tokens = |exact, (prompt_tokens, salt): (usize, &str)| {
        let mut model = Setup::new(exact).load();
        let tokens = tokens(1, 300);
        begin(&mut model, 1, &tokens[..100], 100, "a");
        forward(&mut model, 1, &tokens[..100], 0);
        begin(&mut model, 2, &tokens[..prompt_tokens], prompt_tokens, salt)
    };
    for (prompt, auto, exact) in [
        ((100, "a"), 64, 64),
        ((100, "b"), 0, 0),
        ((100, ""), 0, 0),
        ((128, "a"), 64, 64),
        ((129, "a"), 0, 64),
    ] {
        assert_eq!((cached_tokens(false, prompt), cached_tokens(true, prompt)), (auto, exact), "{prompt:?}");
    }
}

#[test]
fn a_salt_that_is_too_long_shares_nothing() {
    let mut model = Setup::new(false).load();
    let tokens = tokens(1, 100);
    for (len, cached_tokens) in [(1024, 64), (1025, 0)] {
        let salt = "x".repeat(len);
        begin(&mut model, 1, &tokens, 100, &salt);
        forward(&mut model, 1, &tokens, 0);
        assert_eq!(begin(&mut model, 2, &tokens, 100, &salt), cached_tokens);
        model.free(SeqId(2));
    }
}

#[test]
fn dynamic_rope_shares_only_between_prompts_that_stretch_alike() {
    let scaling = serde_json::json!({
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 150,
    });
    let setup = Setup::with_config(true, scaling);
    let mut model = setup.load();
    let mut uncached = Setup { prefix_cache: false, ..setup }.load();
    // Up to the original context nothing is stretched.
    for (len, cached_tokens) in [(70, 0), (140, 64), (150, 128), (151, 0), (200, 0), (151, 128), (140, 128)] {
        let tokens = tokens(1, len);
        let got = run_and_free(&mut model, &tokens, len);
        assert_eq!(got.cached_tokens, cached_tokens, "{len}");
        let expected = run_and_free(&mut uncached, &tokens, len);
        assert!(got.logits == expected.logits[cached_tokens * VOCAB..], "{len}");
    }
}

#[test]
fn equal_prompts_of_one_step_share_their_blocks() {
    let mut model = Setup::new(false).load();
    let tokens = tokens(1, 200);
    for seq in 1..=3 {
        assert_eq!(begin(&mut model, seq, &tokens, 200, ""), 0);
    }
    let span = |seq| Span { seq: SeqId(seq), tokens: &tokens, start: 0, rows: Rows::Last };
    let logits = model.forward(&[span(1), span(2), span(3)], &Cancel::never()).unwrap();
    let rows: Vec<_> = logits.values.chunks(VOCAB).collect();
    assert!(rows[0] == rows[1] && rows[1] == rows[2]);
    assert_eq!(model.kv_blocks(), KvBlocks { total: 100, free: 100 - 3 - 3, cached: 0 });
    let next: Vec<_> =
        (1..=3).map(|seq| Span { seq: SeqId(seq), tokens: &[7], start: 200, rows: Rows::Last }).collect();
    let logits = model.forward(&next, &Cancel::never()).unwrap();
    let rows: Vec<_> = logits.values.chunks(VOCAB).collect();
    assert!(rows[0] == rows[1] && rows[1] == rows[2]);
    (1..=3).for_each(|seq| model.free(SeqId(seq)));
    assert_eq!(model.kv_blocks(), KvBlocks { total: 100, free: 100, cached: 3 });
}

#[test]
fn without_the_prefix_cache_nothing_is_kept() {
    let mut model = Setup { prefix_cache: false, ..Setup::new(true) }.load();
    for _ in 0..2 {
        let run = run(&mut model, 1, &tokens(1, 200), 200);
        assert_eq!(run.cached_tokens, 0);
        assert_eq!(model.kv_blocks(), KvBlocks { total: 100, free: 96, cached: 0 });
        model.free(SeqId(1));
        assert_eq!(model.kv_blocks(), KvBlocks { total: 100, free: 100, cached: 0 });
    }
}

#[test]
fn a_sequence_that_never_began_shares_nothing() {
    let mut model = Setup::new(true).load();
    forward(&mut model, 1, &tokens(1, 200), 0);
    model.free(SeqId(1));
    assert_eq!(model.kv_blocks(), KvBlocks { total: 100, free: 100, cached: 0 });
}

#[test]
fn a_step_that_fails_keeps_no_block_and_shares_none() {
    let mut model = Setup { kv_blocks: 4, ..Setup::new(false) }.load();
    let tokens = tokens(1, 200);
    begin(&mut model, 1, &tokens, 200, "");
    begin(&mut model, 2, &tokens, 200, "");
    let span = |seq| Span { seq: SeqId(seq), tokens: &tokens[..150], start: 0, rows: Rows::Last };
    let refused = model.forward(&[span(1), span(2)], &Cancel::never());
    assert!(matches!(refused, Err(Error::Generation { .. })), "{refused:?}");
    assert_eq!(model.kv_blocks(), KvBlocks { total: 4, free: 4, cached: 0 });
    let flag = AtomicBool::new(true);
    let cancelled = model.forward(&[span(1)], &Cancel::new(&flag));
    assert!(matches!(cancelled, Err(Error::Cancelled)), "{cancelled:?}");
    assert_eq!(model.kv_blocks(), KvBlocks { total: 4, free: 4, cached: 0 });
    assert_eq!(begin(&mut model, 3, &tokens, 200, ""), 0);
    // The same span may be run again.
    model.forward(&[span(1)], &Cancel::never()).unwrap();
    assert_eq!(begin(&mut model, 3, &tokens, 200, ""), 128);
    (1..=3).for_each(|seq| model.free(SeqId(seq)));
    assert_eq!(model.kv_blocks(), KvBlocks { total: 4, free: 4, cached: 2 });
}

#[test]
fn a_sequence_that_begins_again_frees_what_it_had() {
    let mut model = Setup { kv_blocks: 4, ..Setup::new(false) }.load();
    for seed in 1..5 {
        let tokens = tokens(seed, 4 * KV_BLOCK_POSITIONS);
        assert_eq!(begin(&mut model, 1, &tokens, tokens.len(), ""), 0);
        assert_eq!(model.kv_blocks().free, 4);
        forward(&mut model, 1, &tokens, 0);
    }
}

#[derive(Clone, Debug)]
enum Event {
    /// The length of what prompts have in common, the length of the rest, and the seed of the rest.
    Begin(usize, usize, u32),
    /// Computes at most this many of the next tokens.
    Forward(usize),
    /// Drops this many positions.
    Back(usize),
    Free,
}

fn event() -> impl Strategy<Value = Event> {
    let same = prop_oneof![Just(0_usize), Just(64), Just(128), 0_usize..200];
    prop_oneof![
        3 => (same, 1_usize..100, 1_u32..3).prop_map(|(same, rest, seed)| Event::Begin(same, rest, seed)),
        6 => (1_usize..120).prop_map(Event::Forward),
        1 => (1_usize..100).prop_map(Event::Back),
        1 => Just(Event::Free),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn random_use_of_a_small_cache_changes_no_bit(
        exact: bool,
        kv_blocks in 1_usize..9,
        events in proptest::collection::vec((0_usize..3, event()), 1..40),
    ) {
        let mut model = Setup { kv_blocks, ..Setup::quantized(exact, WeightType::Q8_0) }.load();
        let mut uncached = Setup { prefix_cache: false, ..Setup::quantized(exact, WeightType::Q8_0) }.load();
        // Tokens, length of the prompt, number of computed tokens.
        let mut sequences: Vec<Option<(Vec<u32>, usize, usize)>> = vec![None; 3];
        for (index, event) in events {
            let seq = index as u64;
            match (event, &mut sequences[index]) {
                (Event::Begin(same, rest, seed), sequence) => {
                    let mut all = [tokens(9, same), tokens(seed, rest)].concat();
                    let prompt_tokens = all.len();
                    let computed = begin(&mut model, seq, &all, prompt_tokens, "");
                    begin(&mut uncached, seq, &all, prompt_tokens, "");
                    if computed > 0 {
                        forward(&mut uncached, seq, &all[..computed], 0);
                    }
                    // What is generated later.
                    all.extend(tokens(8, 200));
                    *sequence = Some((all, prompt_tokens, computed));
                }
                (Event::Forward(most), Some((tokens, prompt_tokens, computed))) => {
                    // A step computes tokens of the prompt, or a few that were generated.
                    let end = if *computed < *prompt_tokens { *prompt_tokens } else { *computed + 2 };
                    let end = end.min(*computed + most).min(tokens.len());
                    if end == *computed {
                        continue;
                    }
                    let part = &tokens[*computed..end];
                    let span = Span { seq: SeqId(seq), tokens: part, start: *computed, rows: Rows::All };
                    match model.forward(&[span], &Cancel::never()) {
                        Ok(logits) => {
                            let expected = uncached.forward(&[span], &Cancel::never()).unwrap();
                            prop_assert!(bits(&logits) == bits(&expected));
                            *computed = end;
                        }
                        Err(Error::Generation { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                (Event::Back(positions), Some((_, _, computed))) => {
                    *computed = computed.saturating_sub(positions);
                }
                (Event::Free, sequence) => {
                    model.free(SeqId(seq));
                    uncached.free(SeqId(seq));
                    *sequence = None;
                }
                (_, None) => {}
            }
            let KvBlocks { total, free, cached } = model.kv_blocks();
            prop_assert!(total == kv_blocks && cached <= free && free <= total);
        }
        (0..3).for_each(|seq| model.free(SeqId(seq)));
        prop_assert_eq!(model.kv_blocks().free, kv_blocks);
    }
}
