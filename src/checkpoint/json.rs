//! Reads JSON files strictly: of bounded size, in UTF-8, one object, each key only once.

use std::cell::Cell;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{self, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::checkpoint::mmap::read_bounded;
use crate::checkpoint::names::unfit_name;
use crate::error::{Error, Result, quoted};

/// The largest file that is read, far larger than any config or index in use.
const MAX_JSON_BYTES: u64 = 16 << 20;
/// The most values in a file. A value may take two bytes on disk but takes far more memory. An index has one
/// value for each tensor.
const MAX_VALUES: usize = 1 << 18;

/// A JSON object, with its file's path for messages.
///
/// The typed getters return `Ok(None)` for a key that is absent or null, and [`Error::Malformed`] for a value
/// of another type.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    path: PathBuf,
    /// The prefix of keys in messages, such as "rope_scaling.".
    prefix: String,
    map: Map<String, Value>,
}

impl Object {
    /// Reads the object in the file at `path`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        Self::parse(path, &read_bounded(path, MAX_JSON_BYTES)?)
    }

    /// Parses the bytes of the file at `path`.
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(bytes)
            .map_err(|error| Error::malformed(path, format!("is not valid UTF-8: {error}")))?;
        // Windows editors may write a byte order mark first.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let left = Cell::new(MAX_VALUES);
        let mut deserializer = serde_json::Deserializer::from_str(text);
        let value = StrictValue { left: &left }
            .deserialize(&mut deserializer)
            .and_then(|value| deserializer.end().map(|()| value))
            .map_err(|error| Error::malformed(path, format!("is not valid JSON: {error}")))?;
        match value {
            Value::Object(map) => Ok(Self { path: path.into(), prefix: String::new(), map }),
            other => Err(Error::malformed(path, format!("holds {}, not an object", kind(&other)))),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn map(&self) -> &Map<String, Value> {
        &self.map
    }

    /// The value of a key, unless it is absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Makes an [`Error::Malformed`] that names the file and the key.
    pub(crate) fn malformed(&self, key: &str, reason: impl fmt::Display) -> Error {
        Error::malformed(&self.path, format!("{}{key} {reason}", self.prefix))
    }

    /// The key as messages spell it: with the keys of the enclosing objects.
    pub(crate) fn full_key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(self.malformed(key, format!("is {}, expected {wanted}", brief(value)))),
        }
    }

    /// A whole number, which may be written as a float: scripts that scale a context write 32768.0.
    pub(crate) fn usize(&self, key: &str) -> Result<Option<usize>> {
        const MOST: f64 = (1_u64 << 53) as f64;
        self.typed(key, "a whole number, zero or more", |value| {
            let whole = |number: &f64| number.fract() == 0.0 && (0.0..MOST).contains(number);
            let number = value.as_u64().or_else(|| value.as_f64().filter(whole).map(|number| number as u64));
            number.and_then(|number| usize::try_from(number).ok())
        })
    }

    pub(crate) fn i64(&self, key: &str) -> Result<Option<i64>> {
        self.typed(key, "a whole number", Value::as_i64)
    }

    pub(crate) fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(crate) fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A token id. A negative number stands for no token, as if it was null.
    pub(crate) fn token_id(&self, key: &str) -> Result<Option<u32>> {
        if self.get(key).and_then(Value::as_i64).is_some_and(|id| id < 0) {
            return Ok(None);
        }
        self.typed(key, "a token id", token_id)
    }

    /// One token id or a list of them. A negative number stands for no token, as if it was null.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let is_some = |value: &&Value| value.as_i64().is_none_or(|id| id >= 0);
        let ids = self.typed(key, "a token id or a list of them", |value| match value {
            Value::Array(ids) => ids.iter().filter(is_some).map(token_id).collect(),
            one => Some(one).filter(is_some).map(token_id).into_iter().collect(),
        })?;
        let is_list = self.get(key).is_some_and(|value| value.as_array().is_some_and(Vec::is_empty));
        Ok(ids.filter(|ids: &Vec<u32>| !ids.is_empty() || is_list))
    }

    pub(crate) fn strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.typed(key, "a list of strings", |value| {
            value.as_array().and_then(|list| list.iter().map(Value::as_str).collect())
        })
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<Object>> {
        let map = self.typed(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Object {
            path: self.path.clone(),
            prefix: format!("{}{key}.", self.prefix),
            map: map.clone(),
        }))
    }
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value for use in a message: its JSON if that is short, else its kind.
pub(crate) fn brief(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 { text } else { kind(value).into() }
}

/// Reads a JSON value and refuses objects that have a key twice. serde_json's own `Value` keeps the last of
/// two equal keys, and another reader may keep the first.
#[derive(Clone, Copy)]
struct StrictValue<'a> {
    /// How many more values are allowed.
    left: &'a Cell<usize>,
}

impl<'de> DeserializeSeed<'de> for StrictValue<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Value, D::Error> {
        let left = self.left.get().checked_sub(1);
        self.left.set(left.ok_or_else(|| D::Error::custom(format_args!("more than {MAX_VALUES} values")))?);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for StrictValue<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> std::result::Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> std::result::Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> std::result::Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> std::result::Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> std::result::Result<Value, E> {
        Ok(Value::String(value.into()))
    }

    fn visit_string<E>(self, value: String) -> std::result::Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> std::result::Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = access.next_element_seed(self)? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> std::result::Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            if let Some(reason) = unfit_name(&key) {
                return Err(de::Error::custom(format_args!("a key {reason}")));
            }
            if map.contains_key(&key) {
                return Err(de::Error::custom(format_args!("duplicate key {}", quoted(&key))));
            }
            let value = access.next_value_seed(self)?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Object> {
        Object::parse(Path::new("config.json"), text.as_bytes())
    }

    fn refusal(text: &str) -> String {
        let error = parse(text).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error:?}");
        error.to_string()
    }

    #[test]
    fn values_come_through_unchanged_and_in_order() {
        let text = r#"{"b":[1,-2,1.5e3,"x",true,null],"a":{"c":18446744073709551615}}"#;
        let object = parse(text).unwrap();
        assert_eq!(Value::Object(object.map().clone()).to_string(), text.replace("1.5e3", "1500.0"));
    }

    #[test]
    fn a_byte_order_mark_is_skipped() {
        assert_eq!(parse("\u{feff}{\"a\": 1}").unwrap().usize("a").unwrap(), Some(1));
    }

    #[test]
    fn duplicate_keys_are_refused_at_every_depth() {
        assert!(refusal(r#"{"a": 1, "a": 1}"#).contains("duplicate key \"a\""));
        assert!(refusal(r#"{"a": [{"b": 1, "b": 2}]}"#).contains("duplicate key \"b\""));
    }

    #[test]
    fn the_number_of_values_is_limited_and_messages_are_short() {
        let list = |values: usize| format!(r#"{{"a": [{}]}}"#, vec!["0"; values].join(","));
        // The object and the list are values too.
        assert!(parse(&list(MAX_VALUES - 2)).is_ok());
        assert!(refusal(&list(MAX_VALUES - 1)).contains("more than 262144 values"));
        let long = "x".repeat(1 << 20);
        assert!(refusal(&format!(r#"{{"{long}": 1}}"#)).contains("a key of 1048576 bytes"));
        let text = format!(r#"{{"n": "{long}"}}"#);
        assert!(parse(&text).unwrap().usize("n").unwrap_err().to_string().len() < 600);
    }

    #[test]
    fn anything_but_an_object_is_refused() {
        assert!(refusal("[1]").contains("holds a list, not an object"));
        assert!(refusal("").contains("not valid JSON"));
        assert!(refusal("{} {}").contains("not valid JSON"));
        assert!(refusal(r#"{"a": NaN}"#).contains("not valid JSON"));
        assert!(refusal(r#"{"a": 1e999}"#).contains("not valid JSON"));
        assert!(refusal(&format!("{{\"a\":{}", "[".repeat(100_000))).contains("recursion"));
        let error = Object::parse(Path::new("config.json"), b"{\"\xff\": 1}").unwrap_err();
        assert!(error.to_string().contains("config.json: is not valid UTF-8"), "{error}");
    }

    #[test]
    fn a_wrong_type_names_file_key_and_value() {
        let object = parse(r#"{"rope_scaling": {"factor": "8"}, "n": -1, "ids": [1, 1.5]}"#).unwrap();
        let rope = object.object("rope_scaling").unwrap().unwrap();
        assert_eq!(
            rope.f64("factor").unwrap_err().to_string(),
            "config.json: rope_scaling.factor is \"8\", expected a number"
        );
        assert!(object.usize("n").is_err());
        assert_eq!(object.i64("n").unwrap(), Some(-1));
        assert!(object.token_ids("ids").is_err());
    }

    #[test]
    fn odd_spellings_of_numbers_are_read() {
        let object = parse(r#"{"a": 4096.0, "b": 0.5, "c": 1e300, "d": [1, -1], "e": -1, "f": []}"#).unwrap();
        assert_eq!(object.usize("a").unwrap(), Some(4096));
        assert!(object.usize("b").is_err() && object.usize("c").is_err());
        assert_eq!(object.token_ids("d").unwrap(), Some(vec![1]));
        assert_eq!(object.token_ids("e").unwrap(), None);
        assert_eq!(object.token_ids("f").unwrap(), Some(Vec::new()));
    }

    #[test]
    fn null_reads_as_absent() {
        let object = parse(r#"{"a": null}"#).unwrap();
        assert_eq!(object.usize("a").unwrap(), None);
        assert_eq!(object.bool("b").unwrap(), None);
    }
}
