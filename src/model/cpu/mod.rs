//! Our own decoder: weights stay in their storage type, keys and values are appended in place.
//!
//! - `weights.rs`: the checkpoint's tensors, checked against the config
//! - `forward.rs`: the whole decoder stack, for a chunk of rows at a time
//! - `arithmetic.rs`: which kernel computes a chunk's products, and how activations are rounded
//! - `projector.rs`: runs those products

mod arithmetic;
mod forward;
mod projector;
mod weights;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::background::no_thread;
use crate::checkpoint::tied::LmHead;
use crate::config::LlamaConfig;
use crate::error::Result;
use crate::kernels::{Isa, Kernels, WeightType};
use crate::kv_cache::{BlockPool, KvShape, PagedKv};
use crate::model::{Beginning, Cancel, KvBlocks, Logits, Model, SeqId, Span, Storage};
use crate::sys::reserve;
use forward::Scratch;
pub use forward::scratch_bytes;
use std::collections::HashMap;
pub use weights::Types;
use weights::Weights;

/// How to load and run a model.
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// The kernels' ISA.
    pub isa: Isa,
    /// Number of threads, including the calling one.
    pub threads: usize,
    /// Which tensor is the output head.
    pub lm_head: LmHead,
    /// The types of the weights in memory.
    pub types: Types,
    /// True: activations stay f32 in every product, and prefill and decode add in the same order.
    /// False: activations may be rounded, in prefill and in decode; docs/kernels.md has the table.
    pub exact: bool,
    /// The type of cached keys and values: F32, F16 or BF16.
    pub kv_dtype: WeightType,
    /// Maximum bytes of the keys and values of all sequences together.
    pub kv_bytes: u64,
}

/// The maximum number of sequences that are decoded together. More gain nothing: products are then bound by
/// arithmetic.
const MAX_NUM_SEQS: usize = 32;

/// The fewest rows of a prompt that are worth a pass.
const MIN_PROMPT_ROWS: usize = 24;

/// A Llama on our kernels.
pub struct CpuModel {
    config: LlamaConfig,
    kernels: Kernels,
    exact: bool,
    weights: Weights,
    /// RoPE frequencies, `(head_dim / 2,)`.
    inv_freq: Vec<f32>,
    block_pool: BlockPool,
    sequences: HashMap<SeqId, Sequence>,
    scratch: Scratch,
}

#[derive(Default)]
struct Sequence {
    kv: PagedKv,
    /// Length of the prompt; tokens from this position on are generated.
    prompt_tokens: usize,
    /// RoPE frequencies of this sequence, if they depend on the length of its prompt.
    inv_freq: Option<Vec<f32>>,
}

impl CpuModel {
    /// Loads the tensors that `config` requires from `checkpoint`.
    ///
    /// # Errors
    /// A checkpoint error for a tensor that is missing, misshaped or of a type that is not supported;
    /// [`crate::error::Error::Device`] if no thread can be started, [`crate::error::Error::Generation`] if
    /// there is no memory for one; [`crate::error::Error::Cancelled`].
    pub fn new(
        config: LlamaConfig,
        checkpoint: &Checkpoint,
        options: &CpuOptions,
        cancel: &Cancel,
    ) -> Result<Self> {
        reserve::check_threads(options.threads)?;
        let kernels = Kernels::new(options.isa, options.threads).map_err(no_thread)?;
        let packs = !options.exact && options.isa.packs_weights();
        let (lm_head, types) = (options.lm_head, options.types.clone());
        let weights = Weights::load(&config, checkpoint, lm_head, types, Some(&kernels), packs, cancel)?;
        let shape = KvShape {
            layers: config.num_hidden_layers,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            dtype: options.kv_dtype,
        };
        Ok(CpuModel {
            inv_freq: config.rope.inv_freq(config.head_dim, 0),
            block_pool: BlockPool::new(shape, options.kv_bytes)?,
            sequences: HashMap::new(),
            scratch: Scratch::default(),
            config,
            kernels,
            exact: options.exact,
            weights,
        })
    }

    /// Names of the checkpoint's tensors that a Llama of this config does not have.
    pub fn unused_tensors(&self) -> &[String] {
        &self.weights.unused
    }
}

/// Checks that every tensor that the config requires exists, is readable and has the right shape. Returns
/// the same names as [`CpuModel::unused_tensors`].
///
/// # Errors
/// As [`CpuModel::new`].
pub fn check_tensors(config: &LlamaConfig, checkpoint: &Checkpoint, lm_head: LmHead) -> Result<Vec<String>> {
    let weights = Weights::load(config, checkpoint, lm_head, Types::default(), None, false, &Cancel::never());
    Ok(weights?.unused)
}

impl Model for CpuModel {
    fn forward(&mut self, spans: &[Span], cancel: &Cancel) -> Result<Logits> {
        super::check_spans(spans, self.config.vocab_size)?;
        // If a mapped file was cut short since, reading the missing part would kill the process.
        self.weights.files.check()?;
        self.forward_chunks(spans, cancel)
    }

    fn begin(&mut self, seq: SeqId, beginning: &Beginning) -> usize {
        let CpuModel { config, sequences, .. } = self;
        let prompt_tokens = beginning.prompt_tokens;
        let rope = &config.rope;
        let inv_freq = rope.is_dynamic().then(|| rope.inv_freq(config.head_dim, prompt_tokens));
        let sequence = sequences.entry(seq).or_default();
        (sequence.prompt_tokens, sequence.inv_freq) = (prompt_tokens, inv_freq);
        0
    }

    fn free(&mut self, seq: SeqId) {
        if let Some(sequence) = self.sequences.remove(&seq) {
            sequence.kv.release(&mut self.block_pool);
        }
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn max_num_seqs(&self) -> usize {
        MAX_NUM_SEQS
    }

    fn max_spans(&self) -> usize {
        usize::MAX
    }

    fn min_prompt_rows(&self) -> usize {
        MIN_PROMPT_ROWS
    }

    fn kv_blocks(&self) -> KvBlocks {
        let free = self.block_pool.free_blocks();
        KvBlocks { total: self.block_pool.max_blocks(), free, cached: 0 }
    }

    fn storage(&self) -> Vec<Storage> {
        self.weights.storage()
    }
}
