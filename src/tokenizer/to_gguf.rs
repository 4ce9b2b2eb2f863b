//! Writes a tokenizer as a GGUF file's metadata, and checks it by reading it back.
//!
//! - `byte_level.rs`: byte-level BPE; its pre-tokenizer must have a name in GGUF
//! - `sentence_piece.rs`: vocabularies with scores, and Llama 2's tokenizer.json, whose merges become scores
//! - this file: the parts that both share, and the check that the metadata, read back, gives the same ids
//!
//! Source: llama.cpp, `convert_hf_to_gguf.py`, for keys and token types; `llama-vocab.cpp`.

mod byte_level;
mod sentence_piece;

use std::collections::BTreeMap;
use std::path::Path;

use tokenizers::{AddedToken, ModelWrapper};

use super::encoder::Encoder;
use super::gguf::{self, ADD_BOS, ADD_EOS, BOS, CHAT_TEMPLATE, EOS, NO_TOKENIZER, TOKEN_TYPE, TOKENS};
use super::sentence_piece::Kind;
use super::{MAX_VOCAB_SIZE, Tokenizer, catching};
use crate::checkpoint::gguf::{Array, Metadata, Value};
use crate::error::{Error, Result};

/// A tokenizer in GGUF's form.
#[derive(Clone, Debug)]
pub struct GgufTokenizer {
    /// The `tokenizer.*` keys.
    pub metadata: Vec<(String, Value)>,
    /// Warnings about settings that GGUF cannot express, with their consequences.
    pub warnings: Vec<String>,
}

/// The metadata of a file without a tokenizer. It keeps the ids of BOS and EOS: generation must know where to
/// end.
pub fn no_tokenizer(bos_token_id: Option<u32>, eos_token_ids: &[u32]) -> Vec<(String, Value)> {
    let mut metadata = vec![(gguf::MODEL.into(), Value::String(NO_TOKENIZER.into()))];
    metadata.extend(ids(bos_token_id, eos_token_ids.first().copied(), eos_token_ids));
    metadata
}

/// The keys for BOS, for the EOS that other programs use, and for all tokens that end a text if there are
/// more.
fn ids(bos: Option<u32>, eos: Option<u32>, eos_token_ids: &[u32]) -> Vec<(String, Value)> {
    let mut metadata = Vec::new();
    metadata.extend(bos.map(|id| (BOS.into(), Value::U32(id))));
    metadata.extend(eos.map(|id| (EOS.into(), Value::U32(id))));
    if eos_token_ids.iter().any(|id| Some(*id) != eos) {
        let all = Value::Array(Array::U32(eos_token_ids.to_vec()));
        metadata.push(("tokenizer.ggml.eos_token_ids".into(), all));
    }
    metadata
}

/// The parts that differ between kinds of vocabularies.
struct Vocabulary {
    /// `tokenizer.ggml.model`, and keys that only this kind has.
    metadata: Vec<(String, Value)>,
    has_scores: bool,
    /// Indexed by id; None for an id without a token.
    tokens: Vec<Option<Token>>,
}

#[derive(Clone, Debug)]
struct Token {
    text: String,
    score: f32,
    kind: Kind,
}

/// Texts that must get the same ids before and after. They cover the differences between pre-tokenizers and
/// vocabularies.
const PROBES: &[&str] = &[
    "Hello world",
    "The quick  brown fox   jumps; over the lazy dog's 12345.67 items\n\n\tand more...\r\n",
    "I'm you'll WE'VE don't they'd he's\u{a0}x",
    "fn main() { println!(\"{}\", a[0]+=1); } // https://example.org/?q=1&r=2",
    "naïve café Ünïcödé, ελληνικά Русский हिन्दी 日本語 한국어 العربية 😀👍🏽 ½²",
    "1 22 333 4444 55555 666666 ¼ ٣٤٥",
    "a:\n    indented\n        twice\n",
    "a",
];

/// Texts before which GGUF's readers may put a space although the vocabulary with scores does not.
const SPACED: &[&str] = &[" a text after a space", "   three"];

impl Tokenizer {
    /// Writes the tokenizer as metadata for a GGUF file whose model has `vocab_size` rows and ends a text
    /// with `eos_token_ids`.
    ///
    /// Rows without a token get a placeholder. The result has been read back and compared: it gives the same
    /// ids.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for anything that GGUF cannot express: pre-tokenizers and normalizers that have
    /// no name there, models other than BPE, more tokens than the model has rows.
    pub fn to_gguf(&self, vocab_size: usize, eos_token_ids: &[u32]) -> Result<GgufTokenizer> {
        if vocab_size > MAX_VOCAB_SIZE {
            let value =
                format!("for a model of {vocab_size} tokens, readers accept at most {MAX_VOCAB_SIZE}");
            return Err(inexpressible("vocabulary", &value));
        }
        let mut warnings = Vec::new();
        let mut vocabulary = match &self.parts.encoder {
            Encoder::SentencePiece(pieces) => sentence_piece::from_pieces(pieces),
            Encoder::Library(library) => {
                let tokenizer = library.tokenizer();
                let ModelWrapper::BPE(model) = tokenizer.get_model() else {
                    return Err(inexpressible("model", "not BPE"));
                };
                if model.byte_fallback {
                    sentence_piece::from_library(tokenizer, model)?
                } else {
                    byte_level::from_library(tokenizer, model)?
                }
            }
        };
        self.fit(&mut vocabulary.tokens, vocab_size, &mut warnings)?;
        warnings.extend(self.stripping_tokens());
        let mut metadata = vocabulary.metadata;
        if vocabulary.has_scores {
            metadata.push(sentence_piece::scores(&vocabulary.tokens));
        }
        let (texts, kinds): (Vec<String>, Vec<i32>) = (0..)
            .zip(&vocabulary.tokens)
            .map(|(id, token): (usize, _)| match token {
                Some(token) => (token.text.clone(), token.kind.number()),
                None => (format!("[PAD{id}]"), Kind::Unused.number()),
            })
            .unzip();
        let known = |wanted: u32| vocabulary.tokens.get(wanted as usize).is_some_and(Option::is_some);
        metadata.push((TOKENS.into(), Value::Array(Array::String(texts))));
        metadata.push((TOKEN_TYPE.into(), Value::Array(Array::I32(kinds))));
        metadata.extend(self.special_ids(eos_token_ids)?);
        for (name, key) in [("unk_token", "unknown"), ("pad_token", "padding")] {
            let token =
                self.parts.special_tokens.get(name).and_then(|token| self.token_to_id(token.as_str()?));
            if let Some(token) = token.filter(|token| known(*token)) {
                metadata.push((format!("tokenizer.ggml.{key}_token_id"), Value::U32(token)));
            }
        }
        metadata.extend(self.parts.chat_templates.iter().map(|(name, template)| {
            let key =
                if name == "default" { CHAT_TEMPLATE.into() } else { format!("{CHAT_TEMPLATE}.{name}") };
            (key, Value::String(template.into()))
        }));
        warnings.extend(self.check(&metadata)?);
        Ok(GgufTokenizer { metadata, warnings })
    }

    /// Pads or cuts the vocabulary to the model's length.
    fn fit(
        &self,
        tokens: &mut Vec<Option<Token>>,
        vocab_size: usize,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        if let Some(beyond) = tokens.get(vocab_size..) {
            let beyond: Vec<&Token> = beyond.iter().flatten().collect();
            // Added tokens can be dropped. Others may be parts of merges.
            let is_added = |token: &&Token| matches!(token.kind, Kind::Control | Kind::UserDefined);
            if !beyond.iter().all(is_added) {
                let value = format!("{} tokens for a model of {vocab_size}", tokens.len());
                return Err(inexpressible("vocabulary", &value));
            }
            let names: Vec<&str> = beyond.iter().take(5).map(|token| token.text.as_str()).collect();
            if !names.is_empty() {
                let (count, names) = (beyond.len(), names.join(", "));
                warnings.push(format!(
                    "{count} tokens beyond the model's vocabulary of {vocab_size} are left out: {names}"
                ));
            }
        }
        tokens.resize(vocab_size, None);
        Ok(())
    }

    /// A warning about tokens that absorb the spaces beside them, which GGUF cannot express.
    fn stripping_tokens(&self) -> Option<String> {
        let strips = |token: &&AddedToken| token.lstrip || token.rstrip || token.single_word;
        let mut found: Vec<&str> = match &self.parts.encoder {
            Encoder::SentencePiece(pieces) => {
                let added = pieces.pieces().iter().filter_map(|piece| piece.added.as_ref());
                added.filter(strips).map(|token| token.content.as_str()).collect()
            }
            Encoder::Library(library) => {
                let added = library.tokenizer().get_added_vocabulary().get_added_tokens_decoder();
                added.values().filter(strips).map(|token| token.content.as_str()).collect()
            }
        };
        found.sort_unstable();
        let example = found.first()?;
        let count = found.len();
        Some(format!(
            "GGUF cannot express that {count} tokens, such as {example}, absorb the spaces beside them"
        ))
    }

    /// The keys for BOS, for EOS, and for which of them is put around a text.
    fn special_ids(&self, eos_token_ids: &[u32]) -> Result<Vec<(String, Value)>> {
        let (first, last) = self.around()?;
        if let (Some(first), Some(bos)) = (first, self.parts.bos_token_id)
            && first != bos
        {
            return Err(inexpressible("post_processor", &format!("puts {first} first, but BOS is {bos}")));
        }
        let bos = first.or(self.parts.bos_token_id);
        // The EOS that other programs use: the tokenizer's own, if the model also ends with it.
        let own = self.parts.eos_token_id.filter(|id| eos_token_ids.is_empty() || eos_token_ids.contains(id));
        let eos = last.or(own).or(eos_token_ids.first().copied());
        let mut metadata = ids(bos, eos, eos_token_ids);
        metadata.push((ADD_BOS.into(), Value::Bool(first.is_some())));
        metadata.push((ADD_EOS.into(), Value::Bool(last.is_some())));
        Ok(metadata)
    }

    /// The tokens that are put before and after every text, found by encoding one.
    fn around(&self) -> Result<(Option<u32>, Option<u32>)> {
        let (with, without) = (self.encode("a", true, false)?, self.encode("a", false, false)?);
        let at = with.windows(without.len().max(1)).position(|window| window == without);
        let (before, after) = match at {
            Some(at) => (with.get(..at), with.get(at.saturating_add(without.len())..)),
            None => (None, None),
        };
        match (before, after) {
            (Some([]), Some([])) => Ok((None, None)),
            (Some([first]), Some([])) => Ok((Some(*first), None)),
            (Some([]), Some([last])) => Ok((None, Some(*last))),
            (Some([first]), Some([last])) => Ok((Some(*first), Some(*last))),
            _ => Err(inexpressible("post_processor", "puts several tokens around a text")),
        }
    }

    /// Reads the metadata back and compares ids and texts. A difference only at the start of a text or after
    /// a special token is a warning.
    fn check(&self, metadata: &[(String, Value)]) -> Result<Option<String>> {
        let values: BTreeMap<String, Value> = metadata.iter().cloned().collect();
        let parts = gguf::from_metadata(&Metadata::new(Path::new(&self.parts.kind), values))?;
        let read =
            Tokenizer::from_parts(parts).map_err(|reason| Error::malformed(&self.parts.kind, reason))?;
        let differs = |text: &str, compare_text: bool| -> Result<bool> {
            let ids = self.encode(text, true, false)?;
            if read.encode(text, true, false)? != ids {
                return Ok(true);
            }
            Ok(compare_text && self.decode(&ids, true)? != read.decode(&ids, true)?)
        };
        for text in PROBES {
            if differs(text, true)? {
                return Err(inexpressible("tokenizer", &format!("gives different ids or text for {text:?}")));
            }
        }
        let special = self.parts.special_tokens.values().filter_map(|token| token.as_str());
        let special = special.filter(|token| read.token_to_id(token).is_some());
        let special = special.map(|token| format!("one{token}two {token} three\n"));
        for text in SPACED.iter().map(|text| (*text).to_owned()).chain(special) {
            if differs(&text, false)? {
                return Ok(Some(format!(
                    "readers of GGUF put a space where this tokenizer does not: before a text that begins \
                     with one, or after a special token, as in {text:?}"
                )));
            }
        }
        Ok(None)
    }
}

/// The tokens of the library's tokenizer by id, with their kinds.
fn library_tokens(
    tokenizer: &tokenizers::Tokenizer,
    kind: impl Fn(&str) -> Kind,
    score: impl Fn(&str) -> f32,
) -> Vec<Option<Token>> {
    let added = tokenizer.get_added_vocabulary();
    let mut tokens = Vec::new();
    for (text, id) in tokenizer.get_vocab(true) {
        let id = id as usize;
        if id >= tokens.len() {
            // Ids are below MAX_VOCAB_SIZE: that was checked when the tokenizer was opened.
            tokens.resize(id.saturating_add(1), None);
        }
        let kind = match added.get_vocab().contains_key(&text) {
            true if added.is_special_token(&text) => Kind::Control,
            true => Kind::UserDefined,
            false => kind(&text),
        };
        let score = score(&text);
        if let Some(token) = tokens.get_mut(id) {
            *token = Some(Token { text, score, kind });
        }
    }
    tokens
}

/// The merges in their order.
fn merges(model: &tokenizers::models::bpe::BPE) -> Result<Vec<(String, String)>> {
    #[derive(serde::Deserialize)]
    struct Merges {
        merges: Vec<(String, String)>,
    }
    // The library gives access to its merges only through its own file format.
    let read = || {
        let text = catching(|| Ok(serde_json::to_string(model)?))?;
        serde_json::from_str::<Merges>(&text).map_err(|error| error.to_string())
    };
    read().map(|read| read.merges).map_err(|reason| inexpressible("merges", &reason))
}

/// A part of a tokenizer in the form of its file.
fn as_json<T: serde::Serialize>(part: &T) -> Result<serde_json::Value> {
    serde_json::to_value(part).map_err(|error| inexpressible("tokenizer", &error.to_string()))
}

/// Makes the error for something that GGUF cannot express. The user's only way out is to leave the tokenizer
/// out.
fn inexpressible(key: &str, value: &str) -> Error {
    Error::unsupported(
        format!("tokenizer {key}"),
        format!("{value}: GGUF cannot express it; --no-tokenizer leaves the tokenizer out"),
    )
}
