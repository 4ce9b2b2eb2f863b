//! `_core.Tokenizer`.

use super::convert::{self, Text, TokenIds};
use super::detach::{detach_engine, guarded};
use super::error;
use super::llama::messages;
use crate::model::Cancel;
use crate::tokenizer::Tokenizer;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};
use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;

/// Text to ids and back.
#[pyclass(frozen, name = "Tokenizer", module = "candle_llama._core")]
pub(super) struct PyTokenizer(pub(super) Arc<Tokenizer>);

#[pymethods]
impl PyTokenizer {
    /// Reads a folder's tokenizer, or a GGUF file's.
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        detach_engine(py, |_| Tokenizer::open(&path).map(Arc::new)).map(PyTokenizer)
    }

    /// Text to ids; releases the GIL.
    fn encode<'py>(
        &self,
        py: Python<'py>,
        text: Text,
        add_special_tokens: bool,
        split_special_tokens: bool,
    ) -> PyResult<Bound<'py, PyList>> {
        let ids = detach_engine(py, |cancel| {
            self.0.encode_unless_cancelled(&text.0, add_special_tokens, split_special_tokens, cancel)
        })?;
        guarded(py, || PyList::new(py, ids))
    }

    /// Ids to text; releases the GIL.
    fn decode<'py>(
        &self,
        py: Python<'py>,
        ids: TokenIds,
        skip_special_tokens: bool,
    ) -> PyResult<Bound<'py, PyString>> {
        let decode = |cancel: &Cancel| self.0.decode_unless_cancelled(&ids.0, skip_special_tokens, cancel);
        let text = detach_engine(py, decode)?;
        guarded(py, || Ok(PyString::new(py, &text)))
    }

    /// The bytes that a token adds inside a text, none for a special token. None if they depend on the tokens
    /// around it.
    fn token_bytes(&self, py: Python<'_>, token_id: u32) -> PyResult<Option<Cow<'static, [u8]>>> {
        let bytes = self.0.token_bytes(token_id).map_err(|error| error::to_python(py, error))?;
        Ok(bytes.map(Cow::Owned))
    }

    /// The name and the text of a chat template.
    fn choose_chat_template(
        &self,
        py: Python<'_>,
        given: Option<String>,
        has_tools: bool,
    ) -> PyResult<(Option<String>, String)> {
        let chosen = self.0.choose_chat_template(given.as_deref(), has_tools);
        let (name, text) = chosen.map_err(|error| error::to_python(py, error))?;
        Ok((name.map(str::to_owned), text.to_owned()))
    }

    /// The special tokens that chat templates see.
    #[getter]
    fn special_tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (name, token) in self.0.special_tokens() {
            dict.set_item(name, convert::from_json(py, token)?)?;
        }
        Ok(dict)
    }

    /// The number of token ids: every id is smaller.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    /// The token that begins a text.
    #[getter]
    fn bos_token_id(&self) -> Option<u32> {
        self.0.bos_token_id()
    }

    /// The token that ends a text.
    #[getter]
    fn eos_token_id(&self) -> Option<u32> {
        self.0.eos_token_id()
    }

    /// The Jinja source of the chat template.
    #[getter]
    fn chat_template(&self) -> Option<&str> {
        self.0.chat_template()
    }

    /// Warnings about the tokenizer's files.
    #[getter]
    fn warnings(&self) -> Vec<String> {
        messages(self.0.warnings())
    }

    /// The tokenizer's source, such as "tokenizer.json".
    #[getter]
    fn kind(&self) -> &str {
        self.0.kind()
    }
}
