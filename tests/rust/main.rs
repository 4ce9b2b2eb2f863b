//! One binary for all Rust tests of the crate's public API.

mod checkpoint;
mod checkpoint_files;
mod config;
mod examples;
mod forward;
mod gguf_writer;
mod hostile;
mod llama;
mod prefix_cache;
mod quantize;
mod split_gguf;
mod tied;
