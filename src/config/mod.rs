//! `config.json` or GGUF metadata to a `LlamaConfig`.
