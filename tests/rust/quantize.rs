//! Tests of converting a checkpoint to a GGUF file, without Python.

use candle_llama::error::Error;
use candle_llama::llama::Compute;
use candle_llama::llama::{QuantizeOptions, quantize};
use candle_llama::model::Cancel;
use candle_llama::{Llama, LoadOptions};
use std::path::Path;

use crate::checkpoint_files::{Entry, llama_config, llama_weights, write_safetensors};
use crate::gguf_writer::names_in;

#[test]
fn a_folder_becomes_a_file_with_the_same_logits() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    std::fs::create_dir(&folder).unwrap();
    let weights = llama_weights();
    let entries: Vec<_> =
        weights.iter().map(|(name, shape, values)| Entry::f32(name, shape, values)).collect();
    write_safetensors(&folder.join("model.safetensors"), &entries);
    std::fs::write(folder.join("config.json"), llama_config().to_string()).unwrap();
    let path = dir.path().join("out.gguf");
    let options = QuantizeOptions { dtype: "F32".into(), tokenizer: false, ..QuantizeOptions::default() };
    let mut reports = Vec::new();
    let mut progress = |done, total| {
        reports.push((done, total));
        true
    };
    quantize(&folder, &path, &options, &mut progress, &Cancel::never()).unwrap();
    assert!(reports.last().is_some_and(|(done, total)| done == total && *done > 0), "{reports:?}");
    let exact = LoadOptions { compute: Compute::Exact, device: Some("cpu".into()), ..LoadOptions::default() };
    let logits = |path: &Path| {
        Llama::load(path, &exact, &Cancel::never())
            .unwrap()
            .logits(&[3, 1, 4, 1, 5], None, &Cancel::never())
            .unwrap()
            .values
    };
    assert_eq!(logits(&folder), logits(&path));

    // If `progress` returns false, the work is cancelled and leaves no file.
    let other = dir.path().join("other.gguf");
    let stopped = quantize(&folder, &other, &options, &mut |_, _| false, &Cancel::never());
    assert!(matches!(stopped, Err(Error::Cancelled)));
    assert_eq!(names_in(dir.path()), ["model", "out.gguf"]);
}
