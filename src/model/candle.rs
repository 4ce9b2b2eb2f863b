//! Candle's own Llama behind our [`Model`]: any of Candle's devices.
//!
//! It is built from our `VarBuilder` and from our reading of the config. It gives the logits of the
//! last row only, so more rows cost one call each; a cancelled call ends with the chunk it is in.
//!
//! Source: `candle_transformers::models::llama`.

use crate::checkpoint::Checkpoint;
use crate::checkpoint::tied::{HeadChoice, var_builder};
use crate::config::{LlamaConfig, RopeScaling};
use crate::device::has_flash_attention;
use crate::error::{Error, Result};
use crate::model::{Cancel, Logits, Model, Rows, SeqId, Span, Storage, cpu};
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::llama as stock;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long one chunk of a prompt should take: nothing can stop Candle inside a call.
const CHUNK_TIME: Duration = Duration::from_millis(80);
const FIRST_CHUNK: usize = 16;
const MOST_ROWS: usize = 512;

/// Candle's Llama.
pub struct CandleModel {
    model: stock::Llama,
    /// A cache that no token has been through; cloning it shares the rotary tables.
    empty: stock::Cache,
    sequences: HashMap<SeqId, Sequence>,
    device: Device,
    vocab_size: usize,
    storage: Vec<Storage>,
    chunk_rows: usize,
}

struct Sequence {
    cache: stock::Cache,
    position: usize,
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
        // Candle's errors are prose; ours name the tensor.
        cpu::check_tensors(config, &checkpoint, head.lm_head)?;
        let infos = checkpoint.infos();
        let elements: u64 = infos.iter().map(|info| info.shape.iter().product::<usize>() as u64).sum();
        let storage = Storage {
            dtype: format!("{dtype:?}"),
            count: infos.len(),
            bytes: elements * dtype.size_in_bytes() as u64,
        };
        let builder = var_builder(checkpoint, head, dtype, device);
        let model = stock::Llama::load(builder, &stock_config).map_err(failed)?;
        let empty = stock::Cache::new(true, dtype, &stock_config, device).map_err(failed)?;
        Ok(CandleModel {
            model,
            empty,
            sequences: HashMap::new(),
            device: device.clone(),
            vocab_size: config.vocab_size,
            storage: vec![storage],
            chunk_rows: FIRST_CHUNK,
        })
    }

    /// The logits after `tokens`, `(vocab_size,)`.
    fn step(&mut self, seq: SeqId, tokens: &[u32]) -> candle_core::Result<Vec<f32>> {
        let sequence =
            self.sequences.entry(seq).or_insert_with(|| Sequence { cache: self.empty.clone(), position: 0 });
        let input = Tensor::new(tokens, &self.device)?.unsqueeze(0)?;
        let logits = self.model.forward(&input, sequence.position, &mut sequence.cache)?;
        sequence.position += tokens.len();
        logits.squeeze(0)?.to_dtype(DType::F32)?.to_vec1()
    }

    /// Runs one span; on an error the sequence is forgotten, because its cache may be half written.
    fn span(&mut self, span: &Span, logits: &mut Logits, cancel: &Cancel) -> Result<()> {
        let done = self.sequences.get(&span.seq).map_or(0, |sequence| sequence.position);
        if done != span.start {
            let reason = format!("position {} cannot follow {done}: Candle's cache only appends", span.start);
            return Err(Error::Generation { reason });
        }
        let mut rest = span.tokens;
        while !rest.is_empty() {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let rows = if span.rows == Rows::All { 1 } else { self.chunk_rows.min(rest.len()) };
            let (tokens, behind) = rest.split_at(rows);
            let started = Instant::now();
            let last = self.step(span.seq, tokens).map_err(failed)?;
            if rows == self.chunk_rows {
                let fits = CHUNK_TIME.as_secs_f64() / started.elapsed().as_secs_f64().max(1e-9);
                self.chunk_rows = ((rows as f64 * fits) as usize).clamp(1, MOST_ROWS);
            }
            rest = behind;
            if span.rows == Rows::All || span.rows == Rows::Last && rest.is_empty() {
                logits.values.extend(last);
            }
        }
        Ok(())
    }
}

impl Model for CandleModel {
    fn forward(&mut self, spans: &[Span], cancel: &Cancel) -> Result<Logits> {
        super::check_spans(spans, self.vocab_size)?;
        let wanted = spans.iter().map(Span::wanted).sum();
        let mut logits = Logits::with_capacity(wanted, self.vocab_size)?;
        for span in spans {
            if let Err(error) = self.span(span, &mut logits, cancel) {
                self.free(span.seq);
                return Err(error);
            }
        }
        Ok(logits)
    }

    fn free(&mut self, seq: SeqId) {
        self.sequences.remove(&seq);
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn storage(&self) -> Vec<Storage> {
        self.storage.clone()
    }
}

/// The config as Candle's Llama takes it.
fn stock_config(config: &LlamaConfig, context_length: usize, use_flash_attn: bool) -> Result<stock::Config> {
    let refused = |key: &str, value: String| {
        Error::unsupported(key, format!("{value}: Candle's Llama cannot express it; use engine=\"cpu\""))
    };
    if config.head_dim * config.num_attention_heads != config.hidden_size {
        return Err(refused("head_dim", config.head_dim.to_string()));
    }
    let rope_scaling = match &config.rope.scaling {
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
        RopeScaling::Factors(_) => return Err(refused("rope_freqs.weight", "present".into())),
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
        // The length of the rotary tables. Candle also compares it with the number of heads before it
        // drops old keys, where it means their positions; keep it above both.
        max_position_embeddings: context_length.max(config.num_key_value_heads),
        // Our VarBuilder answers for the head, whatever the flag says.
        tie_word_embeddings: false,
    })
}

/// A failed call into Candle, with its message.
fn failed(error: candle_core::Error) -> Error {
    Error::Generation { reason: format!("Candle: {error}") }
}
