//! Reads GGUF versions 2 and 3, little-endian, in one file or several.
//!
//! A file consists of a header (magic, version, counts), the metadata, the list of tensors (name, shape,
//! type, offset) and the data, which starts at the next multiple of `general.alignment`. Everything is read
//! from the map with checked arithmetic. A count in the file only bounds a loop; memory grows only with what
//! has really been read.
//!
//! - `reader.rs`: numbers, strings and values, and their limits
//! - `metadata.rs`: keys, values and typed getters
//! - `split.rs`: models split into several files
//! - `writer.rs`: writes GGUF files
//!
//! Source: ggml, `docs/gguf.md`.

mod metadata;
mod reader;
mod split;
mod writer;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

pub use metadata::{Array, Metadata, Value};
use reader::Reader;
use split::Split;
pub(crate) use writer::check_destination;
pub use writer::{TensorSpec, Writer};

use crate::checkpoint::mmap::Mmap;
use crate::checkpoint::tensor::{Stored, StoredType};
use crate::checkpoint::{MAX_TENSORS, ggml_types};
use crate::error::{Error, Result, quoted};

const MAX_ALIGNMENT: u64 = 1 << 20;
/// ggml's `GGML_MAX_DIMS`.
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
/// The most metadata values. Llamas have about 40.
const MAX_VALUES: u64 = 1 << 16;

/// Reads only a model's metadata: no tensor list, no data. It works for every architecture and for files that
/// hold only a vocabulary. For any part of a split model it returns the first part's metadata.
///
/// # Errors
/// - [`Error::NotFound`], [`Error::Io`], [`Error::Malformed`] or [`Error::Truncated`] if the file cannot be
///   read or violates the format
/// - [`Error::Unsupported`] for version 1 and big-endian files
pub fn read_metadata(path: &Path) -> Result<Metadata> {
    let metadata = read_own_metadata(path)?;
    match Split::of(&metadata)? {
        Some(split) if split.no > 0 => {
            let first = read_own_metadata(&split.part(0)).map_err(|error| split.explain(0, error))?;
            split.check(0, &first)?;
            Ok(first)
        }
        _ => Ok(metadata),
    }
}

fn read_own_metadata(path: &Path) -> Result<Metadata> {
    let map = Mmap::open(path)?;
    let (_, metadata) = read_start(&mut Reader::new(&map), path)?;
    Ok(metadata)
}

/// Reads the metadata and the tensor lists of all parts. The tensors keep GGUF's names. Shapes are in Hugging
/// Face's order.
pub(crate) fn read(path: &Path) -> Result<(Metadata, BTreeMap<String, Stored>)> {
    let (metadata, tensors) = read_file(path)?;
    let Some(split) = Split::of(&metadata)? else { return Ok((metadata, tensors)) };
    let mut given = Some((metadata, tensors));
    let mut part = |no| {
        let part = match given.take_if(|_| no == split.no) {
            Some(part) => part,
            None => read_file(&split.part(no)).map_err(|error| split.explain(no, error))?,
        };
        split.check(no, &part.0)?;
        Ok(part)
    };
    let (first, mut all) = part(0)?;
    for no in 1..split.count {
        let (metadata, tensors) = part(no)?;
        for (name, stored) in tensors {
            if all.contains_key(&name) {
                let reason = format!("has the tensor {}, as has another part", quoted(&name));
                return Err(Error::malformed(metadata.path(), reason));
            }
            all.insert(name, stored);
        }
        check_count(path, all.len() as u64)?;
    }
    split.check_tensors(first.path(), all.len())?;
    Ok((first, all))
}

fn check_count(path: &Path, tensors: u64) -> Result<()> {
    if tensors <= MAX_TENSORS {
        return Ok(());
    }
    Err(Error::malformed(path, format!("has {tensors} tensors, the limit is {MAX_TENSORS}")))
}

/// Reads one file.
fn read_file(path: &Path) -> Result<(Metadata, BTreeMap<String, Stored>)> {
    let map = Mmap::open(path)?;
    let mut reader = Reader::new(&map);
    let (tensor_count, metadata) = read_start(&mut reader, path)?;
    let alignment = match metadata.u64("general.alignment")? {
        None => DEFAULT_ALIGNMENT,
        Some(alignment) if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT => alignment,
        Some(alignment) => {
            let reason = format!("is {alignment}, expected a power of two up to {MAX_ALIGNMENT}");
            return Err(metadata.malformed("general.alignment", reason));
        }
    };
    // A tensor's entry has at least the name's length, the number of dimensions, the type and the offset.
    reader.plausible("tensors", tensor_count, 8 + 4 + 4 + 8, MAX_TENSORS)?;
    let mut entries = BTreeMap::new();
    for _ in 0..tensor_count {
        let name = reader.name("a tensor's name")?;
        let entry = read_tensor_entry(&mut reader, &name)?;
        if entries.contains_key(&name) {
            return Err(Error::malformed(path, format!("has two tensors named {}", quoted(&name))));
        }
        entries.insert(name, entry);
    }
    let data = Data {
        map: &map,
        start: reader.position().checked_next_multiple_of(alignment).unwrap_or(u64::MAX),
        alignment,
    };
    let mut tensors = BTreeMap::new();
    for (name, entry) in entries {
        let stored = data.locate(&name, entry)?;
        tensors.insert(name, stored);
    }
    check_overlap(path, &tensors)?;
    Ok((metadata, tensors))
}

/// Reads magic, version, counts and metadata. Returns the number of tensors that follow, and the metadata.
fn read_start(reader: &mut Reader, path: &Path) -> Result<(u64, Metadata)> {
    if reader.array::<4>("the magic number")? != *b"GGUF" {
        return Err(reader.malformed("does not begin with \"GGUF\""));
    }
    let version = reader.u32("the version")?;
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
    // A metadata value has at least the key's length, the type and the shortest value.
    reader.plausible("metadata values", value_count, 8 + 4 + 1, MAX_VALUES)?;
    let mut values = BTreeMap::new();
    for _ in 0..value_count {
        let key = reader.name("a metadata key")?;
        let kind = reader.u32(&key)?;
        let value = reader.value(&key, kind)?;
        if values.contains_key(&key) {
            return Err(reader.malformed(format!("has the metadata key {} twice", quoted(&key))));
        }
        values.insert(key, value);
    }
    Ok((tensor_count, Metadata::new(path, values).with_warnings(reader.warnings())))
}

struct TensorEntry {
    shape: Vec<usize>,
    kind: u32,
    offset: u64,
}

fn read_tensor_entry(reader: &mut Reader, name: &str) -> Result<TensorEntry> {
    let dims = reader.u32(name)?;
    if dims > MAX_DIMS {
        let reason = format!("tensor {} has {dims} dimensions, the limit is {MAX_DIMS}", quoted(name));
        return Err(reader.malformed(reason));
    }
    let mut shape = Vec::new();
    for _ in 0..dims {
        let dim = reader.u64(name)?;
        shape
            .push(usize::try_from(dim).map_err(|_| {
                reader.malformed(format!("tensor {} has a dimension of {dim}", quoted(name)))
            })?);
    }
    // ggml lists the fastest-varying dimension first.
    shape.reverse();
    Ok(TensorEntry { shape, kind: reader.u32(name)?, offset: reader.u64(name)? })
}

/// Where a file's tensor data begins.
struct Data<'a> {
    map: &'a Arc<Mmap>,
    start: u64,
    alignment: u64,
}

impl Data<'_> {
    /// Checks that a tensor's data lies inside the file, aligned, at the offset in the list.
    fn locate(&self, name: &str, entry: TensorEntry) -> Result<Stored> {
        let TensorEntry { shape, kind, offset } = entry;
        let file_len = self.map.bytes().len() as u64;
        let malformed =
            |reason: String| Error::malformed(self.map.path(), format!("tensor {} {reason}", quoted(name)));
        if !offset.is_multiple_of(self.alignment) {
            let alignment = self.alignment;
            return Err(malformed(format!("begins at {offset}, which is no multiple of {alignment}")));
        }
        let too_large = || malformed(format!("has shape {shape:?} at {offset}, which is too large"));
        let begin = self.start.checked_add(offset).ok_or_else(too_large)?;
        let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim as u64));
        let elements = elements.ok_or_else(too_large)?;
        let (dtype, len) = match ggml_types::find(kind) {
            Some(ggml_type) => {
                let row = shape.last().copied().unwrap_or(1) as u64;
                if !row.is_multiple_of(ggml_type.block_len) {
                    let (block, name) = (ggml_type.block_len, ggml_type.name);
                    return Err(malformed(format!(
                        "has rows of {row} elements, {name} needs a multiple of {block}"
                    )));
                }
                let blocks = elements.checked_div(ggml_type.block_len);
                let len = blocks.and_then(|blocks| blocks.checked_mul(ggml_type.block_bytes));
                (ggml_type.stored(), len.ok_or_else(too_large)?)
            }
            // A type newer than this reader. It can be listed, but its size is unknown. Every type takes at
            // least one bit per element.
            None if elements.div_ceil(8) > file_len => return Err(too_large()),
            None => (StoredType::Other(format!("ggml type {kind}")), 0),
        };
        let end = begin.checked_add(len).ok_or_else(too_large)?;
        let range = usize::try_from(begin).ok().zip(usize::try_from(end).ok());
        match range {
            Some((begin, end)) if end <= self.map.bytes().len() => {
                Ok(Stored { dtype, shape, map: self.map.clone(), range: begin..end })
            }
            _ => Err(Error::Truncated {
                path: self.map.path().into(),
                what: format!("tensor {}", quoted(name)),
                expected: end,
                got: file_len,
            }),
        }
    }
}

/// Refuses tensors that overlap: no real file has them. Gaps are allowed, for padding and because some
/// writers leave them.
fn check_overlap(path: &Path, tensors: &BTreeMap<String, Stored>) -> Result<()> {
    let mut ranges: Vec<_> = tensors
        .iter()
        .filter(|(_, stored)| !stored.range.is_empty())
        .map(|(name, stored)| (stored.range.start, stored.range.end, name))
        .collect();
    ranges.sort_unstable();
    for (before, after) in ranges.iter().zip(ranges.iter().skip(1)) {
        if after.0 < before.1 {
            let (one, other) = (quoted(before.2), quoted(after.2));
            return Err(Error::malformed(
                path,
                format!("tensors {one} and {other} overlap at byte {}", after.0),
            ));
        }
    }
    Ok(())
}
