//! Candle's own Llama behind our [`Model`] trait, on any device that Candle supports.
//!
//! It is built from our `VarBuilder` and our `LlamaConfig`. Candle returns the logits of the last row only,
//! so a span that wants all rows is run one token per call.
//!
//! It runs on a thread of its own ([`Worker`]), which checks for a cancellation between chunks.
//!
//! Source: `candle_transformers::models::llama`.

use crate::checkpoint::Checkpoint;
use crate::checkpoint::tied::{HeadChoice, var_builder};
use crate::config::{LlamaConfig, RopeScaling};
use crate::device::has_flash_attention;
use crate::error::{Error, Result};
use crate::kernels::Activation;
use crate::model::worker::{OwnedSpan, Runner, Worker};
use crate::model::{Cancel, Logits, Model, Rows, SeqId, Span, Storage, cpu};
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::llama as stock;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Maximum rows per call. This bounds the work that continues after a cancellation. Smaller chunks would be
/// slow, because Candle copies every weight to another layout in each call.
const CHUNK_ROWS: usize = 512;

/// Candle's Llama.
pub struct CandleModel {
    worker: Worker,
    vocab_size: usize,
    storage: Vec<Storage>,
    unused: Vec<String>,
}

impl CandleModel {
    /// Loads the checkpoint through Candle.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a config that Candle's Llama cannot express; a checkpoint error for
    /// tensors that are missing or misshaped; [`Error::Device`] if the device fails.
    pub fn new(
        config: &LlamaConfig,
        checkpoint: Arc<Checkpoint>,
        head: &HeadChoice,
        dtype: DType,
        device: &Device,
        context_length: usize,
    ) -> Result<Self> {
        let stock_config = stock_config(config, context_length, has_flash_attention(device))?;
        // Checked here first, because our errors name the tensor and Candle's only carry text.
        let unused = cpu::check_tensors(config, &checkpoint, head.lm_head)?;
        let infos = checkpoint.infos();
        let elements: u64 = infos.iter().map(|info| info.shape.iter().product::<usize>() as u64).sum();
        let storage = Storage {
            dtype: format!("{dtype:?}"),
            count: infos.len(),
            bytes: elements * dtype.size_in_bytes() as u64,
        };
        let builder = var_builder(checkpoint, head, dtype, device);
        let runner = Stock {
            model: stock::Llama::load(builder, &stock_config).map_err(failed)?,
            empty: stock::Cache::new(true, dtype, &stock_config, device).map_err(failed)?,
            sequences: HashMap::new(),
            device: device.clone(),
            vocab_size: config.vocab_size,
        };
        Ok(CandleModel {
            worker: Worker::new(runner)?,
            vocab_size: config.vocab_size,
            storage: vec![storage],
            unused,
        })
    }

    /// Names of the checkpoint's tensors that a Llama of this config does not have.
    pub fn unused_tensors(&self) -> &[String] {
        &self.unused
    }
}

impl Model for CandleModel {
    fn forward(&mut self, spans: &[Span], cancel: &Cancel) -> Result<Logits> {
        super::check_spans(spans, self.vocab_size)?;
        self.worker.forward(spans, cancel)
    }

    fn free(&mut self, seq: SeqId) {
        self.worker.free(seq);
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn storage(&self) -> Vec<Storage> {
        self.storage.clone()
    }
}

/// The state that the thread owns.
struct Stock {
    model: stock::Llama,
    /// An empty cache; its clones share the rotary tables.
    empty: stock::Cache,
    sequences: HashMap<SeqId, Sequence>,
    device: Device,
    vocab_size: usize,
}

struct Sequence {
    cache: stock::Cache,
    position: usize,
}

impl Runner for Stock {
    fn forward(&mut self, spans: &[OwnedSpan], stop: &AtomicBool) -> Result<Logits> {
        let mut logits = Logits::with_capacity(spans.iter().map(OwnedSpan::wanted).sum(), self.vocab_size)?;
        let result = spans.iter().try_for_each(|span| self.span(span, &mut logits, stop));
        if result.is_err() {
            // The caches of these sequences may be half written.
            spans.iter().for_each(|span| self.free(span.seq));
        }
        result.map(|()| logits)
    }

    fn free(&mut self, seq: SeqId) {
        self.sequences.remove(&seq);
    }
}

impl Stock {
    fn span(&mut self, span: &OwnedSpan, logits: &mut Logits, stop: &AtomicBool) -> Result<()> {
        let done = self.sequences.get(&span.seq).map_or(0, |sequence| sequence.position);
        if done != span.start {
            let reason = format!("position {} cannot follow {done}: Candle's cache only appends", span.start);
            return Err(Error::Generation { reason });
        }
        let chunks = span.tokens.chunks(if span.rows == Rows::All { 1 } else { CHUNK_ROWS });
        let last_chunk = chunks.len() - 1;
        for (index, tokens) in chunks.enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            let last = self.step(span.seq, tokens).map_err(failed)?;
            if span.rows == Rows::All || span.rows == Rows::Last && index == last_chunk {
                logits.values.extend(last);
            }
        }
        Ok(())
    }

    /// Runs `tokens` and returns the logits after the last one, `(vocab_size,)`.
    fn step(&mut self, seq: SeqId, tokens: &[u32]) -> candle_core::Result<Vec<f32>> {
        let sequence =
            self.sequences.entry(seq).or_insert_with(|| Sequence { cache: self.empty.clone(), position: 0 });
        let input = Tensor::new(tokens, &self.device)?.unsqueeze(0)?;
        let logits = self.model.forward(&input, sequence.position, &mut sequence.cache)?;
        sequence.position += tokens.len();
        logits.squeeze(0)?.to_dtype(DType::F32)?.to_vec1()
    }
}

/// Converts the config to the type that Candle's own Llama takes. That Llama can then be loaded through our
/// [`var_builder`].
///
/// - `context_length`: the number of positions in the rotary tables
/// - `use_flash_attn`: needs the feature `flash-attn` and a CUDA device
///
/// # Errors
/// [`Error::Unsupported`] for what Candle's Llama cannot express.
pub fn stock_config(
    config: &LlamaConfig,
    context_length: usize,
    use_flash_attn: bool,
) -> Result<stock::Config> {
    let refused = |key: &str, value: String| {
        Error::unsupported(key, format!("{value}: Candle's Llama cannot express it; use engine=\"cpu\""))
    };
    if config.head_dim * config.num_attention_heads != config.hidden_size {
        return Err(refused("head_dim", config.head_dim.to_string()));
    }
    for (key, has_bias) in [("attention_bias", config.attention_bias), ("mlp_bias", config.mlp_bias)] {
        if has_bias {
            return Err(refused(key, "true".into()));
        }
    }
    if config.hidden_act != Activation::Silu {
        return Err(refused("hidden_act", config.hidden_act.name().into()));
    }
    let scaling = config.rope.without_factors(config.head_dim);
    let scaling = scaling.ok_or_else(|| refused("rope_freqs.weight", "present".into()))?;
    let rope_scaling = match &scaling {
        RopeScaling::Default => None,
        &RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => Some(stock::Llama3RopeConfig {
            factor: factor as f32,
            low_freq_factor: low_freq_factor as f32,
            high_freq_factor: high_freq_factor as f32,
            original_max_position_embeddings,
            rope_type: stock::Llama3RopeType::Llama3,
        }),
        other => return Err(refused("rope_type", other.rope_type())),
    };
    Ok(stock::Config {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        use_flash_attn,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope.theta as f32,
        bos_token_id: config.bos_token_id,
        eos_token_id: None,
        rope_scaling,
        // The length of the rotary tables. Candle also drops old keys when they exceed this number, but
        // counts their heads instead of their positions. So it must not be below either.
        max_position_embeddings: context_length.max(config.num_key_value_heads),
        // Our VarBuilder supplies the right head, so Candle must always ask for it.
        tie_word_embeddings: false,
    })
}

/// Wraps an error of Candle's, with its message.
fn failed(error: candle_core::Error) -> Error {
    Error::Generation { reason: format!("Candle: {error}") }
}
