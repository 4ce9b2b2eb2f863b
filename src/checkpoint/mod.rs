//! Reads checkpoint files: metadata and named tensors.
//!
//! Start reading at [`Checkpoint`]. It opens a safetensors folder or a GGUF file and hands out tensors by
//! Hugging Face's names, memory-mapped, in the type that the file stores. [`tied`] decides which tensor is
//! the output head and makes the `VarBuilder` for Candle's models. Nothing here depends on a model's config.

// Every number here comes from a file. Arithmetic and indexing must handle wrong numbers explicitly.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub(crate) mod background;
mod ggml_types;
pub mod gguf;
pub(crate) mod json;
pub(crate) mod mmap;
pub mod names;
pub(crate) mod recognise;
mod safetensors;
// It works within ranges and shapes that the readers have checked.
#[allow(clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tensor;
#[allow(clippy::arithmetic_side_effects)] // for the same reason
pub mod tied;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result, quoted};
use mmap::Mmap;
use names::PermutedBy;
use tensor::Stored;
pub use tensor::Tensor;
pub(crate) use tensor::hf_row;

/// The most tensors in a checkpoint. The deepest Llama that a config may describe has fewer. Listing this
/// many takes little memory.
const MAX_TENSORS: u64 = 1 << 17;

/// The file format of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A folder of safetensors files.
    Safetensors,
    /// A GGUF file, or several files that together hold one model.
    Gguf,
}

/// What a header says about a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// The name in Hugging Face's spelling, or the file's own if Hugging Face has none.
    pub name: String,
    /// The file's name for the type, such as "BF16" or "Q4_1". Types that cannot be read are listed too.
    pub dtype: String,
    /// Row-major, in Hugging Face's order.
    pub shape: Vec<usize>,
    /// Bytes in the file. 0 if the type's size is not known.
    pub bytes: u64,
}

/// The mapped files that hold a checkpoint's tensors. They stay mapped while this value lives.
#[derive(Clone, Default)]
pub struct MappedFiles(Vec<Arc<Mmap>>);

impl MappedFiles {
    /// Fails if a file has become shorter since it was opened. Reading a missing page would kill the process,
    /// so code that reads mapped tensors calls this before each step. A file that shrinks during a step
    /// cannot be noticed. Costs one system call per file.
    ///
    /// # Errors
    /// [`Error::Truncated`], or [`Error::Io`] if the system does not report the length.
    pub fn check(&self) -> Result<()> {
        self.0.iter().try_for_each(|map| map.check())
    }
}

/// An opened checkpoint. The headers have been read and checked. The data is mapped but not yet read.
pub struct Checkpoint {
    path: PathBuf,
    format: Format,
    tensors: BTreeMap<String, Stored>,
    metadata: Option<gguf::Metadata>,
    /// Why tensors that the index names are absent.
    absent: BTreeMap<String, Error>,
    notes: Vec<String>,
}

impl Checkpoint {
    /// Opens a folder with `model.safetensors`, a folder with `model.safetensors.index.json` and its shards,
    /// or a GGUF file. If a model is split into several GGUF files (`name-00001-of-00003.gguf` and so on),
    /// the path of any of them opens the whole model.
    ///
    /// # Errors
    /// - [`Error::NotFound`]: nothing is there, the folder has no weights, or a shard or part is
    ///   missing
    /// - [`Error::Malformed`], [`Error::Truncated`]: a file violates its format, or shards or parts do not
    ///   belong together
    /// - [`Error::Unsupported`]: a pickle, or a GGUF file that is for another architecture, of version 1 or
    ///   big-endian
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|source| Error::io(path, source))?;
        if metadata.is_dir() {
            return Self::open_folder(path);
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if safetensors::is_pickle(&name) {
            return Err(safetensors::refuse_pickle(&name));
        }
        if name.ends_with(".safetensors") {
            return Err(Error::argument("path", format!("{name:?} is a single file; pass its folder")));
        }
        Self::open_gguf(path)
    }

    fn open_folder(path: &Path) -> Result<Self> {
        let (mut tensors, mut absent) = safetensors::open_folder(path)?;
        let mut notes = Vec::new();
        let names: Vec<&str> = tensors.keys().chain(absent.keys()).map(String::as_str).collect();
        if let Some(usual) = names::without_prefix(&names) {
            if let Some((saved, usual)) = names.iter().zip(&usual).find(|(saved, usual)| *saved != usual) {
                let (saved, usual) = (quoted(saved), quoted(usual));
                notes.push(format!("tensors have other names than usual: {saved} is read as {usual}"));
            }
            let mut usual = usual.into_iter();
            tensors = usual.by_ref().take(tensors.len()).zip(tensors.into_values()).collect();
            absent = usual.zip(absent.into_values()).collect();
        }
        let unknown = |name: &&String| names::hf_to_gguf(name).is_none();
        if let Some(name) = absent.keys().find(unknown) {
            let name = quoted(name);
            notes.push(format!(
                "the index names tensors that no shard has and no Llama needs, such as {name}"
            ));
        }
        if path.join("adapter_config.json").exists() {
            notes.push(
                "adapter_config.json is ignored: the adapter beside the model is not applied".to_owned(),
            );
        }
        let format = Format::Safetensors;
        Ok(Self { path: path.into(), format, tensors, metadata: None, absent, notes })
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let (metadata, in_file) = gguf::read(path)?;
        metadata.require_llama()?;
        let mut tensors = BTreeMap::new();
        for (name, stored) in in_file {
            let name = names::gguf_to_hf(&name).unwrap_or(name);
            if tensors.contains_key(&name) {
                return Err(Error::malformed(path, format!("has two tensors for {}", quoted(&name))));
            }
            tensors.insert(name, stored);
        }
        Ok(Self {
            path: path.into(),
            format: Format::Gguf,
            tensors,
            metadata: Some(metadata),
            absent: BTreeMap::new(),
            notes: Vec::new(),
        })
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The format of its files.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether there is a tensor of this name (Hugging Face's spelling), even one that cannot be read.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor of this name (Hugging Face's spelling). Its bytes stay in the mapped file, except for a
    /// GGUF file's query and key projections: their rows are copied into Hugging Face's order.
    ///
    /// # Errors
    /// - [`Error::MissingTensor`]
    /// - [`Error::TensorType`] for a type that cannot be read
    /// - [`Error::Malformed`] if a projection's rows cannot be split into the number of heads in the metadata
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let stored = self.tensors.get(name).ok_or_else(|| self.missing(name))?;
        let tensor = stored.load(name)?;
        let (Some(metadata), Some(permuted_by)) = (&self.metadata, names::permuted_by(name)) else {
            return Ok(tensor);
        };
        let heads = permuting_heads(metadata, permuted_by)?;
        tensor
            .unpermute(heads)
            .map_err(|reason| Error::malformed(&self.path, format!("tensor {name:?}: {reason}")))
    }

    /// The error for a tensor that is not there. It says so if an index names a file for it.
    fn missing(&self, name: &str) -> Error {
        match self.absent.get(name) {
            Some(Error::Malformed { path, reason }) => Error::malformed(path, reason.as_str()),
            _ => Error::MissingTensor { tensor: name.into(), path: self.path.clone() },
        }
    }

    /// Fails if an index names a file for the tensor, and the file does not have it.
    pub(crate) fn check_not_lost(&self, name: &str) -> Result<()> {
        if self.absent.contains_key(name) { Err(self.missing(name)) } else { Ok(()) }
    }

    /// Gives the tensor `from` the name `to`, with a note for the user.
    pub(crate) fn rename(&mut self, from: &str, to: &str, note: &str) {
        if let Some(stored) = self.tensors.remove(from) {
            self.tensors.insert(to.into(), stored);
            self.notes.push(note.into());
        }
    }

    /// Facts about the files that may be worth knowing but are not problems.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// As [`Checkpoint::tensor`], but the tensor must have the shape `expected`.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`], and [`Error::TensorShape`].
    pub fn tensor_with_shape(&self, name: &str, expected: &[usize]) -> Result<Tensor> {
        // The shape is checked before the tensor is loaded. An error about heads would hide the simpler
        // cause.
        self.check_shape(name, expected)?;
        self.tensor(name)
    }

    /// Checks that the tensor, if present, has the shape `expected`. Reads only the headers.
    ///
    /// # Errors
    /// [`Error::TensorShape`]
    pub fn check_shape(&self, name: &str, expected: &[usize]) -> Result<()> {
        if let Some(stored) = self.tensors.get(name).filter(|stored| stored.shape != expected) {
            return Err(Error::TensorShape {
                tensor: name.into(),
                got: stored.shape.clone(),
                expected: expected.into(),
                path: self.path.clone(),
            });
        }
        Ok(())
    }

    /// Lists all tensors, sorted by name. Reads only the headers.
    pub fn infos(&self) -> Vec<TensorInfo> {
        let info = |(name, stored): (&String, &Stored)| TensorInfo {
            name: name.clone(),
            dtype: stored.dtype.name().into(),
            shape: stored.shape.clone(),
            bytes: stored.range.len() as u64,
        };
        self.tensors.iter().map(info).collect()
    }

    /// The files that hold the tensors.
    pub fn files(&self) -> MappedFiles {
        let mut files: Vec<_> = self.tensors.values().map(|stored| &stored.map).collect();
        files.sort_unstable_by_key(|map| Arc::as_ptr(map));
        files.dedup_by_key(|map| Arc::as_ptr(map));
        MappedFiles(files.into_iter().cloned().collect())
    }

    /// A GGUF file's metadata. None for safetensors.
    pub fn metadata(&self) -> Option<&gguf::Metadata> {
        self.metadata.as_ref()
    }

    /// The shape in the header. Works for tensors that cannot be read too.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|stored| stored.shape.as_slice())
    }
}

/// The number of heads that llama.cpp's converter used to reorder a projection's rows.
fn permuting_heads(metadata: &gguf::Metadata, permuted_by: PermutedBy) -> Result<usize> {
    const HEADS: &str = "llama.attention.head_count";
    const KV_HEADS: &str = "llama.attention.head_count_kv";
    let heads = metadata.u64_or_uniform(HEADS)?;
    let count = match permuted_by {
        PermutedBy::AttentionHeads => heads,
        PermutedBy::KeyValueHeads => metadata.u64_or_uniform(KV_HEADS)?.or(heads),
    };
    let count = count.ok_or_else(|| Error::malformed(metadata.path(), format!("has no {HEADS}")))?;
    usize::try_from(count).map_err(|_| metadata.malformed(HEADS, format!("is {count}")))
}
