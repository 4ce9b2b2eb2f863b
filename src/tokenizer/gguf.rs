//! Reads a GGUF file's own vocabulary: byte-level BPE ("gpt2") or SentencePiece ("llama").
//!
//! Source: llama.cpp, `llama-vocab.cpp`, for the defaults and token types that go with each
//! `tokenizer.ggml.*` key.

use std::path::Path;

use serde_json::{Map, json};
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::bounds::{Bounds, check_token};
use super::chat_template::ChatTemplates;
use super::encoder::Encoder;
use super::hf::post_processor;
use super::pre_tokenizers::{self, DEFAULT, LLAMA_3, PreTokenizer};
use super::sentence_piece::{Kind, Piece, SentencePiece, Settings};
use super::{Parts, catching};
use crate::checkpoint::gguf::{self, Metadata};
use crate::error::{Error, Result, quoted};
use crate::sys::reserve;

pub(super) const MODEL: &str = "tokenizer.ggml.model";
pub(super) const PRE: &str = "tokenizer.ggml.pre";
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
pub(super) const SCORES: &str = "tokenizer.ggml.scores";
pub(super) const MERGES: &str = "tokenizer.ggml.merges";
pub(super) const BOS: &str = "tokenizer.ggml.bos_token_id";
pub(super) const EOS: &str = "tokenizer.ggml.eos_token_id";
const EOT: &str = "tokenizer.ggml.eot_token_id";
const EOM: &str = "tokenizer.ggml.eom_token_id";
const FIM_PAD: &str = "tokenizer.ggml.fim_pad_token_id";
const FIM_REPO: &str = "tokenizer.ggml.fim_rep_token_id";
const FIM_SEPARATOR: &str = "tokenizer.ggml.fim_sep_token_id";
pub(super) const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
pub(super) const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
pub(super) const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// The model's name in a file without a vocabulary.
pub(super) const NO_TOKENIZER: &str = "none";
pub(super) const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
pub(super) const REMOVE_EXTRA_WHITESPACES: &str = "tokenizer.ggml.remove_extra_whitespaces";

/// Tokens that end a text or a turn, whatever type the file gives them: files name one or two of them, and
/// converters mark others as ordinary text.
///
/// Source: llama.cpp, `llama-vocab.cpp`, `special_eog_ids`, `special_fim_pad_id` and the like.
const END_OF_GENERATION: [&str; 32] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "</s>",
    // What follows code that was filled in: padding, or another file or repository.
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];

/// The most tokens, and the most merges. The largest vocabulary in use has about 262,000 tokens, and 515,000
/// merges.
const MAX_ENTRIES: usize = 1 << 19;
/// The memory that building a tokenizer takes: for each token or merge, and for each byte of their texts.
const WORKING_BYTES_PER_ENTRY: usize = 512;
const WORKING_BYTES: usize = 12;

/// The tokens and the type of each.
struct Tokens<'a> {
    texts: &'a [String],
    kinds: Vec<Kind>,
}

/// Reads the tokenizer of the GGUF file at `path`, which may have no tensors.
pub(super) fn read(path: &Path) -> Result<Parts> {
    from_metadata(&gguf::read_metadata(path)?)
}

/// Reads the tokenizer out of a file's metadata.
pub(super) fn from_metadata(metadata: &Metadata) -> Result<Parts> {
    let texts = || [TOKENS, MERGES].into_iter().filter_map(|key| metadata.strings(key).ok()?).flatten();
    let bytes = texts().map(String::len).sum::<usize>().saturating_mul(WORKING_BYTES);
    let bytes = bytes.saturating_add(texts().count().saturating_mul(WORKING_BYTES_PER_ENTRY));
    let _held = reserve::hold("the tokenizer", bytes)?;
    let none = || Error::NotFound { what: format!("tokenizer ({MODEL})"), path: metadata.path().into() };
    match metadata.string(MODEL)? {
        Some("gpt2") => byte_level_bpe(metadata),
        Some("llama") => sentence_piece(metadata),
        // llama.cpp's name for no tokenizer.
        Some(NO_TOKENIZER) | None => Err(none()),
        Some(other) => Err(Error::unsupported(
            MODEL,
            format!("{other:?}; \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece) are supported"),
        )),
    }
}

impl<'a> Tokens<'a> {
    fn new(metadata: &'a Metadata) -> Result<Self> {
        let texts =
            metadata.strings(TOKENS)?.ok_or_else(|| malformed(metadata, format!("{TOKENS} is missing")))?;
        if texts.is_empty() || texts.len() > MAX_ENTRIES {
            let reason = format!("{TOKENS} holds {} tokens, expected 1 to {MAX_ENTRIES}", texts.len());
            return Err(malformed(metadata, reason));
        }
        let longest = texts.iter().map(String::len).max().unwrap_or(0);
        check_token(longest).map_err(|reason| malformed(metadata, format!("{TOKENS}: {reason}")))?;
        let numbers = metadata.ints(TOKEN_TYPE)?.unwrap_or_else(|| vec![1; texts.len()]);
        if numbers.len() != texts.len() {
            let reason = format!("{TOKEN_TYPE} has {} entries for {} tokens", numbers.len(), texts.len());
            return Err(malformed(metadata, reason));
        }
        let kind = |(text, number): (&String, i64)| match Kind::from_number(number) {
            _ if END_OF_GENERATION.contains(&text.as_str()) => Kind::Control,
            // 0 means "undefined" in ggml.
            kind => kind.unwrap_or(Kind::Normal),
        };
        let kinds = texts.iter().zip(numbers).map(kind).collect();
        Ok(Tokens { texts, kinds })
    }

    fn get(&self, id: u32) -> Option<&'a str> {
        self.texts.get(id as usize).map(String::as_str)
    }

    /// The token that `key` names; None if it is not in the vocabulary.
    fn special(&self, metadata: &Metadata, key: &str) -> Result<Option<(u32, &'a str)>> {
        Ok(metadata.token_id(key)?.and_then(|id| Some((id, self.get(id)?))))
    }

    /// Warnings about special tokens that are not in the vocabulary. As in llama.cpp they are ignored.
    fn unknown_specials(&self, metadata: &Metadata) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        for key in [BOS, EOS, EOT, EOM, FIM_PAD, FIM_REPO, FIM_SEPARATOR] {
            if let Some(id) = metadata.token_id(key)?.filter(|&id| self.get(id).is_none()) {
                let count = self.texts.len();
                warnings.push(format!("{key} is {id} and is ignored: the vocabulary has {count} tokens"));
            }
        }
        Ok(warnings)
    }
}

fn byte_level_bpe(metadata: &Metadata) -> Result<Parts> {
    let tokens = Tokens::new(metadata)?;
    let mut warnings = tokens.unknown_specials(metadata)?;
    let bos = tokens.special(metadata, BOS)?;
    let eos = tokens.special(metadata, EOS)?;
    let (pre, name) = pre_tokenizer(metadata, bos, &mut warnings)?;

    let vocab: Vocab = tokens.texts.iter().cloned().zip(0..).collect();
    if vocab.len() < tokens.texts.len() {
        let count = tokens.texts.len() - vocab.len();
        warnings.push(format!("{count} tokens of the vocabulary have the same text as another"));
    }
    let merges = merges(metadata, &vocab, &mut warnings)?;
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(pre.ignore_merges);
    let bpe = catching(|| bpe.build()).map_err(|reason| malformed(metadata, reason))?;

    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(pre.pre_tokenizer));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    let added = tokens.texts.iter().zip(&tokens.kinds).filter_map(|(token, kind)| match *kind {
        Kind::Control | Kind::Unknown => Some(AddedToken::from(token.as_str(), true)),
        Kind::UserDefined => Some(AddedToken::from(token.as_str(), false).normalized(false)),
        Kind::Normal | Kind::Unused | Kind::Byte => None,
    });
    let added: Vec<AddedToken> = added.collect();
    Bounds::OURS
        .check_added(added.iter().map(|token| token.content.as_str()))
        .and_then(|()| catching(|| tokenizer.add_tokens(added)))
        .map_err(|reason| malformed(metadata, reason))?;

    let first = added_around(metadata, ADD_BOS, pre.add_bos_token, (BOS, bos))?;
    let last = added_around(metadata, ADD_EOS, false, (EOS, eos))?;
    if first.is_some() || last.is_some() {
        let processor = post_processor(first, last).map_err(|reason| malformed(metadata, reason))?;
        tokenizer.with_post_processor(Some(processor));
    }
    parts(metadata, tokenizer.into(), format!("gguf bpe {name}"), &tokens, (bos, eos), warnings)
}

fn sentence_piece(metadata: &Metadata) -> Result<Parts> {
    let tokens = Tokens::new(metadata)?;
    let mut warnings = tokens.unknown_specials(metadata)?;
    let scores = metadata.floats(SCORES)?.unwrap_or_else(|| {
        warnings.push(format!("{SCORES} is missing; the token ids may not be the model's own"));
        vec![0.0; tokens.texts.len()]
    });
    if scores.len() != tokens.texts.len() {
        let reason = format!("{SCORES} has {} entries for {} tokens", scores.len(), tokens.texts.len());
        return Err(malformed(metadata, reason));
    }
    // Files without these keys use Llama 2's <s> and </s>.
    let at = |id: u32| Some((id, tokens.get(id)?));
    let bos = tokens.special(metadata, BOS)?.or_else(|| at(1));
    let eos = tokens.special(metadata, EOS)?.or_else(|| at(2));
    let first = added_around(metadata, ADD_BOS, true, (BOS, bos))?;
    let last = added_around(metadata, ADD_EOS, false, (EOS, eos))?;
    let settings = Settings {
        add_space_prefix: metadata.bool(ADD_SPACE_PREFIX)?.unwrap_or(true),
        prefix_after_special: true,
        remove_extra_whitespaces: metadata.bool(REMOVE_EXTRA_WHITESPACES)?.unwrap_or(false),
        first: first.map(|(id, _)| id),
        last: last.map(|(id, _)| id),
    };
    let pieces = tokens.texts.iter().zip(&tokens.kinds).zip(scores);
    let pieces = pieces.map(|((text, kind), score)| Piece::new(text.clone(), score, *kind)).collect();
    let (encoder, more) =
        SentencePiece::new(pieces, settings).map_err(|reason| malformed(metadata, reason))?;
    warnings.extend(more);
    parts(metadata, encoder.into(), "gguf llama".into(), &tokens, (bos, eos), warnings)
}

/// A special token, if there is one.
type Special<'a> = Option<(u32, &'a str)>;

fn parts(
    metadata: &Metadata,
    encoder: Encoder,
    kind: String,
    tokens: &Tokens<'_>,
    (bos, eos): (Special<'_>, Special<'_>),
    warnings: Vec<String>,
) -> Result<Parts> {
    let mut special_tokens = Map::new();
    for (name, token) in [("bos_token", bos), ("eos_token", eos)] {
        if let Some((_, token)) = token {
            special_tokens.insert(name.into(), json!(token));
        }
    }
    let eos_token_id = eos.map(|(id, _)| id);
    Ok(Parts {
        encoder,
        kind,
        bos_token_id: bos.map(|(id, _)| id),
        eos_token_id,
        extra_eos_token_ids: extra_eos_token_ids(metadata, tokens, eos_token_id)?,
        special_tokens,
        chat_templates: chat_templates(metadata)?,
        warnings,
    })
}

fn malformed(metadata: &Metadata, reason: impl Into<String>) -> Error {
    Error::malformed(metadata.path(), reason)
}

/// The token that is added to every text; None if `key`, or its default, says that none is.
fn added_around<'a>(
    metadata: &Metadata,
    key: &str,
    default: bool,
    (id_key, token): (&str, Special<'a>),
) -> Result<Special<'a>> {
    if !metadata.bool(key)?.unwrap_or(default) {
        return Ok(None);
    }
    let missing = || malformed(metadata, format!("BOS or EOS is to be added, but {id_key} is missing"));
    token.map(Some).ok_or_else(missing)
}

/// Reads the merges. Each is two tokens that make a third; others can never apply and are dropped.
fn merges(metadata: &Metadata, vocab: &Vocab, warnings: &mut Vec<String>) -> Result<Vec<(String, String)>> {
    let lines =
        metadata.strings(MERGES)?.ok_or_else(|| malformed(metadata, format!("{MERGES} is missing")))?;
    if lines.len() > MAX_ENTRIES {
        let reason = format!("{MERGES} holds {} merges, the limit is {MAX_ENTRIES}", lines.len());
        return Err(malformed(metadata, reason));
    }
    let mut merges = Vec::with_capacity(lines.len());
    let mut dropped = None;
    for line in lines {
        // A token is never empty, so a space at the very start belongs to the first one.
        let cut = line.char_indices().skip(1).find(|&(_, character)| character == ' ').map(|(at, _)| at);
        let pair = cut.map(|at| line.split_at(at)).and_then(|(left, right)| {
            let right = right.strip_prefix(' ')?;
            let known =
                [left, right, &format!("{left}{right}")].iter().all(|&token| vocab.contains_key(token));
            known.then(|| (left.to_owned(), right.to_owned()))
        });
        match pair {
            Some(pair) => merges.push(pair),
            None => dropped = dropped.or(Some(line)),
        }
    }
    if let Some(line) = dropped {
        let (count, line) = (lines.len() - merges.len(), quoted(line));
        warnings.push(format!(
            "{count} of {MERGES} are ignored: they are not two tokens that make a third, such as {line}"
        ));
    }
    Ok(merges)
}

/// The pre-tokenizer that the file names, and its name.
fn pre_tokenizer(
    metadata: &Metadata,
    bos: Special<'_>,
    warnings: &mut Vec<String>,
) -> Result<(PreTokenizer, String)> {
    let mut name = metadata.string(PRE)?.unwrap_or(DEFAULT);
    if name == DEFAULT {
        // Llama 3 files made before llama.cpp had a name for their pre-tokenizer.
        let is_llama_3 = bos == Some((128_000, "<|begin_of_text|>"));
        let (taken, doubt) = if is_llama_3 {
            (LLAMA_3, "because the vocabulary is Llama 3's")
        } else {
            (DEFAULT, "and the token ids may not be the model's own")
        };
        name = taken;
        warnings.push(format!("{PRE} names no pre-tokenizer; {name:?} is used, {doubt}"));
    }
    match pre_tokenizers::by_name(name).map_err(|reason| malformed(metadata, reason))? {
        Some(pre) => Ok((pre, name.to_owned())),
        None => {
            let known: Vec<&str> = pre_tokenizers::names().collect();
            Err(Error::unsupported(
                PRE,
                format!("{name:?}; take a folder with tokenizer.json, or one of {}", known.join(", ")),
            ))
        }
    }
}

fn extra_eos_token_ids(metadata: &Metadata, tokens: &Tokens<'_>, eos: Option<u32>) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for key in [EOT, EOM, FIM_PAD, FIM_REPO, FIM_SEPARATOR] {
        ids.extend(tokens.special(metadata, key)?.map(|(id, _)| id));
    }
    let ends = |token: &String| END_OF_GENERATION.contains(&token.as_str());
    ids.extend((0..).zip(tokens.texts).filter(|(_, token)| ends(token)).map(|(id, _)| id));
    ids.retain(|id| Some(*id) != eos);
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// The default template and named ones (`tokenizer.chat_template.tool_use`).
fn chat_templates(metadata: &Metadata) -> Result<ChatTemplates> {
    let mut templates = ChatTemplates::default();
    if let Some(template) = metadata.string(CHAT_TEMPLATE)? {
        templates.insert("default", template);
    }
    let named: Vec<String> = metadata
        .iter()
        .filter_map(|(key, _)| key.strip_prefix(CHAT_TEMPLATE)?.strip_prefix('.').map(str::to_owned))
        .collect();
    for name in named {
        if let Some(template) = metadata.string(&format!("{CHAT_TEMPLATE}.{name}"))? {
            templates.insert(&name, template);
        }
    }
    Ok(templates)
}
