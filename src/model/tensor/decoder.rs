//! The decoder stack, as `model/cpu/forward.rs` has it, in Candle's tensor operations.
//!
//! Spans are cut into chunks of at most [`CHUNK_ROWS`] rows. Projections and MLPs run once for all rows of a
//! chunk. Between layers, the decoder checks whether it is to stop.

use super::attention::{Heads, MAX_SCORES, Place, Plan};
use super::on_device;
use super::slots::{SlotShape, Slots};
use super::weights::{Layer, Weights};
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::kernels::Activation;
use crate::model::worker::{OwnedSpan, Runner};
use crate::model::{Logits, Rows, SeqId};
use candle_core::{DType, Device, Tensor};
use candle_nn::ops::{rms_norm, sigmoid, silu};
use candle_nn::rotary_emb::rope_thd;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

/// Maximum number of rows that go through the layers together.
const CHUNK_ROWS: usize = 512;

/// The most logits that are computed at once, unless a single row has more.
const MAX_LOGITS: usize = 1 << 24;

/// A model on a device, with the keys and values of its sequences.
pub(super) struct Decoder {
    config: LlamaConfig,
    weights: Weights,
    slots: Slots,
    /// RoPE frequencies, `(head_dim / 2,)`.
    inv_freq: Vec<f32>,
    /// RoPE frequencies of the sequences for which they depend on the length of the prompt.
    own_inv_freq: HashMap<SeqId, Vec<f32>>,
    dtype: DType,
    device: Device,
}

/// Cosines and sines by which queries and keys are rotated. Those of queries also divide them by the root of
/// `head_dim`, as attention requires.
struct Rotation {
    queries: [Tensor; 2],
    keys: [Tensor; 2],
}

/// Consecutive tokens of one sequence, in one chunk.
#[derive(Clone, Copy)]
struct Part<'a> {
    seq: SeqId,
    tokens: &'a [u32],
    start: usize,
    rows: Rows,
}

/// An upper bound for the buffers of a pass of a model that computes with `dtype`, in bytes.
pub fn scratch_bytes(config: &LlamaConfig, dtype: DType, context_length: usize) -> u64 {
    let attention = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim;
    let row = 4 * config.hidden_size + 3 * attention + 4 * config.intermediate_size;
    let activations = (CHUNK_ROWS as u64).saturating_mul(row as u64);
    // The scores and weights of a tile in f32 and in the model's type, and logits in both and on the CPU.
    let row_scores = config.num_attention_heads.saturating_mul(context_length);
    let scores = 3 * MAX_SCORES.max(row_scores) as u64;
    let logits = 3 * MAX_LOGITS.min(CHUNK_ROWS * config.vocab_size).max(config.vocab_size) as u64;
    let f32_bytes = size_of::<f32>() as u64;
    let activations = activations.saturating_mul(dtype.size_in_bytes() as u64);
    activations.saturating_add(scores.max(logits).saturating_mul(f32_bytes))
}

impl Decoder {
    pub(super) fn new(config: LlamaConfig, weights: Weights, shape: SlotShape, device: &Device) -> Self {
        Decoder {
            inv_freq: config.rope.inv_freq(config.head_dim, 0),
            own_inv_freq: HashMap::new(),
            slots: Slots::new(shape, device),
            dtype: shape.dtype,
            device: device.clone(),
            config,
            weights,
        }
    }

    fn heads(&self) -> Heads {
        Heads {
            query: self.config.num_attention_heads,
            kv: self.config.num_key_value_heads,
            dim: self.config.head_dim,
        }
    }

    /// Runs at most [`CHUNK_ROWS`] rows, and appends the wanted logits.
    fn chunk(&self, parts: &[Part], logits: &mut Logits, stop: &AtomicBool) -> Result<()> {
        // Rows that are alone in their sequence come first, by their slots.
        let slot = |part: &Part| self.slots.place(part.seq);
        let mut order: Vec<&Part> = parts.iter().collect();
        order.sort_by_key(|part| if part.tokens.len() == 1 { slot(part) } else { usize::MAX });
        let alone = parts.iter().filter(|part| part.tokens.len() == 1).count();
        let batched = if alone > 1 { alone } else { 0 };
        let rows = parts.iter().map(|part| part.tokens.len()).sum::<usize>();
        let failed = on_device(&self.device, format!("a pass of {rows} rows"));

        let place = |part: &&Part| Place { slot: slot(part), start: part.start, rows: part.tokens.len() };
        let places: Vec<Place> = order.iter().map(place).collect();
        let plan = Plan::new(&places, batched, self.heads(), &self.slots, &self.device).map_err(&failed)?;
        let rope = self.rope(&order).map_err(&failed)?;
        let mut x = self.embed(&order).map_err(&failed)?;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            check(stop)?;
            x = self.layer(layer, index, &x, &plan, &rope).map_err(&failed)?;
        }
        check(stop)?;

        // The wanted rows, in the order of the parts.
        let mut first_rows = HashMap::new();
        let mut row = 0;
        for part in &order {
            first_rows.insert(part.seq, row);
            row += part.tokens.len();
        }
        let wanted = parts.iter().flat_map(|part| {
            let end = first_rows[&part.seq] + part.tokens.len();
            end - part.rows.count(part.tokens.len())..end
        });
        let wanted: Vec<u32> = wanted.map(|row| row as u32).collect();
        for wanted in wanted.chunks((MAX_LOGITS / self.config.vocab_size).max(1)) {
            check(stop)?;
            let values = self.head(&x, wanted).map_err(&failed)?;
            logits.values.extend_from_slice(&values);
        }
        Ok(())
    }

    /// `(rows, hidden_size)`
    fn embed(&self, parts: &[&Part]) -> candle_core::Result<Tensor> {
        let ids: Vec<u32> = parts.iter().flat_map(|part| part.tokens).copied().collect();
        self.weights.embed_tokens.rows(&ids, self.dtype, &self.device)
    }

    /// Cosines and sines of each row's angles, `(rows, 1, head_dim / 2)`.
    fn rope(&self, parts: &[&Part]) -> candle_core::Result<Rotation> {
        let angles = parts.iter().flat_map(|part| {
            let inv_freq = self.own_inv_freq.get(&part.seq).unwrap_or(&self.inv_freq);
            let positions = part.start..part.start + part.tokens.len();
            positions.flat_map(move |position| inv_freq.iter().map(move |f| position as f32 * f))
        });
        let factor = self.config.rope.attention_factor();
        let (sin, cos): (Vec<f32>, Vec<f32>) =
            angles.map(f32::sin_cos).map(|(sin, cos)| (sin * factor, cos * factor)).unzip();
        let shape = ((), 1, self.config.head_dim / 2);
        let tensor =
            |numbers: Vec<f32>| Tensor::new(numbers, &self.device)?.reshape(shape)?.to_dtype(self.dtype);
        let scale = 1.0 / (self.config.head_dim as f32).sqrt();
        let scaled = |numbers: &[f32]| tensor(numbers.iter().map(|number| number * scale).collect());
        Ok(Rotation { queries: [scaled(&cos)?, scaled(&sin)?], keys: [tensor(cos)?, tensor(sin)?] })
    }

    fn layer(
        &self,
        layer: &Layer,
        index: usize,
        x: &Tensor,
        plan: &Plan,
        rotation: &Rotation,
    ) -> candle_core::Result<Tensor> {
        let Heads { query, kv, dim } = self.heads();
        let rows = x.dim(0)?;
        let normed = self.norm(x, &layer.input_layernorm)?;
        let rotated = |projected: Tensor, heads: usize, [cos, sin]: &[Tensor; 2]| {
            rope_thd(&projected.reshape((rows, 1, heads, dim))?, cos, sin)?.squeeze(1)
        };
        let queries = rotated(layer.q_proj.forward(&normed)?, query, &rotation.queries)?;
        let keys = rotated(layer.k_proj.forward(&normed)?, kv, &rotation.keys)?;
        let values = layer.v_proj.forward(&normed)?.reshape((rows, kv, dim))?;
        let attended = plan.run(&queries, [&keys, &values], self.slots.layer(index))?;
        let x = (x + layer.o_proj.forward(&attended)?)?;

        let normed = self.norm(&x, &layer.post_attention_layernorm)?;
        let gate = layer.gate_proj.forward(&normed)?;
        let activated = match self.config.hidden_act {
            Activation::Silu => silu(&gate)?,
            Activation::Gelu => gate.gelu_erf()?,
            Activation::GeluTanh => gate.gelu()?,
            Activation::QuickGelu => (&gate * sigmoid(&(&gate * 1.702)?)?)?,
        };
        let inner = (activated * layer.up_proj.forward(&normed)?)?;
        x + layer.down_proj.forward(&inner)?
    }

    fn norm(&self, x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
        rms_norm(x, weight, self.config.rms_norm_eps as f32)
    }

    /// The logits of some rows of `x`, one row after the other.
    fn head(&self, x: &Tensor, rows: &[u32]) -> candle_core::Result<Vec<f32>> {
        let rows = x.index_select(&Tensor::new(rows, &self.device)?, 0)?;
        let logits = self.weights.lm_head.forward(&self.norm(&rows, &self.weights.norm)?)?;
        logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
    }
}

impl Runner for Decoder {
    fn forward(&mut self, spans: &[OwnedSpan], stop: &AtomicBool) -> Result<Logits> {
        let ends: Vec<_> = spans.iter().map(|span| (span.seq, span.start + span.tokens.len())).collect();
        for &(seq, end) in &ends {
            if !self.own_inv_freq.contains_key(&seq) {
                self.begin(seq, end);
            }
        }
        self.slots.reserve(&ends)?;
        // If a mapped file was cut short since, reading the missing part would kill the process.
        self.weights.files.check()?;
        let wanted = spans.iter().map(OwnedSpan::wanted).sum();
        let mut logits = Logits::with_capacity(wanted, self.config.vocab_size)?;
        let (mut parts, mut rows) = (Vec::new(), 0);
        for span in spans {
            let (mut start, mut rest) = (span.start, span.tokens.as_slice());
            while !rest.is_empty() {
                if rows == CHUNK_ROWS {
                    self.chunk(&parts, &mut logits, stop)?;
                    parts.clear();
                    rows = 0;
                }
                let (tokens, later) = rest.split_at(rest.len().min(CHUNK_ROWS - rows));
                // Only the last row is wanted, and it is in a later chunk.
                let only_fills = span.rows == Rows::Last && !later.is_empty();
                let wanted = if only_fills { Rows::None } else { span.rows };
                parts.push(Part { seq: span.seq, tokens, start, rows: wanted });
                rows += tokens.len();
                start += tokens.len();
                rest = later;
            }
        }
        self.chunk(&parts, &mut logits, stop)?;
        Ok(logits)
    }

    fn begin(&mut self, seq: SeqId, prompt_tokens: usize) {
        let rope = &self.config.rope;
        if rope.is_dynamic() {
            self.own_inv_freq.insert(seq, rope.inv_freq(self.config.head_dim, prompt_tokens));
        }
    }

    fn free(&mut self, seq: SeqId) {
        self.slots.free(seq);
        self.own_inv_freq.remove(&seq);
    }
}

fn check(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
}
