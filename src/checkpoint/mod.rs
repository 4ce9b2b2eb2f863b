//! Files to metadata and named tensors.
//!
//! Start reading at [`Checkpoint`]: it opens a safetensors folder or a GGUF file and hands tensors
//! out by Hugging Face's names, mapped, in the type that the file stores. [`tied`] decides which
//! tensor is the output head and makes the `VarBuilder` for Candle's models. Nothing here knows of
//! a model's config.

// A file decides every number here: arithmetic and indexing say what they do when it lies.
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
mod safetensors;
// Works within ranges and shapes that the readers have checked.
#[allow(clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tensor;
#[allow(clippy::arithmetic_side_effects)] // likewise
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

/// Tensors of a checkpoint: more than the deepest Llama that a config may describe has, and few
/// enough that listing them takes little memory.
const MAX_TENSORS: u64 = 1 << 17;

/// What kind of files a checkpoint consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A folder of safetensors files.
    Safetensors,
    /// A GGUF file, or several that are one model.
    Gguf,
}

/// What a header says about a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// In Hugging Face's spelling, where it has one.
    pub name: String,
    /// The file's name for the type, such as "BF16" or "Q4_1"; not only types that can be read.
    pub dtype: String,
    /// Row-major, in Hugging Face's order.
    pub shape: Vec<usize>,
    /// Bytes in the file; 0 for a type whose size is not known.
    pub bytes: u64,
}

/// The files that hold a checkpoint's tensors, for as long as somebody reads them.
#[derive(Clone, Default)]
pub struct MappedFiles(Vec<Arc<Mmap>>);

impl MappedFiles {
    /// Notices that a file has become shorter since it was opened. Reading what is gone would kill
    /// the process, so whoever reads mapped tensors asks before each step; that a file shrinks during
    /// a step cannot be noticed. One system call for each file.
    ///
    /// # Errors
    /// [`Error::Truncated`], or [`Error::Io`] if the system does not tell.
    pub fn check(&self) -> Result<()> {
        self.0.iter().try_for_each(|map| map.check())
    }
}

/// An opened checkpoint: headers read and checked, data mapped and not yet touched.
pub struct Checkpoint {
    path: PathBuf,
    format: Format,
    tensors: BTreeMap<String, Stored>,
    metadata: Option<gguf::Metadata>,
}

impl Checkpoint {
    /// Opens a folder with `model.safetensors` or `model.safetensors.index.json` and its shards, or
    /// a GGUF file. Of a model in several GGUF files, `name-00001-of-00003.gguf` and so on, any one
    /// stands for all.
    ///
    /// # Errors
    /// - [`Error::NotFound`]: nothing is there, the folder has no weights, or a shard or part is
    ///   missing
    /// - [`Error::Malformed`], [`Error::Truncated`]: a file breaks its format, or shards or parts do
    ///   not belong together
    /// - [`Error::Unsupported`]: pickles, GGUF files of another architecture, version 1 or big-endian
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|source| Error::io(path, source))?;
        if metadata.is_dir() {
            let tensors = safetensors::open_folder(path)?;
            return Ok(Self { path: path.into(), format: Format::Safetensors, tensors, metadata: None });
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if safetensors::is_pickle(&name) {
            return Err(safetensors::refuse_pickle(&name));
        }
        if name.ends_with(".safetensors") {
            return Err(Error::argument("path", format!("{name:?} is one file; give the folder around it")));
        }
        Self::open_gguf(path)
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
        Ok(Self { path: path.into(), format: Format::Gguf, tensors, metadata: Some(metadata) })
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What kind of files it consists of.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether there is a tensor of this name (Hugging Face's spelling), readable or not.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor of this name (Hugging Face's spelling). Its bytes stay in the mapped file, except
    /// a GGUF's query and key projections, whose rows are put back into Hugging Face's order.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::TensorType`] for a type that cannot be read;
    /// [`Error::Malformed`] if a projection cannot be split into the heads that the file promises.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let stored = self
            .tensors
            .get(name)
            .ok_or_else(|| Error::MissingTensor { tensor: name.into(), path: self.path.clone() })?;
        let tensor = stored.load(name)?;
        let (Some(metadata), Some(permuted_by)) = (&self.metadata, names::permuted_by(name)) else {
            return Ok(tensor);
        };
        let heads = permuting_heads(metadata, permuted_by)?;
        tensor
            .unpermute(heads)
            .map_err(|reason| Error::malformed(&self.path, format!("tensor {name:?}: {reason}")))
    }

    /// As [`Checkpoint::tensor`], if the tensor has the shape `expected`.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`], and [`Error::TensorShape`].
    pub fn tensor_with_shape(&self, name: &str, expected: &[usize]) -> Result<Tensor> {
        // Before the tensor is loaded: an error about heads would hide the plainer one.
        self.check_shape(name, expected)?;
        self.tensor(name)
    }

    /// Checks that the tensor, if there is one, has the shape `expected`, from the headers alone.
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

    /// All tensors, sorted by name, from the headers alone.
    pub fn infos(&self) -> Vec<TensorInfo> {
        let info = |(name, stored): (&String, &Stored)| TensorInfo {
            name: name.clone(),
            dtype: stored.dtype.name().into(),
            shape: stored.shape.clone(),
            bytes: stored.range.len() as u64,
        };
        self.tensors.iter().map(info).collect()
    }

    /// The files that the tensors lie in.
    pub fn files(&self) -> MappedFiles {
        let mut files: Vec<_> = self.tensors.values().map(|stored| &stored.map).collect();
        files.sort_unstable_by_key(|map| Arc::as_ptr(map));
        files.dedup_by_key(|map| Arc::as_ptr(map));
        MappedFiles(files.into_iter().cloned().collect())
    }

    /// A GGUF file's metadata; None for safetensors.
    pub fn metadata(&self) -> Option<&gguf::Metadata> {
        self.metadata.as_ref()
    }

    /// The shape in the header, for a tensor that need not be readable.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|stored| stored.shape.as_slice())
    }
}

/// The number of heads by which llama.cpp's converter reordered a projection's rows.
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
