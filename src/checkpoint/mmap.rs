//! Opens untrusted files and maps them into memory.
//!
//! All unsafe code of `checkpoint/` is here: the calls that map a file and release its pages.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};

/// A whole file, mapped read-only. Pages are read from disk when they are first touched. All processes that
/// map the same file share them.
///
/// Changing the file in place while it is mapped changes the weights of the running model. Truncating it
/// makes the system kill the process (SIGBUS) at the next read of a page that is gone. [`Mmap::check`],
/// called before each step, turns that into an error unless the file shrinks during the step itself. A signal
/// handler would close that gap, but it would belong to the whole process, not to a library. Replacing the
/// file by renaming another one over it, as download tools do, is safe: the mapping keeps the old file.
pub(crate) struct Mmap {
    map: memmap2::Mmap,
    /// Kept open to ask for the length of this very file, whatever file the path names later.
    file: File,
    path: PathBuf,
}

impl Mmap {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// [`Error::NotFound`] or [`Error::Io`] if it cannot be opened, [`Error::Malformed`] if it is not a
    /// regular file or is a Git LFS pointer, [`Error::Truncated`] if it is empty.
    #[allow(unsafe_code)]
    pub(crate) fn open(path: &Path) -> Result<Arc<Self>> {
        let (file, len) = open_regular(path)?;
        if len == 0 {
            return Err(Error::Truncated {
                path: path.into(),
                what: "a checkpoint".into(),
                expected: 1,
                got: 0,
            });
        }
        if usize::try_from(len).is_err() {
            return Err(Error::malformed(path, format!("{len} bytes do not fit the address space")));
        }
        // SAFETY: the file is a regular file, checked on this handle by `open_regular`. We cannot check that
        // nobody truncates or rewrites it while it is mapped; the type's documentation passes that duty on to
        // the owner of the file. Only plain bytes are read from the map, so bytes that change can give wrong
        // numbers, never an invalid value.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|source| Error::io(path, source))?;
        // Asks the system to read and map large pages where it can: they need fewer address translations.
        // This is only a hint, so an error is ignored.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        refuse_lfs_pointer(path, &map)?;
        Ok(Arc::new(Self { map, file, path: path.into() }))
    }

    /// Fails if the file has become shorter than its map.
    ///
    /// # Errors
    /// [`Error::Truncated`], or [`Error::Io`] if the system does not report the length.
    pub(crate) fn check(&self) -> Result<()> {
        let metadata = self.file.metadata().map_err(|source| Error::io(&self.path, source))?;
        let expected = self.map.len() as u64;
        if metadata.len() >= expected {
            return Ok(());
        }
        let what = "the model in use".into();
        Err(Error::Truncated { path: self.path.clone(), what, expected, got: metadata.len() })
    }

    /// Releases the pages of `range`, which are unlikely to be read again: they no longer count as this
    /// process's memory. A later read gets them from the file again.
    #[allow(unsafe_code)]
    pub(crate) fn forget(&self, range: &Range<usize>) {
        #[cfg(unix)]
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: this advice discards writes to private pages. The map is read-only, so there are none:
            // a dropped page comes back from the file with the same bytes, whichever thread is reading it.
            let advised = unsafe { self.map.unchecked_advise_range(advice, range.start, range.len()) };
            // If the system refuses the hint, the pages stay, which is harmless.
            let _ = advised;
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// The file's bytes; never empty.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The file's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Reads a small file, such as a config, of at most `limit` bytes.
///
/// # Errors
/// As [`Mmap::open`], and [`Error::Malformed`] if the file is longer.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let (file, len) = open_regular(path)?;
    let too_long = || Error::malformed(path, format!("is longer than {limit} bytes"));
    if len > limit {
        return Err(too_long());
    }
    let mut bytes = Vec::new();
    // Reads up to one byte more than allowed, to notice a file that grew after its length was read.
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|source| Error::io(path, source))?;
    if bytes.len() as u64 > limit {
        return Err(too_long());
    }
    refuse_lfs_pointer(path, &bytes)?;
    Ok(bytes)
}

/// Refuses what a clone without Git LFS has in place of a file.
fn refuse_lfs_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    if !bytes.starts_with(b"version https://git-lfs.github.com/") {
        return Ok(());
    }
    Err(Error::malformed(path, "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"))
}

/// Opens a regular file and returns it with its length.
fn open_regular(path: &Path) -> Result<(File, u64)> {
    let io = |source| Error::io(path, source);
    // Checked by path first, because even opening a device can have side effects.
    refuse_irregular(path, &std::fs::metadata(path).map_err(io)?)?;
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // If the path now names a FIFO, opening it must not wait for a writer.
        options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    }
    let file = options.open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    // Checked again on the handle: the path may name another file by now.
    refuse_irregular(path, &metadata)?;
    Ok((file, metadata.len()))
}

fn refuse_irregular(path: &Path, metadata: &std::fs::Metadata) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    let kind = if metadata.is_dir() { "a folder" } else { "a device, a pipe or a socket" };
    Err(Error::malformed(path, format!("is {kind}, not a regular file")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(result: Result<Arc<Mmap>>) -> String {
        match result {
            Err(error) => error.to_string(),
            Ok(_) => panic!("was mapped"),
        }
    }

    #[test]
    fn a_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(reason(Mmap::open(dir.path())).contains("is a folder"));
    }

    #[test]
    fn an_empty_file_is_truncated() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(Mmap::open(file.path()), Err(Error::Truncated { got: 0, .. })));
    }

    #[test]
    fn only_a_file_that_shrinks_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        std::fs::write(&path, "12345678").unwrap();
        let map = Mmap::open(&path).unwrap();
        map.check().unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(9).unwrap();
        map.check().unwrap();
        file.set_len(3).unwrap();
        assert!(matches!(map.check(), Err(Error::Truncated { expected: 8, got: 3, .. })));
        file.set_len(8).unwrap();
        std::fs::write(dir.path().join("other"), "1").unwrap();
        std::fs::rename(dir.path().join("other"), &path).unwrap();
        map.check().unwrap();
        std::fs::remove_file(&path).unwrap();
        map.check().unwrap();
    }

    #[test]
    fn released_pages_come_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..100_000_u32).map(|i| i as u8).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        let map = Mmap::open(file.path()).unwrap();
        for range in [0..0, 0..bytes.len(), 4000..9000, bytes.len() - 1..bytes.len()] {
            assert!(map.bytes() == bytes);
            map.forget(&range);
        }
        assert!(map.bytes() == bytes);
    }

    #[test]
    fn a_missing_file_is_not_found() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Mmap::open(&dir.path().join("none")), Err(Error::NotFound { .. })));
    }

    #[test]
    fn a_git_lfs_pointer_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
            .unwrap();
        assert!(reason(Mmap::open(file.path())).contains("git lfs pull"));
        assert!(read_bounded(file.path(), 1000).unwrap_err().to_string().contains("git lfs pull"));
    }

    #[cfg(unix)]
    #[test]
    fn a_fifo_is_refused_without_waiting_for_a_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert!(reason(Mmap::open(&path)).contains("pipe"));
        assert!(matches!(read_bounded(&path, 10), Err(Error::Malformed { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn a_device_is_refused() {
        assert!(reason(Mmap::open(Path::new("/dev/zero"))).contains("device"));
    }

    #[test]
    fn read_bounded_refuses_one_byte_too_many() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "12345").unwrap();
        assert_eq!(read_bounded(file.path(), 5).unwrap(), b"12345");
        assert!(matches!(read_bounded(file.path(), 4), Err(Error::Malformed { .. })));
    }
}
