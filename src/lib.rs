//! Load and run any Llama-family checkpoint, on Hugging Face's Candle and on our own CPU kernels.
//!
//! The modules form a ladder. Each imports only modules above it; `tests/test_layers.py` checks this.
//!
//! 1. [`error`]: the error type; its variants carry names, shapes and paths
//! 2. [`sys`]: the operating system: cores, memory
//! 3. [`device`]: `"cpu" | "cuda:0" | "metal"` to a Candle device
//! 4. [`kernels`]: the CPU kernels, on plain slices: all arithmetic that must be fast
//! 5. [`checkpoint`]: files to metadata and named tensors; the tied-head `VarBuilder`
//! 6. [`config`]: `config.json` or GGUF metadata to a `LlamaConfig`
//! 7. [`tokenizer`]: text to ids and back; the text of chat templates
//! 8. [`kv_cache`]: blocks of keys and values
//! 9. [`model`]: `trait Model` and its implementations, `cpu`, `tensor` and `candle`
//! 10. [`sampling`]: logits to a token
//! 11. [`engine`]: runs sequences of token ids, step by step; does not deal with text
//! 12. [`llama`]: the facade: load, generate, stream, chat
//! 13. `bindings` (feature `python`): the facade for Python
//!
//! Start reading at [`llama`], or at [`model::cpu`] for the decoder.

pub mod checkpoint;
pub mod config;
pub mod device;
pub mod engine;
pub mod error;
pub mod kv_cache;
pub mod llama;
pub mod model;
pub mod sampling;
pub mod sys;
pub mod tokenizer;

#[cfg(feature = "python")]
mod bindings;

pub use candle_llama_kernels as kernels;
pub use llama::{Llama, LoadOptions, Prompt};
