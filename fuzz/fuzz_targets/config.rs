//! Feeds the same bytes to the reader of each JSON file that is read strictly.

#![no_main]

mod shared;

use std::path::Path;
use std::sync::LazyLock;

use candle_llama::config::{GenerationConfig, LlamaConfig};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

/// A folder with one shard that has one tensor.
static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = shared::folder();
    let header = br#"{"lm_head.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let length = (header.len() as u64).to_le_bytes();
    shared::write(&folder.path().join("shard"), &[&length[..], header, &[0; 4]].concat());
    folder
});

fuzz_target!(|bytes: &[u8]| {
    let folder: &Path = FOLDER.path();
    shared::write(&folder.join("config.json"), bytes);
    shared::checked(LlamaConfig::from_folder(folder));
    shared::write(&folder.join("generation_config.json"), bytes);
    shared::checked(GenerationConfig::from_folder(folder));
    shared::write(&folder.join("model.safetensors.index.json"), bytes);
    shared::read_everything(folder);
});
