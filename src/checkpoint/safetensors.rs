//! Safetensors: one file, or shards listed by `model.safetensors.index.json`.
//!
//! A file is the header's length (8 bytes, little-endian), the header (JSON: name to dtype, shape
//! and byte range) and the data. The header is read here and not with the `safetensors` crate,
//! because that refuses a file as a whole where one tensor has a type it does not know, takes the
//! last of two equal names, and its errors do not say how many bytes are missing.
//!
//! Source: the safetensors README, "Format".

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::checkpoint::json::Object;
use crate::checkpoint::mmap::Mmap;
use crate::checkpoint::tensor::{Stored, StoredType};
use crate::error::{Error, Result};
use crate::kernels::WeightType;

/// The limit of the safetensors crate.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// No checkpoint of any kind has tensors of more dimensions.
const MAX_DIMS: usize = 8;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Reads the headers of all safetensors files of a checkpoint folder.
pub(crate) fn open_folder(dir: &Path) -> Result<BTreeMap<String, Stored>> {
    // The order of transformers: the single file wins over an index beside it.
    if exists(&dir.join(SINGLE))? {
        return read_file(&dir.join(SINGLE));
    }
    if exists(&dir.join(INDEX))? {
        return read_shards(dir);
    }
    read_file(&only_file(dir)?)
}

fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(|source| Error::io(path, source))
}

/// The one `*.safetensors` file of a folder that has neither of the usual names; else the error
/// that says best what the folder holds instead.
fn only_file(dir: &Path) -> Result<PathBuf> {
    let mut names = Vec::new();
    let entries = std::fs::read_dir(dir).map_err(|source| Error::io(dir, source))?;
    for entry in entries {
        let entry = entry.map_err(|source| Error::io(dir, source))?;
        // A name that is not Unicode is none of those looked for.
        names.extend(entry.file_name().into_string().ok());
    }
    names.sort();
    let with = |extension: &str| -> Vec<&str> {
        names.iter().map(String::as_str).filter(|name| name.ends_with(extension)).collect()
    };
    match with(".safetensors")[..] {
        ["adapter_model.safetensors"] => Err(Error::unsupported(
            "adapter_model.safetensors",
            "a LoRA adapter without its base model; merge it into the base model and save that",
        )),
        ["consolidated.safetensors"] => Err(Error::unsupported(
            "consolidated.safetensors",
            "the original release's tensor names; take the transformers version of the checkpoint",
        )),
        [one] => Ok(dir.join(one)),
        [] => Err(without_safetensors(dir, &names)),
        ref several => Err(Error::malformed(
            dir,
            format!("has neither {SINGLE} nor {INDEX}, but several files: {}", several.join(", ")),
        )),
    }
}

fn without_safetensors(dir: &Path, names: &[String]) -> Error {
    if let Some(pickle) = names.iter().find(|name| is_pickle(name)) {
        return refuse_pickle(pickle);
    }
    let what = match names.iter().find(|name| name.ends_with(".gguf")) {
        Some(gguf) => format!("{SINGLE} (the folder has {gguf}: give the path of that file)"),
        None => format!("{SINGLE} or {INDEX}"),
    };
    Error::NotFound { what, path: dir.into() }
}

/// Whether a file's name says that it holds weights as a pickle. `training_args.bin` and the like
/// are pickles too, but no weights.
pub(crate) fn is_pickle(name: &str) -> bool {
    [".pth", ".pt"].iter().any(|extension| name.ends_with(extension))
        || (name.ends_with(".bin") && name.starts_with("pytorch_model"))
}

/// A pickle can run any code when it is read; the error says how to convert it.
pub(crate) fn refuse_pickle(name: &str) -> Error {
    let convert = if name.starts_with("consolidated") {
        "convert it with transformers' convert_llama_weights_to_hf.py, which writes safetensors"
    } else {
        "convert it where you trust it: AutoModelForCausalLM.from_pretrained(folder)\
         .save_pretrained(new_folder) in transformers writes safetensors"
    };
    Error::unsupported(name, format!("a pickle, which can run code when it is read; {convert}"))
}

fn read_shards(dir: &Path) -> Result<BTreeMap<String, Stored>> {
    let path = dir.join(INDEX);
    let index = Object::read(&path)?;
    let weight_map =
        index.object("weight_map")?.ok_or_else(|| Error::malformed(&path, "has no weight_map"))?;
    let mut shards: BTreeMap<&str, BTreeMap<String, Stored>> = BTreeMap::new();
    let mut tensors = BTreeMap::new();
    for tensor in weight_map.map().keys() {
        let shard = weight_map.string(tensor)?.unwrap_or_default();
        if !shards.contains_key(shard) {
            if !is_plain_file_name(shard) {
                return Err(weight_map.malformed(tensor, format!("is {shard:?}, not a plain file name")));
            }
            shards.insert(shard, read_shard(dir, shard)?);
        }
        let found = shards.get_mut(shard).and_then(|stored| stored.remove(tensor));
        let stored = found.ok_or_else(|| {
            weight_map.malformed(tensor, format!("says {shard:?}, which has no such tensor"))
        })?;
        tensors.insert(tensor.clone(), stored);
    }
    // What the index does not list counts too, as in transformers: a head must not get lost.
    for (shard, rest) in shards {
        for (name, stored) in rest {
            if weight_map.map().contains_key(&name) {
                continue; // the index chose the copy in another shard
            }
            if tensors.insert(name.clone(), stored).is_some() {
                let reason = format!("tensor {name:?} is in two shards and not in the index");
                return Err(Error::malformed(dir.join(shard), reason));
            }
        }
    }
    Ok(tensors)
}

fn read_shard(dir: &Path, shard: &str) -> Result<BTreeMap<String, Stored>> {
    read_file(&dir.join(shard)).map_err(|error| match error {
        Error::NotFound { path, .. } => Error::NotFound { what: format!("shard listed in {INDEX}"), path },
        other => other,
    })
}

/// Whether a name can only mean a file in the same folder, on every system.
fn is_plain_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':', '\0'])
}

/// Maps one file and reads its header.
fn read_file(path: &Path) -> Result<BTreeMap<String, Stored>> {
    let map = Mmap::open(path)?;
    parse(&map)
}

fn parse(map: &Arc<Mmap>) -> Result<BTreeMap<String, Stored>> {
    let (path, bytes) = (map.path(), map.bytes());
    let file_len = bytes.len() as u64;
    let truncated =
        |what: String, expected: u64| Error::Truncated { path: path.into(), what, expected, got: file_len };
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(truncated("the header's length".into(), 8));
    };
    let header_len = u64::from_le_bytes(*length);
    if header_len > MAX_HEADER_BYTES {
        let reason = format!("says its header has {header_len} bytes, the limit is {MAX_HEADER_BYTES}");
        return Err(Error::malformed(path, reason));
    }
    let Some((header, data)) = usize::try_from(header_len).ok().and_then(|len| rest.split_at_checked(len))
    else {
        return Err(truncated("the header".into(), 8 + header_len));
    };
    let data_start = 8 + header.len();
    let header: Header = serde_json::from_slice(header)
        .map_err(|error| Error::malformed(path, format!("the header is not valid: {error}")))?;

    let mut tensors = BTreeMap::new();
    let mut ranges = Vec::with_capacity(header.0.len());
    for (name, entry) in header.0 {
        let malformed = |reason: String| Error::malformed(path, format!("tensor {name:?} {reason}"));
        if entry.shape.len() > MAX_DIMS {
            return Err(malformed(format!("has {} dimensions, the limit is {MAX_DIMS}", entry.shape.len())));
        }
        let (begin, end) = entry.data_offsets;
        if begin > end {
            return Err(malformed(format!("ends at {end}, before it begins at {begin}")));
        }
        let shape: Vec<usize> = entry
            .shape
            .iter()
            .map(|&dim| usize::try_from(dim).ok())
            .collect::<Option<_>>()
            .ok_or_else(|| malformed(format!("has shape {:?}, which is too large", entry.shape)))?;
        let dtype = match weight_type(&entry.dtype) {
            Some(dtype) => StoredType::Weight(dtype),
            None => StoredType::Other(entry.dtype),
        };
        if let Some(bits) = element_bits(dtype.name()) {
            let needed = bytes_of(&shape, bits)
                .ok_or_else(|| malformed(format!("has shape {shape:?}, which is too large")))?;
            if needed != end - begin {
                return Err(malformed(format!(
                    "of {} {shape:?} takes {needed} bytes, its range {begin}..{end} has {}",
                    dtype.name(),
                    end - begin
                )));
            }
        }
        if end > data.len() as u64 {
            let expected = (data_start as u64).saturating_add(end);
            return Err(truncated(format!("tensor {name:?}"), expected));
        }
        // Both fit: they are at most the length of a slice.
        let range = data_start + begin as usize..data_start + end as usize;
        ranges.push((range.start, range.end));
        tensors.insert(name, Stored { dtype, shape, map: map.clone(), range });
    }
    check_layout(path, data_start, bytes.len(), ranges)?;
    Ok(tensors)
}

/// The format leaves no byte of the data out and uses none twice; a file that does was damaged or
/// put together wrongly.
fn check_layout(path: &Path, start: usize, end: usize, mut ranges: Vec<(usize, usize)>) -> Result<()> {
    ranges.sort_unstable();
    let mut at = start;
    for (begin, end) in ranges {
        if begin != at {
            let what = if begin < at { "overlap" } else { "leave a gap" };
            return Err(Error::malformed(path, format!("tensors {what} at byte {}", begin.min(at))));
        }
        at = end;
    }
    if at != end {
        return Err(Error::malformed(path, format!("has {} bytes after its last tensor", end - at)));
    }
    Ok(())
}

fn weight_type(dtype: &str) -> Option<WeightType> {
    match dtype {
        "F32" => Some(WeightType::F32),
        "F16" => Some(WeightType::F16),
        "BF16" => Some(WeightType::BF16),
        _ => None,
    }
}

/// Bits per element; None for a type that this list does not know.
fn element_bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// None if the product overflows or is no whole number of bytes.
fn bytes_of(shape: &[usize], bits: u64) -> Option<u64> {
    let bits = shape.iter().try_fold(bits, |product, &dim| product.checked_mul(dim as u64))?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

#[derive(serde::Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's tensors, every name once.
struct Header(HashMap<String, HeaderEntry>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> std::result::Result<Header, A::Error> {
        let mut entries = HashMap::new();
        while let Some(name) = access.next_key::<String>()? {
            if name == "__metadata__" {
                access.next_value::<IgnoredAny>()?;
                continue;
            }
            let entry = access.next_value()?;
            if entries.insert(name.clone(), entry).is_some() {
                return Err(de::Error::custom(format_args!("duplicate tensor {name:?}")));
            }
        }
        Ok(Header(entries))
    }
}
