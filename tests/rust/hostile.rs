//! Tests with damaged and hostile files. Valid files are damaged at random, mostly in their headers, and then
//! used in every way that a user can. Each use must soon end in a result or in a typed error.

use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use candle_llama::checkpoint::{Checkpoint, tied};
use candle_llama::config::{GenerationConfig, LlamaConfig};
use candle_llama::error::{Error, Result};
use candle_llama::llama::inspect;
use candle_llama::model::Cancel;
use candle_llama::sampling::SamplingOptions;
use candle_llama::tokenizer::Tokenizer;
use candle_llama::{Llama, LoadOptions, Prompt};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};
use std::sync::Arc;
use tempfile::TempDir;

use crate::checkpoint_files::{
    CONTROL_TOKENS, Entry, Gguf, MERGES, llama_config, llama_weights, string, vocabulary, write_safetensors,
};

/// The time limit for one file. It is far more than any of these files needs, even on a busy machine.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// Whether an error blames the file, and not an argument or a bug of ours.
fn is_typed(error: &Error) -> bool {
    matches!(
        error,
        Error::NotFound { .. }
            | Error::Malformed { .. }
            | Error::Truncated { .. }
            | Error::MissingTensor { .. }
            | Error::TensorShape { .. }
            | Error::TensorType { .. }
            | Error::Unsupported { .. }
            | Error::Text { .. }
            | Error::OutOfMemory { .. }
    )
}

/// The value, if there is one. An error must be typed and its message short.
fn checked<T>(result: Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            assert!(is_typed(&error), "{error:?}");
            assert!(error.to_string().len() < 2000, "{error}");
            None
        }
    }
}

/// Uses the model at `path` in every way. Returns whether it could be loaded.
fn use_model(path: &Path) -> bool {
    let started = Instant::now();
    let loaded = use_model_untimed(path);
    assert!(started.elapsed() < TIME_LIMIT, "took {:?}", started.elapsed());
    loaded
}

fn use_model_untimed(path: &Path) -> bool {
    if let Some(checkpoint) = checked(Checkpoint::open(path)) {
        for info in checkpoint.infos() {
            if let Some(tensor) = checked(checkpoint.tensor(&info.name)) {
                assert_eq!(tensor.to_f32().len(), tensor.elements());
            }
        }
        checked(checkpoint.files().check());
        if let Some(head) = checked(tied::choose_head(&checkpoint, Some(true), false)) {
            let builder = tied::var_builder(Arc::new(checkpoint), &head, DType::F32, &Device::Cpu);
            // Not `checked`, because these errors are Candle's. There must be none here.
            let head = builder.get_unchecked(tied::LM_HEAD).unwrap();
            assert_eq!(head.dims(), builder.get_unchecked(tied::EMBED_TOKENS).unwrap().dims());
        }
    }
    if path.is_dir() {
        checked(LlamaConfig::from_folder(path));
        checked(GenerationConfig::from_folder(path));
    }
    if let Some(tokenizer) = checked(Tokenizer::open(path))
        && let Some(ids) = checked(tokenizer.encode("hello a<|end|>", true, false))
    {
        checked(tokenizer.decode(&ids, false));
    }
    checked(inspect(path).map(|found| found.parameters));
    let loaded = run(path, "cpu");
    if loaded {
        run(path, "candle");
    }
    loaded
}

/// Loads the model into an engine and generates with the sampling parameters of its files. Returns whether it
/// could be loaded.
fn run(path: &Path, engine: &str) -> bool {
    let options = LoadOptions {
        engine: engine.parse().ok(),
        threads: Some(1),
        context_length: Some(64),
        device: Some("cpu".into()),
        ..LoadOptions::default()
    };
    let Some(llama) = checked(Llama::load(path, &options, &Cancel::never())) else { return false };
    let three = SamplingOptions { max_new_tokens: Some(3), seed: Some(1), ..SamplingOptions::default() };
    match llama.generate(Prompt::TokenIds(vec![0]), &three, &Cancel::never()) {
        Ok(completion) => assert!(completion.token_ids.len() <= 3),
        // A file's own sampling parameters may be invalid, and its weights may not be finite.
        Err(error) => assert!(
            is_typed(&error) || matches!(error, Error::InvalidArgument { .. } | Error::Generation { .. }),
            "{error:?}"
        ),
    }
    true
}

/// A change of some bytes, such as a damaged disk or an attacker makes.
#[derive(Clone, Debug)]
enum Edit {
    Overwrite(Index, Vec<u8>),
    Insert(Index, Vec<u8>),
    Delete(Index, usize),
    /// Inserts a copy of a part of the file somewhere else.
    Repeat(Index, Index, usize),
    Cut(Index),
}

impl Edit {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let len = bytes.len();
        match self {
            Edit::Overwrite(at, new) => {
                let at = at.index(len);
                let end = len.min(at + new.len());
                bytes[at..end].copy_from_slice(&new[..end - at]);
            }
            Edit::Insert(at, new) => {
                let at = at.index(len);
                bytes.splice(at..at, new.iter().copied());
            }
            Edit::Delete(at, count) => {
                let at = at.index(len);
                bytes.drain(at..len.min(at + count));
            }
            Edit::Repeat(from, to, count) => {
                let from = from.index(len);
                let part = bytes[from..len.min(from + count)].to_vec();
                let to = to.index(len);
                bytes.splice(to..to, part);
            }
            Edit::Cut(at) => bytes.truncate(at.index(len)),
        }
    }
}

/// Integers that may overflow something.
fn integer() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0u64..300,
        (0u32..64).prop_map(|bit| 1 << bit),
        (0u32..64).prop_map(|bit| (1 << bit) - 1),
        Just(u64::MAX),
    ]
}

/// Bytes that have a meaning in one of the formats.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 1..9),
        integer().prop_map(|number| number.to_le_bytes().to_vec()),
        integer().prop_map(|number| (number as u32).to_le_bytes().to_vec()),
        integer().prop_map(|number| number.to_string().into_bytes()),
        select(vec!["\"", "{", "}", "[", "]", ":", ",", "-", "1e999", "null", "\\u0000", "é", "\u{feff}"])
            .prop_map(|text| text.as_bytes().to_vec()),
        Just(vec![0xff]),
        Just(b"[".repeat(300)),
    ]
}

fn edit() -> impl Strategy<Value = Edit> {
    let place = any::<Index>;
    prop_oneof![
        4 => (place(), piece()).prop_map(|(at, new)| Edit::Overwrite(at, new)),
        2 => (place(), piece()).prop_map(|(at, new)| Edit::Insert(at, new)),
        1 => (place(), 1usize..40).prop_map(|(at, count)| Edit::Delete(at, count)),
        1 => (place(), place(), 1usize..100).prop_map(|(from, to, count)| Edit::Repeat(from, to, count)),
        1 => place().prop_map(Edit::Cut),
    ]
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    prop::collection::vec(edit(), 1..4)
}

fn edited(mut bytes: Vec<u8>, edits: &[Edit]) -> Vec<u8> {
    for edit in edits {
        edit.apply(&mut bytes);
    }
    bytes
}

thread_local! {
    /// One folder for all cases of a test, because making thousands of folders is slower than reading them.
    static FOLDER: TempDir = folder();
    static GGUF_FOLDER: TempDir = tempfile::tempdir().unwrap();
}

/// A valid folder: the tiny Llama and a tokenizer.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let weights = llama_weights();
    let entries: Vec<_> =
        weights.iter().map(|(name, shape, values)| Entry::bf16(name, shape, values)).collect();
    write_safetensors(&dir.path().join("model.safetensors"), &entries);
    let write = |name: &str, value: Value| std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    write("config.json", llama_config());
    write(
        "generation_config.json",
        json!({"eos_token_id": [1], "temperature": 0.6, "top_k": 50, "do_sample": true}),
    );
    let vocab: serde_json::Map<_, _> = vocabulary().into_iter().zip((0..).map(Value::from)).collect();
    let special = |(id, token)| {
        json!({
            "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        })
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    write(
        "tokenizer.json",
        json!({
            "version": "1.0",
            "added_tokens": CONTROL_TOKENS.iter().enumerate().map(special).collect::<Vec<_>>(),
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": MERGES},
        }),
    );
    dir
}

/// Replaces one file of the valid folder with these bytes, uses the folder, then restores the file.
fn use_folder_with(name: &str, bytes: &[u8]) -> bool {
    FOLDER.with(|dir| {
        let path = dir.path().join(name);
        let _restore = Restore(&path, std::fs::read(&path).unwrap());
        replace(&path, bytes);
        use_model(dir.path())
    })
}

/// A file, and the content that is restored when this is dropped.
struct Restore<'a>(&'a Path, Vec<u8>);

impl Drop for Restore<'_> {
    fn drop(&mut self) {
        replace(self.0, &self.1);
    }
}

fn use_gguf(bytes: &[u8]) -> bool {
    GGUF_FOLDER.with(|dir| {
        let path = dir.path().join("model.gguf");
        replace(&path, bytes);
        use_model(&path)
    })
}

/// Replaces a file by a new one. Overwriting it would be slow: some file systems wait for the disk then.
fn replace(path: &Path, bytes: &[u8]) {
    let _ = std::fs::remove_file(path);
    std::fs::write(path, bytes).unwrap();
}

fn file_of_folder(name: &str) -> Vec<u8> {
    FOLDER.with(|dir| std::fs::read(dir.path().join(name)).unwrap())
}

fn valid_gguf() -> Vec<u8> {
    Gguf::llama_with_tokenizer()
        .u32s("unread", &[1, 2, 3])
        .tensor("blk.7.attn_q.weight", &[32, 32], 2, &[9; 32 * 18])
        .weights(&llama_weights())
        .bytes()
}

/// The offset of the tensors' data.
fn gguf_header(bytes: &[u8]) -> usize {
    let weights: usize = llama_weights().iter().map(|(_, _, values)| 4 * values.len()).sum();
    bytes.len() - weights - 32 * 18
}

/// A safetensors file with edits in its JSON and the matching length, so that the JSON is parsed.
fn with_json_edited(file: &[u8], edits: &[Edit]) -> Vec<u8> {
    let (length, rest) = file.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header = edited(header.to_vec(), edits);
    [&(header.len() as u64).to_le_bytes(), &header[..], data].concat()
}

#[test]
fn the_undamaged_files_load() {
    let file = file_of_folder("model.safetensors");
    assert!(use_folder_with("model.safetensors", &file));
    assert!(use_gguf(&valid_gguf()));
    FOLDER.with(|dir| {
        assert_eq!(Tokenizer::open(dir.path()).unwrap().encode("hello a", true, false).unwrap().len(), 4);
    });
}

#[test]
fn every_truncation_of_the_smaller_files_is_survived() {
    for name in ["config.json", "generation_config.json"] {
        let whole = file_of_folder(name);
        for len in 0..whole.len() {
            assert!(!use_folder_with(name, &whole[..len]), "{name} cut at {len}");
        }
    }
    // A model with an unreadable tokenizer still loads.
    let whole = file_of_folder("tokenizer.json");
    for len in (0..whole.len()).step_by(7) {
        assert!(use_folder_with("tokenizer.json", &whole[..len]));
    }
}

/// Config values of wrong types, wrong sizes or wrong ranges.
fn hostile_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        integer().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        select(vec![0.0, -0.0, -1.0, 0.5, 1e-320, 1e38, 1e39, 1e308, f64::MIN]).prop_map(Value::from),
        select(vec![
            json!(null),
            json!(true),
            json!(""),
            json!("x".repeat(5000)),
            json!([]),
            json!({}),
            json!([1, 2]),
            json!([[1]]),
            json!({"rope_type": "llama3"}),
            json!({"rope_type": "linear", "factor": 1e300}),
            json!({"rope_type": "yarn", "factor": 0}),
            json!({"type": "dynamic", "factor": -1}),
            json!({
                "rope_type": "llama3", "factor": 1e-300, "low_freq_factor": 1, "high_freq_factor": 1,
                "original_max_position_embeddings": 0
            }),
        ]),
    ]
}

const CONFIG_KEYS: [&str; 20] = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "eos_token_id",
    "bos_token_id",
    "tie_word_embeddings",
    "architectures",
    "model_type",
];

const GENERATION_KEYS: [&str; 8] = [
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "eos_token_id",
    "do_sample",
];

const GGUF_KEYS: [&str; 16] = [
    "general.alignment",
    "llama.vocab_size",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.block_count",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.rope.freq_base",
    "llama.rope.scaling.factor",
    "split.count",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.token_type",
    "tokenizer.chat_template",
];

fn with_values(name: &str, changes: &[(&str, Value)]) -> Vec<u8> {
    let mut config: Value = serde_json::from_slice(&file_of_folder(name)).unwrap();
    for (key, value) in changes {
        config[key] = value.clone();
    }
    config.to_string().into_bytes()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_safetensors_file_is_survived(edits in edits(), json_only in any::<bool>()) {
        let file = file_of_folder("model.safetensors");
        let bytes = if json_only { with_json_edited(&file, &edits) } else { edited(file, &edits) };
        use_folder_with("model.safetensors", &bytes);
    }

    #[test]
    fn a_damaged_gguf_file_is_survived(edits in edits(), header_only in any::<bool>()) {
        let mut file = valid_gguf();
        let data = file.split_off(if header_only { gguf_header(&file) } else { file.len() });
        use_gguf(&[edited(file, &edits), data].concat());
    }

    #[test]
    fn a_damaged_json_file_is_survived(
        name in select(vec!["config.json", "generation_config.json", "tokenizer.json"]),
        edits in edits(),
    ) {
        use_folder_with(name, &edited(file_of_folder(name), &edits));
    }

    #[test]
    fn config_values_are_survived(
        changes in prop::collection::vec((select(CONFIG_KEYS.to_vec()), hostile_value()), 1..4),
    ) {
        use_folder_with("config.json", &with_values("config.json", &changes));
    }

    #[test]
    fn generation_config_values_are_survived(
        changes in prop::collection::vec((select(GENERATION_KEYS.to_vec()), hostile_value()), 1..4),
    ) {
        use_folder_with("generation_config.json", &with_values("generation_config.json", &changes));
    }

    #[test]
    fn gguf_values_are_survived(key in select(GGUF_KEYS.to_vec()), kind in 0u32..14, number in integer()) {
        let value = match kind {
            0 | 1 | 7 => vec![number as u8],
            2 | 3 => (number as u16).to_le_bytes().to_vec(),
            4 | 5 => (number as u32).to_le_bytes().to_vec(),
            6 => (number as f32).to_le_bytes().to_vec(),
            8 => string(&number.to_string()),
            9 => [&4u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[number as u8; 8]].concat(),
            _ => number.to_le_bytes().to_vec(),
        };
        let file = Gguf::llama_with_tokenizer().without(key).value(key, kind, &value);
        use_gguf(&file.weights(&llama_weights()).bytes());
    }

    #[test]
    fn random_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        use_folder_with("model.safetensors", &bytes);
        use_gguf(&[&b"GGUF\x03\x00\x00\x00"[..], &bytes].concat());
    }
}
