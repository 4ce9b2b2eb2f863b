//! The KV cache: keys and values of the tokens that sequences have processed.
//!
//! - `block_pool.rs`: owns the KV blocks of 64 positions, counts references, evicts cached blocks
//! - `prefix.rs`: finds full blocks by their tokens and those before them
//! - `paged.rs`: the KV blocks of one sequence; writes in place and never moves data
//!
//! A sequence shares its full blocks with later sequences that begin with the same tokens (the prefix cache).
//! A shared block is never written: a sequence that returns to a position inside one gets a copy.

pub mod block_pool;
pub mod paged;
mod prefix;

pub use block_pool::{BlockPool, KvBlocks, KvShape};
pub use paged::PagedKv;
pub use prefix::Context;
