//! The Rust example, as the program that `cargo test` has built beside this one.

use std::process::Command;

use candle_llama::llama::EngineKind;
use candle_llama::model::Cancel;
use candle_llama::sampling::SamplingOptions;
use candle_llama::{Llama, LoadOptions, Prompt};

use crate::checkpoint_files::{Gguf, llama_weights};

const PROMPT: &str = "hello a";

/// `target/release/examples/varbuilder`; this binary is in `target/release/deps`.
fn varbuilder() -> Command {
    let ours = std::env::current_exe().unwrap();
    let name = format!("varbuilder{}", std::env::consts::EXE_SUFFIX);
    let program = ours.parent().unwrap().with_file_name("examples").join(name);
    assert!(program.exists(), "{} is not built: run `cargo test` without `--test`", program.display());
    Command::new(program)
}

#[test]
fn varbuilder_generates_what_the_candle_engine_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, Gguf::llama_with_tokenizer().weights(&llama_weights()).bytes()).unwrap();
    let options = LoadOptions {
        engine: Some(EngineKind::Candle),
        device: Some("cpu".into()),
        ..LoadOptions::default()
    };
    let llama = Llama::load(&path, &options, &Cancel::never()).unwrap();
    let greedy = SamplingOptions { max_new_tokens: Some(16), ..SamplingOptions::default() };
    let expected = llama.generate(Prompt::Text(PROMPT.into()), &greedy, &Cancel::never()).unwrap();
    assert!(expected.text.len() > 3, "{expected:?}");

    let output = varbuilder().arg(&path).arg(PROMPT).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let lines = format!("lm_head: Tied, because the file has no output.weight\n{PROMPT}{}\n", expected.text);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), lines);
}

#[test]
fn varbuilder_without_a_model_says_how_it_is_run() {
    let output = varbuilder().output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().contains("usage: varbuilder MODEL"));
}
