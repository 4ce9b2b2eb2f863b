//! A GGUF file's own byte-level BPE vocabulary.
//!
//! Source: llama.cpp, `llama-vocab.cpp`: which pre-tokenizer, which defaults and which token types go with
//! which `tokenizer.ggml.*` key. The expressions are those of the models' own tokenizer.json files.

use std::path::Path;

use serde_json::{Map, json};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::chat_template::ChatTemplates;
use super::hf::post_processor;
use super::{MAX_VOCAB_SIZE, Parts, catching};
use crate::checkpoint::gguf::{self, Metadata};
use crate::error::{Error, Result};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

// Values of `tokenizer.ggml.token_type`.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Control tokens that end a turn, for files made before `eot_token_id` existed.
const END_OF_TURN: [&str; 3] = ["<|eot_id|>", "<|eom_id|>", "<|im_end|>"];

/// How text is cut before merging.
struct PreTokenizer {
    pre_tokenizer: PreTokenizerWrapper,
    /// Whether a piece that is a token as a whole needs no merges.
    ignore_merges: bool,
    /// Whether BOS is added where the file does not say.
    add_bos_token: bool,
}

/// Reads the tokenizer of the GGUF file at `path`, which may have no tensors.
pub(super) fn read(path: &Path) -> Result<Parts> {
    let metadata = gguf::read_metadata(path)?;
    match metadata.string(MODEL)? {
        Some("gpt2") => byte_level_bpe(&metadata),
        Some("llama") => Err(Error::unsupported(
            MODEL,
            "\"llama\" (SentencePiece); byte-level BPE (\"gpt2\") is supported, or a folder with tokenizer.json",
        )),
        Some(other) => Err(Error::unsupported(MODEL, format!("{other:?}; \"gpt2\" is supported"))),
        None => Err(Error::NotFound { what: format!("tokenizer ({MODEL})"), path: path.into() }),
    }
}

fn byte_level_bpe(metadata: &Metadata) -> Result<Parts> {
    let mut warnings = Vec::new();
    let tokens =
        metadata.strings(TOKENS)?.ok_or_else(|| malformed(metadata, format!("{TOKENS} is missing")))?;
    if tokens.is_empty() || tokens.len() > MAX_VOCAB_SIZE {
        let reason = format!("{TOKENS} holds {} tokens, expected 1 to {MAX_VOCAB_SIZE}", tokens.len());
        return Err(malformed(metadata, reason));
    }
    let types = metadata.ints(TOKEN_TYPE)?.unwrap_or_default();
    if !types.is_empty() && types.len() != tokens.len() {
        let reason = format!("{TOKEN_TYPE} has {} entries for {} tokens", types.len(), tokens.len());
        return Err(malformed(metadata, reason));
    }
    let name = metadata.string(PRE)?;
    let pre = pre_tokenizer(metadata, name, &mut warnings)?;

    let vocab: Vocab = tokens.iter().cloned().zip(0..).collect();
    if vocab.len() < tokens.len() {
        warnings
            .push(format!("{} tokens of the vocabulary are spelt like another", tokens.len() - vocab.len()));
    }
    let merges = merges(metadata, &vocab)?;
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(pre.ignore_merges);
    let bpe = catching(|| bpe.build()).map_err(|reason| malformed(metadata, reason))?;

    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(pre.pre_tokenizer));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    let added = tokens.iter().zip(&types).filter_map(|(token, kind)| match *kind {
        CONTROL | UNKNOWN => Some(AddedToken::from(token.as_str(), true)),
        USER_DEFINED => Some(AddedToken::from(token.as_str(), false).normalized(false)),
        _ => None,
    });
    catching(|| tokenizer.add_tokens(added)).map_err(|reason| malformed(metadata, reason))?;

    let bos = special_token(metadata, BOS, tokens)?;
    let eos = special_token(metadata, EOS, tokens)?;
    let first = added_around(metadata, "tokenizer.ggml.add_bos_token", pre.add_bos_token, (BOS, bos))?;
    let last = added_around(metadata, "tokenizer.ggml.add_eos_token", false, (EOS, eos))?;
    if first.is_some() || last.is_some() {
        let processor = post_processor(first, last).map_err(|reason| malformed(metadata, reason))?;
        tokenizer.with_post_processor(Some(processor));
    }

    let mut special_tokens = Map::new();
    for (name, token) in [("bos_token", bos), ("eos_token", eos)] {
        if let Some((_, token)) = token {
            special_tokens.insert(name.into(), json!(token));
        }
    }
    Ok(Parts {
        tokenizer,
        kind: format!("gguf bpe {}", name.unwrap_or("default")),
        bos_token_id: bos.map(|(id, _)| id),
        eos_token_id: eos.map(|(id, _)| id),
        extra_eos_token_ids: extra_eos_token_ids(metadata, tokens, &types, eos.map(|(id, _)| id))?,
        special_tokens,
        chat_templates: chat_templates(metadata)?,
        warnings,
    })
}

fn malformed(metadata: &Metadata, reason: impl Into<String>) -> Error {
    Error::malformed(metadata.path(), reason)
}

/// The token that is added to every text, if `key` (or its default) says so.
fn added_around<'a>(
    metadata: &Metadata,
    key: &str,
    default: bool,
    (id_key, token): (&str, Option<(u32, &'a str)>),
) -> Result<Option<(u32, &'a str)>> {
    if !metadata.bool(key)?.unwrap_or(default) {
        return Ok(None);
    }
    let missing = || malformed(metadata, format!("BOS or EOS is to be added, but {id_key} is missing"));
    token.map(Some).ok_or_else(missing)
}

/// The merges, each being two tokens that make a third.
fn merges(metadata: &Metadata, vocab: &Vocab) -> Result<Vec<(String, String)>> {
    let lines =
        metadata.strings(MERGES)?.ok_or_else(|| malformed(metadata, format!("{MERGES} is missing")))?;
    let mut merges = Vec::with_capacity(lines.len());
    for line in lines {
        // A token is never empty, so a space at the very start belongs to the first one.
        let cut = line.char_indices().skip(1).find(|&(_, character)| character == ' ').map(|(at, _)| at);
        let pair = cut.map(|at| line.split_at(at)).and_then(|(left, right)| {
            let right = right.strip_prefix(' ')?;
            let known =
                [left, right, &format!("{left}{right}")].iter().all(|&token| vocab.contains_key(token));
            known.then(|| (left.to_owned(), right.to_owned()))
        });
        merges.push(pair.ok_or_else(|| {
            malformed(metadata, format!("{MERGES}: {line:?} is not two tokens that make a third"))
        })?);
    }
    Ok(merges)
}

fn pre_tokenizer(
    metadata: &Metadata,
    name: Option<&str>,
    warnings: &mut Vec<String>,
) -> Result<PreTokenizer> {
    let gpt2 = ByteLevel::new(false, true, true);
    match name {
        Some("smollm") => Ok(PreTokenizer {
            // Each digit apart, then GPT-2's expression.
            pre_tokenizer: Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into(),
            ignore_merges: false,
            add_bos_token: false,
        }),
        Some("llama-bpe" | "llama3" | "llama-v3") => {
            let split = catching(|| {
                let pattern = SplitPattern::Regex(LLAMA_3.into());
                Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            })
            .map_err(|reason| malformed(metadata, reason))?;
            Ok(PreTokenizer {
                pre_tokenizer: Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()])
                    .into(),
                ignore_merges: true,
                add_bos_token: true,
            })
        }
        Some("gpt-2") => {
            Ok(PreTokenizer { pre_tokenizer: gpt2.into(), ignore_merges: false, add_bos_token: false })
        }
        None | Some("default") => {
            warnings.push(format!(
                "{PRE} names no pre-tokenizer; GPT-2's is used, and the token ids may not be the model's own"
            ));
            Ok(PreTokenizer { pre_tokenizer: gpt2.into(), ignore_merges: false, add_bos_token: false })
        }
        Some(other) => Err(Error::unsupported(
            PRE,
            format!(
                "{other:?}; \"smollm\", \"llama-bpe\", \"llama3\", \"llama-v3\" and \"gpt-2\" are supported"
            ),
        )),
    }
}

/// How Llama 3's tokenizer.json cuts text.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The token that `key` names, which must be in the vocabulary.
fn special_token<'a>(metadata: &Metadata, key: &str, tokens: &'a [String]) -> Result<Option<(u32, &'a str)>> {
    let Some(id) = metadata.u64(key)? else { return Ok(None) };
    usize::try_from(id)
        .ok()
        .and_then(|index| tokens.get(index))
        .zip(u32::try_from(id).ok())
        .map(|(token, id)| Some((id, token.as_str())))
        .ok_or_else(|| {
            malformed(metadata, format!("{key} is {id}, the vocabulary has {} tokens", tokens.len()))
        })
}

fn extra_eos_token_ids(
    metadata: &Metadata,
    tokens: &[String],
    types: &[i64],
    eos: Option<u32>,
) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ids.extend(special_token(metadata, key, tokens)?.map(|(id, _)| id));
    }
    for ((id, token), kind) in (0..).zip(tokens).zip(types) {
        if *kind == CONTROL && END_OF_TURN.contains(&token.as_str()) {
            ids.push(id);
        }
    }
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
