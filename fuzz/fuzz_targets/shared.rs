//! What the targets share: a folder in memory, and what may come of reading what is in it.

use std::path::Path;

use candle_llama::checkpoint::{Checkpoint, tied};
use candle_llama::error::{Error, Result};
use tempfile::TempDir;

/// A folder, in memory where the system has such a place.
pub fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder to write to")
}

/// Lets a panic inside a library pass if this crate catches it, as it does for the `tokenizers` library.
/// The fuzzer's own hook would end the process first. Nobody's panic gets past the target.
#[allow(dead_code)] // not every target has such a library below it
pub fn let_libraries_panic() {
    let end_the_process = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if panic.location().is_none_or(|place| !place.file().contains("/tokenizers-")) {
            end_the_process(panic);
        }
    }));
}

/// Replaces a file.
pub fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("room for a small file");
}

/// The value, if there is one. An error must be the file's fault, and its message must be short.
pub fn checked<T>(result: Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(Error::Internal { reason }) => panic!("a bug: {reason}"),
        Err(error) => {
            assert!(error.to_string().len() < 2500, "a long story: {error}");
            None
        }
    }
}

/// Opens a checkpoint and reads every tensor of it.
pub fn read_everything(path: &Path) -> Option<Checkpoint> {
    let checkpoint = checked(Checkpoint::open(path))?;
    for info in checkpoint.infos() {
        if let Some(tensor) = checked(checkpoint.tensor(&info.name)) {
            assert_eq!(tensor.to_f32().len(), tensor.elements());
        }
    }
    checked(tied::choose_head(&checkpoint, Some(true), false));
    checked(checkpoint.files().check());
    Some(checkpoint)
}
