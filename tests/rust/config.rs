//! Tests of reading config.json and GGUF metadata: every key is honoured or refused by name.

use candle_llama::checkpoint::{Checkpoint, gguf};
use candle_llama::config::{LlamaConfig, RopeScaling};
use candle_llama::error::{Error, Result};
use candle_llama::kernels::Activation;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::checkpoint_files::{Gguf, HEAD_DIM, HIDDEN, VOCAB};

/// Llama 3.2 1B as transformers 4 writes it.
fn llama_3_2() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256
    })
}

/// The required keys of a config.
fn tiny() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 10, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 4
    })
}

fn read_text(text: &str) -> Result<LlamaConfig> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    LlamaConfig::from_folder(dir.path())
}

fn read(config: &Value) -> Result<LlamaConfig> {
    read_text(&config.to_string())
}

/// `config` with these keys changed; null removes a key.
fn with(mut config: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().unwrap() {
        if value.is_null() {
            config.as_object_mut().unwrap().remove(key);
        } else {
            config[key] = value.clone();
        }
    }
    config
}

fn malformed(result: Result<LlamaConfig>) -> String {
    match result {
        Err(error @ Error::Malformed { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

fn unsupported(result: Result<LlamaConfig>) -> (String, String) {
    match result {
        Err(Error::Unsupported { key, value }) => (key, value),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_key_of_llama_3_2_is_read() {
    let config = read(&llama_3_2()).unwrap();
    assert_eq!(config.warnings, [] as [&str; 0]);
    assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (128_256, 2048, 8192));
    assert_eq!(
        (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads),
        (16, 32, 8)
    );
    assert_eq!((config.head_dim, config.rms_norm_eps, config.max_position_embeddings), (64, 1e-5, 131_072));
    assert_eq!(config.rope.theta, 500_000.0);
    let scaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!(config.rope.scaling, scaling);
    assert_eq!(config.tie_word_embeddings, Some(true));
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(128_000), vec![128_001, 128_008, 128_009]));
    assert_eq!(config.torch_dtype.as_deref(), Some("bfloat16"));
    assert_eq!(Value::Object(config.raw), llama_3_2());
}

#[test]
fn both_versions_of_transformers_give_the_same_config() {
    let four = read(&llama_3_2()).unwrap();
    let mut parameters = llama_3_2()["rope_scaling"].clone();
    parameters["rope_theta"] = json!(500_000.0);
    let changes = json!({
        "rope_scaling": null, "rope_theta": null, "torch_dtype": null,
        "rope_parameters": parameters, "dtype": "bfloat16"
    });
    let five = read(&with(llama_3_2(), changes)).unwrap();
    assert_eq!((five.rope, five.torch_dtype), (four.rope, four.torch_dtype));
    let default = json!({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}});
    let config = read(&with(tiny(), default)).unwrap();
    assert_eq!((config.rope.theta, config.rope.scaling), (1e6, RopeScaling::Default));
}

#[test]
fn both_spellings_are_accepted_if_they_agree() {
    let rope = json!({"rope_type": "default", "rope_theta": 5e5});
    let both = json!({"rope_theta": 5e5, "rope_scaling": {"type": "default"}, "rope_parameters": rope,
        "torch_dtype": "float16", "dtype": "float16"});
    let config = read(&with(tiny(), both.clone())).unwrap();
    assert_eq!((config.rope.theta, config.torch_dtype.as_deref()), (5e5, Some("float16")));
    let llama3 = llama_3_2()["rope_scaling"].clone();
    for (change, key) in [
        (json!({"rope_theta": 1e4}), "rope_parameters.rope_theta"),
        (json!({"rope_scaling": llama3}), "rope_parameters"),
        (json!({"rope_scaling": {"type": "default", "rope_type": "llama3"}}), "rope_scaling.rope_type"),
    ] {
        let message = malformed(read(&with(with(tiny(), both.clone()), change)));
        assert!(message.contains(&format!("config.json: {key} ")), "{message}");
    }
}

#[test]
fn type_and_rope_type_are_the_same_key() {
    let mut rope = llama_3_2()["rope_scaling"].clone();
    rope["type"] = rope["rope_type"].clone();
    let both = read(&with(llama_3_2(), json!({"rope_scaling": rope}))).unwrap();
    rope.as_object_mut().unwrap().remove("rope_type");
    let old = read(&with(llama_3_2(), json!({"rope_scaling": rope}))).unwrap();
    assert_eq!(both.rope, old.rope);
    assert_eq!(both.rope, read(&llama_3_2()).unwrap().rope);
}

#[test]
fn absent_keys_have_transformers_defaults() {
    let config = read(&tiny()).unwrap();
    assert_eq!((config.num_key_value_heads, config.head_dim), (4, 4));
    assert_eq!((config.rms_norm_eps, config.max_position_embeddings), (1e-6, 2048));
    assert_eq!((config.rope.theta, config.rope.scaling), (10_000.0, RopeScaling::Default));
    assert_eq!((config.tie_word_embeddings, config.torch_dtype), (None, None));
    assert_eq!((config.bos_token_id, config.eos_token_ids), (None, vec![]));
    for key in ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    {
        let message = malformed(read(&with(tiny(), json!({ key: null }))));
        assert!(message.ends_with(&format!("config.json: {key} is missing")), "{message}");
    }
}

#[test]
fn null_means_absent() {
    let text = r#"{"model_type": "llama", "vocab_size": 10, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": null, "head_dim": null,
        "rope_scaling": null, "eos_token_id": null, "sliding_window": null, "quantization_config": null,
        "logit_scale": null, "never_heard_of": null, "neither_of_this": false}"#;
    let config = read_text(text).unwrap();
    assert_eq!((config.num_key_value_heads, config.head_dim, config.warnings.len()), (4, 4, 0));
}

#[test]
fn all_heads_together_may_be_wider_than_hidden_size() {
    let config = read(&with(tiny(), json!({"head_dim": 32, "num_key_value_heads": 1}))).unwrap();
    assert_eq!((config.head_dim, config.num_key_value_heads), (32, 1));
}

#[test]
fn other_models_are_refused() {
    assert_eq!(unsupported(read(&with(tiny(), json!({"model_type": "mistral"})))).0, "model_type");
    assert_eq!(unsupported(read(&with(tiny(), json!({"model_type": null})))).0, "model_type");
    let architecture = json!({"architectures": ["LlamaForSequenceClassification"]});
    let (key, value) = unsupported(read(&with(tiny(), architecture)));
    assert_eq!(key, "architectures");
    assert!(value.contains("LlamaForSequenceClassification"), "{value}");
    let by_architecture = json!({"model_type": null, "architectures": ["LlamaForCausalLM"]});
    assert!(read(&with(tiny(), by_architecture)).is_ok());
}

#[test]
fn what_changes_the_mathematics_is_refused_by_name_and_value() {
    for (change, key, value) in [
        (json!({"hidden_act": "relu"}), "hidden_act", "relu"),
        (json!({"sliding_window": 2047}), "sliding_window", "2047"),
        (json!({"sliding_window": 2047, "use_sliding_window": true}), "sliding_window", "2047"),
        (json!({"sliding_window": -1}), "sliding_window", "-1"),
        (json!({"use_sliding_window": true}), "use_sliding_window", "true"),
        (json!({"attention_chunk_size": 1024}), "attention_chunk_size", "1024"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor", "0.5"),
        (json!({"rope_interleaved": true}), "rope_interleaved", "true"),
        (json!({"quantization_config": {"quant_method": "gptq"}}), "quantization_config", "gptq"),
        (json!({"rope_parameters": {"rope_type": "longrope"}}), "rope_parameters.rope_type", "longrope"),
        (json!({"rope_parameters": {"full_attention": {}}}), "rope_parameters.full_attention", "{}"),
        (
            json!({"rope_parameters": {"partial_rotary_factor": 0.5}}),
            "rope_parameters.partial_rotary_factor",
            "0.5",
        ),
        (json!({"logits_scaling": 8.0}), "logits_scaling", "8"),
        (json!({"num_local_experts": 8}), "num_local_experts", "8"),
        (json!({"use_qk_norm": true}), "use_qk_norm", "true"),
        (json!({"no_rope_layers": [1, 0]}), "no_rope_layers", "[1,0]"),
        (json!({"query_pre_attn_scalar": 64}), "query_pre_attn_scalar", "64"),
        (json!({"layer_types": ["full_attention", "sliding_attention"]}), "layer_types", "sliding_attention"),
    ] {
        let (got_key, got_value) = unsupported(read(&with(tiny(), change)));
        assert_eq!(got_key, key);
        assert!(got_value.contains(value), "{got_value}");
    }
}

#[test]
fn values_that_change_nothing_are_accepted() {
    for change in [
        json!({"attention_bias": false, "mlp_bias": false, "pretraining_tp": 4, "hidden_act": "swish"}),
        json!({"partial_rotary_factor": 1.0, "rope_interleaved": false, "is_llama_config": true}),
        json!({"logits_scaling": 1.0, "residual_multiplier": 1, "num_local_experts": 0}),
        json!({"use_qk_norm": false, "layer_types": ["full_attention"]}),
        json!({"auto_map": {"AutoModel": "x"}, "_name_or_path": "x"}),
        json!({"unsloth_version": "1", "max_length": 20}),
        json!({"sliding_window": 4096, "use_sliding_window": false, "max_window_layers": 21}),
        // max_position_embeddings is 2048 here.
        json!({"sliding_window": 2048, "attention_chunk_size": 4096}),
        json!({"sliding_window": 32768, "use_sliding_window": true}),
        json!({"use_sliding_window": false, "sliding_window": 16}),
        json!({"architectures": ["LLaMAForCausalLM"]}),
    ] {
        assert_eq!(read(&with(tiny(), change)).unwrap().warnings, [] as [&str; 0]);
    }
}

#[test]
fn of_two_dtypes_the_newer_key_counts() {
    let config = read(&with(tiny(), json!({"torch_dtype": "float16", "dtype": "bfloat16"}))).unwrap();
    assert_eq!(config.torch_dtype.as_deref(), Some("bfloat16"));
    let warning = "config.json: dtype is \"bfloat16\", but torch_dtype is \"float16\"; the weights decide";
    assert_eq!(config.warnings, [warning]);
}

#[test]
fn unknown_keys_and_unused_rope_values_are_warned_about() {
    let rope = json!({"rope_type": "default", "factor": 4.0});
    let config = read(&with(tiny(), json!({"never_heard_of": 1, "rope_scaling": rope}))).unwrap();
    assert_eq!(
        config.warnings,
        [
            "config.json: unknown key never_heard_of (1) is ignored",
            "config.json: rope_scaling.factor (4.0) is ignored, as \"default\" does not use it",
        ]
    );
    assert_eq!(config.rope.scaling, RopeScaling::Default);
}

#[test]
fn end_tokens_outside_the_vocabulary_are_dropped_with_a_warning() {
    let config = read(&with(tiny(), json!({"eos_token_id": [2, 10]}))).unwrap();
    assert_eq!(config.eos_token_ids, [2]);
    assert!(config.warnings[0].contains("eos_token_id [10] is outside"), "{:?}", config.warnings);
}

#[test]
fn values_out_of_range_are_malformed_with_file_and_key() {
    let llama3 = |key: &str, value: Value| {
        let mut rope = llama_3_2()["rope_scaling"].clone();
        rope[key] = value;
        json!({ "rope_scaling": rope })
    };
    for (change, key) in [
        (json!({"vocab_size": 0}), "vocab_size"),
        (json!({"vocab_size": 1 << 25}), "vocab_size"),
        (json!({"hidden_size": "16"}), "hidden_size"),
        (json!({"hidden_size": 16.5}), "hidden_size"),
        (json!({"hidden_size": -16}), "hidden_size"),
        (json!({"num_hidden_layers": 4097}), "num_hidden_layers"),
        (json!({"num_attention_heads": 0}), "num_attention_heads"),
        (json!({"num_attention_heads": 3}), "num_attention_heads"),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
        (json!({"num_key_value_heads": 0}), "num_key_value_heads"),
        (json!({"head_dim": 5}), "head_dim"),
        (json!({"head_dim": 1 << 24}), "num_attention_heads"),
        (json!({"rms_norm_eps": 0.0}), "rms_norm_eps"),
        (json!({"rms_norm_eps": 1e-60}), "rms_norm_eps"),
        (json!({"rope_theta": -1.0}), "rope_theta"),
        (json!({"rope_theta": 1e60}), "rope_theta"),
        (json!({"tie_word_embeddings": 1}), "tie_word_embeddings"),
        (json!({"eos_token_id": 1.5}), "eos_token_id"),
        (json!({"eos_token_id": [2, "x"]}), "eos_token_id"),
        (json!({"architectures": "LlamaForCausalLM"}), "architectures"),
        (json!({"rope_scaling": "llama3"}), "rope_scaling"),
        (json!({"rope_scaling": {"factor": 2.0}}), "rope_scaling"),
        (llama3("factor", json!(0)), "rope_scaling.factor"),
        (llama3("factor", json!("8")), "rope_scaling.factor"),
        (llama3("factor", Value::Null), "rope_scaling.factor"),
        (llama3("low_freq_factor", json!(4.0)), "rope_scaling.low_freq_factor"),
        (
            llama3("original_max_position_embeddings", Value::Null),
            "rope_scaling.original_max_position_embeddings",
        ),
    ] {
        let message = malformed(read(&with(tiny(), change.clone())));
        assert!(message.contains(&format!("config.json: {key} ")), "{change}: {message}");
    }
}

#[test]
fn the_file_must_be_json() {
    assert!(malformed(read_text("")).contains("not valid JSON"));
    assert!(malformed(read_text("[]")).contains("not an object"));
    assert!(malformed(read_text(r#"{"vocab_size": 1, "vocab_size": 2}"#)).contains("duplicate key"));
    let dir = tempfile::tempdir().unwrap();
    match LlamaConfig::from_folder(dir.path()) {
        Err(Error::NotFound { what, path }) => {
            assert_eq!(what, "config.json");
            assert!(path.ends_with("config.json"));
        }
        other => panic!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_config_never_panics(
        edits in prop::collection::vec(
            (any::<prop::sample::Index>(), prop::sample::select(&b"09e-.\"{}[],:nx\xff"[..])),
            1..4,
        )
    ) {
        let mut bytes = llama_3_2().to_string().into_bytes();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), bytes).unwrap();
        match LlamaConfig::from_folder(dir.path()) {
            Ok(config) => assert_eq!(config.rope.inv_freq(config.head_dim, 9).len(), config.head_dim / 2),
            Err(Error::Malformed { .. } | Error::Unsupported { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
}

fn read_gguf(file: &Gguf) -> Result<LlamaConfig> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    LlamaConfig::from_gguf(&gguf::read_metadata(&path).unwrap(), Some(&checkpoint))
}

#[test]
fn gguf_metadata_becomes_a_config() {
    let file = Gguf::llama()
        .f32("llama.rope.freq_base", 500_000.0)
        .u32("llama.rope.dimension_count", HEAD_DIM as u32)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 7)
        .u32("tokenizer.ggml.eot_token_id", 5);
    let config = read_gguf(&file).unwrap();
    assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (VOCAB, HIDDEN, 64));
    assert_eq!((config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads), (2, 4, 2));
    assert_eq!((config.head_dim, config.rms_norm_eps, config.max_position_embeddings), (HEAD_DIM, 1e-5, 128));
    assert_eq!((config.rope.theta, &config.rope.scaling), (500_000.0, &RopeScaling::Default));
    assert_eq!((config.tie_word_embeddings, config.warnings.len()), (None, 0));
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![7, 5]));
    // The raw config is a valid config.json.
    let again = read(&Value::Object(config.raw)).unwrap();
    assert_eq!((again.hidden_size, again.rms_norm_eps, again.rope), (HIDDEN, 1e-5, config.rope));
}

#[test]
fn gguf_rope_factors_come_from_their_tensor() {
    let factors = [1.0f32, 1.0, 4.0, 8.0];
    let file = |factors: &[f32]| {
        Gguf::llama().tensor("rope_freqs.weight", &[factors.len()], 0, bytemuck::cast_slice(factors))
    };
    assert_eq!(read_gguf(&file(&factors)).unwrap().rope.freq_factors, Some(factors.into()));
    assert!(matches!(read_gguf(&file(&[1.0; 3])), Err(Error::TensorShape { .. })));
    assert!(malformed(read_gguf(&file(&[1.0, 1.0, 0.0, 1.0]))).contains("rope_freqs.weight is 0"));
    let long = Gguf::llama().tensor("rope_factors_long.weight", &[1], 0, &[0; 4]);
    assert_eq!(unsupported(read_gguf(&long)).0, "rope_factors_long.weight");
}

#[test]
fn gguf_head_dim_may_be_explicit() {
    let explicit = |key: u32, value: u32, rope: u32| {
        Gguf::llama()
            .u32("llama.attention.key_length", key)
            .u32("llama.attention.value_length", value)
            .u32("llama.rope.dimension_count", rope)
    };
    assert_eq!(read_gguf(&explicit(16, 16, 16)).unwrap().head_dim, 16);
    assert_eq!(unsupported(read_gguf(&explicit(16, 8, 16))).0, "llama.attention.value_length");
    assert_eq!(unsupported(read_gguf(&explicit(16, 16, 8))).0, "llama.rope.dimension_count");
}

#[test]
fn gguf_vocabulary_size_may_come_from_tokens_or_embedding() {
    let base = || {
        Gguf::empty()
            .string("general.architecture", "llama")
            .u32("llama.context_length", 8)
            .u32("llama.embedding_length", 4)
            .u32("llama.feed_forward_length", 4)
            .u32("llama.block_count", 1)
            .u32("llama.attention.head_count", 1)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    };
    assert!(malformed(read_gguf(&base())).contains("llama.vocab_size is missing"));
    assert_eq!(read_gguf(&base().strings("tokenizer.ggml.tokens", &["a", "b"])).unwrap().vocab_size, 2);
    let embedding = base().tensor("token_embd.weight", &[3, 4], 0, &[0; 48]);
    assert_eq!(read_gguf(&embedding).unwrap().vocab_size, 3);

    // A key that disagrees with the tokens is ignored if the embedding has as many rows as there are tokens.
    let stale = |tokens: &[&str]| {
        let file = base().u32("llama.vocab_size", 2).strings("tokenizer.ggml.tokens", tokens);
        read_gguf(&file.tensor("token_embd.weight", &[3, 4], 0, &[0; 48])).unwrap()
    };
    let config = stale(&["a", "b", "c"]);
    assert_eq!(config.vocab_size, 3);
    assert_eq!(config.warnings, ["llama.vocab_size is 2 and is ignored: the vocabulary has 3 tokens"]);
    assert_eq!(stale(&["a"]).vocab_size, 2);
}

#[test]
fn gguf_faults_of_unused_values_are_warnings() {
    let config = read_gguf(&Gguf::llama().value("general.name", 8, b"\x02\0\0\0\0\0\0\0\xffx")).unwrap();
    assert_eq!(config.warnings, ["\"general.name\" is not valid UTF-8; wrong bytes are replaced"]);
    let none = Gguf::llama()
        .value("tokenizer.ggml.bos_token_id", 5, &[255; 4])
        .value("tokenizer.ggml.eos_token_id", 4, &[255; 4])
        .value("tokenizer.ggml.eot_token_id", 10, &[255; 8]);
    let config = read_gguf(&none).unwrap();
    assert_eq!((config.bos_token_id, config.eos_token_ids, config.warnings), (None, vec![], vec![]));
}

#[test]
fn gguf_keys_that_change_the_mathematics_are_refused() {
    let string = |key: &str, value: &str| Gguf::llama().string(key, value);
    for (file, key) in [
        (string("llama.rope.scaling.type", "longrope"), "llama.rope.scaling.type"),
        (Gguf::llama().f32("llama.rope.scaling.yarn_ext_factor", 0.5), "llama.rope.scaling.yarn_ext_factor"),
        (Gguf::llama().u32("llama.expert_count", 8), "llama.expert_count"),
        (Gguf::llama().f32("llama.logit_scale", 0.5), "llama.logit_scale"),
        (Gguf::llama().value("llama.attention.causal", 7, &[0]), "llama.attention.causal"),
        (Gguf::llama().u32("llama.attention.sliding_window", 1), "llama.attention.sliding_window"),
        (string("llama.attention.sliding_window", "off"), "llama.attention.sliding_window"),
    ] {
        assert_eq!(unsupported(read_gguf(&file)).0, key);
    }
    let harmless = string("llama.rope.scaling.type", "none")
        .f32("llama.rope.scaling.factor", 4.0)
        .u32("llama.expert_count", 0)
        .u32("llama.attention.sliding_window", u32::MAX)
        .value("llama.attention.causal", 7, &[1]);
    assert_eq!(read_gguf(&harmless).unwrap().warnings, [] as [&str; 0]);
    let unknown = Gguf::llama().u32("llama.never_heard_of", 1);
    assert!(read_gguf(&unknown).unwrap().warnings[0].contains("llama.never_heard_of (1)"));
}

#[test]
fn gguf_rope_scaling_is_read_as_llama_cpp_reads_it() {
    let scaling = |file: Gguf| read_gguf(&file).unwrap().rope.scaling;
    let linear = RopeScaling::Linear { factor: 4.0 };
    assert_eq!(scaling(Gguf::llama().f32("llama.rope.scaling.factor", 4.0)), linear);
    assert_eq!(scaling(Gguf::llama().f32("llama.rope.scale_linear", 4.0)), linear);
    assert_eq!(scaling(Gguf::llama().f32("llama.rope.scaling.factor", 0.0)), RopeScaling::Default);
    let yarn = Gguf::llama().string("llama.rope.scaling.type", "yarn").f32("llama.rope.scaling.factor", 4.0);
    let RopeScaling::Yarn { attention_factor, beta_fast, original_max_position_embeddings, .. } =
        scaling(yarn.u32("llama.rope.scaling.original_context_length", 32))
    else {
        panic!("it says yarn");
    };
    assert!((attention_factor - 1.138_629_436).abs() < 1e-8);
    assert_eq!((beta_fast, original_max_position_embeddings), (32.0, 32));
}

#[test]
fn rope_scaling_of_every_type_is_read_in_both_spellings() {
    for section in ["rope_scaling", "rope_parameters"] {
        let scaling = |value: Value| read(&with(tiny(), json!({section: value}))).unwrap().rope.scaling;
        let linear = json!({"type": "linear", "factor": 2.5});
        assert_eq!(scaling(linear), RopeScaling::Linear { factor: 2.5 });
        let dynamic = scaling(json!({"rope_type": "dynamic", "factor": 3.0}));
        let original_max_position_embeddings = read(&tiny()).unwrap().max_position_embeddings;
        assert_eq!(dynamic, RopeScaling::Dynamic { factor: 3.0, original_max_position_embeddings });
        let yarn = scaling(json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": null, "truncate": false}));
        let RopeScaling::Yarn { attention_factor, beta_fast, beta_slow, truncate, .. } = yarn else {
            panic!("it says yarn");
        };
        assert!((attention_factor - 1.138_629_436).abs() < 1e-8);
        assert_eq!((beta_fast, beta_slow, truncate), (32.0, 1.0, false));
    }
}

#[test]
fn dynamic_rope_has_a_longer_context() {
    let config = json!({"max_position_embeddings": 100, "rope_scaling": {"type": "dynamic", "factor": 2.5}});
    assert_eq!(read(&with(tiny(), config)).unwrap().context_length(), 250);
}

#[test]
fn biases_and_activations_are_read() {
    let config = read(&with(tiny(), json!({"attention_bias": true, "hidden_act": "gelu_new"}))).unwrap();
    assert!(config.attention_bias && !config.mlp_bias);
    assert_eq!(config.hidden_act, Activation::GeluTanh);
}

#[test]
fn gguf_values_out_of_range_are_named_as_in_the_file() {
    for (file, key) in [
        (Gguf::llama().f32("llama.rope.freq_base", -1.0), "llama.rope.freq_base"),
        (Gguf::llama().f32("llama.rope.freq_base", f32::NAN), "llama.rope.freq_base"),
        (Gguf::llama().string("tokenizer.ggml.bos_token_id", "1"), "tokenizer.ggml.bos_token_id"),
        (Gguf::llama().u32("llama.attention.key_length", 7), "llama.attention.value_length"),
    ] {
        let error = read_gguf(&file).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}
