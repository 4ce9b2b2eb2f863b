//! Our own decoder: weights stay in their storage type, keys and values are appended in place.
//!
//! - `weights.rs`: the checkpoint's tensors, checked against the config
//! - `forward.rs`: the whole decoder stack, for a chunk of rows at a time
//! - `arithmetic.rs`: which kernel computes a row's products, and how activations are rounded
//! - `projector.rs`: runs those products
//! - `scratch.rs`: the buffers of a chunk

mod arithmetic;
mod forward;
mod projector;
mod scratch;
mod weights;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::background::no_thread;
use crate::checkpoint::tied::LmHead;
use crate::config::LlamaConfig;
use crate::error::Result;
use crate::kernels::{Isa, Kernels, WeightType};
use crate::kv_cache::{BlockPool, Context, KvShape, PagedKv};
use crate::model::{Beginning, Cancel, KvBlocks, Logits, MAX_SALT_BYTES, Model, SeqId, Span, Storage};
use crate::sys::reserve;
use arithmetic::Phase;
use forward::{Chunk, SUBLAYERS};
use scratch::Scratch;
pub use scratch::scratch_bytes;
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
    /// Whether sequences reuse the keys and values of others that begin with the same tokens. A reused block
    /// has the same bits as one that is computed again.
    pub prefix_cache: bool,
    /// Maximum bytes of keys and values that no sequence needs, and that are kept for later ones.
    pub cached_kv_bytes: u64,
}

/// The maximum number of sequences that are decoded together. More gain nothing: products are then bound by
/// arithmetic.
const MAX_NUM_SEQS: usize = 32;

/// The fewest rows in a pass that are not much slower per row than many: reading and unpacking the weights is
/// then a small part of it.
const MIN_ROWS: usize = 24;

/// A Llama on our kernels.
pub struct CpuModel {
    config: LlamaConfig,
    kernels: Kernels,
    exact: bool,
    weights: Weights,
    /// RoPE frequencies, `(head_dim / 2,)`.
    inv_freq: Vec<f32>,
    block_pool: BlockPool,
    prefix_cache: bool,
    sequences: HashMap<SeqId, Sequence>,
    scratch: Scratch,
    /// Rows that pause between two sublayers.
    paused: Option<Chunk>,
    /// Logits that were given back.
    spare_logits: Vec<f32>,
}

struct Sequence {
    kv: PagedKv,
    /// Length of the prompt; tokens from this position on are generated.
    prompt_tokens: usize,
    /// RoPE frequencies of this sequence, if they depend on the length of its prompt.
    inv_freq: Option<Vec<f32>>,
}

impl Sequence {
    fn new(config: &LlamaConfig, prompt_tokens: usize, kv: PagedKv) -> Self {
        let rope = &config.rope;
        let inv_freq = rope.is_dynamic().then(|| rope.inv_freq(config.head_dim, prompt_tokens));
        Sequence { kv, prompt_tokens, inv_freq }
    }
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
            block_pool: BlockPool::new(shape, options.kv_bytes, options.cached_kv_bytes)?,
            prefix_cache: options.prefix_cache,
            sequences: HashMap::new(),
            scratch: Scratch::default(),
            paused: None,
            spare_logits: Vec::new(),
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

    /// What the keys and values of a sequence depend on besides its tokens. None if it shares nothing.
    fn context(&self, beginning: &Beginning) -> Option<Context> {
        (self.prefix_cache && beginning.salt.len() <= MAX_SALT_BYTES).then(|| Context {
            arithmetic: (!self.exact).then(|| Phase::of(0, beginning.prompt_tokens) as u8),
            rope_tokens: self.config.rope.stretched_tokens(beginning.prompt_tokens),
            salt: beginning.salt.into(),
        })
    }

    /// Checks spans, and that the weights can be read.
    fn check(&self, spans: &[Span]) -> Result<()> {
        crate::model::check_spans(spans, self.config.vocab_size)?;
        // If a mapped file was cut short since, reading the missing part would kill the process.
        self.weights.files.check()
    }

    /// Makes room for the keys and values of the spans. After an error, the sequences have no more blocks
    /// than their earlier positions need.
    fn reserve(&mut self, spans: &[Span]) -> Result<()> {
        for span in spans {
            if !self.sequences.contains_key(&span.seq) {
                let prompt_tokens = span.start + span.tokens.len();
                self.sequences
                    .insert(span.seq, Sequence::new(&self.config, prompt_tokens, PagedKv::default()));
            }
        }
        self.truncate(spans);
        let CpuModel { block_pool, sequences, .. } = self;
        let reserved = spans.iter().try_for_each(|span| {
            let kv = &mut sequences.get_mut(&span.seq).expect("it has begun").kv;
            kv.reserve(span.start..span.start + span.tokens.len(), block_pool)
        });
        if reserved.is_err() {
            self.truncate(spans);
        }
        reserved
    }

    /// Drops keys and values from the start of each span on.
    fn truncate(&mut self, spans: &[Span]) {
        for span in spans {
            if let Some(sequence) = self.sequences.get_mut(&span.seq) {
                sequence.kv.truncate(span.start, &mut self.block_pool);
            }
        }
    }

    /// Records that the spans went through all layers, and shares the blocks that are full now.
    fn complete(&mut self, spans: &[Span]) {
        for span in spans {
            self.sequences.get_mut(&span.seq).expect("it has begun").kv.complete(span.start, span.tokens);
        }
        for span in spans {
            self.sequences.get_mut(&span.seq).expect("it has begun").kv.share(&mut self.block_pool);
        }
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
        self.check(spans)?;
        let logits = self.forward_chunks(spans, cancel);
        if logits.is_err() {
            // The blocks that were taken for the spans may be needed for others first.
            self.truncate(spans);
        }
        logits
    }

    fn forward_until(
        &mut self,
        spans: &[Span],
        pauses: &mut dyn FnMut() -> bool,
        cancel: &Cancel,
    ) -> Result<Option<Logits>> {
        let chunk = self.paused.take().filter(|chunk| chunk.is_of(spans));
        let logits = self.check(spans).and_then(|()| self.forward_chunk_until(chunk, spans, pauses, cancel));
        if logits.is_err() {
            self.truncate(spans);
        }
        logits
    }

    fn stages(&self) -> usize {
        SUBLAYERS * self.config.num_hidden_layers
    }

    fn reclaim(&mut self, logits: Logits) {
        // The logits of whole prompts may be much larger, and are seldom wanted.
        if logits.rows() <= MAX_NUM_SEQS {
            self.spare_logits = logits.values;
        }
    }

    fn begin(&mut self, seq: SeqId, beginning: &Beginning) -> usize {
        self.free(seq);
        let &Beginning { tokens, prompt_tokens, reusable, .. } = beginning;
        let kv = match self.context(beginning) {
            Some(context) => {
                // In exact mode, tokens that were read equal those that were generated.
                let max_shared = if self.exact { usize::MAX } else { prompt_tokens };
                let tokens = &tokens[..reusable.min(tokens.len())];
                PagedKv::shared(context, max_shared, tokens, &mut self.block_pool)
            }
            None => PagedKv::default(),
        };
        let cached_tokens = kv.cached_tokens();
        self.sequences.insert(seq, Sequence::new(&self.config, prompt_tokens, kv));
        cached_tokens
    }

    fn free(&mut self, seq: SeqId) {
        if let Some(mut sequence) = self.sequences.remove(&seq) {
            sequence.kv.truncate(0, &mut self.block_pool);
        }
        if let Some(chunk) = &mut self.paused {
            chunk.remove(seq, &self.config);
        }
        self.paused.take_if(|chunk| chunk.is_empty());
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

    fn min_rows(&self) -> usize {
        MIN_ROWS
    }

    fn rows_together(&self) -> usize {
        self.kernels.panel_rows()
    }

    fn shares_prefixes(&self) -> bool {
        self.prefix_cache
    }

    fn kv_blocks(&self) -> KvBlocks {
        self.block_pool.blocks()
    }

    fn storage(&self) -> Vec<Storage> {
        self.weights.storage()
    }
}
