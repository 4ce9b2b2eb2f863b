//! Reads numbers, strings and values one after the other, each checked against the end of the file.

use std::borrow::Cow;
use std::path::Path;

use super::metadata::{Array, Value};
use crate::checkpoint::mmap::Mmap;
use crate::checkpoint::names::unfit_name;
use crate::error::{Error, Result, quoted};
use crate::sys::reserve;

/// The most bytes of header, metadata and tensor list together. A vocabulary of a million tokens takes a
/// fifth of this.
pub(super) const MAX_HEADER_BYTES: usize = 128 << 20;
/// The most elements in an array: as many as a tokenizer's vocabulary may have. An element can take three
/// times as much memory as in the file.
const MAX_ARRAY_LEN: u64 = 1 << 22;

/// A reading position in a file's header.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    path: &'a Path,
    /// A key whose text is not UTF-8, although that does no harm.
    unreadable: Option<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(map: &'a Mmap) -> Self {
        Self { bytes: map.bytes(), at: 0, path: map.path(), unreadable: None }
    }

    /// The offset of the next byte in the file.
    pub(super) fn position(&self) -> u64 {
        self.at as u64
    }

    pub(super) fn malformed(&self, reason: impl Into<String>) -> Error {
        Error::malformed(self.path, reason)
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        let end = usize::try_from(len).ok().and_then(|len| self.at.checked_add(len));
        match end.and_then(|end| Some((end, self.bytes.get(self.at..end)?))) {
            Some((end, taken)) if end <= MAX_HEADER_BYTES => {
                self.at = end;
                Ok(taken)
            }
            Some(_) => Err(self.malformed(format!(
                "has metadata of more than {MAX_HEADER_BYTES} bytes, at {}",
                quoted(what)
            ))),
            None => Err(self.truncated(what, len)),
        }
    }

    fn truncated(&self, what: &str, len: u64) -> Error {
        Error::Truncated {
            path: self.path.into(),
            what: what.into(),
            expected: self.position().saturating_add(len),
            got: self.bytes.len() as u64,
        }
    }

    /// Refuses a count of items that the remaining file cannot hold at `least_bytes` each, and a count above
    /// `limit`, which bounds the memory.
    pub(super) fn plausible(&self, what: &str, count: u64, least_bytes: u64, limit: u64) -> Result<()> {
        let left = (self.bytes.len() as u64).saturating_sub(self.position());
        match count.checked_mul(least_bytes) {
            Some(needed) if needed <= left && count > limit => {
                Err(self.malformed(format!("has {count} {what}, the limit is {limit}")))
            }
            Some(needed) if needed <= left => Ok(()),
            needed => Err(self.truncated(&format!("{count} {what}"), needed.unwrap_or(u64::MAX))),
        }
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        let bytes = self.take(len, what)?;
        match std::str::from_utf8(bytes) {
            Ok(string) => Ok(string.into()),
            Err(error) => Err(self.malformed(format!("{} is not valid UTF-8: {error}", quoted(what)))),
        }
    }

    /// Reads a text of the value of `key`. Bytes that are not UTF-8 are replaced if nothing reads the text.
    fn text(&mut self, key: &str) -> Result<String> {
        let is_read = ["llama.", "tokenizer.", "split."].iter().any(|start| key.starts_with(start))
            || key == "general.architecture";
        if is_read {
            return self.string(key);
        }
        let len = self.u64(key)?;
        let text = String::from_utf8_lossy(self.take(len, key)?);
        if matches!(text, Cow::Owned(_)) && self.unreadable.is_none() {
            self.unreadable = Some(key.to_owned());
        }
        Ok(text.into_owned())
    }

    /// Warnings about what has been read.
    pub(super) fn warnings(&self) -> Vec<String> {
        let warning = |key| format!("{} is not valid UTF-8; wrong bytes are replaced", quoted(key));
        self.unreadable.iter().map(|key| warning(key)).collect()
    }

    /// Reads a key or a tensor's name. `what` describes it in messages.
    pub(super) fn name(&mut self, what: &str) -> Result<String> {
        let name = self.string(what)?;
        match unfit_name(&name) {
            Some(reason) => Err(self.malformed(format!("has {what} {reason}"))),
            None => Ok(name),
        }
    }

    fn bool(&mut self, what: &str) -> Result<bool> {
        match self.array(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.malformed(format!("{} is the boolean {other}", quoted(what)))),
        }
    }

    /// Reads the value of `key`, which has the type number `kind`.
    pub(super) fn value(&mut self, key: &str, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array(key)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(key)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(key)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(key)?)),
            4 => Value::U32(u32::from_le_bytes(self.array(key)?)),
            5 => Value::I32(i32::from_le_bytes(self.array(key)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            7 => Value::Bool(self.bool(key)?),
            8 => Value::String(self.text(key)?),
            9 => Value::Array(self.array_value(key)?),
            10 => Value::U64(u64::from_le_bytes(self.array(key)?)),
            11 => Value::I64(i64::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            other => return Err(self.unknown_type(key, other)),
        })
    }

    fn unknown_type(&self, key: &str, kind: u32) -> Error {
        self.malformed(format!("{} has the unknown type {kind}", quoted(key)))
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
            8 => Array::String(self.many(key, count, 8, |reader| reader.text(key))?),
            9 => return Err(self.malformed(format!("{} is an array of arrays", quoted(key)))),
            10 => Array::U64(self.numbers(key, count, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(key, count, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(key, count, f64::from_le_bytes)?),
            other => return Err(self.unknown_type(key, other)),
        })
    }

    fn numbers<T, const N: usize>(
        &mut self,
        key: &str,
        count: u64,
        convert: fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        self.many(key, count, N as u64, |reader| reader.array(key).map(convert))
    }

    fn many<T>(
        &mut self,
        key: &str,
        count: u64,
        least_bytes: u64,
        read: impl Fn(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        self.plausible(&format!("elements in {}", quoted(key)), count, least_bytes, MAX_ARRAY_LEN)?;
        let mut items = Vec::new();
        for _ in 0..count {
            if reserve::is_exhausted() {
                return Err(reserve::exhausted());
            }
            items.push(read(self)?);
        }
        Ok(items)
    }
}
