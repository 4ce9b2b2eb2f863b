//! Tests of the facade, without Python: both engines on a tiny checkpoint that has no tokenizer.

use candle_llama::error::Error;
use candle_llama::llama::{Compute, EngineKind, FloatType, KvType, QuantizeType};
use candle_llama::model::Cancel;
use candle_llama::sampling::SamplingOptions;
use candle_llama::{Llama, LoadOptions, Prompt};
use std::sync::atomic::AtomicBool;
use tempfile::TempDir;

use crate::checkpoint_files::{Entry, VOCAB, llama_config, llama_weights, write_safetensors};

const PROMPT: [u32; 5] = [3, 1, 4, 1, 5];

fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let weights = llama_weights();
    let entries: Vec<_> =
        weights.iter().map(|(name, shape, values)| Entry::f32(name, shape, values)).collect();
    write_safetensors(&dir.path().join("model.safetensors"), &entries);
    std::fs::write(dir.path().join("config.json"), llama_config().to_string()).unwrap();
    dir
}

fn load(dir: &TempDir, engine: &str, compute: &str) -> Llama {
    let options = LoadOptions {
        engine: engine.parse().ok(),
        compute: compute.parse().unwrap(),
        device: Some("cpu".into()),
        ..LoadOptions::default()
    };
    Llama::load(dir.path(), &options, &Cancel::never()).unwrap()
}

fn greedy(tokens: i64) -> SamplingOptions {
    SamplingOptions { max_new_tokens: Some(tokens), ..SamplingOptions::default() }
}

#[test]
fn both_engines_give_the_same_logits() {
    let dir = folder();
    let rows = |engine| load(&dir, engine, "exact").logits(&PROMPT, None, &Cancel::never()).unwrap().values;
    let (cpu, candle) = (rows("cpu"), rows("candle"));
    assert_eq!(cpu.len(), PROMPT.len() * VOCAB);
    let largest = cpu.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    let difference = cpu.iter().zip(&candle).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(difference <= 2e-5 * largest, "{difference} of {largest}");
}

#[test]
fn exact_logits_are_the_same_in_prefill_and_decode() {
    let dir = folder();
    let llama = load(&dir, "cpu", "exact");
    let prompt = Prompt::TokenIds(PROMPT.to_vec());
    let generated = llama.generate(prompt, &greedy(20), &Cancel::never()).unwrap().token_ids;
    assert_eq!(generated.len(), 20);
    // Prefill all generated tokens at once. The chosen tokens have the largest logits here too, bit for bit.
    let all: Vec<u32> = PROMPT.iter().chain(&generated).copied().collect();
    let logits = llama.logits(&all, None, &Cancel::never()).unwrap();
    for (position, &chosen) in generated.iter().enumerate() {
        let row = &logits.values[(PROMPT.len() - 1 + position) * VOCAB..][..VOCAB];
        let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert_eq!(row[chosen as usize].to_bits(), best.to_bits());
    }
    let last = llama.logits(&all, Some(3), &Cancel::never()).unwrap();
    assert_eq!(last.values, logits.values[(all.len() - 3) * VOCAB..]);
}

#[test]
fn ids_need_no_tokenizer_and_text_without_one_is_an_error() {
    let dir = folder();
    let llama = load(&dir, "auto", "auto");
    assert_eq!(llama.load_report().engine, "cpu");
    let completion = llama.generate(Prompt::TokenIds(PROMPT.to_vec()), &greedy(4), &Cancel::never()).unwrap();
    assert_eq!((completion.token_ids.len(), completion.text.as_str()), (4, ""));
    let text = llama.generate(Prompt::Text("hello".into()), &greedy(4), &Cancel::never());
    assert!(matches!(text, Err(Error::NotFound { .. })), "{text:?}");
    let stop = SamplingOptions { stop: Some(vec!["x".into()]), ..greedy(4) };
    let stopped = llama.generate(Prompt::TokenIds(PROMPT.to_vec()), &stop, &Cancel::never());
    assert!(matches!(stopped, Err(Error::NotFound { .. })), "{stopped:?}");
}

#[test]
fn dtype_sets_the_types_of_the_weights_in_memory() {
    let dir = folder();
    let exact = load(&dir, "cpu", "exact").logits(&PROMPT, None, &Cancel::never()).unwrap().values;
    let largest = exact.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    for (dtype, name, bound) in
        [("float16", "F16", 5e-3), ("bfloat16", "BF16", 4e-2), ("float32", "F32", 0.0)]
    {
        let options =
            LoadOptions { dtype: dtype.parse().ok(), compute: Compute::Exact, ..LoadOptions::default() };
        let llama = Llama::load(dir.path(), &options, &Cancel::never()).unwrap();
        assert!(llama.load_report().storage.iter().any(|storage| storage.dtype == name));
        let values = llama.logits(&PROMPT, None, &Cancel::never()).unwrap().values;
        let difference = exact.iter().zip(&values).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(difference <= bound * largest, "{dtype}: {difference} of {largest}");
    }
}

#[test]
fn bad_options_are_refused_by_name() {
    let dir = folder();
    let default = LoadOptions::default;
    let cases = [
        ("kv_dtype", LoadOptions { kv_dtype: Some(KvType::Float16), compute: Compute::Exact, ..default() }),
        (
            "quantize",
            LoadOptions { quantize: Some(QuantizeType::Q8_0), dtype: Some(FloatType::Float16), ..default() },
        ),
        ("threads", LoadOptions { threads: Some(0), ..default() }),
        ("context_length", LoadOptions { context_length: Some(0), ..default() }),
    ];
    for (argument, options) in cases {
        match Llama::load(dir.path(), &options, &Cancel::never()).err() {
            Some(Error::InvalidArgument { argument: named, .. }) => assert_eq!(named, argument),
            other => panic!("{argument}: {other:?}"),
        }
    }
    let unknown = LoadOptions { device: Some("tpu".into()), ..default() };
    assert!(matches!(Llama::load(dir.path(), &unknown, &Cancel::never()), Err(Error::Device { .. })));
}

#[test]
fn option_values_are_parsed_and_an_error_lists_the_valid_names() {
    assert_eq!("bfloat16".parse(), Ok(FloatType::Bfloat16));
    assert_eq!("exact".parse::<Compute>().map(Compute::name), Ok("exact"));
    let error = "gpu".parse::<EngineKind>().unwrap_err();
    assert_eq!(error.to_string(), "\"gpu\" is not one of cpu, tensor, candle");
    assert_eq!("Q4_K_M".parse(), Ok(QuantizeType::Q4KM));
    assert_eq!(
        "q8_1".parse::<QuantizeType>().unwrap_err().known,
        ["q8_0", "q4_0", "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"]
    );
}

#[test]
fn a_load_can_be_cancelled() {
    let dir = folder();
    let flag = AtomicBool::new(true);
    // Keep, convert or pack the weights.
    for (dtype, quantize) in
        [(None, None), (Some(FloatType::Bfloat16), None), (None, Some(QuantizeType::Q8_0))]
    {
        let engine = Some(EngineKind::Cpu);
        let options = LoadOptions { dtype, quantize, engine, ..LoadOptions::default() };
        let cancelled = Llama::load(dir.path(), &options, &Cancel::new(&flag));
        assert!(matches!(cancelled, Err(Error::Cancelled)), "{options:?}");
        Llama::load(dir.path(), &options, &Cancel::never()).unwrap();
    }
}

#[test]
fn a_context_beyond_the_model_s_own_is_a_warning_and_strict_refuses_it() {
    let dir = folder();
    let longer = LoadOptions { context_length: Some(128), ..LoadOptions::default() };
    let llama = Llama::load(dir.path(), &longer, &Cancel::never()).unwrap();
    assert_eq!((llama.context_length(), llama.load_report().warnings.len()), (128, 1));
    let strict = LoadOptions { strict: true, ..longer };
    assert!(matches!(Llama::load(dir.path(), &strict, &Cancel::never()), Err(Error::Strict { .. })));
}

#[test]
fn scores_are_the_log_softmax_of_the_logits() {
    let dir = folder();
    for engine in ["cpu", "tensor", "candle"] {
        let llama = load(&dir, engine, "exact");
        let score = llama.score(Prompt::TokenIds(PROMPT.to_vec()), &Cancel::never()).unwrap();
        let logits = llama.logits(&PROMPT, None, &Cancel::never()).unwrap();
        assert_eq!((score.token_ids.as_slice(), score.logprobs.len()), (&PROMPT[..], PROMPT.len() - 1));
        let mut total = 0.0;
        for (position, &logprob) in score.logprobs.iter().enumerate() {
            let row = &logits.values[position * VOCAB..][..VOCAB];
            let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            let expected = f64::from(row[PROMPT[position + 1] as usize]) - sum.ln();
            assert!((f64::from(logprob) - expected).abs() < 1e-5, "{engine}: {logprob} for {expected}");
            total += expected;
        }
        assert!((score.perplexity() - (-total / 4.0).exp()).abs() < 1e-3);
        let (context, rest) = PROMPT.split_at(2);
        let [context, rest] = [context, rest].map(|ids| Prompt::TokenIds(ids.to_vec()));
        let found = llama.loglikelihood(context, rest, &Cancel::never()).unwrap();
        assert_eq!(found.logprobs, score.logprobs[1..], "{engine}: a row does not depend on the chunks");
        for (context, rest) in [(vec![], vec![1]), (vec![1], vec![])] {
            let [context, rest] = [context, rest].map(Prompt::TokenIds);
            let error = llama.loglikelihood(context, rest, &Cancel::never()).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
        }
    }
}

#[test]
fn the_estimate_equals_the_memory_in_the_load_report() {
    let dir = folder();
    for (engine, dtype) in [("cpu", "auto"), ("cpu", "bfloat16"), ("candle", "auto")] {
        let options = LoadOptions {
            engine: engine.parse().ok(),
            dtype: dtype.parse().ok(),
            device: Some("cpu".into()),
            context_length: Some(64),
            ..LoadOptions::default()
        };
        let estimate = candle_llama::llama::estimate_memory(dir.path(), &options).unwrap();
        let report = Llama::load(dir.path(), &options, &Cancel::never()).unwrap().load_report().clone();
        assert_eq!((estimate.engine, estimate.weights), (report.engine, report.bytes), "{engine} {dtype}");
        assert_eq!(estimate.context_length, 64);
        assert_eq!(estimate.total(), estimate.weights + estimate.kv_cache + estimate.scratch);
    }
}
