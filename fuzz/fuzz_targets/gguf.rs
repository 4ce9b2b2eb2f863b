//! Reads the bytes as a GGUF file: its tensors, its config and its tokenizer.

#![no_main]

mod shared;

use std::sync::LazyLock;

use candle_llama::checkpoint::gguf;
use candle_llama::config::LlamaConfig;
use candle_llama::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(shared::folder);

fuzz_target!(init: shared::let_libraries_panic(), |bytes: &[u8]| {
    let file = FOLDER.path().join("model.gguf");
    shared::write(&file, bytes);
    let checkpoint = shared::read_everything(&file);
    let Some(metadata) = shared::checked(gguf::read_metadata(&file)) else { return };
    shared::checked(LlamaConfig::from_gguf(&metadata, checkpoint.as_ref()));
    if let Some(tokenizer) = shared::checked(Tokenizer::open(&file))
        && let Some(ids) = shared::checked(tokenizer.encode("Hello, world 12<|end|>", true, false))
    {
        shared::checked(tokenizer.decode(&ids, false)).expect("ids that were encoded");
    }
});
