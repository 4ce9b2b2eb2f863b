//! The facade for Python. Functions here extract arguments, release the GIL and convert results; they have no
//! other logic. No other module uses pyo3.
//!
//! - `detach.rs`: runs work without the GIL, and stops it on Ctrl-C
//! - `error.rs`: converts our errors to the classes of `candle_llama.errors`
//! - `convert.rs`: converts JSON values and our records to Python's and back
//! - `processor.rs`: calls logits processors, on the engine's thread
//! - `options.rs`: converts keyword arguments to `LoadOptions`
//! - `llama.rs`, `stream.rs`, `tokenizer.rs`: the classes
//! - `quantize.rs`, `roofline.rs`, `system.rs`: the functions

mod convert;
mod detach;
mod error;
mod llama;
mod options;
mod processor;
mod quantize;
mod roofline;
mod stream;
mod system;
mod tokenizer;

use crate::sys::reserve;
use pyo3::prelude::*;

#[global_allocator]
static ALLOCATOR: reserve::Allocator = reserve::Allocator;

#[pymodule(gil_used = false)]
mod _core {
    use super::*;

    #[pymodule_export]
    use super::detach::PyCancellation;
    #[pymodule_export]
    use super::llama::PyLlama;
    #[pymodule_export]
    use super::quantize::quantize;
    #[pymodule_export]
    use super::roofline::roofline_peaks;
    #[pymodule_export]
    use super::stream::{PyMailbox, PyRequest, PyStream};
    #[pymodule_export]
    use super::system::{check_sampling, doctor, estimate_memory, inspect};
    #[pymodule_export]
    use super::tokenizer::PyTokenizer;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        reserve::enable();
        crate::sys::panics::remember();
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
