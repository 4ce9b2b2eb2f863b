//! Converts a dict of keyword arguments to [`LoadOptions`].

use super::error::to_python;
use crate::error::Error;
use crate::llama::{LoadOptions, UnknownName};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::str::FromStr;

impl<'a, 'py> FromPyObject<'a, 'py> for LoadOptions {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let mut options = LoadOptions::default();
        for (name, value) in value.cast::<PyDict>()?.iter() {
            let name: String = name.extract()?;
            let value = Keyword { name: &name, value };
            match name.as_str() {
                "device" => options.device = Some(value.text()?),
                "dtype" => options.dtype = value.name_or(Some("auto"))?,
                "quantize" if value.value.is_none() => {}
                "quantize" => options.quantize = value.name_or(Some("None"))?,
                "compute" => options.compute = value.name_or(None)?.unwrap_or_default(),
                "kv_dtype" => options.kv_dtype = value.name_or(Some("auto"))?,
                "engine" => options.engine = value.name_or(Some("auto"))?,
                "threads" => options.threads = value.value.extract()?,
                "context_length" => options.context_length = value.value.extract()?,
                "max_num_seqs" => options.max_num_seqs = value.value.extract()?,
                "kv_cache_bytes" => options.kv_cache_bytes = value.value.extract()?,
                "prefix_cache" => options.prefix_cache = Some(value.value.extract()?),
                "strict" => options.strict = value.value.extract()?,
                _ => return Err(PyTypeError::new_err(format!("unknown option {name:?}"))),
            }
        }
        Ok(options)
    }
}

struct Keyword<'a, 'py> {
    name: &'a str,
    value: Bound<'py, PyAny>,
}

impl Keyword<'_, '_> {
    fn text(&self) -> PyResult<String> {
        let kind = self.value.get_type().name()?;
        let wrong = |_| PyTypeError::new_err(format!("{} must be a str, not {kind}", self.name));
        self.value.extract().map_err(wrong)
    }

    /// The value with this name; None if the text equals `none`.
    fn name_or<T: FromStr<Err = UnknownName>>(&self, none: Option<&str>) -> PyResult<Option<T>> {
        let text = self.text()?;
        if none == Some(&text) {
            return Ok(None);
        }
        text.parse().map(Some).map_err(|UnknownName { got, known }| {
            let names: Vec<&str> = none.into_iter().chain(known.iter().copied()).collect();
            let reason = format!("{got:?} is not one of {}", names.join(", "));
            to_python(self.value.py(), Error::argument(self.name, reason))
        })
    }
}
