//! The same bytes as a chat template and as what a user says to it.

#![no_main]

#[allow(dead_code)] // a template needs no folder but the tokenizer's
mod shared;

use std::path::Path;
use std::sync::LazyLock;

use candle_llama::tokenizer::{ChatTemplateOptions, Tokenizer};
use libfuzzer_sys::fuzz_target;
use serde_json::json;

/// A tokenizer of one token.
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let folder = shared::folder();
    let tokenizer = br#"{"model":{"type":"BPE","vocab":{"a":0},"merges":[]},"added_tokens":[]}"#;
    shared::write(&folder.path().join("tokenizer.json"), tokenizer);
    let path: &Path = folder.path();
    Tokenizer::open(path).expect("a sound tokenizer")
});

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let options = ChatTemplateOptions {
        chat_template: Some(text.to_string()),
        tools: Some(json!([{"type": "function", "function": {"name": "f", "parameters": {}}}])),
        add_generation_prompt: true,
        ..Default::default()
    };
    let messages =
        json!([{"role": "user", "content": text}, {"role": "assistant", "content": [{"text": 1.5}]}]);
    shared::checked(TOKENIZER.apply_chat_template(&messages, &options));
});
