//! Vocabularies with scores: SentencePiece's own, and Llama 2's tokenizer.json, which has merges instead of
//! scores.
//!
//! A piece that merges make gets the negative of its position in their order as its score. SentencePiece
//! merges the pair whose piece has the best score, the library the pair of the lowest rank. Both give the
//! same result if the merges that make one piece are adjacent, as in every file converted from a
//! SentencePiece model.

use std::collections::HashMap;

use serde_json::{Value as Json, json};
use tokenizers::models::bpe::BPE;

use super::{Kind, Token, Vocabulary, as_json, inexpressible, library_tokens, merges};
use crate::checkpoint::gguf::{Array, Value};
use crate::error::Result;
use crate::tokenizer::gguf::{ADD_SPACE_PREFIX, MODEL, REMOVE_EXTRA_WHITESPACES, SCORES};
use crate::tokenizer::sentence_piece::{SPACE, SentencePiece};

/// The key of the scores. It is made once the vocabulary has its final length.
pub(super) fn scores(tokens: &[Option<Token>]) -> (String, Value) {
    let scores = tokens.iter().map(|token| token.as_ref().map_or(UNUSED, |token| token.score)).collect();
    (SCORES.into(), Value::Array(Array::F32(scores)))
}

/// The score of an id without a token, as in llama.cpp's converter.
const UNUSED: f32 = -10_000.0;

pub(super) fn from_pieces(vocabulary: &SentencePiece) -> Vocabulary {
    let token = |piece: &crate::tokenizer::sentence_piece::Piece| {
        let (text, score, kind) = (piece.text.clone(), piece.score, piece.kind);
        (!text.is_empty()).then_some(Token { text, score, kind })
    };
    let settings = vocabulary.settings();
    Vocabulary {
        metadata: vec![
            (MODEL.into(), Value::String("llama".into())),
            (ADD_SPACE_PREFIX.into(), Value::Bool(settings.add_space_prefix)),
            (REMOVE_EXTRA_WHITESPACES.into(), Value::Bool(settings.remove_extra_whitespaces)),
        ],
        has_scores: true,
        tokens: vocabulary.pieces().iter().map(token).collect(),
    }
}

pub(super) fn from_library(tokenizer: &tokenizers::Tokenizer, model: &BPE) -> Result<Vocabulary> {
    let add_space_prefix = space_prefix(tokenizer)?;
    let mut places = HashMap::new();
    let mut last = None;
    for (left, right) in merges(model)? {
        let piece = left + &right;
        if last.as_ref() == Some(&piece) {
            continue;
        }
        let place = places.len();
        if places.insert(piece.clone(), place).is_some() {
            let reason = format!("those of {piece:?} do not stand together, as scores would have it");
            return Err(inexpressible("merges", &reason));
        }
        last = Some(piece);
    }
    let unknown = model.unk_token.as_deref();
    let is_byte = |text: &str| {
        let digits = text.strip_prefix("<0x").and_then(|text| text.strip_suffix('>'));
        digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
    };
    let kind = |text: &str| if is_byte(text) { Kind::Byte } else { Kind::Normal };
    let score = |text: &str| places.get(text).map_or(0.0, |place| -(*place as f32));
    let mut tokens = library_tokens(tokenizer, kind, score);
    for token in tokens.iter_mut().flatten().filter(|token| Some(token.text.as_str()) == unknown) {
        token.kind = Kind::Unknown;
    }
    Ok(Vocabulary {
        metadata: vec![
            (MODEL.into(), Value::String("llama".into())),
            (ADD_SPACE_PREFIX.into(), Value::Bool(add_space_prefix)),
        ],
        has_scores: true,
        tokens,
    })
}

/// Whether a space is put before a text. Refuses any preparation of text other than Llama 2's.
fn space_prefix(tokenizer: &tokenizers::Tokenizer) -> Result<bool> {
    let space = SPACE.to_string();
    let prepend = json!({"type": "Prepend", "prepend": space});
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": space});
    let normalizer = as_json(&tokenizer.get_normalizer())?;
    let steps = match normalizer.get("normalizers").and_then(Json::as_array) {
        Some(steps) => steps.clone(),
        None if normalizer.is_null() => Vec::new(),
        None => vec![normalizer.clone()],
    };
    let pre_tokenizer = as_json(&tokenizer.get_pre_tokenizer())?;
    match steps.as_slice() {
        [first, second] if *first == prepend && *second == replace && pre_tokenizer.is_null() => Ok(true),
        [only] if *only == replace && pre_tokenizer.is_null() => Ok(false),
        [] => {
            let is = |key: &str, value: Json| pre_tokenizer.get(key) == Some(&value);
            if !(is("type", json!("Metaspace"))
                && is("replacement", json!(space))
                && is("split", json!(false)))
            {
                return Err(inexpressible("pre_tokenizer", &pre_tokenizer.to_string()));
            }
            Ok(!is("prepend_scheme", json!("never")))
        }
        _ => Err(inexpressible("normalizer", &normalizer.to_string())),
    }
}
