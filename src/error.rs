//! One error type for the crate. Variants carry the facts (names, shapes, paths, limits), so that
//! nobody has to parse a message; advice is kept apart, in [`Error::hint`].

use std::path::PathBuf;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, with the facts.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder that should be there is not.
    #[error("{what} not found: {path}")]
    NotFound {
        /// What was looked for, such as "config.json".
        what: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The operating system refused to read something.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file does not follow its own format.
    #[error("{path}: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, with the values that show it.
        reason: String,
    },
    /// A file ends before the data its header promises.
    #[error("{path} is truncated: {what} needs {expected} bytes, the file has {got}")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The part that does not fit.
        what: String,
        /// Bytes the file would need to have.
        expected: u64,
        /// Bytes it has.
        got: u64,
    },
    /// A tensor that the model needs is in none of the files.
    #[error("tensor `{tensor}` is missing in {path}")]
    MissingTensor {
        /// The tensor, in Hugging Face's spelling.
        tensor: String,
        /// The file or folder searched.
        path: PathBuf,
    },
    /// A tensor's shape does not fit the config.
    #[error("tensor `{tensor}` has shape {got:?}, expected {expected:?} in {path}")]
    TensorShape {
        /// The tensor, in Hugging Face's spelling.
        tensor: String,
        /// Its shape in the file.
        got: Vec<usize>,
        /// The shape that the config asks for.
        expected: Vec<usize>,
        /// The file or folder.
        path: PathBuf,
    },
    /// A tensor is stored in a type that is not supported.
    #[error("tensor `{tensor}` is stored as {dtype}, which is not supported, in {path}")]
    TensorType {
        /// The tensor, in Hugging Face's spelling.
        tensor: String,
        /// The file format's name of the type.
        dtype: String,
        /// The file or folder.
        path: PathBuf,
    },
    /// A number in a tensor is not finite, or larger than the type it is to be stored as can hold.
    #[error("tensor `{tensor}` has {value:e} at {at:?}, which cannot be stored as {dtype}, in {path}")]
    TensorValue {
        /// The tensor, in Hugging Face's spelling.
        tensor: String,
        /// The number.
        value: f32,
        /// Its place, an index for each dimension.
        at: Vec<usize>,
        /// The type that it was to be stored as.
        dtype: &'static str,
        /// The file or folder.
        path: PathBuf,
    },
    /// A file that was to be written is there already.
    #[error("{path} is there already")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The operating system refused to write something.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// `strict=True` met something that would otherwise load with a warning.
    #[error("refused by strict: {reason}")]
    Strict {
        /// What the warning would have said.
        reason: String,
    },
    /// A well-formed model that this version, or this engine, cannot run exactly.
    #[error("unsupported {key}: {value}")]
    Unsupported {
        /// The config key or feature, in the file's own spelling.
        key: String,
        /// Its value, and what would be supported.
        value: String,
    },
    /// A prompt that leaves no room in the context.
    #[error("the prompt has {prompt_tokens} tokens, the context holds {context_length}")]
    ContextLength {
        /// Tokens in the prompt.
        prompt_tokens: usize,
        /// Positions of the context.
        context_length: usize,
    },
    /// A device that is unknown, not built in, or not there.
    #[error("device {device}: {reason}")]
    Device {
        /// The device as it was asked for.
        device: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// What is to be loaded is larger than the memory that this process may use.
    #[error("needs {needed} bytes of memory for {what}, of which {available} can be had")]
    OutOfMemory {
        /// What the memory is for.
        what: String,
        /// Bytes that it takes.
        needed: u64,
        /// Bytes that can be had, swap included.
        available: u64,
    },
    /// An argument out of its range.
    #[error("{argument}: {reason}")]
    InvalidArgument {
        /// The argument's name.
        argument: String,
        /// The value and the range.
        reason: String,
    },
    /// The tokenizer or the chat template failed on this input.
    #[error("{reason}")]
    Text {
        /// What failed and why.
        reason: String,
    },
    /// A forward pass failed.
    #[error("{reason}")]
    Generation {
        /// What failed and why.
        reason: String,
    },
    /// The work was cancelled by its caller.
    #[error("cancelled")]
    Cancelled,
    /// The model was loaded by another process, and this one was forked from it: the memory came
    /// along, the threads and what they were doing did not.
    #[error("the model belongs to the process that this one was forked from")]
    Forked,
    /// The object was closed before.
    #[error("{what} is closed")]
    Closed {
        /// What was closed.
        what: &'static str,
    },
    /// A bug of ours: a caught panic, or a state that cannot be.
    #[error("internal error: {reason}")]
    Internal {
        /// The panic's message and place.
        reason: String,
    },
}

impl Error {
    /// What the user can do about it, where something can be done.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Error::ContextLength { .. } => {
                Some("shorten the prompt, or load the model with a larger context_length")
            }
            Error::Strict { .. } => Some("load with strict=False to go on with a warning"),
            Error::OutOfMemory { .. } => {
                Some("give a smaller context_length, or load weights that take less, such as a Q4_0 GGUF")
            }
            Error::Forked => Some(
                "load it again in this process, or start processes with multiprocessing's \"spawn\" method",
            ),
            Error::Truncated { .. } => Some("download the file again"),
            Error::Exists { .. } => Some("give force=True, or --force, to replace it"),
            Error::Internal { .. } => Some("this is a bug in candle-llama; please report it"),
            _ => None,
        }
    }

    /// An argument out of its range.
    pub fn argument(argument: impl Into<String>, reason: impl Into<String>) -> Self {
        Error::InvalidArgument { argument: argument.into(), reason: reason.into() }
    }

    /// A well-formed model that cannot be run exactly.
    pub fn unsupported(key: impl Into<String>, value: impl Into<String>) -> Self {
        Error::Unsupported { key: bounded(key.into()), value: bounded(value.into()) }
    }

    /// A file that does not follow its own format.
    pub fn malformed(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Error::Malformed { path: path.into(), reason: bounded(reason.into()) }
    }

    /// A failed read: [`Error::NotFound`] if nothing is there, else [`Error::Io`].
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        let path = path.into();
        if source.kind() == std::io::ErrorKind::NotFound {
            Error::NotFound { what: "file".into(), path }
        } else {
            Error::Io { path, source }
        }
    }
}

/// A text cut to the length of a message: what it quotes from a file may have any length.
fn bounded(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(500) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}

/// A text from a file, for use in a message: in quotes, and cut after 100 characters.
pub(crate) fn quoted(text: &str) -> String {
    match text.char_indices().nth(100).and_then(|(end, _)| text.get(..end)) {
        Some(start) => format!("{start:?}..."),
        None => format!("{text:?}"),
    }
}
