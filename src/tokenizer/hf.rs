//! The tokenizer files of a Hugging Face folder.
//!
//! Follows transformers' `PreTrainedTokenizerFast`, in version 4 where 4 and 5 differ: tokens named in
//! tokenizer_config.json are added to those of tokenizer.json, and BOS and EOS come from tokenizer.json's
//! own post-processor. One class departs from that: `LlamaTokenizer` (and `LlamaTokenizerFast`) replaces
//! the post-processor by one made from `add_bos_token` (true if absent) and `add_eos_token` (false if
//! absent), so the same is done here for that `tokenizer_class` alone.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PostProcessorWrapper};

use super::chat_template::ChatTemplates;
use super::{Parts, catching};
use crate::checkpoint::mmap::read_bounded;
use crate::error::{Error, Result};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";

/// The largest tokenizer.json in use has about 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 128 << 20;
const MAX_CONFIG_BYTES: u64 = 16 << 20;
const MAX_TEMPLATE_BYTES: u64 = 4 << 20;

/// The names under which a config gives single special tokens.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// tokenizer_config.json, completed from special_tokens_map.json.
struct Config {
    path: PathBuf,
    map: Map<String, Value>,
}

/// Reads the tokenizer of the folder `dir`.
pub(super) fn read(dir: &Path) -> Result<Parts> {
    let path = dir.join(TOKENIZER);
    let bytes = match read_bounded(&path, MAX_TOKENIZER_BYTES) {
        Ok(bytes) => bytes,
        Err(Error::NotFound { .. }) if dir.join("tokenizer.model").exists() => {
            return Err(Error::unsupported(
                "tokenizer.model",
                "a folder without tokenizer.json; transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes one",
            ));
        }
        Err(Error::NotFound { path, .. }) => return Err(Error::NotFound { what: TOKENIZER.into(), path }),
        Err(error) => return Err(error),
    };
    let mut tokenizer = parse_tokenizer(&bytes).map_err(|reason| Error::malformed(&path, reason))?;
    let config = Config::read(dir)?;

    catching(|| {
        tokenizer.with_truncation(None)?;
        tokenizer.with_padding(None);
        Ok(())
    })
    .map_err(|reason| Error::malformed(&path, reason))?;
    let added = config.added_tokens(&tokenizer)?;
    catching(|| tokenizer.add_tokens(added)).map_err(|reason| config.malformed(reason))?;
    let id = |name| config.token(name).map(|token| token.and_then(|token| tokenizer.token_to_id(&token)));
    let (bos_token_id, eos_token_id) = (id("bos_token")?, id("eos_token")?);
    if let Some(processor) = config.llama_post_processor(&tokenizer)? {
        tokenizer.with_post_processor(Some(processor));
    }
    Ok(Parts {
        tokenizer,
        kind: TOKENIZER.into(),
        bos_token_id,
        eos_token_id,
        extra_eos_token_ids: Vec::new(),
        special_tokens: config.special_tokens()?,
        chat_templates: chat_templates(dir, &config)?,
        warnings: Vec::new(),
    })
}

fn parse_tokenizer(bytes: &[u8]) -> std::result::Result<tokenizers::Tokenizer, String> {
    // The library panics on some syntax errors, so the syntax is checked first, which costs little.
    serde_json::from_slice::<serde::de::IgnoredAny>(bytes).map_err(|error| format!("not JSON: {error}"))?;
    catching(|| tokenizers::Tokenizer::from_bytes(bytes))
}

fn read_json(path: &Path) -> Result<Option<Map<String, Value>>> {
    let bytes = match read_bounded(path, MAX_CONFIG_BYTES) {
        Ok(bytes) => bytes,
        Err(Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| Error::malformed(path, format!("not a JSON object: {error}")))
}

fn read_text(path: &Path) -> Result<Option<String>> {
    let bytes = match read_bounded(path, MAX_TEMPLATE_BYTES) {
        Ok(bytes) => bytes,
        Err(Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    String::from_utf8(bytes).map(Some).map_err(|error| Error::malformed(path, format!("not UTF-8: {error}")))
}

impl Config {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let mut map = read_json(&path)?.unwrap_or_default();
        // transformers reads special_tokens_map.json for files older than added_tokens_decoder only, and
        // then it wins.
        if !map.contains_key("added_tokens_decoder") {
            let special = read_json(&dir.join(SPECIAL_TOKENS_MAP))?.unwrap_or_default();
            map.extend(special.into_iter().filter(|(_, token)| !token.is_null()));
        }
        Ok(Config { path, map })
    }

    fn malformed(&self, reason: impl std::fmt::Display) -> Error {
        Error::malformed(&self.path, reason.to_string())
    }

    /// A special token's text; it is written as a string or as an object with `content`.
    fn token(&self, name: &str) -> Result<Option<String>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => self.content(name, value).map(|token| Some(token.to_owned())),
        }
    }

    fn content<'a>(&self, name: &str, value: &'a Value) -> Result<&'a str> {
        value
            .as_str()
            .or_else(|| value.get("content")?.as_str())
            .ok_or_else(|| self.malformed(format!("{name} is neither a string nor an object with content")))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.malformed(format!("{name} is {other}, expected true or false"))),
        }
    }

    /// The tokens of `added_tokens_decoder`, in the order of their ids, then special tokens that
    /// tokenizer.json does not know as such.
    fn added_tokens(&self, tokenizer: &tokenizers::Tokenizer) -> Result<Vec<AddedToken>> {
        let mut added = Vec::new();
        if let Some(decoder) = self.map.get("added_tokens_decoder").and_then(Value::as_object) {
            let mut entries = Vec::new();
            for (id, token) in decoder {
                let id: u32 = id
                    .parse()
                    .map_err(|_| self.malformed(format!("added_tokens_decoder: {id:?} is no token id")))?;
                entries.push((id, self.added_token("added_tokens_decoder", token, false)?));
            }
            entries.sort_by_key(|&(id, _)| id);
            added.extend(entries.into_iter().map(|(_, token)| token));
        }
        let known = tokenizer.get_added_vocabulary().get_vocab();
        let additional = self.map.get("additional_special_tokens").and_then(Value::as_array);
        let named = SPECIAL_TOKENS.iter().filter_map(|name| Some((*name, self.map.get(*name)?)));
        let additional = additional.into_iter().flatten().map(|token| ("additional_special_tokens", token));
        for (name, value) in named.chain(additional).filter(|(_, value)| !value.is_null()) {
            let token = self.added_token(name, value, true)?;
            if !known.contains_key(&token.content) && !added.iter().any(|a| a.content == token.content) {
                added.push(token);
            }
        }
        Ok(added)
    }

    fn added_token(&self, name: &str, value: &Value, special: bool) -> Result<AddedToken> {
        let content = self.content(name, value)?;
        let flag = |key: &str, default: bool| value.get(key).and_then(Value::as_bool).unwrap_or(default);
        let special = special || flag("special", false);
        Ok(AddedToken::from(content, special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special)))
    }

    /// The post-processor that transformers makes for `LlamaTokenizer`; see the module's description.
    fn llama_post_processor(
        &self,
        tokenizer: &tokenizers::Tokenizer,
    ) -> Result<Option<PostProcessorWrapper>> {
        if !matches!(
            self.map.get("tokenizer_class").and_then(Value::as_str),
            Some("LlamaTokenizer" | "LlamaTokenizerFast")
        ) {
            return Ok(None);
        }
        let token = |flag: &str, default: bool, name: &str, default_token: &str| {
            if !self.flag(flag)?.unwrap_or(default) {
                return Ok(None);
            }
            let token = match self.map.get(name) {
                None => default_token.to_owned(),
                Some(_) => self
                    .token(name)?
                    .ok_or_else(|| self.malformed(format!("{flag} is true, but {name} is null")))?,
            };
            match tokenizer.token_to_id(&token) {
                Some(id) => Ok(Some((id, token))),
                None => Err(self.malformed(format!("{name} {token:?} is not in the vocabulary"))),
            }
        };
        let bos = token("add_bos_token", true, "bos_token", "<s>")?;
        let eos = token("add_eos_token", false, "eos_token", "</s>")?;
        post_processor(
            bos.as_ref().map(|(id, token)| (*id, token.as_str())),
            eos.as_ref().map(|(id, token)| (*id, token.as_str())),
        )
        .map(Some)
        .map_err(|reason| self.malformed(reason))
    }

    /// The special tokens as chat templates see them.
    fn special_tokens(&self) -> Result<Map<String, Value>> {
        let mut tokens = Map::new();
        for name in SPECIAL_TOKENS {
            if let Some(token) = self.token(name)? {
                tokens.insert(name.to_owned(), Value::String(token));
            }
        }
        Ok(tokens)
    }
}

/// A post-processor that puts `first` before and `last` after a text.
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
        "type": "TemplateProcessing", "single": around(&["A"]), "pair": around(&["A", "B"]), "special_tokens": tokens,
    });
    serde_json::from_value::<TemplateProcessing>(template)
        .map(PostProcessorWrapper::Template)
        .map_err(|error| error.to_string())
}

/// Newest first, as transformers looks: chat_template.jinja (with additional_chat_templates/*.jinja),
/// chat_template.json, tokenizer_config.json.
fn chat_templates(dir: &Path, config: &Config) -> Result<ChatTemplates> {
    let mut templates = ChatTemplates::default();
    if let Some(template) = read_text(&dir.join("chat_template.jinja"))? {
        templates.insert("default", &template);
        if let Some(template) = read_text(&dir.join("additional_chat_templates").join("tool_use.jinja"))? {
            templates.insert("tool_use", &template);
        }
        return Ok(templates);
    }
    let path = dir.join("chat_template.json");
    if let Some(file) = read_json(&path)?
        && let Some(value) = file.get("chat_template")
    {
        add_templates(&mut templates, value).map_err(|reason| Error::malformed(path, reason))?;
        return Ok(templates);
    }
    if let Some(value) = config.map.get("chat_template") {
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
