//! A GGUF file's metadata: keys and typed values.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // named after their types
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of metadata values of one type. Arrays of arrays do not occur in Llama files and are refused.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // named after their types
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

impl Value {
    /// The type's name in messages.
    fn kind(&self) -> &'static str {
        match self {
            Value::U8(_) | Value::U16(_) | Value::U32(_) | Value::U64(_) => "an unsigned integer",
            Value::I8(_) | Value::I16(_) | Value::I32(_) | Value::I64(_) => "an integer",
            Value::F32(_) | Value::F64(_) => "a float",
            Value::Bool(_) => "a boolean",
            Value::String(_) => "a string",
            Value::Array(Array::String(_)) => "an array of strings",
            Value::Array(Array::F32(_) | Array::F64(_)) => "an array of floats",
            Value::Array(Array::Bool(_)) => "an array of booleans",
            Value::Array(_) => "an array of integers",
        }
    }
}

/// A file's metadata, ordered by key.
#[derive(Clone, Debug)]
pub struct Metadata {
    path: PathBuf,
    values: BTreeMap<String, Value>,
    warnings: Vec<String>,
}

/// The typed getters return `Ok(None)` for an absent key, and [`Error::Malformed`] for a value of another
/// type.
impl Metadata {
    /// Makes the metadata of the file at `path`, which may not exist yet.
    pub(crate) fn new(path: &Path, values: BTreeMap<String, Value>) -> Self {
        Self { path: path.into(), values, warnings: Vec::new() }
    }

    pub(crate) fn with_warnings(self, warnings: Vec<String>) -> Self {
        Self { warnings, ..self }
    }

    /// Harmless faults of the file.
    pub(crate) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// All keys and values, ordered by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The string under `key`.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::String(string) => Some(string.as_str()),
            _ => None,
        })
    }

    /// The integer under `key`, of any type. It must not be negative.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "an integer, zero or more", |value| match *value {
            Value::U8(number) => Some(number.into()),
            Value::U16(number) => Some(number.into()),
            Value::U32(number) => Some(number.into()),
            Value::U64(number) => Some(number),
            Value::I8(number) => number.try_into().ok(),
            Value::I16(number) => number.try_into().ok(),
            Value::I32(number) => number.try_into().ok(),
            Value::I64(number) => number.try_into().ok(),
            _ => None,
        })
    }

    /// The token id under `key`. Files write -1, signed or not, for a token that they do not have.
    pub(crate) fn token_id(&self, key: &str) -> Result<Option<u32>> {
        if matches!(self.get(key), Some(Value::I8(..0) | Value::I16(..0) | Value::I32(..0) | Value::I64(..0)))
        {
            return Ok(None);
        }
        Ok(self.u64(key)?.and_then(|id| u32::try_from(id).ok()).filter(|&id| id != u32::MAX))
    }

    /// The float under `key`. An f32 is converted through its shortest decimal form: a config's 1e-5 comes
    /// back as 1e-5 and not as 9.99999974e-6. Converted to f32 again, it is the same number.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a float", |value| match *value {
            Value::F32(number) => number.to_string().parse().ok(),
            Value::F64(number) => Some(number),
            _ => None,
        })
    }

    /// The boolean under `key`.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", |value| match *value {
            Value::Bool(value) => Some(value),
            _ => None,
        })
    }

    /// The array of strings under `key`.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::String(strings)) => Some(strings.as_slice()),
            _ => None,
        })
    }

    /// The array of integers under `key`, of any type.
    pub fn ints(&self, key: &str) -> Result<Option<Vec<i64>>> {
        fn to_i64<T: Copy + TryInto<i64>>(numbers: &[T]) -> Option<Vec<i64>> {
            numbers.iter().map(|&number| number.try_into().ok()).collect()
        }
        self.typed(key, "an array of integers", |value| match value {
            Value::Array(Array::U8(numbers)) => to_i64(numbers),
            Value::Array(Array::I8(numbers)) => to_i64(numbers),
            Value::Array(Array::U16(numbers)) => to_i64(numbers),
            Value::Array(Array::I16(numbers)) => to_i64(numbers),
            Value::Array(Array::U32(numbers)) => to_i64(numbers),
            Value::Array(Array::I32(numbers)) => to_i64(numbers),
            Value::Array(Array::U64(numbers)) => to_i64(numbers),
            Value::Array(Array::I64(numbers)) => Some(numbers.clone()),
            _ => None,
        })
    }

    /// The array of numbers under `key`, as f32. Some converters write whole numbers as integers.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        if let Some(Value::Array(Array::F32(numbers))) = self.get(key) {
            return Ok(Some(numbers.clone()));
        }
        if let Some(Value::Array(Array::F64(numbers))) = self.get(key) {
            return Ok(Some(numbers.iter().map(|&number| number as f32).collect()));
        }
        let numbers = self.ints(key)?;
        Ok(numbers.map(|numbers| numbers.into_iter().map(|number| number as f32).collect()))
    }

    /// The integer under `key`. An array of equal integers counts as one: some converters write one value per
    /// layer.
    pub(crate) fn u64_or_uniform(&self, key: &str) -> Result<Option<u64>> {
        if !matches!(self.get(key), Some(Value::Array(_))) {
            return self.u64(key);
        }
        let numbers = self.ints(key)?.unwrap_or_default();
        match *numbers.as_slice() {
            [first, ..] if first >= 0 && numbers.iter().all(|&number| number == first) => {
                Ok(Some(first.unsigned_abs()))
            }
            _ => Err(Error::unsupported(key, "values that differ from layer to layer")),
        }
    }

    /// Makes an [`Error::Malformed`] that names the file and the key.
    pub(crate) fn malformed(&self, key: &str, reason: impl std::fmt::Display) -> Error {
        Error::malformed(&self.path, format!("{key} {reason}"))
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
            None => Err(self.malformed(key, format!("is {}, expected {wanted}", value.kind()))),
        }
    }

    /// Refuses files that hold no model, and any architecture but "llama".
    pub(crate) fn require_llama(&self) -> Result<()> {
        let other = match self.get("general.type") {
            Some(Value::String(kind)) if kind == "adapter" => {
                "\"adapter\", a LoRA adapter without its base model; llama.cpp's llama-export-lora merges it"
            }
            Some(Value::String(kind)) if kind == "imatrix" => {
                "\"imatrix\", which helps to quantise a model but is none; take the model's own file"
            }
            Some(Value::String(kind)) if kind == "mmproj" => {
                "\"mmproj\", the part of a model that reads images; take the file of its text model"
            }
            _ => "",
        };
        if !other.is_empty() {
            return Err(Error::unsupported("general.type", other));
        }
        match self.string("general.architecture")? {
            Some("llama") => Ok(()),
            Some(other) => {
                Err(Error::unsupported("general.architecture", format!("{other:?}, only \"llama\"")))
            }
            None => Err(Error::malformed(&self.path, "has no general.architecture")),
        }
    }
}
