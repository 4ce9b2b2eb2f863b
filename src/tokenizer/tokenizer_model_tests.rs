//! Tests folders with tokenizer.model and no tokenizer.json, valid and broken.

use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::sentence_piece::{Kind, Piece};
use super::tokenizer_model::{Model, Refusal};
use super::vocabulary_tests::{pieces, sentence_piece_gguf, tokens};
use super::*;

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

fn flag(field: u64, number: u64) -> Vec<u8> {
    [varint(field << 3), varint(number)].concat()
}

fn message(field: u64, bytes: &[u8]) -> Vec<u8> {
    [varint(field << 3 | 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

fn model_bytes(pieces: &[Piece], trainer: &[u8], normalizer: &[u8]) -> Vec<u8> {
    let piece = |piece: &Piece| {
        let text = message(1, piece.text.as_bytes());
        let score = [varint(2 << 3 | 5), piece.score.to_le_bytes().to_vec()].concat();
        message(1, &[text, score, flag(3, piece.kind as u64 + 1)].concat())
    };
    let pieces: Vec<u8> = pieces.iter().flat_map(piece).collect();
    [pieces, message(2, trainer), message(3, normalizer)].concat()
}

fn llama_2_bytes() -> Vec<u8> {
    model_bytes(&llama_2_pieces(), &flag(3, 2), &flag(4, 0))
}

/// Llama 2 has no user-defined pieces.
fn llama_2_pieces() -> Vec<Piece> {
    pieces().into_iter().filter(|piece| piece.kind != Kind::UserDefined).collect()
}

fn open_model(model: &[u8], files: &[(&str, Value)]) -> Result<Tokenizer> {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("tokenizer.model"), model).unwrap();
    for (name, content) in files {
        std::fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    Tokenizer::open(dir.path())
}

#[test]
fn a_folder_with_tokenizer_model_alone_is_read() {
    let tokenizer = open_model(&llama_2_bytes(), &[]).unwrap();
    assert_eq!(tokenizer.kind(), "tokenizer.model");
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id()), (Some(1), Some(2)));
    let gguf = sentence_piece_gguf(&pieces()).open().unwrap();
    for text in ["", "abab aba 日😀", " </s>  a<s>b"] {
        assert_eq!(tokens(&tokenizer, text), tokens(&gguf, text));
    }
    let config = json!({
        "add_bos_token": false, "add_eos_token": true, "legacy": false, "pad_token": "<pad>",
        "added_tokens_decoder": {
            "280": {"content": "<|im_end|>", "special": true}, "1": {"content": "<begin>", "special": true},
            "276": {"content": "<think>", "special": false, "rstrip": true},
        },
    });
    let files = [("tokenizer_config.json", config), ("added_tokens.json", json!({"<old>": 275}))];
    let tokenizer = open_model(&llama_2_bytes(), &files).unwrap();
    let id = |token: &str| tokenizer.token_to_id(token);
    assert_eq!(id("<begin>"), Some(1));
    assert_eq!(
        (id("<old>"), id("<think>"), id("<|im_end|>"), id("<pad>")),
        (Some(275), Some(276), Some(280), Some(281))
    );
    assert_eq!((tokenizer.vocab_size(), tokenizer.id_to_token(278)), (282, None));
    assert_eq!(
        tokens(&tokenizer, "a<think>  a<|im_end|>b"),
        ["▁a", "<think>", "a", "<|im_end|>", "b", "</s>"]
    );
    let ids = tokenizer.encode("a<|im_end|><think>", false, false).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a<think>");
}

#[test]
fn settings_of_a_tokenizer_model_are_kept_or_refused() {
    let defaults = Model::read(&model_bytes(&llama_2_pieces(), &flag(3, 2), &[])).unwrap();
    assert!(defaults.add_dummy_prefix && defaults.remove_extra_whitespaces);
    let none = [flag(3, 2), flag(41, u64::MAX)].concat();
    let said =
        Model::read(&model_bytes(&llama_2_pieces(), &none, &[flag(3, 0), flag(4, 0)].concat())).unwrap();
    assert_eq!((said.bos_id, said.eos_id), (None, Some(2)));
    assert!(!said.add_dummy_prefix && !said.remove_extra_whitespaces);
    let charsmap = message(2, b"x");
    for (trainer, normalizer, key) in [
        (flag(3, 1), vec![], "unigram"),
        (vec![], vec![], "unigram"),
        (flag(3, 9), vec![], "unknown type"),
        ([flag(3, 2), flag(24, 1)].concat(), vec![], "treat_whitespace_as_suffix"),
        (flag(3, 2), charsmap, "precompiled_charsmap"),
        (flag(3, 2), flag(5, 0), "escape_whitespaces"),
    ] {
        let error = open_model(&model_bytes(&llama_2_pieces(), &trainer, &normalizer), &[]).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        let error = error.to_string();
        assert!(error.contains(key) && error.contains("save_pretrained"), "{error}");
    }
    let user_defined = open_model(&model_bytes(&pieces(), &flag(3, 2), &[]), &[]).unwrap_err();
    assert!(user_defined.to_string().contains("user-defined"), "{user_defined}");
    let cut = llama_2_bytes();
    for end in [1, 2, 5, cut.len() / 2, cut.len() - 1] {
        let read = Model::read(&cut[..end]);
        assert!(matches!(read, Err(Refusal::Malformed(_) | Refusal::Unsupported(..))), "cut at {end}");
    }
}

proptest! {
    #[test]
    fn mutated_models_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = llama_2_bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(tokenizer) = open_model(&bytes, &[])
            && let Ok(ids) = tokenizer.encode("ab é </s>", true, false)
        {
            tokenizer.decode(&ids, false).unwrap();
        }
    }

    #[test]
    fn any_bytes_are_a_model_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Model::read(&bytes);
        let _ = tiktoken::read(&bytes);
    }
}
