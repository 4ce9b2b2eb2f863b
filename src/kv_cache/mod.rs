//! The KV cache: keys and values of the tokens that each sequence has processed.
//!
//! - `block_pool.rs`: allocates KV blocks of 64 positions and reuses them
//! - `paged.rs`: the KV blocks of one sequence; writes in place and never moves data

pub mod block_pool;
pub mod paged;

pub use block_pool::{BlockPool, KvShape};
pub use paged::PagedKv;
