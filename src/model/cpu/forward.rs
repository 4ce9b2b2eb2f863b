//! The decoder stack, as the Llama papers and `modeling_llama.py` have it:
//!
//! ```text
//! x = embed_tokens[ids]
//! for each layer:
//!     x += o_proj(attention(rope(q_proj(norm(x))), rope(k_proj(norm(x))), v_proj(norm(x))))
//!     x += down_proj(silu(gate_proj(norm(x))) * up_proj(norm(x)))
//! logits = lm_head(norm(x))
//! ```
//!
//! Spans are cut into chunks of at most [`CHUNK_ROWS`] rows, so that memory does not grow with the
//! prompt. No row's result depends on how they are cut.
//!
//! Source: Touvron et al., "LLaMA", arXiv 2302.13971.

use super::CpuModel;
use crate::error::{Error, Result};
use crate::kernels::{AttentionSpan, Output, Product};
use crate::model::{Cancel, Logits, Rows, Span};

/// The most rows that go through the layers together.
const CHUNK_ROWS: usize = 512;

/// Buffers for one chunk; they grow to the largest chunk seen and stay.
#[derive(Default)]
pub(super) struct Scratch {
    /// `(rows, hidden_size)`: the residual stream
    x: Vec<f32>,
    /// `(rows, hidden_size)`
    normed: Vec<f32>,
    /// `(rows, num_attention_heads, head_dim)`
    queries: Vec<f32>,
    /// `(rows, num_key_value_heads, head_dim)`
    keys: Vec<f32>,
    /// As `keys`.
    values: Vec<f32>,
    /// As `queries`.
    attended: Vec<f32>,
    /// `(rows, intermediate_size)`
    gate: Vec<f32>,
    /// As `gate`.
    up: Vec<f32>,
    /// `(rows, head_dim / 2)`
    cos: Vec<f32>,
    /// As `cos`.
    sin: Vec<f32>,
}

/// The first `len` elements, which may hold anything.
fn grown(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl CpuModel {
    pub(super) fn forward_chunks(&mut self, spans: &[Span], cancel: &Cancel) -> Result<Logits> {
        for span in spans {
            let kv = self.sequences.entry(span.seq).or_default();
            kv.reserve(span.start + span.tokens.len(), &mut self.block_pool)?;
        }
        let wanted = spans.iter().map(Span::wanted).sum();
        let mut logits = Logits::with_capacity(wanted, self.config.vocab_size)?;
        let mut chunk = Vec::new();
        let mut rows = 0;
        for span in spans {
            let mut rest = *span;
            while !rest.tokens.is_empty() {
                let taken = rest.tokens.len().min(CHUNK_ROWS - rows);
                let (tokens, behind) = rest.tokens.split_at(taken);
                // The last row is wanted, and it is not in this chunk.
                let only_fills = rest.rows == Rows::Last && !behind.is_empty();
                let rows_wanted = if only_fills { Rows::None } else { rest.rows };
                chunk.push(Span { tokens, rows: rows_wanted, ..rest });
                rest = Span { tokens: behind, start: rest.start + taken, ..rest };
                rows += taken;
                if rows == CHUNK_ROWS {
                    self.forward_chunk(&chunk, &mut logits, cancel)?;
                    chunk.clear();
                    rows = 0;
                }
            }
        }
        if rows > 0 {
            self.forward_chunk(&chunk, &mut logits, cancel)?;
        }
        Ok(logits)
    }

    /// Runs at most `CHUNK_ROWS` rows through all layers, and appends their logits.
    fn forward_chunk(&mut self, spans: &[Span], logits: &mut Logits, cancel: &Cancel) -> Result<()> {
        let CpuModel { config, kernels, weights, inv_freq, block_pool, sequences, scratch } = self;
        let rows: usize = spans.iter().map(|span| span.tokens.len()).sum();
        let epsilon = config.rms_norm_eps as f32;
        let (hidden, inner, head_dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (query_heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let shape = block_pool.shape();

        let x = grown(&mut scratch.x, rows * hidden);
        let normed = grown(&mut scratch.normed, rows * hidden);
        let queries = grown(&mut scratch.queries, rows * query_heads * head_dim);
        let keys = grown(&mut scratch.keys, rows * kv_heads * head_dim);
        let values = grown(&mut scratch.values, rows * kv_heads * head_dim);
        let attended = grown(&mut scratch.attended, rows * query_heads * head_dim);
        let gate = grown(&mut scratch.gate, rows * inner);
        let up = grown(&mut scratch.up, rows * inner);
        let cos = grown(&mut scratch.cos, rows * head_dim / 2);
        let sin = grown(&mut scratch.sin, rows * head_dim / 2);

        let ids = spans.iter().flat_map(|span| span.tokens);
        let embedding = weights.embed_tokens.view();
        for (x, &id) in x.chunks_exact_mut(hidden).zip(ids) {
            kernels.dequantize(embedding, id as usize, x);
        }
        let positions = spans.iter().flat_map(|span| (span.start..).take(span.tokens.len()));
        let angles = positions.flat_map(|position| inv_freq.iter().map(move |f| position as f32 * f));
        for ((cos, sin), angle) in cos.iter_mut().zip(sin.iter_mut()).zip(angles) {
            (*sin, *cos) = angle.sin_cos();
        }
        let check = || if cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) };

        for (index, layer) in weights.layers.iter().enumerate() {
            check()?;
            kernels.rms_norm(x, &layer.input_layernorm, epsilon, normed, cancel);
            let mut products = [
                Product { weight: layer.q_proj.view(), out: &mut *queries, output: Output::Set },
                Product { weight: layer.k_proj.view(), out: &mut *keys, output: Output::Set },
                Product { weight: layer.v_proj.view(), out: &mut *values, output: Output::Set },
            ];
            kernels.matmul(normed, rows, &mut products, cancel);
            kernels.rope(queries, head_dim, cos, sin, cancel);
            kernels.rope(keys, head_dim, cos, sin, cancel);
            // What a cancelled product left unfinished must not reach the cache.
            check()?;
            let mut first = 0;
            for span in spans {
                let kv = sequences.get_mut(&span.seq).expect("reserved by forward_chunks");
                let part = first * kv_heads * head_dim..(first + span.tokens.len()) * kv_heads * head_dim;
                kv.write(&shape, index, span.start, &keys[part.clone()], &values[part]);
                first += span.tokens.len();
            }
            let attention: Vec<AttentionSpan> = spans
                .iter()
                .map(|span| AttentionSpan {
                    rows: span.tokens.len(),
                    position: span.start,
                    blocks: sequences[&span.seq].layer(index),
                })
                .collect();
            kernels.attention(queries, &attention, query_heads, kv_heads, head_dim, attended, cancel);
            let o_proj = Product { weight: layer.o_proj.view(), out: &mut *x, output: Output::Add };
            kernels.matmul(attended, rows, &mut [o_proj], cancel);

            kernels.rms_norm(x, &layer.post_attention_layernorm, epsilon, normed, cancel);
            let mut products = [
                Product { weight: layer.gate_proj.view(), out: &mut *gate, output: Output::Set },
                Product { weight: layer.up_proj.view(), out: &mut *up, output: Output::Set },
            ];
            kernels.matmul(normed, rows, &mut products, cancel);
            kernels.silu_mul(gate, up, cancel);
            let down_proj = Product { weight: layer.down_proj.view(), out: &mut *x, output: Output::Add };
            kernels.matmul(gate, rows, &mut [down_proj], cancel);
        }
        check()?;

        // The rows that logits are wanted of, moved together to the front.
        let mut wanted = 0;
        let mut first = 0;
        for span in spans {
            let count = span.wanted();
            let last = first + span.tokens.len();
            x.copy_within((last - count) * hidden..last * hidden, wanted * hidden);
            wanted += count;
            first = last;
        }
        let normed = &mut normed[..wanted * hidden];
        kernels.rms_norm(&x[..wanted * hidden], &weights.norm, epsilon, normed, cancel);
        let before = logits.values.len();
        logits.values.resize(before + wanted * config.vocab_size, 0.0);
        let out = &mut logits.values[before..];
        let lm_head = Product { weight: weights.lm_head().view(), out, output: Output::Set };
        kernels.matmul(normed, wanted, &mut [lm_head], cancel);
        check()
    }
}
