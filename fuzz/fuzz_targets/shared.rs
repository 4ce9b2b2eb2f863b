//! Shared by the targets: a folder in memory, and the checks of a reader's result.

use std::path::Path;

use candle_llama::checkpoint::{Checkpoint, tied};
use candle_llama::error::{Error, Result};
use tempfile::TempDir;

/// A temporary folder, in memory if the system has /dev/shm.
pub fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder to write to")
}

/// Lets the crate catch panics inside the `tokenizers` library and those below it, as it does in normal use.
/// The fuzzer's own hook would end the process first. Any other panic still ends the target.
#[allow(dead_code)] // not every target uses the library
pub fn let_libraries_panic() {
    let end_the_process = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let libraries = ["/tokenizers-", "/spm_precompiled-", "/onig-"];
        let is_in = |file: &str| libraries.iter().any(|library| file.contains(library));
        if panic.location().is_none_or(|place| !is_in(place.file())) {
            end_the_process(panic);
        }
    }));
}

/// Replaces a file.
pub fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("room for a small file");
}

/// The value of a result, if there is one. An error must be the file's fault, and its message must be short.
pub fn checked<T>(result: Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(Error::Internal { reason }) => panic!("a bug: {reason}"),
        Err(error) => {
            assert!(error.to_string().len() < 2500, "a message that is too long: {error}");
            None
        }
    }
}

/// Opens a checkpoint and reads every tensor.
#[allow(dead_code)] // the target for tokenizers has no tensors
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
