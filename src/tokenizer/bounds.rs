//! Limits for tokenizer.json, and for tokens from other files. The `tokenizers` library trusts the file: a
//! malicious one can make it ask for gigabytes, recurse until the stack overflows, or search for hours. So
//! the file is inspected before the library builds anything. The limits are far above what published
//! tokenizers need.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::{check_added_tokens, pre_tokenizers};
use crate::error::quoted;

type Checked<T> = std::result::Result<T, String>;

/// The most bytes of a token. The library's trie of Unigram pieces recurses once per character when it is
/// freed. The longest token in use has some hundred bytes.
pub(super) const MAX_TOKEN_BYTES: usize = 1024;
/// The most JSON values in each of normalizer, pre-tokenizer, decoder and post-processor.
const MAX_VALUES: usize = 4096;
/// The most steps in a normalizer, pre-tokenizer, decoder or post-processor.
const MAX_STEPS: usize = 64;
/// How deep steps may be nested. The library parses each level several times.
const MAX_DEPTH: usize = 8;
/// The most bytes of a step's text or regular expression.
const MAX_TEXT_BYTES: usize = 4096;
/// The most bytes of a precompiled character map. T5's has some 240 kB.
const MAX_CHARSMAP_BYTES: usize = 8 << 20;
/// The most entries of a post-processor's template, special tokens and their ids.
const MAX_TEMPLATE: usize = 256;
/// How many times longer normalizers may make a text. Published ones reach 66, with T5's character map.
const MAX_GROWTH: usize = 1024;
/// The most bytes of all added tokens. The library builds an automaton of them, which takes some hundred
/// bytes and a microsecond for each. 65,000 tokens such as `<|audio_12345|>` have 1 MB.
const MAX_ADDED_BYTES: usize = 3 << 20;
/// The same after normalizing, if each token grows as much as any text can.
const MAX_NORMALIZED_ADDED_BYTES: usize = 12 << 20;

/// What inspection found out about a tokenizer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// How many times longer normalizers may make a text, at most.
    pub(super) growth: usize,
    /// Whether encoding surely takes a time in proportion to the text's length: BPE, and no regular
    /// expression that is not known.
    pub(super) is_quick: bool,
}

/// The parts of tokenizer.json that are inspected.
#[derive(Deserialize)]
pub(super) struct Shape {
    #[serde(default)]
    pub(super) added_tokens: Vec<Added>,
    #[serde(default)]
    model: ModelShape,
    #[serde(default, deserialize_with = "bounded")]
    normalizer: Value,
    #[serde(default, deserialize_with = "bounded")]
    pre_tokenizer: Value,
    #[serde(default, deserialize_with = "bounded")]
    post_processor: Value,
    #[serde(default, deserialize_with = "bounded")]
    decoder: Value,
}

#[derive(Deserialize)]
pub(super) struct Added {
    pub(super) id: u32,
    pub(super) content: String,
}

#[derive(Default, Deserialize)]
struct ModelShape {
    #[serde(rename = "type")]
    kind: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    vocab: Tokens,
}

impl Shape {
    /// Parses the JSON text and checks all limits.
    pub(super) fn inspect(bytes: &[u8]) -> Checked<(Self, Bounds)> {
        let shape: Shape = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        // The library assumes that the bytes after the prefix are UTF-8 without checking.
        if shape.model.continuing_subword_prefix.as_ref().is_some_and(|prefix| !prefix.is_empty()) {
            return Err("model.continuing_subword_prefix is set, which no Llama does".into());
        }
        let longest =
            shape.model.vocab.longest.max(shape.model.end_of_word_suffix.as_ref().map_or(0, String::len));
        check_token(longest)?;

        let normalizers = Steps::new("normalizer", &shape.normalizer)?;
        let pre_tokenizers = Steps::new("pre_tokenizer", &shape.pre_tokenizer)?;
        let decoders = Steps::new("decoder", &shape.decoder)?;
        for step in Steps::new("post_processor", &shape.post_processor)?.0 {
            check_template(step)?;
        }
        let growth = growth(&normalizers)?;
        growth_within("decoder", decoders.0.iter().map(|step| step_growth(step)))?;
        if decoders.regexes().next().is_some() {
            return Err("a decoder has a regular expression, which no Llama's has".into());
        }
        let is_known =
            normalizers.regexes().chain(pre_tokenizers.regexes()).all(pre_tokenizers::is_known_expression);
        let is_quick = shape.model.kind.as_deref() == Some("BPE") && is_known;
        let bounds = Bounds { growth, is_quick };
        bounds.check_added(shape.added_tokens.iter().map(|added| added.content.as_str()))?;
        Ok((shape, bounds))
    }
}

impl Bounds {
    /// The bounds of tokenizers that we build ourselves.
    pub(super) const OURS: Bounds = Bounds { growth: 1, is_quick: true };

    /// Refuses added tokens that are too many or too long.
    pub(super) fn check_added<'a>(self, contents: impl Iterator<Item = &'a str>) -> Checked<()> {
        let (mut count, mut bytes) = (0_usize, 0_usize);
        for content in contents {
            check_token(content.len())?;
            count += 1;
            bytes += content.len();
        }
        check_added_tokens(count)?;
        if bytes > MAX_ADDED_BYTES {
            return Err(format!("the added tokens have {bytes} bytes, the limit is {MAX_ADDED_BYTES}"));
        }
        if bytes.saturating_mul(self.growth) > MAX_NORMALIZED_ADDED_BYTES {
            return Err(format!(
                "the added tokens have {bytes} bytes, which the normalizer may make {} times longer; the \
                 limit is {MAX_NORMALIZED_ADDED_BYTES} bytes",
                self.growth
            ));
        }
        Ok(())
    }

    /// Refuses a text that normalizers could make too long for the memory.
    pub(super) fn check_text(self, text: &str) -> Checked<()> {
        const MAX_NORMALIZED_BYTES: usize = 1 << 28;
        let longest = text.len().saturating_mul(self.growth);
        // Twenty times longer is possible with ordinary normalizers, in theory, but not with ordinary text.
        if self.growth > 100 && longest > MAX_NORMALIZED_BYTES {
            return Err(format!(
                "its normalizer could make {longest} bytes of this text, the limit is {MAX_NORMALIZED_BYTES}"
            ));
        }
        Ok(())
    }
}

/// Refuses a token that is too long.
pub(super) fn check_token(bytes: usize) -> Checked<()> {
    if bytes > MAX_TOKEN_BYTES {
        return Err(format!("a token has {bytes} bytes, the limit is {MAX_TOKEN_BYTES}"));
    }
    Ok(())
}

/// The steps of a component, with those of sequences in place of the sequences.
struct Steps<'a>(Vec<&'a Map<String, Value>>);

impl<'a> Steps<'a> {
    fn new(component: &str, value: &'a Value) -> Checked<Self> {
        let mut steps = Vec::new();
        flatten(value, 0, &mut steps).map_err(|reason| format!("{component}: {reason}"))?;
        Ok(Steps(steps))
    }

    /// The regular expressions of Split and Replace.
    fn regexes(&self) -> impl Iterator<Item = &'a str> {
        let pattern = |step: &&'a Map<String, Value>| step.get("pattern")?.get("Regex")?.as_str();
        self.0.iter().filter_map(pattern)
    }
}

fn flatten<'a>(value: &'a Value, depth: usize, steps: &mut Vec<&'a Map<String, Value>>) -> Checked<()> {
    let step = match value {
        Value::Null => return Ok(()),
        Value::Object(step) => step,
        _ => return Err("expected an object".into()),
    };
    if depth > MAX_DEPTH {
        return Err(format!("steps are nested more than {MAX_DEPTH} deep"));
    }
    let mut is_sequence = false;
    for key in ["normalizers", "pretokenizers", "decoders", "processors"] {
        let Some(inner) = step.get(key) else { continue };
        is_sequence = true;
        let inner = inner.as_array().ok_or_else(|| format!("{key} is not a list"))?;
        inner.iter().try_for_each(|value| flatten(value, depth + 1, steps))?;
    }
    if is_sequence {
        return Ok(());
    }
    if steps.len() >= MAX_STEPS {
        return Err(format!("it has more than {MAX_STEPS} steps"));
    }
    for (key, value) in step {
        let texts = [
            value.as_str(),
            value.get("String").and_then(Value::as_str),
            value.get("Regex").and_then(Value::as_str),
        ];
        let longest = texts.into_iter().flatten().map(str::len).max().unwrap_or(0);
        if key != "precompiled_charsmap" && longest > MAX_TEXT_BYTES {
            return Err(format!("{} has {longest} bytes, the limit is {MAX_TEXT_BYTES}", quoted(key)));
        }
    }
    steps.push(step);
    Ok(())
}

/// Refuses a template of too many pieces. Each is handled for every text.
fn check_template(step: &Map<String, Value>) -> Checked<()> {
    fn entries(value: &Value) -> usize {
        match value {
            Value::Array(list) => list.iter().map(entries).sum::<usize>().max(1),
            Value::Object(fields) => fields.values().map(entries).sum::<usize>().max(1),
            _ => 1,
        }
    }
    for key in ["single", "pair", "special_tokens"] {
        let count = step.get(key).map_or(0, entries);
        if count > 4 * MAX_TEMPLATE {
            return Err(format!(
                "post_processor: {key} has {count} values, the limit is {}",
                4 * MAX_TEMPLATE
            ));
        }
    }
    Ok(())
}

/// How many times longer the normalizers may make a text.
fn growth(normalizers: &Steps) -> Checked<usize> {
    let mut steps = Vec::new();
    for step in &normalizers.0 {
        let charsmap = step.get("precompiled_charsmap").map(charsmap_growth).transpose()?;
        steps.push(charsmap.unwrap_or_else(|| step_growth(step)));
    }
    growth_within("normalizer", steps.into_iter())
}

fn growth_within(component: &str, steps: impl Iterator<Item = usize>) -> Checked<usize> {
    let growth = steps.fold(1, usize::saturating_mul);
    if growth > MAX_GROWTH {
        return Err(format!(
            "the {component} may make a text {growth} times longer, the limit is {MAX_GROWTH} times"
        ));
    }
    Ok(growth)
}

/// How many times longer a step may make a text, at most.
fn step_growth(step: &Map<String, Value>) -> usize {
    if let Some(pattern) = step.get("pattern") {
        let content = step.get("content").and_then(Value::as_str).map_or(0, str::len);
        let replaced = pattern.get("String").or(Some(pattern)).and_then(Value::as_str).map_or(0, str::len);
        // A regular expression may match the empty text, before every character.
        return if replaced == 0 { content + 1 } else { content.div_ceil(replaced).max(1) };
    }
    match step.get("type").and_then(Value::as_str) {
        // The compatibility forms make 33 bytes of U+FDFA's three.
        Some("NFKC" | "NFKD") => 11,
        Some("NFC" | "NFD" | "BertNormalizer") => 3,
        Some("ByteLevel" | "Lowercase") => 2,
        _ => 1,
    }
}

/// Checks a precompiled character map, whose library trusts the length of its table. Returns how many times
/// longer it may make a text: the bytes of its longest replacement.
///
/// The map is the number of the table's bytes, in 32 bits; the table; and replacements, which end in a zero
/// byte.
fn charsmap_growth(value: &Value) -> Checked<usize> {
    let text = value.as_str().ok_or("normalizer: precompiled_charsmap is not a string")?;
    if text.len() > MAX_CHARSMAP_BYTES {
        return Err(format!(
            "normalizer: precompiled_charsmap has {} bytes, the limit is {MAX_CHARSMAP_BYTES}",
            text.len()
        ));
    }
    let bytes = base64(text).ok_or("normalizer: precompiled_charsmap is not base64")?;
    let replacements = bytes.split_first_chunk::<4>().and_then(|(length, rest)| {
        let length = u32::from_le_bytes(*length) as usize;
        rest.get(length..)
    });
    let replacements = replacements.ok_or("normalizer: precompiled_charsmap ends before its table does")?;
    Ok(replacements.split(|&byte| byte == 0).map(<[u8]>::len).max().unwrap_or(0).max(1))
}

/// Decodes base64; None if the text has other characters.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0);
    for character in text.trim_end_matches('=').bytes() {
        let value = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

/// The tokens of a vocabulary: an object of ids, or a list of pieces with scores.
#[derive(Default)]
struct Tokens {
    /// The bytes of the longest token.
    longest: usize,
}

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Tokens;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Tokens, A::Error> {
                let mut longest = 0;
                while let Some((token, _)) = map.next_entry::<Text<'de>, IgnoredAny>()? {
                    longest = longest.max(token.0.len());
                }
                Ok(Tokens { longest })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Tokens, A::Error> {
                let mut longest = 0;
                while let Some((token, _)) = list.next_element::<(Text<'de>, IgnoredAny)>()? {
                    longest = longest.max(token.0.len());
                }
                Ok(Tokens { longest })
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

/// A text, borrowed from the file unless it has escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Reads a JSON value of at most [`MAX_VALUES`] values.
fn bounded<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Value, D::Error> {
    let mut left = MAX_VALUES;
    Bounded(&mut left).deserialize(deserializer)
}

/// Reads a JSON value while values are left.
struct Bounded<'a>(&'a mut usize);

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Value, D::Error> {
        *self.0 = self.0.checked_sub(1).ok_or_else(|| {
            D::Error::custom(format!(
                "the normalizer, pre_tokenizer, decoder or post_processor has more than {MAX_VALUES} values"
            ))
        })?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> std::result::Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> std::result::Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> std::result::Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> std::result::Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> std::result::Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(Bounded(&mut *self.0))? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(Bounded(&mut *self.0))?;
            if fields.insert(key, value).is_some() {
                return Err(A::Error::custom("a key is there twice"));
            }
        }
        Ok(fields.into())
    }
}
