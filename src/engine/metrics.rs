//! Counts of what the engine does.

use std::time::Duration;

/// A snapshot of the engine, after its last forward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Sequences that take part in forward passes.
    pub running: usize,
    /// Sequences that wait for their turn, and those whose readers are slow.
    pub waiting: usize,
    /// KV blocks that running and paused sequences hold.
    pub blocks_used: usize,
    /// KV blocks that can be taken.
    pub blocks_free: usize,
    /// KV blocks among the free ones whose keys and values a later prompt may reuse.
    pub blocks_cached: usize,
    /// Tokens of prompts so far, cached ones included.
    pub tokens_in: u64,
    /// Prompts so far that began with cached keys and values.
    pub prefix_hits: u64,
    /// Tokens of prompts so far whose keys and values were cached.
    pub tokens_cached: u64,
    /// Tokens generated so far.
    pub tokens_out: u64,
    /// How often a sequence lost its KV blocks to an older one, and was computed again.
    pub preemptions: u64,
    /// Sequences that have ended, for whatever reason.
    pub ended: u64,
    /// Time spent in forward passes and sampling.
    pub busy: Duration,
}
