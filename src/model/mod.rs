//! Token ids in, logits out: one trait, three implementations.
//!
//! - `cpu/`: our decoder on our kernels; every supported config, every storage type
//! - `tensor/`: our decoder in Candle's tensor operations, on any of its devices
//! - `candle.rs`: Candle's own Llama, on any of its devices; refuses configs that it cannot express
//! - `layer.rs`: the names and shapes of a layer's weights, for the first two
//! - `worker.rs`: the thread on which the latter two run
//!
//! Start reading at [`Model`], then `cpu/forward.rs`.

pub mod candle;
pub mod cpu;
mod layer;
pub mod tensor;
mod worker;

use crate::error::{Error, Result};

pub use crate::kernels::Cancel;
pub use crate::kv_cache::KvBlocks;

/// Identifies a sequence. A model keeps its keys and values until [`Model::free`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// The longest salt in bytes. A sequence with a longer one shares nothing: the prefix cache keeps salts, and
/// its memory must be bounded.
pub const MAX_SALT_BYTES: usize = 1024;

/// A sequence that begins, announced before its first span.
#[derive(Clone, Copy, Debug)]
pub struct Beginning<'a> {
    /// All tokens known so far: the prompt, and what was generated after it if the sequence was preempted.
    pub tokens: &'a [u32],
    /// Length of the prompt. RoPE and the choice of kernels may depend on it.
    pub prompt_tokens: usize,
    /// How many leading tokens need not be computed again if their keys and values are cached.
    pub reusable: usize,
    /// Only sequences with equal salts share keys and values.
    pub salt: &'a str,
}

/// The rows of a span whose logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// No row: the span only fills the KV cache.
    None,
    /// The last row.
    Last,
    /// All rows.
    All,
}

impl Rows {
    /// The number of wanted rows in a span of `rows` rows.
    fn count(self, rows: usize) -> usize {
        match self {
            Rows::None => 0,
            Rows::Last => 1,
            Rows::All => rows,
        }
    }
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// The sequence that the tokens belong to.
    pub seq: SeqId,
    /// The tokens; at least one, each below the vocabulary's size.
    pub tokens: &'a [u32],
    /// The position of the first token. All earlier positions have been through `forward`. Keys and
    /// values from this position on are overwritten.
    pub start: usize,
    /// The rows whose logits are wanted.
    pub rows: Rows,
}

impl Span<'_> {
    /// The number of rows whose logits are wanted.
    pub(crate) fn wanted(&self) -> usize {
        self.rows.count(self.tokens.len())
    }
}

/// Logits of some rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Logits {
    /// `(rows, vocab_size)`
    pub values: Vec<f32>,
    /// The length of a row.
    pub vocab_size: usize,
}

impl Logits {
    /// No rows yet, with capacity for `rows` rows.
    ///
    /// # Errors
    /// [`Error::Generation`] if there is no memory.
    pub(crate) fn with_capacity(rows: usize, vocab_size: usize) -> Result<Self> {
        let mut values = Vec::new();
        let reserved = rows.checked_mul(vocab_size).map(|len| values.try_reserve_exact(len));
        if !matches!(reserved, Some(Ok(()))) {
            let reason = format!("no memory for {rows} rows of {vocab_size} logits");
            return Err(Error::Generation { reason });
        }
        Ok(Logits { values, vocab_size })
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.values.len() / self.vocab_size
    }
}

/// The weights of one storage type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage {
    /// The type's name, such as "BF16" or "Q4_1".
    pub dtype: String,
    /// Number of tensors of this type.
    pub count: usize,
    /// Their total size in bytes.
    pub bytes: u64,
}

/// A loaded Llama.
pub trait Model: Send {
    /// Runs the spans, appends their keys and values to the cache, and returns the logits of the wanted
    /// rows, in the order of the spans.
    ///
    /// # Errors
    /// [`Error::Cancelled`] if `cancel` fired; [`Error::Generation`] if the KV cache has no room. After
    /// an error the same spans may be run again; the KV blocks that they took are free.
    fn forward(&mut self, spans: &[Span], cancel: &Cancel) -> Result<Logits>;

    /// As [`Model::forward`]. A model that can pause asks `pauses` between the stages of its work, and
    /// returns None once the answer is true. The next call, with the same spans, goes on from there. One with
    /// other sequences, positions or wanted rows begins anew; tokens are not compared. Meanwhile
    /// [`Model::forward`] may run others. [`Model::free`] takes a sequence out of the paused spans, and the
    /// next call is without it.
    ///
    /// # Errors
    /// As [`Model::forward`]. The spans then begin anew.
    fn forward_until(
        &mut self,
        spans: &[Span],
        _pauses: &mut dyn FnMut() -> bool,
        cancel: &Cancel,
    ) -> Result<Option<Logits>> {
        self.forward(spans, cancel).map(Some)
    }

    /// The stages of [`Model::forward_until`]; 1 if the model cannot pause.
    fn stages(&self) -> usize {
        1
    }

    /// Takes logits back that are no longer needed, so that the next call need not allocate as many.
    fn reclaim(&mut self, _logits: Logits) {}

    /// Announces a sequence before its first span. If it has keys and values, frees them. Without this call
    /// the first span counts as the prompt, and nothing is shared.
    ///
    /// Returns the number of leading tokens whose keys and values are there already: a multiple of the block
    /// size, at most `reusable`. The first span starts there.
    fn begin(&mut self, _seq: SeqId, _beginning: &Beginning) -> usize {
        0
    }

    /// Frees a sequence's keys and values. An unknown sequence is ignored.
    fn free(&mut self, seq: SeqId);

    /// The length of a row of logits.
    fn vocab_size(&self) -> usize;

    /// The number of sequences that is worth running together. Here none gains from it, but none waits for
    /// the whole of another.
    fn max_num_seqs(&self) -> usize {
        8
    }

    /// The most sequences that may have keys and values at the same time, those that pause included.
    fn max_held_seqs(&self) -> usize {
        usize::MAX
    }

    /// The most spans in a call of [`Model::forward`].
    fn max_spans(&self) -> usize {
        1
    }

    /// The fewest rows in a call that are not much slower per row than many.
    fn min_rows(&self) -> usize {
        512
    }

    /// Rows that are processed together. A call with a multiple of this number is the fastest per row.
    fn rows_together(&self) -> usize {
        1
    }

    /// Whether a sequence may reuse what was computed for another one.
    fn shares_prefixes(&self) -> bool {
        false
    }

    /// The numbers of KV blocks, if there is a limit. A sequence that begins takes the cached blocks that it
    /// reuses; they are no longer free.
    fn kv_blocks(&self) -> KvBlocks {
        KvBlocks { total: usize::MAX, free: usize::MAX, cached: 0 }
    }

    /// The weights in memory, by storage type.
    fn storage(&self) -> Vec<Storage>;
}

/// Checks that every span has tokens and that their ids are below `vocab_size`.
fn check_spans(spans: &[Span], vocab_size: usize) -> Result<()> {
    for span in spans {
        if span.tokens.is_empty() {
            return Err(Error::argument("token_ids", "there is no token"));
        }
        if let Some(&id) = span.tokens.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(Error::argument("token_ids", format!("{id} is not below vocab_size {vocab_size}")));
        }
    }
    Ok(())
}
