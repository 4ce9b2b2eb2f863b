//! Our own decoder: weights stay in their storage type, keys and values are appended in place.
//!
//! - `weights.rs`: the checkpoint's tensors, checked against the config
//! - `forward.rs`: the whole decoder stack, for a chunk of rows at a time
//! - `arithmetic.rs`: which kernel computes a chunk's products, and how activations are rounded
//! - `projector.rs`: runs them

mod arithmetic;
mod forward;
mod projector;
mod weights;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::tied::LmHead;
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::kernels::{Isa, Kernels, WeightType};
use crate::kv_cache::{BlockPool, KvShape, PagedKv};
use crate::model::{Cancel, Logits, Model, SeqId, Span, Storage};
use forward::Scratch;
pub use forward::scratch_bytes;
use std::collections::HashMap;
pub use weights::Types;
use weights::Weights;

/// How to hold and run a model.
#[derive(Clone, Copy, Debug)]
pub struct CpuOptions {
    /// The level of the kernels.
    pub isa: Isa,
    /// Threads, the calling one included.
    pub threads: usize,
    /// Which tensor is the output head.
    pub lm_head: LmHead,
    /// In which types weights are held.
    pub types: Types,
    /// Activations stay f32 in every product, and sums keep one order for prompts and for what is generated.
    /// Else both may be rounded, see docs/kernels.md.
    pub exact: bool,
    /// The type of cached keys and values: F32, F16 or BF16.
    pub kv_dtype: WeightType,
    /// The most bytes that keys and values of all sequences may take.
    pub kv_bytes: u64,
}

/// The most sequences that are decoded together.
const MAX_NUM_SEQS: usize = 8;

/// A Llama on our kernels.
pub struct CpuModel {
    config: LlamaConfig,
    kernels: Kernels,
    exact: bool,
    weights: Weights,
    /// `(head_dim / 2,)`
    inv_freq: Vec<f32>,
    block_pool: BlockPool,
    sequences: HashMap<SeqId, Sequence>,
    scratch: Scratch,
}

#[derive(Default)]
struct Sequence {
    kv: PagedKv,
    /// Positions from here on are generated.
    prompt_tokens: usize,
    /// Its own frequencies, if they depend on its prompt.
    inv_freq: Option<Vec<f32>>,
}

impl CpuModel {
    /// Takes the tensors that `config` asks for out of `checkpoint`.
    ///
    /// # Errors
    /// A checkpoint error for a tensor that is missing, misshaped or of a type that is not supported;
    /// [`Error::Internal`] if no thread can be started; [`Error::Cancelled`].
    pub fn new(
        config: LlamaConfig,
        checkpoint: &Checkpoint,
        options: &CpuOptions,
        cancel: &Cancel,
    ) -> Result<Self> {
        let kernels = Kernels::new(options.isa, options.threads)
            .map_err(|error| Error::Internal { reason: format!("no threads: {error}") })?;
        let packs = !options.exact && options.isa.packs_weights();
        let (lm_head, types) = (options.lm_head, options.types);
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

    /// Tensors of the checkpoint that a Llama of this config does not have.
    pub fn unused_tensors(&self) -> &[String] {
        &self.weights.unused
    }
}

/// Checks that every tensor of a Llama of this config is there, readable and of its shape; gives
/// [`CpuModel::unused_tensors`].
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
        // Reading what a file has lost since it was mapped would kill the process.
        self.weights.files.check()?;
        self.forward_chunks(spans, cancel)
    }

    fn begin(&mut self, seq: SeqId, prompt_tokens: usize) {
        let CpuModel { config, sequences, .. } = self;
        let rope = &config.rope;
        let inv_freq = rope.is_dynamic().then(|| rope.inv_freq(config.head_dim, prompt_tokens));
        let sequence = sequences.entry(seq).or_default();
        (sequence.prompt_tokens, sequence.inv_freq) = (prompt_tokens, inv_freq);
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

    fn free_blocks(&self) -> usize {
        self.block_pool.free_blocks()
    }

    fn storage(&self) -> Vec<Storage> {
        self.weights.storage()
    }
}
