//! Text to ids and back; the text of chat templates.
//!
//! Start reading at [`Tokenizer`]. It is read from a folder ([`hf`]; [`tokenizer_model`] if there is no
//! tokenizer.json) or from a GGUF file's own vocabulary ([`gguf`]). It then encodes with one of two encoders
//! ([`encoder`]): Hugging Face's `tokenizers`, or [`sentence_piece`] for vocabularies with scores.
//! [`to_gguf`] writes a tokenizer down for a GGUF file.
//! [`decode_stream`] turns ids into text as they come, [`chat_template`] keeps a model's chat templates.
//! [`bounds`] refuses tokenizer.json files that would take too much time or memory.
//! May import `checkpoint`, `config`, `error` and `kernels::Cancel`.

// The bytes of a tokenizer's files are untrusted.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing))]

mod bounds;
mod byte_level;
mod chat_template;
pub mod decode_stream;
mod encoder;
mod gguf;
mod hf;
mod hf_config;
mod merging;
mod pre_tokenizers;
mod sentence_piece;
mod tiktoken;
mod to_gguf;
mod tokenizer_model;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::{Map, Value};

use chat_template::ChatTemplates;
pub use decode_stream::DecodeStream;
use decode_stream::Decoder;
use encoder::{Encoder, LongestToken};
pub use to_gguf::{GgufTokenizer, no_tokenizer};

use crate::error::{Error, Result};
use crate::kernels::Cancel;
use crate::sys::sync::get_or_make;

/// Larger ids are refused, because tables are as long as the largest id. The largest vocabulary in use has
/// about 262,000 tokens.
const MAX_VOCAB_SIZE: usize = 1 << 22;

/// The most added tokens: those that are found in the text before anything else. Each takes about a kilobyte.
/// Vocabularies in use have up to some thousands.
const MAX_ADDED_TOKENS: usize = 1 << 18;

/// Refuses more added tokens than [`MAX_ADDED_TOKENS`].
fn check_added_tokens(count: usize) -> std::result::Result<(), String> {
    if count > MAX_ADDED_TOKENS {
        return Err(format!("{count} tokens are special or user-defined, the limit is {MAX_ADDED_TOKENS}"));
    }
    Ok(())
}

/// The result of reading a tokenizer's files, by [`hf`] or [`gguf`].
struct Parts {
    encoder: Encoder,
    kind: String,
    bos_token_id: Option<u32>,
    eos_token_id: Option<u32>,
    extra_eos_token_ids: Vec<u32>,
    /// `bos_token`, `eos_token` and their like, as chat templates see them.
    special_tokens: Map<String, Value>,
    chat_templates: ChatTemplates,
    warnings: Vec<String>,
}

/// A model's tokenizer with its chat template. It can be shared between threads.
pub struct Tokenizer {
    parts: Parts,
    decoder: Decoder,
    vocab_size: usize,
    /// Ids below it may be decoded. The model's vocabulary may be larger than the tokenizer's.
    padded_size: usize,
    /// The most bytes of a text that one token stands for. It is found on first use.
    longest_token: OnceLock<Option<LongestToken>>,
}

impl Tokenizer {
    /// Reads the tokenizer of a folder or of a GGUF file. A folder has `tokenizer.json` or else
    /// `tokenizer.model`, and optionally `tokenizer_config.json`, `special_tokens_map.json` and
    /// `chat_template.jinja`. The GGUF file may hold only a vocabulary.
    ///
    /// # Errors
    /// - [`Error::NotFound`], [`Error::Io`] or [`Error::Malformed`], with the file
    /// - [`Error::Unsupported`] for a kind of tokenizer that we cannot reproduce exactly
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => Error::NotFound { what: "tokenizer".into(), path: path.into() },
            _ => Error::Io { path: path.into(), source },
        })?;
        let parts = if metadata.is_dir() { hf::read(path)? } else { gguf::read(path)? };
        let mut tokenizer = Self::from_parts(parts).map_err(|reason| Error::malformed(path, reason))?;
        tokenizer.pad(hf_config::model_vocab_size(path).unwrap_or(0));
        Ok(tokenizer)
    }

    /// Lets [`Tokenizer::decode`] accept the ids of a model with `vocab_size` rows.
    pub(crate) fn pad(&mut self, vocab_size: usize) {
        self.padded_size = self.padded_size.max(vocab_size);
    }

    fn from_parts(mut parts: Parts) -> std::result::Result<Self, String> {
        let vocab_size = parts.encoder.vocab_size();
        if vocab_size > MAX_VOCAB_SIZE {
            return Err(format!(
                "the tokenizer has token id {}, the limit is {MAX_VOCAB_SIZE}",
                vocab_size - 1
            ));
        }
        let decoder = parts.encoder.decoder();
        parts.warnings.extend(decoder.warning());
        let longest_token = OnceLock::new();
        Ok(Tokenizer { parts, decoder, vocab_size, padded_size: vocab_size, longest_token })
    }

    /// Encodes `text`. With `add_special_tokens`, BOS and the like are added exactly as the tokenizer's own
    /// configuration says. With `split_special_tokens`, special tokens in the text are encoded as plain text.
    ///
    /// # Errors
    /// [`Error::Text`] if the tokenizer fails on this text.
    pub fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        split_special_tokens: bool,
    ) -> Result<Vec<u32>> {
        self.encode_unless_cancelled(text, add_special_tokens, split_special_tokens, &Cancel::never())
    }

    /// As [`Tokenizer::encode`], but it stops soon after `cancel` fires.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; [`Error::Cancelled`].
    pub fn encode_unless_cancelled(
        &self,
        text: &str,
        add_special_tokens: bool,
        split_special_tokens: bool,
        cancel: &Cancel,
    ) -> Result<Vec<u32>> {
        self.parts.encoder.encode(text, add_special_tokens, split_special_tokens, cancel)
    }

    /// The number of tokens that `text` has at least; 0 if the tokenizer could shorten it by any amount.
    pub fn fewest_tokens(&self, text: &str) -> usize {
        let longest = get_or_make(&self.longest_token, || self.parts.encoder.longest_token());
        let Some((longest, kept)) = longest else { return 0 };
        let kept = |byte: &u8| kept.get(usize::from(*byte)).is_some_and(|kept| *kept);
        text.as_bytes().iter().filter(|byte| kept(byte)).count() / (*longest).max(1)
    }

    /// Decodes `ids`. Bytes that are not UTF-8 become U+FFFD, as in Hugging Face's decoders. Ids inside the
    /// model's vocabulary without a token add nothing.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.decode_unless_cancelled(ids, skip_special_tokens, &Cancel::never())
    }

    /// As [`Tokenizer::decode`], but it stops soon after `cancel` fires.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`]; [`Error::Cancelled`]; [`Error::Generation`] if there is no memory for the
    /// text.
    pub fn decode_unless_cancelled(
        &self,
        ids: &[u32],
        skip_special_tokens: bool,
        cancel: &Cancel,
    ) -> Result<String> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.padded_size) {
            return Err(Error::argument(
                "ids",
                format!("got {id}, expected token ids below {}", self.padded_size),
            ));
        }
        let mut text = String::new();
        let mut state = self.decoder.start();
        for &id in ids {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if let Some(token) = self.visible_token(id, skip_special_tokens) {
                text.try_reserve(token.len()).map_err(|_| {
                    let reason = format!("no memory for the decoded text of {} tokens", ids.len());
                    Error::Generation { reason }
                })?;
                self.decoder.push(&mut state, token, &mut text)?;
            }
        }
        self.decoder.finish(&mut state, &mut text)?;
        Ok(text)
    }

    /// Starts a stream that decodes ids one by one. [`DecodeStream`] says what it guarantees.
    pub fn decode_stream(self: &Arc<Self>, skip_special_tokens: bool) -> DecodeStream {
        DecodeStream::new(Arc::clone(self), skip_special_tokens)
    }

    /// The bytes that `id` adds inside a text, none for a special token. None if the tokenizer's decoder
    /// makes text of several tokens together, so that one alone has none.
    ///
    /// # Errors
    /// [`Error::Text`] if the tokenizer's decoder fails.
    pub fn token_bytes(&self, id: u32) -> Result<Option<Vec<u8>>> {
        self.visible_token(id, true).map_or(Ok(Some(Vec::new())), |token| self.decoder.bytes(token))
    }

    /// The token of `id`; None if there is none or it is skipped.
    fn visible_token(&self, id: u32, skip_special_tokens: bool) -> Option<String> {
        self.parts
            .encoder
            .id_to_token(id)
            .filter(|token| !skip_special_tokens || !self.parts.encoder.is_special(id, token))
    }

    /// One more than the largest token id. The model's vocabulary may be larger if its embedding is padded.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that begins a text.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.parts.bos_token_id
    }

    /// The token that ends a text.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.parts.eos_token_id
    }

    /// Further tokens that end a turn, from a GGUF file's metadata. Folders list theirs in
    /// generation_config.json.
    pub fn extra_eos_token_ids(&self) -> &[u32] {
        &self.parts.extra_eos_token_ids
    }

    /// The id of a special token that is written exactly as `text`.
    pub(crate) fn special_token_id(&self, text: &str) -> Option<u32> {
        self.token_to_id(text).filter(|&id| self.parts.encoder.is_special(id, text))
    }

    /// The id of the special token with which `text` begins: the longest, if there are several.
    pub(crate) fn leading_special_token(&self, text: &str) -> Option<u32> {
        let ends = text.char_indices().map(|(at, character)| at + character.len_utf8());
        let ends: Vec<usize> = ends.take_while(|&end| end <= bounds::MAX_TOKEN_BYTES).collect();
        ends.into_iter().rev().find_map(|end| self.special_token_id(text.get(..end)?))
    }

    /// Whether `id` may end a text: it is a special token, but not the one for unknown text.
    pub(crate) fn is_end_token(&self, id: u32) -> bool {
        let unknown = self.parts.special_tokens.get("unk_token").and_then(Value::as_str);
        let token = self.id_to_token(id).filter(|token| Some(token.as_str()) != unknown);
        token.is_some_and(|token| self.parts.encoder.is_special(id, &token))
    }

    /// The id of a token, in the vocabulary's own spelling.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.parts.encoder.token_to_id(token)
    }

    /// The token of an id, in the vocabulary's own spelling.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.parts.encoder.id_to_token(id)
    }

    /// The chat template that is used without tools.
    pub fn chat_template(&self) -> Option<&str> {
        self.parts.chat_templates.default_template()
    }

    /// The name and the text of the chat template for `given`: one of the model's by its name, or a template
    /// itself, which has no name. Without it, the model's template named `tool_use` if there are tools, or
    /// else its default.
    ///
    /// # Errors
    /// [`Error::Text`] if the model has no such template.
    pub fn choose_chat_template<'a>(
        &'a self,
        given: Option<&'a str>,
        has_tools: bool,
    ) -> Result<(Option<&'a str>, &'a str)> {
        self.parts.chat_templates.choose(given, has_tools)
    }

    /// `bos_token`, `eos_token` and their like, as chat templates see them.
    pub fn special_tokens(&self) -> &Map<String, Value> {
        &self.parts.special_tokens
    }

    /// The source of the tokenizer, such as "tokenizer.json", "tokenizer.model", "gguf bpe smollm" or "gguf
    /// llama".
    pub fn kind(&self) -> &str {
        &self.parts.kind
    }

    /// Warnings for the user about the tokenizer's files.
    pub fn warnings(&self) -> &[String] {
        &self.parts.warnings
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("kind", &self.parts.kind)
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

/// Runs code of the `tokenizers` library and turns its panics into errors. It panics on some malformed
/// definitions (such as merges that make a token longer than any in the vocabulary, or a regular expression
/// that exceeds its match limit).
fn catching<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(panic_message(panic.as_ref())),
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let message = panic
        .downcast_ref::<&str>()
        .map(|message| (*message).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    message.unwrap_or_else(|| "unknown panic".to_owned())
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tokenizer_model_tests;
#[cfg(test)]
mod vocabulary_tests;
