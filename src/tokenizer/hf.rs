//! Reads the tokenizer files of a Hugging Face folder: tokenizer.json, or tokenizer.model if there is none.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PostProcessorWrapper};

use super::bounds::{Bounds, Shape};
use super::chat_template::ChatTemplates;
use super::encoder::Encoder;
use super::hf_config::{Config, read_json};
use super::sentence_piece::{Kind, Piece, SentencePiece, Settings};
use super::tokenizer_model::{Model, Refusal};
use super::{MAX_VOCAB_SIZE, Parts, catching, tiktoken};
use crate::checkpoint::background;
use crate::checkpoint::mmap::read_bounded;
use crate::error::{Error, Result};
use crate::kernels::Cancel;
use crate::sys::reserve;

const TOKENIZER: &str = "tokenizer.json";
const MODEL: &str = "tokenizer.model";

/// The most bytes that are read. The largest tokenizer.json in use has about 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 128 << 20;
/// The memory that building a tokenizer takes, for each byte of its file.
const WORKING_BYTES: usize = 32;
const MAX_TEMPLATE_BYTES: u64 = 4 << 20;
const MAX_TEMPLATES: usize = 256;

/// Reads the tokenizer of the folder `dir`.
pub(super) fn read(dir: &Path) -> Result<Parts> {
    let path = dir.join(TOKENIZER);
    match read_bounded(&path, MAX_TOKENIZER_BYTES) {
        Ok(bytes) => {
            let _held = reserve::hold("the tokenizer", bytes.len().saturating_mul(WORKING_BYTES))?;
            let (tokenizer, bounds, warning) =
                parse_tokenizer(bytes)?.map_err(|reason| Error::malformed(&path, reason))?;
            let config = Config::read(dir)?;
            let encoder = complete(tokenizer, bounds, &config, &path)?;
            parts(dir, &config, encoder, TOKENIZER, Vec::new(), warning.into_iter().collect())
        }
        Err(Error::NotFound { .. }) => read_model(dir),
        Err(error) => Err(error),
    }
}

/// Reads a folder without tokenizer.json.
fn read_model(dir: &Path) -> Result<Parts> {
    let path = dir.join(MODEL);
    let bytes = match read_bounded(&path, MAX_TOKENIZER_BYTES) {
        Ok(bytes) => bytes,
        Err(Error::NotFound { .. }) => {
            return Err(Error::NotFound { what: TOKENIZER.into(), path: dir.join(TOKENIZER) });
        }
        Err(error) => return Err(error),
    };
    let _held = reserve::hold("the tokenizer", bytes.len().saturating_mul(WORKING_BYTES))?;
    let mut config = Config::read(dir)?;
    let malformed = |reason| Error::malformed(&path, reason);
    // A protocol buffer begins with the tag of its first field, the pieces. The other format is text.
    if bytes.first() == Some(&0x0A) {
        let model = Model::read(&bytes).map_err(|refusal| match refusal {
            Refusal::Malformed(reason) => malformed(reason),
            Refusal::Unsupported(key, value) => {
                Error::unsupported(format!("{MODEL}: {key}"), format!("{value}, {CONVERT}"))
            }
        })?;
        let (vocabulary, warnings) = sentence_piece(model, dir, &mut config)?.map_err(malformed)?;
        return parts(dir, &config, vocabulary.into(), MODEL, Vec::new(), warnings);
    }
    let mut tokenizer = tiktoken::read(&bytes).map_err(malformed)?;
    config.default_token("bos_token", tiktoken::BOS);
    config.default_token("eos_token", tiktoken::EOS);
    let bos = tokenizer.token_to_id(tiktoken::BOS).map(|id| (id, tiktoken::BOS));
    tokenizer.with_post_processor(Some(post_processor(bos, None).map_err(malformed)?));
    let ends = tiktoken::END_OF_TURN.iter().filter_map(|token| tokenizer.token_to_id(token)).collect();
    let encoder = complete(tokenizer, Bounds::OURS, &config, &path)?;
    parts(dir, &config, encoder, MODEL, ends, Vec::new())
}

/// The advice for a tokenizer.model that is not supported.
const CONVERT: &str = "or a folder with tokenizer.json, which transformers' \
     AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes";

fn parts(
    dir: &Path,
    config: &Config,
    encoder: Encoder,
    kind: &str,
    extra_eos_token_ids: Vec<u32>,
    warnings: Vec<String>,
) -> Result<Parts> {
    let id = |name| config.token(name).map(|token| token.and_then(|token| encoder.token_to_id(&token)));
    let (bos_token_id, eos_token_id) = (id("bos_token")?, id("eos_token")?);
    Ok(Parts {
        encoder,
        kind: kind.into(),
        bos_token_id,
        eos_token_id,
        extra_eos_token_ids,
        special_tokens: config.special_tokens()?,
        chat_templates: chat_templates(dir, config)?,
        warnings,
    })
}

/// Parses a tokenizer.json. Also returns a warning if the file is odd.
fn parse_tokenizer(bytes: Vec<u8>) -> Result<std::result::Result<Parsed, String>> {
    // The library panics on some syntax errors and trusts the file's numbers, so the file is checked first.
    let (shape, bounds) = match Shape::inspect(&bytes) {
        Ok(inspected) => inspected,
        Err(reason) => return Ok(Err(reason)),
    };
    // The largest files take some seconds. Regular expressions are compiled, which cannot be interrupted.
    let limit = Duration::from_secs(4) + Duration::from_micros(2) * bytes.len() as u32;
    let build = move || catching(|| tokenizers::Tokenizer::from_bytes(&bytes));
    let tokenizer = match background::run_within("the tokenizer", limit, &Cancel::never(), build)? {
        Ok(tokenizer) => tokenizer,
        Err(reason) => return Ok(Err(reason)),
    };
    // The library, and so transformers, numbers added tokens in their order and ignores the file's ids.
    let renumbered = shape.added_tokens.iter().find_map(|added| {
        let id = tokenizer.token_to_id(&added.content).filter(|id| *id != added.id)?;
        Some(format!(
            "added token {:?} has id {} in tokenizer.json; it is {id}, as in the tokenizers library",
            added.content, added.id
        ))
    });
    Ok(Ok((tokenizer, bounds, renumbered)))
}

/// A tokenizer, its bounds, and a warning if its file is odd.
type Parsed = (tokenizers::Tokenizer, Bounds, Option<String>);

/// Completes a tokenizer from the config. `path` is the tokenizer's file, for messages.
fn complete(
    mut tokenizer: tokenizers::Tokenizer,
    bounds: Bounds,
    config: &Config,
    path: &Path,
) -> Result<Encoder> {
    catching(|| {
        tokenizer.with_truncation(None)?;
        tokenizer.with_padding(None);
        Ok(())
    })
    .map_err(|reason| Error::malformed(path, reason))?;
    let mut added: Vec<AddedToken> =
        config.added_tokens_decoder()?.into_iter().map(|(_, token)| token).collect();
    let known = tokenizer.get_added_vocabulary().get_vocab();
    for token in config.named_tokens()? {
        if !known.contains_key(&token.content) && !added.iter().any(|a| a.content == token.content) {
            added.push(token);
        }
    }
    bounds
        .check_added(added.iter().map(|token| token.content.as_str()))
        .map_err(|reason| config.malformed(reason))?;
    catching(|| tokenizer.add_tokens(added)).map_err(|reason| config.malformed(reason))?;
    if config.adds_tokens_around() {
        let (first, last) = config.around(|token| tokenizer.token_to_id(token), false)?;
        let first = first.as_ref().map(|(id, token)| (*id, token.as_str()));
        let last = last.as_ref().map(|(id, token)| (*id, token.as_str()));
        let processor = post_processor(first, last).map_err(|reason| config.malformed(reason))?;
        tokenizer.with_post_processor(Some(processor));
    }
    Ok(Encoder::library(tokenizer, bounds))
}

/// Completes a SentencePiece vocabulary from the folder's other files. Also returns warnings.
fn sentence_piece(
    model: Model,
    dir: &Path,
    config: &mut Config,
) -> Result<std::result::Result<(SentencePiece, Vec<String>), String>> {
    let mut pieces = model.pieces;
    let mut added = Config::added_tokens_file(dir)?;
    added.extend(config.added_tokens_decoder()?);
    for (id, token) in added {
        let place = id as usize;
        if place >= MAX_VOCAB_SIZE {
            return Err(config.malformed(format!("token id {id}: the limit is {MAX_VOCAB_SIZE}")));
        }
        if place >= pieces.len() {
            pieces.resize(place + 1, Piece::new(String::new(), 0.0, Kind::Unused));
        }
        if let Some(piece) = pieces.get_mut(place) {
            piece.set_added(token);
        }
    }
    for (name, id) in [("bos_token", model.bos_id), ("eos_token", model.eos_id)] {
        if let Some(piece) = id.and_then(|id| pieces.get(id as usize)) {
            config.default_token(name, &piece.text);
        }
    }
    for token in config.named_tokens()? {
        match pieces.iter_mut().find(|piece| piece.text == token.content) {
            Some(piece) if piece.added.as_ref().is_some_and(|token| token.special) => {}
            Some(piece) => piece.set_added(token),
            None => {
                let mut piece = Piece::new(String::new(), 0.0, Kind::Unused);
                piece.set_added(token);
                pieces.push(piece);
            }
        }
    }
    let id = |token: &str| (0..).zip(&pieces).find(|(_, piece)| piece.text == token).map(|(id, _)| id);
    let (first, last) = config.around(id, true)?;
    let settings = Settings {
        add_space_prefix: config.flag("add_prefix_space")?.unwrap_or(model.add_dummy_prefix),
        // This is transformers' name for the setting. It is true if absent, as in SentencePiece's other
        // users.
        prefix_after_special: config.flag("legacy")?.unwrap_or(true),
        remove_extra_whitespaces: model.remove_extra_whitespaces,
        first: first.map(|(id, _)| id),
        last: last.map(|(id, _)| id),
    };
    Ok(SentencePiece::new(pieces, settings))
}

fn read_text(path: &Path) -> Result<Option<String>> {
    let bytes = match read_bounded(path, MAX_TEMPLATE_BYTES) {
        Ok(bytes) => bytes,
        Err(Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    String::from_utf8(bytes).map(Some).map_err(|error| Error::malformed(path, format!("not UTF-8: {error}")))
}

/// Makes a post-processor that adds `first` before and `last` after a text.
pub(super) fn post_processor(
    first: Option<(u32, &str)>,
    last: Option<(u32, &str)>,
) -> std::result::Result<PostProcessorWrapper, String> {
    let piece = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let around = |ids: &[&str]| -> Vec<Value> {
        let inner = ids.iter().map(|id| sequence(id));
        first.map(|(_, t)| piece(t)).into_iter().chain(inner).chain(last.map(|(_, t)| piece(t))).collect()
    };
    let tokens: Map<String, Value> = [first, last]
        .into_iter()
        .flatten()
        .map(|(id, token)| (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]})))
        .collect();
    let template = json!({
        "type": "TemplateProcessing", "special_tokens": tokens,
        "single": around(&["A"]), "pair": around(&["A", "B"]),
    });
    serde_json::from_value::<TemplateProcessing>(template)
        .map(PostProcessorWrapper::Template)
        .map_err(|error| error.to_string())
}

/// Newest first, as transformers looks: chat_template.jinja, chat_template.json, tokenizer_config.json. Each
/// may be joined by additional_chat_templates/*.jinja, which are named after their files.
fn chat_templates(dir: &Path, config: &Config) -> Result<ChatTemplates> {
    let mut templates = main_templates(dir, config)?;
    let additional = dir.join("additional_chat_templates");
    let entries = match std::fs::read_dir(&additional) {
        Ok(entries) => entries.take(MAX_TEMPLATES),
        Err(_) => return Ok(templates),
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|extension| extension == "jinja")
            && let Some(name) = path.file_stem().and_then(OsStr::to_str)
            && let Some(template) = read_text(&path)?
        {
            templates.insert(name, &template);
        }
    }
    Ok(templates)
}

fn main_templates(dir: &Path, config: &Config) -> Result<ChatTemplates> {
    let mut templates = ChatTemplates::default();
    if let Some(template) = read_text(&dir.join("chat_template.jinja"))? {
        templates.insert("default", &template);
        return Ok(templates);
    }
    let path = dir.join("chat_template.json");
    if let Some(file) = read_json(&path)?
        && let Some(value) = file.get("chat_template")
    {
        add_templates(&mut templates, value).map_err(|reason| Error::malformed(path, reason))?;
        return Ok(templates);
    }
    if let Some(value) = config.get("chat_template") {
        add_templates(&mut templates, value).map_err(|reason| config.malformed(reason))?;
    }
    Ok(templates)
}

/// A template is written as a string, named ones as a list of objects or as an object.
fn add_templates(templates: &mut ChatTemplates, value: &Value) -> std::result::Result<(), String> {
    let bad = || "chat_template is neither a string nor a list of named templates".to_owned();
    match value {
        Value::Null => {}
        Value::String(template) => templates.insert("default", template),
        Value::Object(named) => {
            for (name, template) in named {
                templates.insert(name, template.as_str().ok_or_else(bad)?);
            }
        }
        Value::Array(named) => {
            for entry in named {
                let field = |key: &str| entry.get(key).and_then(Value::as_str).ok_or_else(bad);
                templates.insert(field("name")?, field("template")?);
            }
        }
        _ => return Err(bad()),
    }
    Ok(())
}
