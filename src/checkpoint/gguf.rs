//! GGUF, versions 2 and 3, little-endian.
//!
//! A file is a header (magic, version, counts), the metadata, the list of tensors (name, shape,
//! type, offset) and, from the next multiple of `general.alignment` on, the data. Everything is
//! read over the map with checked arithmetic; a count only bounds a loop, memory grows with what
//! has really been read.
//!
//! Source: ggml, `docs/gguf.md`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint::ggml_types;
use crate::checkpoint::mmap::Mmap;
use crate::checkpoint::tensor::{Stored, StoredType};
use crate::error::{Error, Result};

/// Header, metadata and tensor list together; a vocabulary of a million tokens takes a tenth.
const MAX_HEADER_BYTES: usize = 256 << 20;
const MAX_ALIGNMENT: u64 = 1 << 20;
/// ggml's `GGML_MAX_DIMS`.
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

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

/// An array of metadata values of one type. Arrays of arrays do not occur in Llama files and are
/// refused.
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
    /// The type, as messages name it.
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
}

/// The typed getters give `Ok(None)` for a key that is absent and [`Error::Malformed`] for one of
/// another type.
impl Metadata {
    /// The file.
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

    /// A string.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::String(string) => Some(string.as_str()),
            _ => None,
        })
    }

    /// An integer of any type, if it is not negative.
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

    /// A float. A single is widened by way of its shortest decimal form, so that the 1e-5 of a
    /// config comes back as 1e-5 and not as 9.99999974e-6; as a single it is the same number.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a float", |value| match *value {
            Value::F32(number) => number.to_string().parse().ok(),
            Value::F64(number) => Some(number),
            _ => None,
        })
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", |value| match *value {
            Value::Bool(value) => Some(value),
            _ => None,
        })
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::String(strings)) => Some(strings.as_slice()),
            _ => None,
        })
    }

    /// An array of integers of any type.
    pub fn ints(&self, key: &str) -> Result<Option<Vec<i64>>> {
        fn widen<T: Copy + TryInto<i64>>(numbers: &[T]) -> Option<Vec<i64>> {
            numbers.iter().map(|&number| number.try_into().ok()).collect()
        }
        self.typed(key, "an array of integers", |value| match value {
            Value::Array(Array::U8(numbers)) => widen(numbers),
            Value::Array(Array::I8(numbers)) => widen(numbers),
            Value::Array(Array::U16(numbers)) => widen(numbers),
            Value::Array(Array::I16(numbers)) => widen(numbers),
            Value::Array(Array::U32(numbers)) => widen(numbers),
            Value::Array(Array::I32(numbers)) => widen(numbers),
            Value::Array(Array::U64(numbers)) => widen(numbers),
            Value::Array(Array::I64(numbers)) => Some(numbers.clone()),
            _ => None,
        })
    }

    /// An array of singles.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.typed(key, "an array of floats", |value| match value {
            Value::Array(Array::F32(numbers)) => Some(numbers.clone()),
            _ => None,
        })
    }

    /// An integer, or an array of integers that are all the same, as some converters write one
    /// value per layer.
    pub(crate) fn u64_or_uniform(&self, key: &str) -> Result<Option<u64>> {
        if !matches!(self.get(key), Some(Value::Array(_))) {
            return self.u64(key);
        }
        let numbers = self.ints(key)?.unwrap_or_default();
        match numbers[..] {
            [first, ..] if first >= 0 && numbers.iter().all(|&number| number == first) => {
                Ok(Some(first.unsigned_abs()))
            }
            _ => Err(Error::unsupported(key, "values that differ from layer to layer")),
        }
    }

    /// [`Error::Malformed`] that names the file and the key.
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

    /// Refuses what is no Llama, and files that are one part of several.
    pub(crate) fn require_whole_llama(&self) -> Result<()> {
        match self.string("general.architecture")? {
            Some("llama") => {}
            Some(other) => {
                return Err(Error::unsupported("general.architecture", format!("{other:?}, only \"llama\"")));
            }
            None => return Err(Error::malformed(&self.path, "has no general.architecture")),
        }
        match self.u64("split.count")? {
            Some(count) if count > 1 => Err(Error::unsupported(
                "split.count",
                format!("{count}; join the parts with llama-gguf-split --merge"),
            )),
            _ => Ok(()),
        }
    }
}

/// Reads a file's metadata and nothing else: no tensor list, no data. Works for every architecture
/// and for files that hold only a vocabulary.
///
/// # Errors
/// [`Error::NotFound`], [`Error::Io`], [`Error::Malformed`] or [`Error::Truncated`] if the file
/// cannot be read or breaks the format, [`Error::Unsupported`] for version 1 and big-endian files.
pub fn read_metadata(path: &Path) -> Result<Metadata> {
    let map = Mmap::open(path)?;
    let mut reader = Reader::new(&map);
    let (_, metadata) = read_start(&mut reader)?;
    Ok(metadata)
}

/// Reads the metadata and the tensor list. The tensors keep GGUF's names; shapes are in Hugging
/// Face's order.
pub(crate) fn read(path: &Path) -> Result<(Metadata, BTreeMap<String, Stored>)> {
    let map = Mmap::open(path)?;
    let mut reader = Reader::new(&map);
    let (tensor_count, metadata) = read_start(&mut reader)?;
    let alignment = match metadata.u64("general.alignment")? {
        None => DEFAULT_ALIGNMENT,
        Some(alignment) if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT => alignment,
        Some(alignment) => {
            let reason = format!("is {alignment}, expected a power of two up to {MAX_ALIGNMENT}");
            return Err(metadata.malformed("general.alignment", reason));
        }
    };
    // Name's length, number of dimensions, type and offset.
    reader.plausible("tensors", tensor_count, 8 + 4 + 4 + 8)?;
    let mut entries = BTreeMap::new();
    for _ in 0..tensor_count {
        let name = reader.string("a tensor's name")?;
        let entry = read_tensor_entry(&mut reader, &name)?;
        if entries.insert(name.clone(), entry).is_some() {
            return Err(Error::malformed(path, format!("has two tensors named {name:?}")));
        }
    }
    // Inside the address space: the reader is at most 256 MiB into the file.
    let data_start = (reader.at as u64).next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    for (name, entry) in entries {
        let stored = locate(&map, &name, entry, data_start, alignment)?;
        tensors.insert(name, stored);
    }
    Ok((metadata, tensors))
}

/// Magic, version, counts and metadata; gives the number of tensors that follow.
fn read_start(reader: &mut Reader) -> Result<(u64, Metadata)> {
    let path = reader.path;
    if reader.array::<4>("the magic number")? != *b"GGUF" {
        return Err(Error::malformed(path, "does not begin with \"GGUF\""));
    }
    let version = u32::from_le_bytes(reader.array("the version")?);
    match version {
        2 | 3 => {}
        1 => {
            return Err(Error::unsupported(
                "GGUF version",
                "1; convert the file again with a current llama.cpp",
            ));
        }
        _ if (1..=3).contains(&version.swap_bytes()) => {
            return Err(Error::unsupported("GGUF byte order", "big-endian; only little-endian files"));
        }
        _ => return Err(Error::unsupported("GGUF version", format!("{version}; 2 and 3 are known"))),
    }
    let tensor_count = reader.u64("the number of tensors")?;
    let value_count = reader.u64("the number of metadata values")?;
    // Key's length, type and the shortest value.
    reader.plausible("metadata values", value_count, 8 + 4 + 1)?;
    let mut values = BTreeMap::new();
    for _ in 0..value_count {
        let key = reader.string("a metadata key")?;
        let kind = reader.u32(&key)?;
        let value = reader.value(&key, kind)?;
        if values.contains_key(&key) {
            return Err(Error::malformed(path, format!("has the metadata key {key:?} twice")));
        }
        values.insert(key, value);
    }
    Ok((tensor_count, Metadata { path: path.into(), values }))
}

struct TensorEntry {
    shape: Vec<usize>,
    kind: u32,
    offset: u64,
}

fn read_tensor_entry(reader: &mut Reader, name: &str) -> Result<TensorEntry> {
    let dims = reader.u32(name)?;
    if dims > MAX_DIMS {
        let reason = format!("tensor {name:?} has {dims} dimensions, the limit is {MAX_DIMS}");
        return Err(Error::malformed(reader.path, reason));
    }
    let mut shape = Vec::new();
    for _ in 0..dims {
        let dim = reader.u64(name)?;
        shape.push(usize::try_from(dim).map_err(|_| {
            Error::malformed(reader.path, format!("tensor {name:?} has a dimension of {dim}"))
        })?);
    }
    // ggml counts dimensions from the fastest one.
    shape.reverse();
    Ok(TensorEntry { shape, kind: reader.u32(name)?, offset: reader.u64(name)? })
}

/// Checks that a tensor's data is where the list says.
fn locate(
    map: &Arc<Mmap>,
    name: &str,
    entry: TensorEntry,
    data_start: u64,
    alignment: u64,
) -> Result<Stored> {
    let TensorEntry { shape, kind, offset } = entry;
    let file_len = map.bytes().len() as u64;
    let malformed = |reason: String| Error::malformed(map.path(), format!("tensor {name:?} {reason}"));
    if !offset.is_multiple_of(alignment) {
        return Err(malformed(format!("begins at {offset}, which is no multiple of {alignment}")));
    }
    let too_large = || malformed(format!("has shape {shape:?} at {offset}, which is too large"));
    let begin = data_start.checked_add(offset).ok_or_else(too_large)?;
    let (dtype, len) = match ggml_types::find(kind) {
        Some(ggml_type) => {
            let row = shape.last().copied().unwrap_or(1) as u64;
            if !row.is_multiple_of(ggml_type.block_len) {
                let (block, name) = (ggml_type.block_len, ggml_type.name);
                return Err(malformed(format!("has rows of {row}, {name} takes multiples of {block}")));
            }
            let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim as u64));
            let len = elements
                .and_then(|elements| (elements / ggml_type.block_len).checked_mul(ggml_type.block_bytes))
                .ok_or_else(too_large)?;
            (ggml_type.stored(), len)
        }
        // Later than this reader: it can be listed, but nobody knows how long it is.
        None => (StoredType::Other(format!("ggml type {kind}")), 0),
    };
    let end = begin.checked_add(len).ok_or_else(too_large)?;
    if end > file_len {
        return Err(Error::Truncated {
            path: map.path().into(),
            what: format!("tensor {name:?}"),
            expected: end,
            got: file_len,
        });
    }
    // Both fit: they are at most the length of a slice.
    Ok(Stored { dtype, shape, map: map.clone(), range: begin as usize..end as usize })
}

/// A place in the header.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    path: &'a Path,
}

impl<'a> Reader<'a> {
    fn new(map: &'a Mmap) -> Self {
        Self { bytes: map.bytes(), at: 0, path: map.path() }
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        let end = usize::try_from(len).ok().and_then(|len| self.at.checked_add(len));
        match end {
            Some(end) if end <= self.bytes.len() && end <= MAX_HEADER_BYTES => {
                let taken = &self.bytes[self.at..end];
                self.at = end;
                Ok(taken)
            }
            Some(end) if end <= self.bytes.len() => Err(Error::malformed(
                self.path,
                format!("has metadata of more than {MAX_HEADER_BYTES} bytes, at {what:?}"),
            )),
            _ => Err(self.truncated(what, len)),
        }
    }

    fn truncated(&self, what: &str, len: u64) -> Error {
        Error::Truncated {
            path: self.path.into(),
            what: what.into(),
            expected: (self.at as u64).saturating_add(len),
            got: self.bytes.len() as u64,
        }
    }

    /// Refuses a count that the rest of the file cannot hold, however short its items are.
    fn plausible(&self, what: &str, count: u64, least_bytes: u64) -> Result<()> {
        let left = (self.bytes.len() - self.at) as u64;
        match count.checked_mul(least_bytes) {
            Some(needed) if needed <= left => Ok(()),
            needed => Err(self.truncated(&format!("{count} {what}"), needed.unwrap_or(u64::MAX))),
        }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        let bytes = self.take(len, what)?;
        match std::str::from_utf8(bytes) {
            Ok(string) => Ok(string.into()),
            Err(error) => Err(Error::malformed(self.path, format!("{what:?} is not valid UTF-8: {error}"))),
        }
    }

    fn bool(&mut self, what: &str) -> Result<bool> {
        match self.array(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(Error::malformed(self.path, format!("{what} is the boolean {other}"))),
        }
    }

    /// The value of `key`, of the type with the number `kind`.
    fn value(&mut self, key: &str, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array(key)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(key)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(key)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(key)?)),
            4 => Value::U32(u32::from_le_bytes(self.array(key)?)),
            5 => Value::I32(i32::from_le_bytes(self.array(key)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            7 => Value::Bool(self.bool(key)?),
            8 => Value::String(self.string(key)?),
            9 => Value::Array(self.array_value(key)?),
            10 => Value::U64(u64::from_le_bytes(self.array(key)?)),
            11 => Value::I64(i64::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            other => {
                return Err(Error::malformed(self.path, format!("{key:?} has the unknown type {other}")));
            }
        })
    }

    fn array_value(&mut self, key: &str) -> Result<Array> {
        let kind = self.u32(key)?;
        let count = self.u64(key)?;
        Ok(match kind {
            0 => Array::U8(self.numbers(key, count, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(key, count, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(key, count, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(key, count, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(key, count, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(key, count, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(key, count, f32::from_le_bytes)?),
            7 => Array::Bool(self.many(key, count, 1, |reader| reader.bool(key))?),
            8 => Array::String(self.many(key, count, 8, |reader| reader.string(key))?),
            9 => return Err(Error::malformed(self.path, format!("{key:?} is an array of arrays"))),
            10 => Array::U64(self.numbers(key, count, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(key, count, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(key, count, f64::from_le_bytes)?),
            other => {
                return Err(Error::malformed(self.path, format!("{key:?} has the unknown type {other}")));
            }
        })
    }

    fn numbers<T, const N: usize>(
        &mut self,
        key: &str,
        count: u64,
        convert: fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let len = count.checked_mul(N as u64).ok_or_else(|| self.truncated(key, u64::MAX))?;
        let (chunks, _) = self.take(len, key)?.as_chunks::<N>();
        Ok(chunks.iter().copied().map(convert).collect())
    }

    fn many<T>(
        &mut self,
        key: &str,
        count: u64,
        least_bytes: u64,
        read: impl Fn(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        self.plausible(key, count, least_bytes)?;
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(read(self)?);
        }
        Ok(items)
    }
}
