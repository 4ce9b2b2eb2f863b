//! Reads the bytes as a safetensors file, then as the header of a file with the right header length.

#![no_main]

mod shared;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(shared::folder);

fuzz_target!(|bytes: &[u8]| {
    let file = FOLDER.path().join("model.safetensors");
    shared::write(&file, bytes);
    shared::read_everything(FOLDER.path());
    let length = (bytes.len() as u64).to_le_bytes();
    shared::write(&file, &[&length[..], bytes, &[0x3f; 64]].concat());
    shared::read_everything(FOLDER.path());
});
