//! The facade for Python: extract, detach, convert; no logic. The only home of pyo3.
//!
//! - `detach.rs`: releases the GIL around work, and stops it on Ctrl-C
//! - `error.rs`: our errors as the classes of `candle_llama.errors`
//! - `convert.rs`: JSON values and records to Python's and back
//! - `options.rs`: keywords as `LoadOptions`
//! - `llama.rs`, `tokenizer.rs`: the classes; `quantize.rs`, `roofline.rs`, `system.rs`: functions without one

mod convert;
mod detach;
mod error;
mod llama;
mod options;
mod quantize;
mod roofline;
mod system;
mod tokenizer;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _core {
    use super::*;

    #[pymodule_export]
    use super::llama::{PyLlama, PyStream};
    #[pymodule_export]
    use super::quantize::quantize;
    #[pymodule_export]
    use super::roofline::roofline_peaks;
    #[pymodule_export]
    use super::system::{check_sampling, doctor, estimate_memory, inspect};
    #[pymodule_export]
    use super::tokenizer::PyTokenizer;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        detach::remember_panics();
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
