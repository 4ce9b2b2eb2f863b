//! One binary for all Rust tests that use the public crate.

mod checkpoint;
mod checkpoint_files;
mod config;
mod examples;
mod gguf_writer;
mod hostile;
mod llama;
mod quantize;
mod split_gguf;
mod tied;
