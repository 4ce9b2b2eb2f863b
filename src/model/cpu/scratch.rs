//! The buffers of a chunk, and how much memory they take.

use super::MAX_NUM_SEQS;
use super::arithmetic::{Arithmetic, ProductKind, runs};
use super::forward::CHUNK_ROWS;
use crate::config::LlamaConfig;
use crate::kernels::{GemmScratch, QuantizedRows, ScratchShape, thread_scratch_bytes};

/// Buffers for one chunk; they grow to the largest chunk seen and stay.
#[derive(Default)]
pub(super) struct Scratch {
    /// `(rows, hidden_size)`
    pub(super) normed: Vec<f32>,
    /// `(rows, num_attention_heads, head_dim)`
    pub(super) queries: Vec<f32>,
    /// `(rows, num_key_value_heads, head_dim)`
    pub(super) keys: Vec<f32>,
    /// As `keys`.
    pub(super) values: Vec<f32>,
    /// As `queries`.
    pub(super) attended: Vec<f32>,
    /// `(rows, intermediate_size)`
    pub(super) gate: Vec<f32>,
    /// As `gate`.
    pub(super) up: Vec<f32>,
    /// Those of chunks that are through the layers.
    pub(super) residuals: Vec<Residuals>,
    /// The input of a product, quantised to 8 bits.
    pub(super) quantized: QuantizedRows,
    pub(super) gemm: GemmScratch,
    /// The most rows so far.
    pub(super) largest: BufferRows,
}

/// Buffers that a chunk keeps while it is on its way through the layers, so that others can pass it.
#[derive(Default)]
pub(super) struct Residuals {
    /// `(rows, hidden_size)`: the residual stream
    pub(super) x: Vec<f32>,
    /// `(rows, head_dim / 2)`
    pub(super) cos: Vec<f32>,
    /// As `cos`.
    pub(super) sin: Vec<f32>,
}

/// An upper bound for the buffers of a step on `threads` threads in bytes, including the logits of one row of
/// each sequence, which are kept, and a copy of one of them.
pub fn scratch_bytes(config: &LlamaConfig, threads: usize) -> u64 {
    step_bytes(config, threads, CHUNK_ROWS)
}

/// As [`scratch_bytes`], for a step of `rows` rows.
pub(super) fn step_bytes(config: &LlamaConfig, threads: usize, rows: usize) -> u64 {
    let (hidden, inner, head_dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (query_heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    // Keys and values are also converted to the KV cache's type. Two chunks may have [`Residuals`], of which
    // one is paused.
    let heads = 2 * query_heads + 3 * kv_heads + 2;
    // Kernels copy the input of a product into their own layout: one copy in f32, one in 8 bits.
    let widest = hidden.max(inner).max(query_heads * head_dim);
    let inputs = widest + QuantizedRows::row_bytes(widest.next_multiple_of(32)) / size_of::<f32>();
    let row = 3 * hidden + heads * head_dim + 2 * inner + inputs;
    // Kernels add rows of zeros to fill their last panel.
    let elements = (rows.next_multiple_of(32) as u64).saturating_mul(row as u64);
    let logits = (rows.min(MAX_NUM_SEQS) as u64 + 1).saturating_mul(config.vocab_size as u64);
    let own = elements.saturating_add(logits).saturating_mul(size_of::<f32>() as u64);
    let shape = ScratchShape { rows, cols: widest, head_dim, group: query_heads / kv_heads };
    let per_thread = thread_scratch_bytes(shape) as u64;
    own.saturating_add(per_thread.saturating_mul(threads as u64))
}

/// What the size of the buffers of a step depends on, because each kernel has buffers of its own.
#[derive(Clone, Copy, Default, PartialEq)]
pub(super) struct BufferRows {
    /// All rows.
    all: usize,
    /// The most consecutive rows with each of [`ProductKind::ALL`].
    of_kind: [usize; ProductKind::ALL.len()],
}

impl BufferRows {
    /// Those of a chunk. Its rows go through the layers, some of them also through the head.
    pub(super) fn of_chunk(layers: &[Arithmetic], head: &[Arithmetic]) -> Self {
        let of_kind = ProductKind::ALL.map(|kind| {
            let runs = [layers, head].into_iter().flat_map(|rows| runs(rows, |row| row.product));
            runs.filter(|(_, of)| *of == kind).map(|(rows, _)| rows.len()).max().unwrap_or(0)
        });
        BufferRows { all: layers.len(), of_kind }
    }

    /// The larger number of each.
    pub(super) fn max(self, other: Self) -> Self {
        let of_kind = std::array::from_fn(|kind| self.of_kind[kind].max(other.of_kind[kind]));
        BufferRows { all: self.all.max(other.all), of_kind }
    }
}
