//! Token ids in, logits out: one trait, two implementations.
//!
//! - `cpu/`: our decoder on our kernels; any config that this version honours, any storage type
//! - `candle.rs`: Candle's own Llama, on any of its devices; what it cannot express is refused
//!
//! Start reading at [`Model`], then `cpu/forward.rs`.

pub mod candle;
pub mod cpu;

use crate::error::{Error, Result};

pub use crate::kernels::Cancel;

/// Names a sequence; a model keeps its keys and values until [`Model::free`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// For which rows of a span logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// None: the span only fills the cache.
    None,
    /// The last.
    Last,
    /// All.
    All,
}

impl Rows {
    /// How many that is of `rows` rows.
    fn of(self, rows: usize) -> usize {
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
    /// Whose tokens they are.
    pub seq: SeqId,
    /// The tokens; at least one, each below the vocabulary's size.
    pub tokens: &'a [u32],
    /// The position of the first. The positions before it have been through `forward`; those from
    /// it on are overwritten.
    pub start: usize,
    /// Where logits are wanted.
    pub rows: Rows,
}

impl Span<'_> {
    fn wanted(&self) -> usize {
        self.rows.of(self.tokens.len())
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
    /// Room for `rows` rows, none of them there yet.
    fn with_capacity(rows: usize, vocab_size: usize) -> Result<Self> {
        let mut values = Vec::new();
        let reserved = rows.checked_mul(vocab_size).map(|len| values.try_reserve_exact(len));
        if !matches!(reserved, Some(Ok(()))) {
            let reason = format!("no memory for {rows} rows of {vocab_size} logits");
            return Err(Error::Generation { reason });
        }
        Ok(Logits { values, vocab_size })
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.values.len() / self.vocab_size
    }
}

/// How the weights of one type are held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage {
    /// The type's name, such as "BF16" or "Q4_1".
    pub dtype: String,
    /// Tensors of this type.
    pub count: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// A Llama that can be run.
pub trait Model: Send {
    /// Runs the spans, appends their keys and values, and gives the logits of the rows asked for, in
    /// the order of the spans.
    ///
    /// # Errors
    /// [`Error::Cancelled`] if `cancel` fired; [`Error::Generation`] if there is no room. After an
    /// error the same spans may be run again.
    fn forward(&mut self, spans: &[Span], cancel: &Cancel) -> Result<Logits>;

    /// Says how long a sequence's prompt will be, before its first token: RoPE may depend on it. Without
    /// this call the first span counts as the prompt.
    fn begin(&mut self, _seq: SeqId, _prompt_tokens: usize) {}

    /// Forgets a sequence; one that is not known is no error.
    fn free(&mut self, seq: SeqId);

    /// The length of a row of logits.
    fn vocab_size(&self) -> usize;

    /// How many sequences may be decoded together to advantage.
    fn max_num_seqs(&self) -> usize {
        1
    }

    /// How many blocks of [`crate::kernels::KV_BLOCK_POSITIONS`] positions sequences may still take.
    fn free_blocks(&self) -> usize {
        usize::MAX
    }

    /// How the weights are held, by type.
    fn storage(&self) -> Vec<Storage>;
}

/// Checks what every implementation relies on.
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
