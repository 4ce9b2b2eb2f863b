//! Tests of models in several GGUF files: any part opens the whole model, and parts that do not belong
//! together are refused.

use std::path::{Path, PathBuf};

use candle_llama::checkpoint::{Checkpoint, gguf};
use candle_llama::error::{Error, Result};
use candle_llama::llama::inspect;
use candle_llama::model::Cancel;
use candle_llama::tokenizer::Tokenizer;
use candle_llama::{Llama, LoadOptions};
use tempfile::TempDir;

use crate::checkpoint_files::{Gguf, llama_weights};

const PARTS: u16 = 3;

fn path_of(dir: &Path, no: u16) -> PathBuf {
    dir.join(format!("tiny-{:05}-of-{PARTS:05}.gguf", no + 1))
}

/// Adds the metadata that number a part.
fn numbered(file: Gguf, no: u16, count: u16, tensors: i32) -> Gguf {
    file.value("split.no", 2, &no.to_le_bytes()).value("split.count", 2, &count.to_le_bytes()).value(
        "split.tensors.count",
        5,
        &tensors.to_le_bytes(),
    )
}

/// The tiny Llama in parts. The first part has the model's metadata and no tensors: llama.cpp's tool can
/// write such files.
fn parts() -> Vec<Gguf> {
    let weights = llama_weights();
    let (one, other) = weights.split_at(weights.len() / 2);
    let number = |no, file| numbered(file, no, PARTS, weights.len() as i32);
    vec![
        number(0, Gguf::llama_with_tokenizer()),
        number(1, Gguf::empty()).weights(one),
        number(2, Gguf::empty()).weights(other),
    ]
}

fn write(parts: &[Gguf]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (no, part) in (0..).zip(parts) {
        std::fs::write(path_of(dir.path(), no), part.bytes()).unwrap();
    }
    dir
}

fn malformed(result: Result<Checkpoint>) -> String {
    match result {
        Err(error @ Error::Malformed { .. }) => error.to_string(),
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn any_part_opens_the_whole_model() {
    let whole = tempfile::tempdir().unwrap();
    let whole = whole.path().join("tiny.gguf");
    std::fs::create_dir_all(whole.parent().unwrap()).unwrap();
    std::fs::write(&whole, Gguf::llama_with_tokenizer().weights(&llama_weights()).bytes()).unwrap();
    let options = LoadOptions { threads: Some(1), ..LoadOptions::default() };
    let logits = |llama: &Llama| llama.logits(&[3, 1, 4], None, &Cancel::never()).unwrap().values;
    let expected = Llama::load(&whole, &options, &Cancel::never()).unwrap();
    let expected_ids = expected.tokenizer().unwrap().encode("hello a", true, false).unwrap();
    assert_eq!(expected_ids.len(), 4);

    let dir = write(&parts());
    for no in 0..PARTS {
        let path = path_of(dir.path(), no);
        let llama = Llama::load(&path, &options, &Cancel::never()).unwrap();
        assert_eq!(logits(&llama), logits(&expected));
        assert_eq!(llama.load_report().bytes, expected.load_report().bytes);
        assert_eq!(llama.eos_token_ids(), [1]);
        let found = inspect(&path).unwrap();
        assert_eq!(found.parameters, inspect(&whole).unwrap().parameters);
        assert_eq!(found.config.num_hidden_layers, 2);
        let ids = Tokenizer::open(&path).unwrap().encode("hello a", true, false).unwrap();
        assert_eq!(ids, expected_ids);
        assert_eq!(Checkpoint::open(&path).unwrap().path(), path);
        let metadata = gguf::read_metadata(&path).unwrap();
        assert_eq!(metadata.path(), path_of(dir.path(), 0));
        assert_eq!(metadata.string("general.architecture").unwrap(), Some("llama"));
    }
}

#[test]
fn a_missing_part_is_named() {
    for missing in 0..PARTS {
        let dir = write(&parts());
        std::fs::remove_file(path_of(dir.path(), missing)).unwrap();
        let given = path_of(dir.path(), (missing + 1) % PARTS);
        match Checkpoint::open(&given) {
            Err(Error::NotFound { what, path }) => {
                assert_eq!(path, path_of(dir.path(), missing));
                assert_eq!(what, format!("part {} of 3 of a split GGUF file", missing + 1));
            }
            other => panic!("{:?}", other.err()),
        }
    }
    let dir = write(&parts());
    std::fs::remove_file(path_of(dir.path(), 0)).unwrap();
    match Tokenizer::open(&path_of(dir.path(), 2)) {
        Err(Error::NotFound { path, .. }) => assert_eq!(path, path_of(dir.path(), 0)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn parts_must_belong_together() {
    let open = |change: &dyn Fn(&mut Vec<Gguf>)| {
        let mut parts = parts();
        change(&mut parts);
        let dir = write(&parts);
        malformed(Checkpoint::open(&path_of(dir.path(), 0)))
    };
    let weights = llama_weights();
    let tensors = weights.len() as i32;
    let swapped = open(&|parts| parts.swap(1, 2));
    assert!(swapped.contains("split.no is 2, expected 1"), "{swapped}");
    let other_count = open(&|parts| parts[2] = numbered(Gguf::empty(), 2, 4, tensors));
    assert!(other_count.contains("split.count is 4, expected 3"), "{other_count}");
    let other_total = open(&|parts| parts[1] = numbered(Gguf::empty(), 1, PARTS, tensors - 1));
    assert!(other_total.contains("split.tensors.count is 19, expected 20"), "{other_total}");
    let too_few = open(&|parts| parts[1] = numbered(Gguf::empty(), 1, PARTS, tensors));
    assert!(too_few.contains("split.tensors.count is 20, but the 3 parts have 10 tensors"), "{too_few}");
    let twice = open(&|parts| {
        parts[1] = numbered(Gguf::empty(), 1, PARTS, tensors).weights(&weights[10..]);
    });
    assert!(twice.contains("as has another part"), "{twice}");
    let unnumbered = open(&|parts| parts[1] = Gguf::empty().weights(&weights[..10]));
    assert!(unnumbered.contains("split.no is missing"), "{unnumbered}");
    let beyond = open(&|parts| parts[0] = numbered(Gguf::llama(), 3, PARTS, tensors));
    assert!(beyond.contains("split.no is 3, expected less than split.count, 3"), "{beyond}");
    let no_total = open(&|parts| {
        parts[0] = Gguf::llama().value("split.no", 2, &[0, 0]).value("split.count", 2, &[3, 0])
    });
    assert!(no_total.contains("split.tensors.count is missing"), "{no_total}");
}

#[test]
fn a_part_under_another_name_says_which_name_it_needs() {
    let dir = write(&parts());
    let renamed = dir.path().join("model.gguf");
    std::fs::rename(path_of(dir.path(), 1), &renamed).unwrap();
    let message = malformed(Checkpoint::open(&renamed));
    assert!(
        message.contains("is part 2 of 3, but its name does not end in \"-00002-of-00003.gguf\""),
        "{message}"
    );
}

#[test]
fn a_wrong_count_of_parts_allocates_nothing() {
    for count in [4u64, 1 << 32, u64::MAX] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(format!("x-00001-of-{count:05}.gguf"));
        let part = Gguf::llama()
            .value("split.no", 10, &0u64.to_le_bytes())
            .value("split.count", 10, &count.to_le_bytes())
            .value("split.tensors.count", 10, &u64::MAX.to_le_bytes());
        std::fs::write(&path, part.bytes()).unwrap();
        match Checkpoint::open(&path) {
            Err(Error::NotFound { path, .. }) => {
                assert!(path.ends_with(format!("x-00002-of-{count:05}.gguf")), "{path:?}");
            }
            other => panic!("{:?}", other.err()),
        }
    }
}

#[test]
fn one_part_of_one_is_a_whole_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("any name.gguf");
    let file = numbered(Gguf::llama(), 0, 1, 20).weights(&llama_weights());
    std::fs::write(&path, file.bytes()).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().infos().len(), 20);
}
