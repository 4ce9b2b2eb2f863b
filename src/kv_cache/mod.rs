//! Keys and values of the tokens that a sequence has been through.
//!
//! - `block_pool.rs`: blocks of 64 positions, lent to sequences and taken back
//! - `paged.rs`: one sequence's blocks; writes in place and never moves what is written

pub mod block_pool;
pub mod paged;

pub use block_pool::{BlockPool, KvShape};
pub use paged::PagedKv;
