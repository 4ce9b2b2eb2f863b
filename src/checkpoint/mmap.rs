//! Opening files that came from somebody else, and mapping them into memory.
//!
//! The only unsafe code of `checkpoint/` is here: the calls that map a file and let its pages go.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};

/// A whole file, mapped read-only. Pages are read from disk when they are first touched and are
/// shared with every other process that maps the same file.
///
/// Whoever changes the file in place while it is mapped changes the weights of the running model.
/// Whoever truncates it makes the system kill the process (SIGBUS) at the next read of a page that
/// is gone. [`Mmap::check`], asked before each step, turns that into an error unless the file shrinks
/// during the step itself; a handler for the signal would close that gap, but it would belong to the
/// whole process, not to a library. Replacing the file by renaming another one over it, as download
/// tools do, is safe: the mapping keeps the old file.
pub(crate) struct Mmap {
    map: memmap2::Mmap,
    /// Kept to ask for the length of this very file, whatever its name stands for by then.
    file: File,
    path: PathBuf,
}

impl Mmap {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// [`Error::NotFound`] or [`Error::Io`] if it cannot be opened, [`Error::Malformed`] if it is no
    /// regular file or a Git LFS pointer, [`Error::Truncated`] if it is empty.
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
        // SAFETY: the file is a regular file, checked on this handle by `open_regular`. That nobody
        // truncates or rewrites it while it is mapped cannot be checked; the type's documentation
        // passes that duty on to the owner of the file. Nothing but plain bytes is read from the
        // map, so bytes that change can give wrong numbers, never an invalid value.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|source| Error::io(path, source))?;
        // Where the system can, it reads large pages from the disk then, and maps them whole: they take less looking up.
        // A hint; nothing is lost where it is refused.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        if map.starts_with(b"version https://git-lfs.github.com/") {
            return Err(Error::malformed(
                path,
                "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
            ));
        }
        Ok(Arc::new(Self { map, file, path: path.into() }))
    }

    /// Notices that the file has become shorter than its map.
    ///
    /// # Errors
    /// [`Error::Truncated`], or [`Error::Io`] if the system does not tell.
    pub(crate) fn check(&self) -> Result<()> {
        let metadata = self.file.metadata().map_err(|source| Error::io(&self.path, source))?;
        let expected = self.map.len() as u64;
        if metadata.len() >= expected {
            return Ok(());
        }
        let what = "the model in use".into();
        Err(Error::Truncated { path: self.path.clone(), what, expected, got: metadata.len() })
    }

    /// Lets go of the pages of `range`, which will hardly be read again: they no longer count as this process's
    /// memory. Whoever reads them all the same gets them from the file anew.
    #[allow(unsafe_code)]
    pub(crate) fn forget(&self, range: &Range<usize>) {
        #[cfg(unix)]
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the advice loses what was written to private pages. The map is read-only, so nothing was:
            // a page that is dropped comes back from the file with the same bytes, whoever is reading it.
            let advised = unsafe { self.map.unchecked_advise_range(advice, range.start, range.len()) };
            // Where the system refuses the hint, the pages stay: no harm done.
            let _ = advised;
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// The file's bytes. Never empty.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Reads a small file, such as a config, if it is at most `limit` bytes long.
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
    // One byte more than allowed, to notice a file that grew since its length was asked for.
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|source| Error::io(path, source))?;
    if bytes.len() as u64 > limit {
        return Err(too_long());
    }
    Ok(bytes)
}

/// Opens a regular file and gives its length.
fn open_regular(path: &Path) -> Result<(File, u64)> {
    let io = |source| Error::io(path, source);
    // Asked by name first, because opening a device can already have effects.
    refuse_irregular(path, &std::fs::metadata(path).map_err(io)?)?;
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // If the name now stands for a FIFO, opening it must not wait for a writer.
        options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    }
    let file = options.open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    // Asked again on the handle: the name may stand for another file by now.
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
    fn a_file_that_shrinks_is_noticed_and_one_that_grows_or_is_replaced_is_not() {
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
    fn pages_that_were_let_go_come_back() {
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
