//! Reads one safetensors file's header and checks it against the file's length.
//!
//! A file consists of the header's length (8 bytes, little-endian), the header (JSON: name to dtype, shape
//! and byte range) and the data. We do not use the `safetensors` crate to read the header. It refuses a whole
//! file if one tensor has a type it does not know, it takes the last of two equal names, and its errors do
//! not say how many bytes are missing.
//!
//! Source: the safetensors README, "Format".

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::checkpoint::MAX_TENSORS;
use crate::checkpoint::mmap::Mmap;
use crate::checkpoint::names::unfit_name;
use crate::checkpoint::tensor::{Stored, StoredType};
use crate::error::{Error, Result, quoted};
use crate::kernels::WeightType;

/// The safetensors crate's limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// More dimensions than any tensor in use has.
const MAX_DIMS: usize = 8;
/// The longest name of a type. "F8_E4M3FNUZ" has 11 bytes.
const MAX_TYPE_BYTES: usize = 32;
/// The bytes that hold the header's length.
const LENGTH_BYTES: usize = 8;

/// Maps one file and reads its header.
pub(super) fn read_file(path: &Path) -> Result<BTreeMap<String, Stored>> {
    let map = Mmap::open(path)?;
    let file_len = map.bytes().len() as u64;
    let truncated =
        |what: String, expected: u64| Error::Truncated { path: path.into(), what, expected, got: file_len };
    let Some((length, rest)) = map.bytes().split_first_chunk::<LENGTH_BYTES>() else {
        return Err(truncated("the header's length".into(), LENGTH_BYTES as u64));
    };
    let header_len = u64::from_le_bytes(*length);
    if header_len > MAX_HEADER_BYTES {
        let reason = format!("says its header has {header_len} bytes, the limit is {MAX_HEADER_BYTES}");
        return Err(Error::malformed(path, reason));
    }
    let Some((header, data)) = usize::try_from(header_len).ok().and_then(|len| rest.split_at_checked(len))
    else {
        return Err(truncated("the header".into(), header_len.saturating_add(LENGTH_BYTES as u64)));
    };
    let header: Header = serde_json::from_slice(header)
        .map_err(|error| Error::malformed(path, format!("the header is not valid: {error}")))?;

    let data = Data { map: &map, start: file_len.saturating_sub(data.len() as u64) };
    let mut tensors = BTreeMap::new();
    for (name, entry) in header.0 {
        let stored = data.locate(&name, entry)?;
        tensors.insert(name, stored);
    }
    data.check_layout(&tensors)?;
    Ok(tensors)
}

/// Where a file's tensor data begins. Offsets in the header count from there.
struct Data<'a> {
    map: &'a Arc<Mmap>,
    start: u64,
}

impl Data<'_> {
    /// Checks that a tensor's data lies inside the file and has the length that its type and shape require.
    fn locate(&self, name: &str, entry: HeaderEntry) -> Result<Stored> {
        let path = self.map.path();
        let malformed = |reason: String| Error::malformed(path, format!("tensor {} {reason}", quoted(name)));
        let HeaderEntry { dtype, shape: Shape(shape), data_offsets: (begin, end) } = entry;
        let Some(len) = end.checked_sub(begin) else {
            return Err(malformed(format!("ends at {end}, before it begins at {begin}")));
        };
        let plain = dtype.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if !plain || dtype.len() > MAX_TYPE_BYTES {
            return Err(malformed(format!("is of the type {}", quoted(&dtype))));
        }
        let dtype = match weight_type(&dtype) {
            Some(dtype) => StoredType::Weight(dtype),
            None => StoredType::Other(dtype),
        };
        // Every type takes at least one bit per element, so even a shape of an unknown type can be checked.
        let known_bits = element_bits(dtype.name());
        let needed = bytes_of(&shape, known_bits.unwrap_or(1))
            .ok_or_else(|| malformed(format!("has shape {shape:?}, which is too large")))?;
        if needed > len || known_bits.is_some() && needed != len {
            let name = dtype.name();
            return Err(malformed(format!(
                "of {name} {shape:?} takes {needed} bytes, its range {begin}..{end} has {len}"
            )));
        }
        let at = |offset: u64| self.start.checked_add(offset).and_then(|at| usize::try_from(at).ok());
        match at(begin).zip(at(end)) {
            Some((begin, end)) if end <= self.map.bytes().len() => {
                Ok(Stored { dtype, shape, map: self.map.clone(), range: begin..end })
            }
            _ => Err(Error::Truncated {
                path: path.into(),
                what: format!("tensor {}", quoted(name)),
                expected: self.start.saturating_add(end),
                got: self.map.bytes().len() as u64,
            }),
        }
    }

    /// Refuses gaps and overlaps: the format allows neither, so such a file was damaged or built wrongly.
    fn check_layout(&self, tensors: &BTreeMap<String, Stored>) -> Result<()> {
        let malformed = |reason: String| Err(Error::malformed(self.map.path(), reason));
        let mut ranges: Vec<_> =
            tensors.iter().map(|(name, stored)| (stored.range.start, stored.range.end, name)).collect();
        ranges.sort_unstable();
        let mut at = self.start;
        for (begin, end, name) in ranges {
            let begin = begin as u64;
            if begin < at {
                return malformed(format!(
                    "tensor {} and the one before it overlap at byte {begin}",
                    quoted(name)
                ));
            }
            if begin > at {
                return malformed(format!("has a gap at byte {at}, before tensor {}", quoted(name)));
            }
            at = end as u64;
        }
        match (self.map.bytes().len() as u64).saturating_sub(at) {
            0 => Ok(()),
            rest => malformed(format!("has {rest} bytes after its last tensor")),
        }
    }
}

fn weight_type(dtype: &str) -> Option<WeightType> {
    match dtype {
        "F32" => Some(WeightType::F32),
        "F16" => Some(WeightType::F16),
        "BF16" => Some(WeightType::BF16),
        _ => None,
    }
}

/// Bits per element; None for a type that is not in this list.
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

/// The size in bytes, rounded up to a whole byte. None if it overflows.
fn bytes_of(shape: &[usize], bits: u64) -> Option<u64> {
    let bits = shape.iter().try_fold(bits, |product, &dim| product.checked_mul(dim as u64))?;
    Some(bits.div_ceil(8))
}

#[derive(serde::Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// A list of at most [`MAX_DIMS`] dimensions.
struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Shape;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> std::result::Result<Shape, A::Error> {
        let mut shape = Vec::new();
        while let Some(dim) = access.next_element::<usize>()? {
            if shape.len() == MAX_DIMS {
                return Err(A::Error::custom(format_args!("more than {MAX_DIMS} dimensions")));
            }
            shape.push(dim);
        }
        Ok(Shape(shape))
    }
}

/// The header's tensors. Each name occurs only once.
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
            if let Some(reason) = unfit_name(&name) {
                return Err(A::Error::custom(format_args!("a tensor's name {reason}")));
            }
            let entry = access.next_value().map_err(|error: A::Error| {
                A::Error::custom(format_args!("tensor {}: {error}", quoted(&name)))
            })?;
            if entries.contains_key(&name) {
                return Err(A::Error::custom(format_args!("duplicate tensor {}", quoted(&name))));
            }
            entries.insert(name, entry);
            if entries.len() as u64 > MAX_TENSORS {
                return Err(A::Error::custom(format_args!("more than {MAX_TENSORS} tensors")));
            }
        }
        Ok(Header(entries))
    }
}
