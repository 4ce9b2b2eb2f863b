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
//! where a projection may add a bias, and `silu` is the config's `hidden_act`.
//!
//! Spans are cut into chunks of at most [`CHUNK_ROWS`] rows, so that memory does not grow with the prompt. A
//! chunk may have rows of several [`Phase`]s, and each phase has its own arithmetic. Packed weights are still
//! read once for the whole chunk. The result of a row does not depend on the rest of its chunk.
//!
//! Source: Touvron et al., "LLaMA", arXiv 2302.13971.

use super::CpuModel;
use super::arithmetic::{Arithmetic, Phase};
use super::projector::{Projection, Projector, project, project_onto};
use super::scratch::{BufferRows, step_bytes};
use crate::error::{Error, Result};
use crate::kernels::{AttentionSpan, Output, grown};
use crate::model::{Cancel, Logits, Rows, Span};
use crate::sys::reserve;

/// Maximum number of rows that go through the layers together.
pub(super) const CHUNK_ROWS: usize = 512;

impl CpuModel {
    /// Cuts the spans into chunks, runs them in order and collects the wanted logits.
    pub(super) fn forward_chunks(&mut self, spans: &[Span], cancel: &Cancel) -> Result<Logits> {
        self.reserve(spans)?;
        let wanted = spans.iter().map(Span::wanted).sum();
        let mut logits = self.logits(wanted)?;
        let mut out = logits.values.as_mut_slice();
        let mut chunk = Vec::new();
        let mut rows = 0;
        for span in spans {
            let prompt_tokens = self.sequences[&span.seq].prompt_tokens;
            let mut rest = *span;
            while !rest.tokens.is_empty() {
                if rows == CHUNK_ROWS {
                    out = self.forward_chunk(&chunk, out, cancel)?;
                    chunk.clear();
                    rows = 0;
                }
                // The prompt ends a span of a chunk, because the phase changes there.
                let left = match prompt_tokens.saturating_sub(rest.start) {
                    0 => usize::MAX,
                    left => left,
                };
                let taken = rest.tokens.len().min(CHUNK_ROWS - rows).min(left);
                let (tokens, later) = rest.tokens.split_at(taken);
                // Only the last row is wanted, and it is in a later chunk.
                let only_fills = rest.rows == Rows::Last && !later.is_empty();
                let rows_wanted = if only_fills { Rows::None } else { rest.rows };
                chunk.push(Span { tokens, rows: rows_wanted, ..rest });
                rest = Span { tokens: later, start: rest.start + taken, ..rest };
                rows += taken;
            }
        }
        self.forward_chunk(&chunk, out, cancel)?;
        self.complete(spans);
        Ok(logits)
    }

    /// `rows` rows of logits, which hold anything. Takes the spare ones if they are large enough: to get some
    /// megabytes from the system for each step takes longer than to fill them.
    fn logits(&mut self, rows: usize) -> Result<Logits> {
        let vocab_size = self.config.vocab_size;
        let mut values = std::mem::take(&mut self.spare_logits);
        let len = rows.saturating_mul(vocab_size);
        if values.capacity() < len {
            values = Logits::with_capacity(rows, vocab_size)?.values;
        }
        values.resize(len, 0.0);
        Ok(Logits { values, vocab_size })
    }

    /// Runs at most `CHUNK_ROWS` rows through all layers, and writes their logits to the beginning of `out`.
    /// Returns the rest of `out`. Each span has rows of one phase.
    fn forward_chunk<'a>(
        &mut self,
        spans: &[Span],
        out: &'a mut [f32],
        cancel: &Cancel,
    ) -> Result<&'a mut [f32]> {
        if spans.is_empty() {
            return Ok(out);
        }
        let CpuModel { config, kernels, exact, weights, inv_freq, block_pool, sequences, scratch, .. } = self;
        let attention_factor = config.rope.attention_factor();
        let rows: usize = spans.iter().map(|span| span.tokens.len()).sum();
        let epsilon = config.rms_norm_eps as f32;
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let (query_heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);

        // The arithmetic of each row in the layers, and of each wanted row in the head.
        let (mut arithmetic, mut head) = (Vec::with_capacity(rows), Vec::new());
        let mut rounds_attention = Vec::with_capacity(spans.len());
        for span in spans {
            let prompt_tokens = sequences[&span.seq].prompt_tokens;
            let phase = Phase::of(span.start, prompt_tokens);
            let end = span.start + span.tokens.len();
            let of_layers = Arithmetic::of_layers(phase, *exact);
            arithmetic.extend(span.tokens.iter().map(|_| of_layers));
            rounds_attention.push(of_layers.attention_bits16);
            let wanted = end - span.wanted()..end;
            head.extend(wanted.map(|at| Arithmetic::of_head(phase, *exact, at + 1 == prompt_tokens)));
        }

        // Buffers that grow, here and in the kernels' threads, cannot report that there is no memory.
        let largest = scratch.largest.max(BufferRows::of_chunk(&arithmetic, &head));
        let _held = if largest != scratch.largest {
            let bytes = step_bytes(config, kernels.pool().threads(), rows);
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            Some(reserve::hold("the scratch buffers of a step", bytes)?)
        } else {
            None
        };
        let x = grown(&mut scratch.x, rows * hidden);
        let normed = grown(&mut scratch.normed, rows * hidden);
        let queries = grown(&mut scratch.queries, rows * query_heads * head_dim);
        let keys = grown(&mut scratch.keys, rows * kv_heads * head_dim);
        let values = grown(&mut scratch.values, rows * kv_heads * head_dim);
        let attended = grown(&mut scratch.attended, rows * query_heads * head_dim);
        let cos = grown(&mut scratch.cos, rows * head_dim / 2);
        let sin = grown(&mut scratch.sin, rows * head_dim / 2);
        let mut projector =
            Projector { kernels, quantized: &mut scratch.quantized, gemm: &mut scratch.gemm, cancel };

        let ids = spans.iter().flat_map(|span| span.tokens);
        for (x, &id) in x.chunks_exact_mut(hidden).zip(ids) {
            weights.embed_tokens.row_to_f32(kernels, id as usize, x);
        }
        let angles = spans.iter().flat_map(|span| {
            let inv_freq = sequences[&span.seq].inv_freq.as_ref().unwrap_or(inv_freq);
            let positions = span.start..span.start + span.tokens.len();
            positions.flat_map(move |position| inv_freq.iter().map(move |f| position as f32 * f))
        });
        for ((cos, sin), angle) in cos.iter_mut().zip(sin.iter_mut()).zip(angles) {
            let (angle_sin, angle_cos) = angle.sin_cos();
            (*sin, *cos) = (angle_sin * attention_factor, angle_cos * attention_factor);
        }
        let check = || if cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) };

        for (index, layer) in weights.layers.iter().enumerate() {
            check()?;
            kernels.rms_norm(x, &layer.input_layernorm, epsilon, normed, cancel);
            let projections = [
                project(&layer.q_proj, queries),
                project(&layer.k_proj, keys),
                project(&layer.v_proj, values),
            ];
            projector.run(normed, &arithmetic, projections);
            kernels.rope(queries, head_dim, cos, sin, cancel);
            kernels.rope(keys, head_dim, cos, sin, cancel);
            // A cancelled product leaves its output unfinished, which must not reach the KV cache.
            check()?;
            let mut first = 0;
            for span in spans {
                let part = first * kv_heads * head_dim..(first + span.tokens.len()) * kv_heads * head_dim;
                let kv = &sequences[&span.seq].kv;
                kv.write(block_pool, index, span.start, &keys[part.clone()], &values[part]);
                first += span.tokens.len();
            }
            let attention: Vec<AttentionSpan> = spans
                .iter()
                .zip(&rounds_attention)
                .map(|(span, &bits16)| AttentionSpan {
                    rows: span.tokens.len(),
                    position: span.start,
                    bits16,
                    kv_blocks: sequences[&span.seq].kv.layer(block_pool, index),
                })
                .collect();
            kernels.attention(queries, &attention, query_heads, kv_heads, head_dim, attended, cancel);
            projector.run(attended, &arithmetic, [project_onto(&layer.o_proj, x)]);

            kernels.rms_norm(x, &layer.post_attention_layernorm, epsilon, normed, cancel);
            let buffers = [&mut scratch.gate, &mut scratch.up];
            projector.run_mlp(normed, &arithmetic, layer, config.hidden_act, buffers, x);
        }
        check()?;

        // Move the rows whose logits are wanted to the front.
        let (mut first, mut moved) = (0, 0);
        for span in spans {
            let last = first + span.tokens.len();
            let wanted = span.wanted();
            x.copy_within((last - wanted) * hidden..last * hidden, moved * hidden);
            moved += wanted;
            first = last;
        }
        let normed = &mut normed[..head.len() * hidden];
        kernels.rms_norm(&x[..head.len() * hidden], &weights.norm, epsilon, normed, cancel);
        let (out, later) = out.split_at_mut(head.len() * config.vocab_size);
        let lm_head = Projection { weight: weights.lm_head(), bias: None, out, output: Output::Set };
        projector.run(normed, &head, [lm_head]);
        scratch.largest = largest;
        check()?;
        Ok(later)
    }
}
