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
//! Spans are cut into chunks of at most [`CHUNK_ROWS`] rows of one [`Phase`], so that memory does not grow
//! with the prompt. The result of a row does not depend on where the cuts are.
//!
//! Source: Touvron et al., "LLaMA", arXiv 2302.13971.

use super::CpuModel;
use super::arithmetic::{Arithmetic, Phase};
use super::projector::{Projection, Projector, project, project_onto};
use super::scratch::step_bytes;
use crate::error::{Error, Result};
use crate::kernels::{AttentionSpan, Output, grown};
use crate::model::{Cancel, Logits, Rows, Span};
use crate::sys::reserve;

/// Maximum number of rows that go through the layers together.
pub(super) const CHUNK_ROWS: usize = 512;

impl CpuModel {
    /// Cuts the spans into chunks of one phase, runs them in order and collects the wanted logits.
    pub(super) fn forward_chunks(&mut self, spans: &[Span], cancel: &Cancel) -> Result<Logits> {
        self.reserve(spans)?;
        let wanted = spans.iter().map(Span::wanted).sum();
        let mut logits = Logits::with_capacity(wanted, self.config.vocab_size)?;
        let mut chunk = Vec::new();
        let (mut rows, mut phase) = (0, Phase::Decode);
        for span in spans {
            let prompt_tokens = self.sequences[&span.seq].prompt_tokens;
            let mut rest = *span;
            while !rest.tokens.is_empty() {
                let next_phase = Phase::of(rest.start, prompt_tokens);
                if rows == CHUNK_ROWS || next_phase != phase {
                    self.forward_chunk(&chunk, phase, &mut logits, cancel)?;
                    chunk.clear();
                    (rows, phase) = (0, next_phase);
                }
                let left = if phase == Phase::Decode { usize::MAX } else { prompt_tokens - rest.start };
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
        self.forward_chunk(&chunk, phase, &mut logits, cancel)?;
        self.complete(spans);
        Ok(logits)
    }

    /// Runs at most `CHUNK_ROWS` rows of one phase through all layers, and appends their logits.
    fn forward_chunk(
        &mut self,
        spans: &[Span],
        phase: Phase,
        logits: &mut Logits,
        cancel: &Cancel,
    ) -> Result<()> {
        if spans.is_empty() {
            return Ok(());
        }
        let CpuModel { config, kernels, exact, weights, inv_freq, block_pool, sequences, scratch, .. } = self;
        let attention_factor = config.rope.attention_factor();
        let rows: usize = spans.iter().map(|span| span.tokens.len()).sum();
        let epsilon = config.rms_norm_eps as f32;
        let (hidden, inner, head_dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (query_heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);

        // Buffers that grow, here and in the kernels' threads, cannot report that there is no memory.
        let _held = if rows > scratch.largest[phase as usize] {
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
        let mut projector = Projector {
            kernels,
            arithmetic: Arithmetic::of_layers(phase, *exact),
            quantized: &mut scratch.quantized,
            gemm: &mut scratch.gemm,
            cancel,
        };

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
            projector.run(normed, rows, projections);
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
            let bits16 = projector.arithmetic.attention_bits16;
            let attention: Vec<AttentionSpan> = spans
                .iter()
                .map(|span| AttentionSpan {
                    rows: span.tokens.len(),
                    position: span.start,
                    bits16,
                    kv_blocks: sequences[&span.seq].kv.layer(block_pool, index),
                })
                .collect();
            kernels.attention(queries, &attention, query_heads, kv_heads, head_dim, attended, cancel);
            projector.run(attended, rows, [project_onto(&layer.o_proj, x)]);

            kernels.rms_norm(x, &layer.post_attention_layernorm, epsilon, normed, cancel);
            if !projector.run_mlp(normed, rows, layer, config.hidden_act, x) {
                let gate = grown(&mut scratch.gate, rows * inner);
                let up = grown(&mut scratch.up, rows * inner);
                let projections = [project(&layer.gate_proj, gate), project(&layer.up_proj, up)];
                projector.run(normed, rows, projections);
                kernels.gate_mul(config.hidden_act, gate, up, cancel);
                projector.run(gate, rows, [project_onto(&layer.down_proj, x)]);
            }
        }
        check()?;

        // Move the rows whose logits are wanted to the front. Note for each whether it is the last of its
        // prompt, because the head computes that row more precisely.
        let mut ends_prompt = Vec::new();
        let mut first = 0;
        for span in spans {
            let last = first + span.tokens.len();
            let wanted = last - span.wanted()..last;
            x.copy_within(wanted.start * hidden..wanted.end * hidden, ends_prompt.len() * hidden);
            let prompt_tokens = sequences[&span.seq].prompt_tokens;
            ends_prompt.extend(wanted.map(|row| span.start + row - first + 1 == prompt_tokens));
            first = last;
        }
        let wanted = ends_prompt.len();
        let normed = &mut normed[..wanted * hidden];
        kernels.rms_norm(&x[..wanted * hidden], &weights.norm, epsilon, normed, cancel);
        let before = logits.values.len();
        logits.values.resize(before + wanted * config.vocab_size, 0.0);
        let (mut normed, mut out) = (&normed[..], &mut logits.values[before..]);
        for group in ends_prompt.chunk_by(PartialEq::eq) {
            let (x, later_rows) = normed.split_at(group.len() * hidden);
            let (logits, later_logits) =
                std::mem::take(&mut out).split_at_mut(group.len() * config.vocab_size);
            (normed, out) = (later_rows, later_logits);
            projector.arithmetic = Arithmetic::of_head(phase, *exact, group[0]);
            let lm_head =
                Projection { weight: weights.lm_head(), bias: None, out: logits, output: Output::Set };
            projector.run(x, group.len(), [lm_head]);
        }
        scratch.largest[phase as usize] = scratch.largest[phase as usize].max(rows);
        check()
    }
}
