//! The two encoders: the `tokenizers` library, and our own for SentencePiece vocabularies.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde_json::Value;
use tokenizers::models::ModelWrapper;

use super::bounds::Bounds;
use super::decode_stream::Decoder;
use super::sentence_piece::SentencePiece;
use super::{byte_level, catching};
use crate::checkpoint::background;
use crate::error::{Error, Result};
use crate::kernels::Cancel;
use crate::sys::reserve;
use crate::sys::sync::get_or_make;

/// The longest text that is encoded in the caller's thread, if the tokenizer is quick: about a millisecond.
const MAX_INLINE_BYTES: usize = 1 << 12;

/// The memory that encoding takes, for each byte of the text: the library keeps offsets and pieces.
const WORKING_BYTES: usize = 64;

/// An encoder with its vocabulary. Clones share it.
#[derive(Clone)]
pub(super) enum Encoder {
    Library(Arc<Library>),
    SentencePiece(Arc<SentencePiece>),
}

/// The most bytes that one token stands for, and which bytes surely are part of a token.
pub(super) type LongestToken = (usize, Vec<bool>);

/// A tokenizer of the `tokenizers` library.
pub(super) struct Library {
    tokenizer: tokenizers::Tokenizer,
    /// The same tokenizer, but it encodes special tokens in the text as plain text. It is made on first use,
    /// because it holds a second copy of the vocabulary.
    splitting: OnceLock<tokenizers::Tokenizer>,
    bounds: Bounds,
}

impl From<tokenizers::Tokenizer> for Encoder {
    fn from(tokenizer: tokenizers::Tokenizer) -> Self {
        Encoder::library(tokenizer, Bounds::OURS)
    }
}

impl From<SentencePiece> for Encoder {
    fn from(vocabulary: SentencePiece) -> Self {
        Encoder::SentencePiece(Arc::new(vocabulary))
    }
}

impl Library {
    pub(super) fn tokenizer(&self) -> &tokenizers::Tokenizer {
        &self.tokenizer
    }

    fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        split_special_tokens: bool,
    ) -> std::result::Result<Vec<u32>, String> {
        self.bounds.check_text(text)?;
        let tokenizer = if split_special_tokens {
            get_or_make(&self.splitting, || {
                let mut tokenizer = self.tokenizer.clone();
                tokenizer.set_encode_special_tokens(true);
                tokenizer
            })
        } else {
            &self.tokenizer
        };
        catching(|| tokenizer.encode_fast(text, add_special_tokens))
            .map(|encoding| encoding.get_ids().to_vec())
    }
}

impl Encoder {
    /// A tokenizer of the library, with what its inspection found.
    pub(super) fn library(tokenizer: tokenizers::Tokenizer, bounds: Bounds) -> Self {
        Encoder::Library(Arc::new(Library { tokenizer, splitting: OnceLock::new(), bounds }))
    }

    /// The ids of `text`. Encoding cannot be interrupted. Unless it is surely short, it runs in a thread of
    /// its own, which is given up when the caller is cancelled or when it takes far longer than it should.
    pub(super) fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        split_special_tokens: bool,
        cancel: &Cancel,
    ) -> Result<Vec<u32>> {
        let is_quick = match self {
            Encoder::Library(library) => library.bounds.is_quick,
            Encoder::SentencePiece(_) => true,
        };
        let encoded = if is_quick && text.len() <= MAX_INLINE_BYTES {
            self.encode_here(text, add_special_tokens, split_special_tokens)
        } else {
            let held = reserve::hold("tokenising", text.len().saturating_mul(WORKING_BYTES))?;
            // Sound tokenizers need half a microsecond per byte; machines may be busy.
            let limit = Duration::from_secs(3)
                + Duration::from_micros(10).saturating_mul(u32::try_from(text.len()).unwrap_or(u32::MAX));
            let (encoder, text) = (self.clone(), text.to_owned());
            let work = move || {
                let _held = held;
                encoder.encode_here(&text, add_special_tokens, split_special_tokens)
            };
            background::run_within("the tokenizer", limit, cancel, work)?
        };
        encoded.map_err(|reason| Error::Text { reason: format!("the tokenizer failed: {reason}") })
    }

    fn encode_here(
        &self,
        text: &str,
        add_special_tokens: bool,
        split_special_tokens: bool,
    ) -> std::result::Result<Vec<u32>, String> {
        match self {
            Encoder::Library(library) => library.encode(text, add_special_tokens, split_special_tokens),
            Encoder::SentencePiece(pieces) => pieces.encode(text, add_special_tokens, split_special_tokens),
        }
    }

    pub(super) fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Encoder::Library(library) => library.tokenizer.token_to_id(token),
            Encoder::SentencePiece(pieces) => pieces.token_to_id(token),
        }
    }

    pub(super) fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Encoder::Library(library) => library.tokenizer.id_to_token(id),
            Encoder::SentencePiece(pieces) => pieces.id_to_token(id),
        }
    }

    /// Whether decoding may skip the token `id`, whose text is `token`.
    pub(super) fn is_special(&self, id: u32, token: &str) -> bool {
        match self {
            Encoder::Library(library) => library.tokenizer.get_added_vocabulary().is_special_token(token),
            Encoder::SentencePiece(pieces) => pieces.is_special(id),
        }
    }

    /// One more than the largest id.
    pub(super) fn vocab_size(&self) -> usize {
        match self {
            Encoder::Library(library) => {
                let largest = library.tokenizer.get_vocab(true).into_values().max();
                largest.map_or(0, |id| id as usize + 1)
            }
            Encoder::SentencePiece(pieces) => pieces.vocab_size(),
        }
    }

    /// The most bytes of a text that one token stands for; None if there is no such limit, because text is
    /// dropped or shortened.
    pub(super) fn longest_token(&self) -> Option<LongestToken> {
        match self {
            Encoder::Library(library) => longest_token(&library.tokenizer),
            Encoder::SentencePiece(pieces) => Some((pieces.longest_token()?, vec![true; 256])),
        }
    }

    pub(super) fn decoder(&self) -> Decoder {
        match self {
            Encoder::Library(library) => Decoder::new(library.tokenizer.get_decoder()),
            Encoder::SentencePiece(pieces) => Decoder::sentence_piece(pieces.adds_space_prefix()),
        }
    }

    #[cfg(test)]
    pub(super) fn library_tokenizer(&self) -> Option<&tokenizers::Tokenizer> {
        match self {
            Encoder::Library(library) => Some(&library.tokenizer),
            Encoder::SentencePiece(_) => None,
        }
    }
}

/// As [`Encoder::longest_token`]. Knows the steps of Llamas' tokenizers.
fn longest_token(tokenizer: &tokenizers::Tokenizer) -> Option<LongestToken> {
    fn keeps_text(step: &Value) -> bool {
        let field = |key: &str| step.get(key).and_then(Value::as_str);
        match field("type") {
            None => step.is_null(),
            Some("Sequence") => {
                let steps = step.get("normalizers").or_else(|| step.get("pretokenizers"));
                steps.and_then(Value::as_array).is_some_and(|steps| steps.iter().all(keeps_text))
            }
            Some("Replace") => {
                let replaced = step.get("pattern").and_then(|pattern| pattern.get("String")?.as_str());
                replaced.zip(field("content")).is_some_and(|(from, to)| from.len() <= to.len())
            }
            Some("Split") => field("behavior") != Some("Removed"),
            Some(kind) => matches!(kind, "Prepend" | "ByteLevel" | "Digits" | "Metaspace"),
        }
    }
    let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
    let added = tokenizer.get_added_tokens_decoder();
    let steps = [
        serde_json::to_value(tokenizer.get_normalizer()).ok()?,
        serde_json::to_value(tokenizer.get_pre_tokenizer()).ok()?,
    ];
    let has = |token: &str| tokenizer.token_to_id(token).is_some();
    // Bytes without a token are dropped, or a run of them is one token. SmolLM's vocabulary lacks some.
    let is_byte_level = steps.iter().any(|step| step.to_string().contains("\"ByteLevel\""));
    let kept: Vec<bool> = if is_byte_level {
        (0..=u8::MAX).map(|byte| has(&byte_level::spell(&[byte]))).collect()
    } else {
        vec![model.byte_fallback && (0..=u8::MAX).all(|byte| has(&format!("<0x{byte:02X}>"))); 256]
    };
    let takes_spaces = added.values().any(|token| token.lstrip || token.rstrip);
    if takes_spaces || !steps.iter().all(keeps_text) {
        return None;
    }
    let longest = tokenizer.get_vocab(true).into_keys().map(|token| token.len()).max()?;
    Some((longest, kept))
}
