//! Tests of the choice of the output head, and of Candle's own Llama on the VarBuilder that uses it.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_llama::checkpoint::Checkpoint;
use candle_llama::checkpoint::tied::{HeadChoice, LmHead, choose_head, var_builder};
use candle_llama::error::{Error, Result};
use candle_transformers::models::llama::{Cache, Config, Llama};
use tempfile::TempDir;

use crate::checkpoint_files::{
    Entry, Gguf, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, VOCAB, llama_weights, seeded,
    write_safetensors,
};

const LM_HEAD: &str = "lm_head.weight";
const EMBED_TOKENS: &str = "model.embed_tokens.weight";

/// The tiny Llama in float32. `more` replaces its tensors of the same names, or is added to them.
fn llama_folder(more: Vec<Entry>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_llama(dir.path(), more);
    dir
}

fn write_llama(dir: &Path, more: Vec<Entry>) {
    let mut entries: Vec<_> =
        llama_weights().iter().map(|(name, shape, values)| Entry::f32(name, shape, values)).collect();
    entries.retain(|entry| more.iter().all(|other| other.name != entry.name));
    entries.extend(more);
    write_safetensors(&dir.join("model.safetensors"), &entries);
}

fn embedding() -> Vec<f32> {
    llama_weights().swap_remove(0).2
}

fn open(dir: &TempDir) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(dir.path()).unwrap())
}

/// Stock Candle's config. The flag is false so that the model asks for `lm_head.weight`.
fn candle_config() -> Config {
    Config {
        hidden_size: HIDDEN,
        intermediate_size: INTERMEDIATE,
        vocab_size: VOCAB,
        num_hidden_layers: LAYERS,
        num_attention_heads: HEADS,
        num_key_value_heads: KV_HEADS,
        use_flash_attn: false,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: 64,
        tie_word_embeddings: false,
    }
}

/// Logits of stock Candle's Llama after three tokens.
fn logits(checkpoint: &Arc<Checkpoint>, head: &HeadChoice) -> Vec<f32> {
    let config = candle_config();
    let device = Device::Cpu;
    let llama = Llama::load(var_builder(checkpoint.clone(), head, DType::F32, &device), &config).unwrap();
    let mut cache = Cache::new(true, DType::F32, &config, &device).unwrap();
    let tokens = Tensor::new(&[[3u32, 1, 4]], &device).unwrap();
    let logits = llama.forward(&tokens, 0, &mut cache).unwrap();
    assert_eq!(logits.dims(), [1, VOCAB]);
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn stock_llama_loads_without_a_head_whose_config_says_untied() {
    let checkpoint = open(&llama_folder(vec![]));
    let head = choose_head(&checkpoint, Some(false), false).unwrap();
    assert_eq!(head.lm_head, LmHead::Tied);
    let tied = logits(&checkpoint, &head);
    assert!(tied.iter().all(|logit| logit.is_finite()));

    // A checkpoint with a copy of the embedding as its head gives the same logits, bit for bit.
    let copy = open(&llama_folder(vec![Entry::f32(LM_HEAD, &[VOCAB, HIDDEN], &embedding())]));
    let head = choose_head(&copy, Some(false), false).unwrap();
    assert_eq!(head.lm_head, LmHead::Separate);
    assert_eq!(logits(&copy, &head), tied);

    let other = open(&llama_folder(vec![Entry::f32(LM_HEAD, &[VOCAB, HIDDEN], &seeded(99, VOCAB * HIDDEN))]));
    let head = choose_head(&other, Some(false), false).unwrap();
    let separate = logits(&other, &head);
    assert!(separate.iter().all(|logit| logit.is_finite()));
    assert_ne!(separate, tied);
}

#[test]
fn a_tied_head_without_an_embedding_is_the_embedding() {
    let renamed = |flag: Option<bool>| {
        let weights = llama_weights().into_iter();
        let entries: Vec<Entry> = weights
            .map(|(name, shape, values)| {
                Entry::f32(if name == EMBED_TOKENS { LM_HEAD } else { &name }, &shape, &values)
            })
            .collect();
        let dir = tempfile::tempdir().unwrap();
        write_safetensors(&dir.path().join("model.safetensors"), &entries);
        let checkpoint = open(&dir);
        choose_head(&checkpoint, flag, true).map(|head| (checkpoint, head))
    };
    let (checkpoint, head) = renamed(Some(true)).unwrap();
    assert_eq!((head.lm_head, &head.warning), (LmHead::Tied, &None));
    assert!(head.reason.contains("no model.embed_tokens.weight"), "{}", head.reason);
    let usual = open(&llama_folder(vec![]));
    let expected = logits(&usual, &choose_head(&usual, Some(true), true).unwrap());
    assert_eq!(logits(&checkpoint, &head), expected);
    let vb = var_builder(checkpoint, &head, DType::F32, &Device::Cpu);
    assert!(vb.contains_tensor(EMBED_TOKENS));
    let ids = [LM_HEAD, EMBED_TOKENS].map(|name| vb.get((VOCAB, HIDDEN), name).unwrap().id());
    assert_eq!(ids[0], ids[1]);
    for flag in [None, Some(false)] {
        assert!(
            matches!(renamed(flag), Err(Error::MissingTensor { tensor, .. }) if tensor == EMBED_TOKENS),
            "{flag:?}"
        );
    }
}

#[test]
fn a_tied_head_is_one_allocation() {
    let checkpoint = open(&llama_folder(vec![]));
    let head = choose_head(&checkpoint, Some(true), true).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let vb = var_builder(checkpoint.clone(), &head, dtype, &Device::Cpu);
        assert!(vb.contains_tensor(LM_HEAD));
        let head = vb.get((VOCAB, HIDDEN), LM_HEAD).unwrap();
        let embedding = vb.get((VOCAB, HIDDEN), EMBED_TOKENS).unwrap();
        assert_eq!(head.id(), embedding.id());
        assert_eq!(head.dtype(), dtype);
        assert_eq!(vb.get_unchecked(LM_HEAD).unwrap().id(), head.id());
    }
    let separate = HeadChoice { lm_head: LmHead::Separate, reason: String::new(), warning: None };
    let vb = var_builder(checkpoint, &separate, DType::F32, &Device::Cpu);
    assert!(!vb.contains_tensor(LM_HEAD));
    let error = vb.get((VOCAB, HIDDEN), LM_HEAD).unwrap_err().to_string();
    assert!(error.contains("tensor `lm_head.weight` is missing in"), "{error}");
}

#[test]
fn errors_through_the_var_builder_carry_our_message() {
    let checkpoint = open(&llama_folder(vec![]));
    let head = choose_head(&checkpoint, Some(true), true).unwrap();
    let vb = var_builder(checkpoint, &head, DType::F32, &Device::Cpu);
    for name in [LM_HEAD, EMBED_TOKENS, "model.norm.weight"] {
        let error = vb.get((VOCAB, HIDDEN + 1), name).unwrap_err().to_string();
        assert!(error.contains(&format!("expected [{VOCAB}, {}]", HIDDEN + 1)), "{error}");
    }
    // The tied tensor comes from the cache now. Its shape must still be checked.
    vb.get((VOCAB, HIDDEN), LM_HEAD).unwrap();
    vb.get((VOCAB, HIDDEN + 1), LM_HEAD).unwrap_err();
    let error = vb.set_dtype(DType::U8).get(HIDDEN, "model.norm.weight").unwrap_err().to_string();
    assert!(error.contains("U8 cannot hold weights"), "{error}");
}

#[test]
fn the_head_table() {
    let different = seeded(99, VOCAB * HIDDEN);
    let absent = open(&llama_folder(vec![]));
    let equal = open(&llama_folder(vec![Entry::f32(LM_HEAD, &[VOCAB, HIDDEN], &embedding())]));
    let other = open(&llama_folder(vec![Entry::f32(LM_HEAD, &[VOCAB, HIDDEN], &different)]));
    let rows = [
        (&absent, Some(true), LmHead::Tied, false),
        (&equal, Some(true), LmHead::Tied, false),
        (&other, Some(true), LmHead::Separate, true),
        (&absent, Some(false), LmHead::Tied, true),
        (&absent, None, LmHead::Tied, true),
        (&equal, Some(false), LmHead::Separate, false),
        (&equal, None, LmHead::Separate, false),
        (&other, Some(false), LmHead::Separate, false),
        (&other, None, LmHead::Separate, false),
    ];
    for (checkpoint, flag, lm_head, warns) in rows {
        let choice = choose_head(checkpoint, flag, false).unwrap();
        assert_eq!((choice.lm_head, choice.warning.is_some()), (lm_head, warns), "{flag:?} {choice:?}");
        assert!(!choice.reason.is_empty());
        match choose_head(checkpoint, flag, true) {
            Ok(strict) => assert!(!warns && strict == choice),
            Err(Error::Strict { reason }) => assert_eq!(Some(reason), choice.warning),
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn equality_is_of_values_not_of_types() {
    let rounded: Vec<f32> = embedding().iter().map(|value| half::bf16::from_f32(*value).to_f32()).collect();
    let choice = |head: Entry| {
        let embedding = Entry::bf16(EMBED_TOKENS, &[VOCAB, HIDDEN], &rounded);
        let checkpoint = open(&llama_folder(vec![embedding, head]));
        choose_head(&checkpoint, Some(true), false).unwrap().lm_head
    };
    assert_eq!(choice(Entry::f32(LM_HEAD, &[VOCAB, HIDDEN], &rounded)), LmHead::Tied);
    let mut last = rounded.clone();
    *last.last_mut().unwrap() += 0.5;
    assert_eq!(choice(Entry::f32(LM_HEAD, &[VOCAB, HIDDEN], &last)), LmHead::Separate);
    assert_eq!(choice(Entry::bf16(LM_HEAD, &[VOCAB, HIDDEN], &last)), LmHead::Separate);
}

#[test]
fn only_an_absent_head_falls_back() {
    let with_head = |head: Entry| -> Vec<Result<HeadChoice>> {
        let checkpoint = open(&llama_folder(vec![head]));
        [None, Some(true), Some(false)].map(|flag| choose_head(&checkpoint, flag, false)).into()
    };
    for result in with_head(Entry::f32(LM_HEAD, &[VOCAB - 1, HIDDEN], &seeded(1, (VOCAB - 1) * HIDDEN))) {
        assert!(matches!(result, Err(Error::TensorShape { tensor, .. }) if tensor == LM_HEAD));
    }
    let unreadable = || Entry {
        name: LM_HEAD.into(),
        dtype: safetensors::Dtype::I8,
        shape: vec![VOCAB, HIDDEN],
        bytes: vec![0; VOCAB * HIDDEN],
    };
    for result in with_head(unreadable()) {
        assert!(matches!(result, Err(Error::TensorType { tensor, .. }) if tensor == LM_HEAD));
    }
    let dir = tempfile::tempdir().unwrap();
    write_safetensors(&dir.path().join("model.safetensors"), &[Entry::f32("a", &[1], &[1.0])]);
    assert!(matches!(choose_head(&open(&dir), Some(true), false), Err(Error::MissingTensor { .. })));
}

/// The tiny Llama as a float32 GGUF file.
fn gguf_llama(output: Option<&[f32]>) -> TempDir {
    let mut file = Gguf::llama();
    let mut weights = llama_weights();
    if let Some(output) = output {
        weights.push((LM_HEAD.into(), vec![VOCAB, HIDDEN], output.into()));
    }
    for (name, shape, values) in weights {
        let gguf = candle_llama::checkpoint::names::hf_to_gguf(&name).unwrap();
        let heads = match () {
            () if name.contains("q_proj") => Some(HEADS),
            () if name.contains("k_proj") => Some(KV_HEADS),
            () => None,
        };
        let values = heads.map_or(values.clone(), |heads| permute(&values, shape[0], heads));
        file = file.tensor(&gguf, &shape, 0, bytemuck::cast_slice(&values));
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.gguf"), file.bytes()).unwrap();
    dir
}

/// Rows as llama.cpp's converter orders them.
fn permute(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let width = values.len() / rows;
    let head_dim = rows / heads;
    let source = |row: usize| {
        let (head, in_head) = (row / head_dim, row % head_dim);
        head * head_dim + (in_head % 2) * (head_dim / 2) + in_head / 2
    };
    (0..rows).flat_map(|row| values[source(row) * width..][..width].to_vec()).collect()
}

fn open_gguf(dir: &TempDir) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(&dir.path().join("model.gguf")).unwrap())
}

#[test]
fn gguf_without_output_is_tied_and_strict_accepts() {
    let checkpoint = open_gguf(&gguf_llama(None));
    let head = choose_head(&checkpoint, None, true).unwrap();
    assert_eq!((head.lm_head, &head.warning), (LmHead::Tied, &None));
    // The same model in safetensors gives the same logits, so names and permutation are right.
    let folder = open(&llama_folder(vec![]));
    assert_eq!(logits(&checkpoint, &head), logits(&folder, &choose_head(&folder, Some(true), true).unwrap()));
}

#[test]
fn gguf_with_output_has_a_separate_head() {
    for values in [seeded(99, VOCAB * HIDDEN), embedding()] {
        let checkpoint = open_gguf(&gguf_llama(Some(&values)));
        let head = choose_head(&checkpoint, None, true).unwrap();
        assert_eq!((head.lm_head, head.warning), (LmHead::Separate, None));
    }
}

#[test]
fn quantised_weights_are_dequantised_to_the_requested_type() {
    // One row of 32 elements each: f16 scale 0.5 (and minimum), then the quants.
    let half = [0x00, 0x38];
    let rows: [(u32, Vec<u8>, f32, f32); 3] = [
        (8, [&half[..], &[3; 32]].concat(), 1.5, 1.5),
        (2, [&half[..], &[0x4c; 16]].concat(), 2.0, -2.0),
        (3, [&half[..], &half, &[0x4c; 16]].concat(), 6.5, 2.5),
    ];
    let mut file = Gguf::llama();
    for (kind, bytes, _, _) in &rows {
        file = file.tensor(&format!("t{kind}"), &[1, 32], *kind, bytes);
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.gguf"), file.bytes()).unwrap();
    let head = HeadChoice { lm_head: LmHead::Tied, reason: String::new(), warning: None };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let vb = var_builder(open_gguf(&dir), &head, dtype, &Device::Cpu);
        for (kind, _, low, high) in &rows {
            let tensor = vb.get((1, 32), &format!("t{kind}")).unwrap();
            assert_eq!(tensor.dtype(), dtype);
            let values: Vec<f32> =
                tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!((values[0], values[15], values[16], values[31]), (*low, *low, *high, *high), "{kind}");
        }
    }
}
