//! One binary for all Rust tests that use the public crate.
