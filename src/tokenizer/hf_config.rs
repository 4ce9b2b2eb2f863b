//! Reads tokenizer_config.json: which tokens are added, which are special, and which are put around a text.
//!
//! The rules are those of transformers, of version 4 where versions 4 and 5 differ, with one exception: if
//! `add_bos_token` or `add_eos_token` is set, it overrides tokenizer.json's own post-processor, as in version
//! 5 and in llama.cpp's converter. Version 4 respects them only for `LlamaTokenizer`, where the defaults are
//! true and false.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::checkpoint::mmap::read_bounded;
use crate::error::{Error, Result};

const CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const ADDED_TOKENS: &str = "added_tokens.json";
const MAX_CONFIG_BYTES: u64 = 16 << 20;

const EXTRA: &str = "extra_special_tokens";

/// The config's keys for single special tokens.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A token (id, text) that is put before or after every text.
type AddedAround = Option<(u32, String)>;

/// tokenizer_config.json, completed from special_tokens_map.json.
pub(super) struct Config {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Config {
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let mut map = read_json(&path)?.unwrap_or_default();
        // transformers reads special_tokens_map.json only with files older than added_tokens_decoder. Then
        // the map takes precedence.
        if !map.contains_key("added_tokens_decoder") {
            let mut special = read_json(&dir.join(SPECIAL_TOKENS_MAP))?.unwrap_or_default();
            if let (Some(Value::Array(own)), Some(Value::Array(more))) =
                (map.get(EXTRA), special.get_mut(EXTRA))
            {
                more.splice(0..0, own.iter().cloned());
            }
            map.extend(special.into_iter().filter(|(_, token)| !token.is_null()));
        }
        Ok(Config { path, map })
    }

    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name)
    }

    pub(super) fn malformed(&self, reason: impl std::fmt::Display) -> Error {
        Error::malformed(&self.path, reason.to_string())
    }

    /// A special token's text. The file has a string or an object with `content`.
    pub(super) fn token(&self, name: &str) -> Result<Option<String>> {
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

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.malformed(format!("{name} is {other}, expected true or false"))),
        }
    }

    /// The tokens of `added_tokens_decoder`, in the order of their ids.
    pub(super) fn added_tokens_decoder(&self) -> Result<Vec<(u32, AddedToken)>> {
        let mut tokens = Vec::new();
        for (id, token) in
            self.map.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten()
        {
            let id: u32 = id
                .parse()
                .map_err(|_| self.malformed(format!("added_tokens_decoder: {id:?} is not a token id")))?;
            tokens.push((id, self.added_token("added_tokens_decoder", token, false)?));
        }
        tokens.sort_by_key(|&(id, _)| id);
        Ok(tokens)
    }

    /// The tokens of added_tokens.json, in the order of their ids. SentencePiece folders older than
    /// `added_tokens_decoder` have this file.
    pub(super) fn added_tokens_file(dir: &Path) -> Result<Vec<(u32, AddedToken)>> {
        let path = dir.join(ADDED_TOKENS);
        let mut tokens = Vec::new();
        for (token, id) in read_json(&path)?.unwrap_or_default() {
            let valid = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = valid.ok_or_else(|| Error::malformed(&path, format!("{id} is not a token id")))?;
            tokens.push((id, AddedToken::from(token, false).normalized(false)));
        }
        tokens.sort_by_key(|&(id, _)| id);
        Ok(tokens)
    }

    /// The special tokens that the config names, in the order in which transformers adds them: by their role
    /// (transformers 5 also knows roles of a model's own, such as `image_token`), then those of lists.
    /// `extra_special_tokens`, a list or an object, is transformers 5's name of `additional_special_tokens`.
    pub(super) fn named_tokens(&self) -> Result<Vec<AddedToken>> {
        let named = SPECIAL_TOKENS.iter().filter_map(|name| Some((*name, self.map.get(*name)?)));
        let own = self.map.iter().map(|(name, value)| (name.as_str(), value)).filter(|(name, value)| {
            let is_token = value.is_string() || value.get("content").is_some();
            name.ends_with("_token") && is_token && !SPECIAL_TOKENS.contains(name)
        });
        let extra = self.map.get(EXTRA);
        let roles = extra.and_then(Value::as_object).into_iter().flat_map(Map::values);
        // An older name, so it counts only without a list of the newer one.
        let older = self.map.get("additional_special_tokens").and_then(Value::as_array);
        let list = extra.and_then(Value::as_array).filter(|list| !list.is_empty()).or(older);
        let listed = roles.chain(list.into_iter().flatten()).map(|token| (EXTRA, token));
        named
            .chain(own)
            .chain(listed)
            .filter(|(_, value)| !value.is_null())
            .map(|(name, value)| self.added_token(name, value, true))
            .collect()
    }

    /// Sets a special token unless the config names it.
    pub(super) fn default_token(&mut self, name: &str, token: &str) {
        self.map.entry(name).or_insert_with(|| token.into());
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

    fn is_llama_class(&self) -> bool {
        let class = self.map.get("tokenizer_class").and_then(Value::as_str);
        matches!(class, Some("LlamaTokenizer" | "LlamaTokenizerFast"))
    }

    /// Whether the config decides which of BOS and EOS are added; see the module's description.
    pub(super) fn adds_tokens_around(&self) -> bool {
        let is_given = |flag: &str| self.map.get(flag).is_some_and(|value| !value.is_null());
        self.is_llama_class() || is_given("add_bos_token") || is_given("add_eos_token")
    }

    /// The tokens that the config puts before and after every text.
    pub(super) fn around(
        &self,
        token_to_id: impl Fn(&str) -> Option<u32>,
        adds_bos_token: bool,
    ) -> Result<(AddedAround, AddedAround)> {
        let is_llama = self.is_llama_class();
        let token = |flag: &str, default: bool, name: &str, default_token: &str| {
            if !self.flag(flag)?.unwrap_or(default) {
                return Ok(None);
            }
            let token = match self.token(name)? {
                Some(token) => token,
                None if !is_llama => return Ok(None),
                None if self.map.contains_key(name) => {
                    return Err(self.malformed(format!("{flag} is true, but {name} is null")));
                }
                None => default_token.to_owned(),
            };
            match token_to_id(&token) {
                Some(id) => Ok(Some((id, token))),
                None => Err(self.malformed(format!("{name} {token:?} is not in the vocabulary"))),
            }
        };
        Ok((
            token("add_bos_token", is_llama || adds_bos_token, "bos_token", "<s>")?,
            token("add_eos_token", false, "eos_token", "</s>")?,
        ))
    }

    /// The special tokens as chat templates see them.
    pub(super) fn special_tokens(&self) -> Result<Map<String, Value>> {
        let mut tokens = Map::new();
        for name in SPECIAL_TOKENS {
            if let Some(token) = self.token(name)? {
                tokens.insert(name.to_owned(), Value::String(token));
            }
        }
        let roles = self.map.get(EXTRA).and_then(Value::as_object).into_iter().flatten();
        let own = self.map.iter().filter(|(name, _)| name.ends_with("_token"));
        for (name, value) in own.chain(roles) {
            if let Some(token) = value.as_str().or_else(|| value.get("content")?.as_str()) {
                tokens.entry(name.as_str()).or_insert_with(|| token.into());
            }
        }
        Ok(tokens)
    }
}

/// The number of rows of the model in the folder `dir`, if its config.json says so.
pub(super) fn model_vocab_size(dir: &Path) -> Option<usize> {
    let config = read_json(&dir.join("config.json")).ok()??;
    usize::try_from(config.get("vocab_size")?.as_u64()?).ok()
}

/// A JSON object from a small file; None if there is no file.
pub(super) fn read_json(path: &Path) -> Result<Option<Map<String, Value>>> {
    let bytes = match read_bounded(path, MAX_CONFIG_BYTES) {
        Ok(bytes) => bytes,
        Err(Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| Error::malformed(path, format!("not a JSON object: {error}")))
}
