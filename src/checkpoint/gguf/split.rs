//! Models split into several files: `name-00001-of-00003.gguf` and so on.
//!
//! The first part has all metadata. Every part says which part it is. The tensors are spread over all parts.
//!
//! Source: llama.cpp, `src/llama-model-loader.cpp` and `tools/gguf-split`.

use std::path::{Path, PathBuf};

use super::metadata::Metadata;
use crate::error::{Error, Result};

const NO: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// One file's place among the parts of a split model.
pub(super) struct Split {
    /// The part's number, counted from 0.
    pub(super) no: u64,
    /// How many parts there are.
    pub(super) count: u64,
    /// The number of tensors in all parts together.
    pub(super) tensors: u64,
    /// The common prefix of all parts' paths.
    stem: PathBuf,
}

impl Split {
    /// Reads a file's place from its metadata. None if that file is the whole model.
    pub(super) fn of(metadata: &Metadata) -> Result<Option<Self>> {
        let count = metadata.u64(COUNT)?.unwrap_or(0);
        if count <= 1 {
            return Ok(None);
        }
        let required = |key| metadata.u64(key)?.ok_or_else(|| metadata.malformed(key, "is missing"));
        let (no, tensors) = (required(NO)?, required(TENSORS)?);
        if no >= count {
            return Err(metadata.malformed(NO, format!("is {no}, expected less than {COUNT}, {count}")));
        }
        let path = metadata.path();
        let ending = ending(no, count);
        let name = path.file_name().and_then(|name| name.to_str());
        let stem = name.and_then(|name| name.strip_suffix(&ending)).ok_or_else(|| {
            let part = no.saturating_add(1);
            let reason = format!("is part {part} of {count}, but its name does not end in {ending:?}");
            Error::malformed(path, reason)
        })?;
        Ok(Some(Self { no, count, tensors, stem: path.with_file_name(stem) }))
    }

    /// The path of part `no`.
    pub(super) fn part(&self, no: u64) -> PathBuf {
        let mut path = self.stem.clone().into_os_string();
        path.push(ending(no, self.count));
        path.into()
    }

    /// Checks that `metadata` is that of part `no` of this model.
    pub(super) fn check(&self, no: u64, metadata: &Metadata) -> Result<()> {
        for (key, expected) in [(NO, no), (COUNT, self.count), (TENSORS, self.tensors)] {
            match metadata.u64(key)? {
                Some(got) if got == expected => {}
                Some(got) => return Err(metadata.malformed(key, format!("is {got}, expected {expected}"))),
                None => return Err(metadata.malformed(key, "is missing")),
            }
        }
        Ok(())
    }

    /// Makes a missing part's error say that it is a part.
    pub(super) fn explain(&self, no: u64, error: Error) -> Error {
        match error {
            Error::NotFound { path, .. } => {
                let what = format!("part {} of {} of a split GGUF file", no.saturating_add(1), self.count);
                Error::NotFound { what, path }
            }
            other => other,
        }
    }

    /// Checks that the parts together have as many tensors as the metadata says.
    pub(super) fn check_tensors(&self, first: &Path, found: usize) -> Result<()> {
        if found as u64 == self.tensors {
            return Ok(());
        }
        let reason =
            format!("{TENSORS} is {}, but the {} parts have {found} tensors", self.tensors, self.count);
        Err(Error::malformed(first, reason))
    }
}

fn ending(no: u64, count: u64) -> String {
    format!("-{:05}-of-{count:05}.gguf", no.saturating_add(1))
}
