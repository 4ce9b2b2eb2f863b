//! Writes GGUF version 3: header, metadata and tensor list at once, then each tensor's data as it arrives.
//!
//! Everything is written to a temporary file in the destination's folder, which is renamed when it is
//! complete. If writing ends early, through an error or a cancelled caller, the destination stays as it was.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::metadata::{Array, Value};
use super::reader::MAX_HEADER_BYTES;
use super::{DEFAULT_ALIGNMENT, MAX_DIMS};
use crate::checkpoint::{background, ggml_types};
use crate::error::{Error, Result, quoted};
use crate::kernels::{Cancel, WeightType};

const VERSION: u32 = 3;
/// How many names are tried for the temporary file.
const MAX_NAMES: u32 = 1000;

/// A tensor that will be written.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// The name in GGUF's spelling.
    pub name: String,
    /// Row-major dimensions in Hugging Face's order.
    pub shape: Vec<usize>,
    /// The storage type of its elements.
    pub dtype: WeightType,
}

impl TensorSpec {
    /// The size of its data in bytes. None if a row is not a whole number of blocks, or if the size
    /// overflows.
    pub fn bytes(&self) -> Option<u64> {
        let (cols, rows) = self.shape.split_last().unwrap_or((&1, &[]));
        let row = u64::try_from(self.dtype.bytes_for(*cols)?).ok()?;
        rows.iter().try_fold(row, |bytes, &size| bytes.checked_mul(size as u64))
    }
}

/// A GGUF file that is being written.
pub struct Writer {
    unfinished: Unfinished,
    destination: PathBuf,
    force: bool,
    /// The bytes that are still missing for each tensor, starting with the current one.
    left: VecDeque<u64>,
    written: u64,
}

/// A temporary file. Dropping it removes the file, unless it has been renamed.
struct Unfinished {
    path: PathBuf,
    file: File,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Fails if the file has been renamed. Any other error cannot be reported from here.
        let _ = fs::remove_file(&self.path);
    }
}

/// Refuses a destination that cannot be written, so that no work is wasted.
///
/// # Errors
/// - [`Error::Exists`] if the file exists and `force` is false
/// - [`Error::InvalidArgument`] if the destination is not a regular file
/// - [`Error::NotFound`] if its folder does not exist
pub(crate) fn check_destination(destination: &Path, force: bool) -> Result<()> {
    if destination.file_name().is_none() {
        return Err(Error::argument("destination", format!("{} has no file name", destination.display())));
    }
    match fs::metadata(destination) {
        Ok(found) if !found.is_file() => {
            let kind = if found.is_dir() { "a folder" } else { "not a regular file" };
            return Err(Error::argument("destination", format!("{} is {kind}", destination.display())));
        }
        Ok(_) if !force => return Err(Error::Exists { path: destination.into() }),
        _ => {}
    }
    match fs::metadata(folder_of(destination)) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => {
            Err(Error::argument("destination", format!("{} is not inside a folder", destination.display())))
        }
        Err(source) if source.kind() == ErrorKind::NotFound => {
            Err(Error::NotFound { what: "folder".into(), path: folder_of(destination).into() })
        }
        Err(source) => Err(Error::Write { path: destination.into(), source }),
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl Writer {
    /// Begins a file with its metadata and the list of its tensors. Pass the tensors' data to
    /// [`Writer::write`] in the same order. Keys and names must be unique.
    ///
    /// # Errors
    /// - [`Error::Exists`] if `destination` exists and `force` is false
    /// - any other error that makes the destination impossible to write
    /// - [`Error::InvalidArgument`] for a tensor whose rows are not a whole number of blocks
    /// - [`Error::Unsupported`] if the metadata is larger than readers accept
    pub fn create(
        destination: &Path,
        force: bool,
        metadata: &[(String, Value)],
        tensors: &[TensorSpec],
    ) -> Result<Self> {
        check_destination(destination, force)?;
        let mut header = Vec::new();
        header.extend_from_slice(b"GGUF");
        put_u32(&mut header, VERSION);
        put_u64(&mut header, tensors.len() as u64);
        put_u64(&mut header, metadata.len() as u64);
        for (key, value) in metadata {
            put_string(&mut header, key);
            put_value(&mut header, value);
        }
        let mut left = VecDeque::new();
        let mut offset = 0_u64;
        for tensor in tensors {
            let unfit = || {
                let stored = format!("{} of shape {:?}", tensor.dtype, tensor.shape);
                Error::argument("tensors", format!("{} cannot be {stored}", quoted(&tensor.name)))
            };
            let bytes = tensor.bytes().filter(|_| tensor.shape.len() <= MAX_DIMS as usize);
            let bytes = bytes.ok_or_else(unfit)?;
            put_string(&mut header, &tensor.name);
            put_u32(&mut header, tensor.shape.len() as u32);
            for &size in tensor.shape.iter().rev() {
                put_u64(&mut header, size as u64);
            }
            put_u32(&mut header, ggml_types::number(tensor.dtype).ok_or_else(unfit)?);
            put_u64(&mut header, offset);
            let end =
                offset.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(DEFAULT_ALIGNMENT));
            offset = end.ok_or_else(unfit)?;
            left.push_back(bytes);
        }
        if header.len() > MAX_HEADER_BYTES {
            let value = format!("{} bytes, readers accept at most {MAX_HEADER_BYTES}", header.len());
            return Err(Error::unsupported("metadata", value));
        }
        let unfinished = Unfinished::beside(destination)?;
        let mut writer = Writer { unfinished, destination: destination.into(), force, left, written: 0 };
        writer.put(&header)?;
        writer.pad()?;
        Ok(writer)
    }

    /// Appends `bytes` to the current tensor's data. They must not reach into the next tensor.
    ///
    /// # Errors
    /// [`Error::Write`]; [`Error::Internal`] for more bytes than the tensor has.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let rest = self.left.front().and_then(|left| left.checked_sub(bytes.len() as u64));
        let (Some(rest), Some(front)) = (rest, self.left.front_mut()) else {
            return Err(Error::Internal { reason: "more data than the tensor has".into() });
        };
        *front = rest;
        self.put(bytes)?;
        if rest == 0 {
            self.left.pop_front();
            self.pad()?;
        }
        Ok(())
    }

    /// Waits until the file is on disk, then gives it its final name. Returns its length in bytes.
    ///
    /// # Errors
    /// - [`Error::Write`], [`Error::Cancelled`]
    /// - [`Error::Exists`] if the destination was created meanwhile and `force` is false
    /// - [`Error::Internal`] if data is missing
    pub fn finish(self, cancel: &Cancel) -> Result<u64> {
        if !self.left.is_empty() {
            return Err(Error::Internal { reason: format!("{} tensors have no data", self.left.len()) });
        }
        let failed = |source| Error::Write { path: self.destination.clone(), source };
        let file = self.unfinished.file.try_clone().map_err(failed)?;
        background::run(cancel, move || file.sync_all())?.map_err(failed)?;
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if !self.force {
            // A rename would replace a file that was created meanwhile; a hard link does not.
            match fs::hard_link(&self.unfinished.path, &self.destination) {
                Ok(()) => return Ok(self.written),
                Err(source) if source.kind() == ErrorKind::AlreadyExists => {
                    return Err(Error::Exists { path: self.destination.clone() });
                }
                // The file system may not support hard links.
                Err(_) => check_destination(&self.destination, false)?,
            }
        }
        fs::rename(&self.unfinished.path, &self.destination).map_err(failed)?;
        Ok(self.written)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let failed = |source| Error::Write { path: self.destination.clone(), source };
        self.unfinished.file.write_all(bytes).map_err(failed)?;
        self.written = self.written.saturating_add(bytes.len() as u64);
        Ok(())
    }

    fn pad(&mut self) -> Result<()> {
        let end = self.written.next_multiple_of(DEFAULT_ALIGNMENT);
        let zeros = usize::try_from(end.saturating_sub(self.written)).unwrap_or(0);
        self.put(&vec![0; zeros])
    }
}

impl Unfinished {
    /// Creates a temporary file in the folder of `destination`.
    fn beside(destination: &Path) -> Result<Self> {
        let folder = folder_of(destination);
        // Each name is used only once, because dropping a file must not remove another writer's.
        static NAMES: AtomicU64 = AtomicU64::new(0);
        let mut tries = 0..MAX_NAMES;
        loop {
            let number = NAMES.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!(".candle-llama-{}-{number}.tmp", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => return Ok(Unfinished { path, file }),
                // A killed process with the same id left this file.
                Err(error) if error.kind() == ErrorKind::AlreadyExists && tries.next().is_some() => {}
                Err(source) => return Err(Error::Write { path: destination.into(), source }),
            }
        }
    }
}

fn put_u32(out: &mut Vec<u8>, number: u32) {
    out.extend_from_slice(&number.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(&number.to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, string: &str) {
    put_u64(out, string.len() as u64);
    out.extend_from_slice(string.as_bytes());
}

/// Writes the type's number, then the value.
fn put_value(out: &mut Vec<u8>, value: &Value) {
    macro_rules! number {
        ($kind:literal, $number:expr) => {{
            put_u32(out, $kind);
            out.extend_from_slice(&$number.to_le_bytes());
        }};
    }
    match value {
        Value::U8(number) => number!(0, number),
        Value::I8(number) => number!(1, number),
        Value::U16(number) => number!(2, number),
        Value::I16(number) => number!(3, number),
        Value::U32(number) => number!(4, number),
        Value::I32(number) => number!(5, number),
        Value::F32(number) => number!(6, number),
        Value::Bool(value) => number!(7, u8::from(*value)),
        Value::String(string) => {
            put_u32(out, 8);
            put_string(out, string);
        }
        Value::Array(array) => {
            put_u32(out, 9);
            put_array(out, array);
        }
        Value::U64(number) => number!(10, number),
        Value::I64(number) => number!(11, number),
        Value::F64(number) => number!(12, number),
    }
}

/// Writes the elements' type, their count, then the elements.
fn put_array(out: &mut Vec<u8>, array: &Array) {
    macro_rules! numbers {
        ($kind:literal, $numbers:expr) => {{
            put_u32(out, $kind);
            put_u64(out, $numbers.len() as u64);
            $numbers.iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
        }};
    }
    match array {
        Array::U8(numbers) => numbers!(0, numbers),
        Array::I8(numbers) => numbers!(1, numbers),
        Array::U16(numbers) => numbers!(2, numbers),
        Array::I16(numbers) => numbers!(3, numbers),
        Array::U32(numbers) => numbers!(4, numbers),
        Array::I32(numbers) => numbers!(5, numbers),
        Array::F32(numbers) => numbers!(6, numbers),
        Array::Bool(values) => {
            put_u32(out, 7);
            put_u64(out, values.len() as u64);
            out.extend(values.iter().map(|value| u8::from(*value)));
        }
        Array::String(strings) => {
            put_u32(out, 8);
            put_u64(out, strings.len() as u64);
            strings.iter().for_each(|string| put_string(out, string));
        }
        Array::U64(numbers) => numbers!(10, numbers),
        Array::I64(numbers) => numbers!(11, numbers),
        Array::F64(numbers) => numbers!(12, numbers),
    }
}
