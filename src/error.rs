//! The crate's one error type. Variants carry the facts (names, shapes, paths, limits), so that nobody has to
//! parse a message. Advice is kept apart, in [`Error::hint`].

use std::path::PathBuf;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as data.
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
    /// A file ends before the data that its header describes.
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
        /// The shape that the config implies.
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
    /// A number in a tensor is not finite, or too large for the type in which it is to be stored.
    #[error("tensor `{tensor}` has {value:e} at {at:?}, which cannot be stored as {dtype}, in {path}")]
    TensorValue {
        /// The tensor, in Hugging Face's spelling.
        tensor: String,
        /// The number.
        value: f32,
        /// Its position: one index per dimension.
        at: Vec<usize>,
        /// The type in which it was to be stored.
        dtype: &'static str,
        /// The file or folder.
        path: PathBuf,
    },
    /// A file that was to be written already exists.
    #[error("{path} already exists")]
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
    /// `strict=True` refused something that would otherwise load with a warning.
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
    /// A text that has more tokens than the context, which shows without tokenising it.
    #[error(
        "the text of {bytes} bytes has at least {prompt_tokens} tokens, the context holds {context_length}"
    )]
    TextLength {
        /// Bytes in the text.
        bytes: usize,
        /// The fewest tokens that it can have.
        prompt_tokens: usize,
        /// Positions of the context.
        context_length: usize,
    },
    /// A device that is unknown, not supported by this build, or absent from this machine.
    #[error("device {device}: {reason}")]
    Device {
        /// The device's name as the caller gave it.
        device: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// A model or a buffer needs more memory than this process may use.
    #[error("needs {needed} bytes of memory for {what}, of which {available} can be had")]
    OutOfMemory {
        /// What the memory is for.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes available, including swap.
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
    /// A function of the caller failed, with an error of its own.
    #[error("a function of the caller failed: {source}")]
    Callback {
        /// Its error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The work was cancelled by its caller.
    #[error("cancelled")]
    Cancelled,
    /// The model was loaded before this process was forked. The fork copied the memory, but not the threads
    /// that work on it.
    #[error("the model belongs to the process that this one was forked from")]
    Forked,
    /// The object has been closed.
    #[error("{what} is closed")]
    Closed {
        /// The object's name.
        what: &'static str,
    },
    /// A bug in this crate: a caught panic or an impossible state.
    #[error("internal error: {reason}")]
    Internal {
        /// The panic's message and location.
        reason: String,
    },
}

impl Error {
    /// What the user can do about the error, if anything.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Error::ContextLength { .. } | Error::TextLength { .. } => {
                Some("shorten the prompt, or load the model with a larger context_length")
            }
            Error::Strict { .. } => Some("load with strict=False to get a warning instead"),
            Error::OutOfMemory { .. } => {
                Some("pass a smaller context_length, or load smaller weights, such as a Q4_0 GGUF")
            }
            Error::Forked => Some(
                "load it again in this process, or start processes with multiprocessing's \"spawn\" method",
            ),
            Error::Truncated { .. } => Some("download the file again"),
            Error::Exists { .. } => Some("pass force=True, or --force, to replace it"),
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

/// Cuts a message to 500 characters: the parts that it quotes from a file may have any length.
fn bounded(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(500) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}

/// A message for people, without characters that change how a terminal shows it: control characters, such as
/// ESC and BEL, and those that reverse the direction of text. Messages quote texts from files.
pub fn printable(text: &str) -> String {
    let is_plain = |character: char| match character {
        '\n' | '\t' => true,
        '\u{061C}' | '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' => false,
        _ => !character.is_control(),
    };
    let escaped = |character: char| format!("\\u{{{:x}}}", u32::from(character));
    text.chars().map(|c| if is_plain(c) { c.to_string() } else { escaped(c) }).collect()
}

/// A text from a file, for use in a message: in quotes, and cut after 100 characters.
pub(crate) fn quoted(text: &str) -> String {
    match text.char_indices().nth(100).and_then(|(end, _)| text.get(..end)) {
        Some(start) => format!("{start:?}..."),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_no_characters_that_control_a_terminal() {
        let text = "tensor `\u{1b}[2J\u{7}a\u{9b}\u{202e}b\u{2066}`\tà 日\n";
        let expected = r"tensor `\u{1b}[2J\u{7}a\u{9b}\u{202e}b\u{2066}`".to_owned() + "\tà 日\n";
        assert_eq!(printable(text), expected);
    }
}
