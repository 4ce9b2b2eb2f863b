//! Feeds bytes to the reader of tokenizer.json, and a text to what it reads.

#![no_main]

mod shared;

use std::sync::LazyLock;

use candle_llama::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(shared::folder);

fuzz_target!(init: shared::let_libraries_panic(), |bytes: &[u8]| {
    shared::write(&FOLDER.path().join("tokenizer.json"), bytes);
    if let Some(tokenizer) = shared::checked(Tokenizer::open(FOLDER.path()))
        && let Some(ids) = shared::checked(tokenizer.encode("Hello, world 12<|end|>", true, false))
    {
        shared::checked(tokenizer.decode(&ids, false));
    }
});
