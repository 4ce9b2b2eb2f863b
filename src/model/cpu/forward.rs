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
//! The two lines of a layer are its sublayers. Between them, a chunk is only its residual stream `x`, so it
//! can pause there while other chunks go through the layers.
//!
//! Source: Touvron et al., "LLaMA", arXiv 2302.13971.

use super::CpuModel;
use super::arithmetic::{Arithmetic, Phase};
use super::projector::{Projection, Projector, project, project_onto};
use super::scratch::{BufferRows, Residuals, step_bytes};
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::kernels::{AttentionSpan, Output, grown};
use crate::model::{Cancel, Logits, Rows, SeqId, Span};
use crate::sys::reserve::{self, Held};

/// Maximum number of rows that go through the layers together.
pub(super) const CHUNK_ROWS: usize = 512;
/// Attention and MLP.
pub(super) const SUBLAYERS: usize = 2;

/// Rows on their way through the layers.
pub(super) struct Chunk {
    spans: Vec<ChunkSpan>,
    /// The arithmetic of each row in the layers.
    layers: Vec<Arithmetic>,
    /// The arithmetic of each wanted row in the head.
    head: Vec<Arithmetic>,
    residuals: Residuals,
    /// How many sublayers are done.
    sublayers: usize,
    /// Memory for buffers that grow.
    _held: Option<Held>,
}

/// A span of a chunk: rows of one phase.
struct ChunkSpan {
    seq: SeqId,
    start: usize,
    rows: usize,
    /// How many of the last rows' logits are wanted.
    wanted: usize,
    /// Whether attention may round numbers to about 16 bits.
    attention_bits16: bool,
}

impl Chunk {
    /// Whether it has no rows.
    pub(super) fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Whether its rows have the sequences and positions of `spans`, and the same rows are wanted.
    pub(super) fn is_of(&self, spans: &[Span]) -> bool {
        let has = |span: &Span| {
            let own = || self.spans.iter().filter(|own| own.seq == span.seq);
            own().next().is_some_and(|first| first.start == span.start)
                && own().map(|own| own.rows).sum::<usize>() == span.tokens.len()
                && own().map(|own| own.wanted).sum::<usize>() == span.wanted()
        };
        let rows = spans.iter().map(|span| span.tokens.len()).sum::<usize>();
        rows == self.layers.len() && spans.iter().all(has)
    }

    /// Removes the rows of `seq`.
    pub(super) fn remove(&mut self, seq: SeqId, config: &LlamaConfig) {
        let (hidden, half) = (config.hidden_size, config.head_dim / 2);
        let mut left = self.layers.len();
        while let Some(index) = self.spans.iter().position(|span| span.seq == seq) {
            let before = &self.spans[..index];
            let first: usize = before.iter().map(|span| span.rows).sum();
            let first_wanted: usize = before.iter().map(|span| span.wanted).sum();
            let ChunkSpan { rows, wanted, .. } = self.spans.remove(index);
            let Residuals { x, cos, sin } = &mut self.residuals;
            for (numbers, width) in [(x, hidden), (cos, half), (sin, half)] {
                grown(numbers, left * width).copy_within((first + rows) * width.., first * width);
            }
            self.layers.drain(first..first + rows);
            self.head.drain(first_wanted..first_wanted + wanted);
            left -= rows;
        }
    }
}

/// Cuts spans into chunks. Each span of a chunk has rows of one phase.
fn chunks<'a>(spans: &[Span<'a>], prompt_tokens: impl Fn(SeqId) -> usize) -> Vec<Vec<Span<'a>>> {
    let mut chunks: Vec<Vec<Span>> = Vec::new();
    // The rows of the last chunk; it is full if there is none.
    let mut rows = CHUNK_ROWS;
    for span in spans {
        let prompt_tokens = prompt_tokens(span.seq);
        let mut rest = *span;
        while !rest.tokens.is_empty() {
            if rows == CHUNK_ROWS {
                chunks.push(Vec::new());
                rows = 0;
            }
            // The prompt ends a span of a chunk, because the phase changes there.
            let left = match prompt_tokens.saturating_sub(rest.start) {
                0 => usize::MAX,
                left => left,
            };
            let taken = rest.tokens.len().min(CHUNK_ROWS - rows).min(left);
            let (tokens, later) = rest.tokens.split_at(taken);
            // Only the last row is wanted, and it is in a later span.
            let only_fills = rest.rows == Rows::Last && !later.is_empty();
            let rows_wanted = if only_fills { Rows::None } else { rest.rows };
            chunks.last_mut().expect("there is one").push(Span { tokens, rows: rows_wanted, ..rest });
            rest = Span { tokens: later, start: rest.start + taken, ..rest };
            rows += taken;
        }
    }
    chunks
}

impl CpuModel {
    /// Cuts the spans into chunks, runs them in order and collects the wanted logits.
    pub(super) fn forward_chunks(&mut self, spans: &[Span], cancel: &Cancel) -> Result<Logits> {
        self.reserve(spans)?;
        let wanted = spans.iter().map(Span::wanted).sum();
        let mut logits = self.logits(wanted)?;
        let mut out = logits.values.as_mut_slice();
        for spans in chunks(spans, |seq| self.sequences[&seq].prompt_tokens) {
            let mut chunk = self.begin_chunk(&spans)?;
            while self.has_sublayers(&chunk) {
                self.run_sublayer(&mut chunk, cancel)?;
            }
            out = self.end_chunk(chunk, out, cancel)?;
        }
        self.complete(spans);
        Ok(logits)
    }

    /// Goes on with `chunk`, or begins one with the spans, until it is through or `pauses` returns true after
    /// a sublayer. It is then kept in `self.paused`.
    pub(super) fn forward_chunk_until(
        &mut self,
        chunk: Option<Chunk>,
        spans: &[Span],
        pauses: &mut dyn FnMut() -> bool,
        cancel: &Cancel,
    ) -> Result<Option<Logits>> {
        let mut chunk = match chunk {
            Some(chunk) => chunk,
            None => {
                self.reserve(spans)?;
                let chunks = chunks(spans, |seq| self.sequences[&seq].prompt_tokens);
                let [spans_of_phases] = &chunks[..] else {
                    return self.forward_chunks(spans, cancel).map(Some);
                };
                self.begin_chunk(spans_of_phases)?
            }
        };
        while self.has_sublayers(&chunk) {
            self.run_sublayer(&mut chunk, cancel)?;
            if self.has_sublayers(&chunk) && pauses() {
                self.paused = Some(chunk);
                return Ok(None);
            }
        }
        let mut logits = self.logits(chunk.head.len())?;
        self.end_chunk(chunk, &mut logits.values, cancel)?;
        self.complete(spans);
        Ok(Some(logits))
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

    /// A chunk of at most `CHUNK_ROWS` rows before the first layer: embeddings, and the angles of RoPE.
    fn begin_chunk(&mut self, spans: &[Span]) -> Result<Chunk> {
        let CpuModel { config, kernels, exact, weights, inv_freq, sequences, scratch, .. } = self;
        let rows: usize = spans.iter().map(|span| span.tokens.len()).sum();
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let (mut layers, mut head) = (Vec::with_capacity(rows), Vec::new());
        let mut chunk_spans = Vec::with_capacity(spans.len());
        for span in spans {
            let &Span { seq, start, .. } = span;
            let (rows, wanted) = (span.tokens.len(), span.wanted());
            let prompt_tokens = sequences[&seq].prompt_tokens;
            let phase = Phase::of(start, prompt_tokens);
            let of_layers = Arithmetic::of_layers(phase, *exact);
            layers.extend(std::iter::repeat_n(of_layers, rows));
            let ends_prompt = |at| at + 1 == prompt_tokens;
            let rows_of_head = start + rows - wanted..start + rows;
            head.extend(rows_of_head.map(|at| Arithmetic::of_head(phase, *exact, ends_prompt(at))));
            let attention_bits16 = of_layers.attention_bits16;
            chunk_spans.push(ChunkSpan { seq, start, rows, wanted, attention_bits16 });
        }

        // Buffers that grow, here and in the kernels' threads, cannot report that there is no memory.
        let largest = scratch.largest.max(BufferRows::of_chunk(&layers, &head));
        let spare = scratch.residuals.last().map_or(0, |residuals| residuals.x.len());
        let held = if largest != scratch.largest || spare < rows * hidden {
            let bytes = step_bytes(config, kernels.pool().threads(), rows);
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            Some(reserve::hold("the scratch buffers of a step", bytes)?)
        } else {
            None
        };
        let mut residuals = scratch.residuals.pop().unwrap_or_default();
        let x = grown(&mut residuals.x, rows * hidden);
        let cos = grown(&mut residuals.cos, rows * head_dim / 2);
        let sin = grown(&mut residuals.sin, rows * head_dim / 2);

        let ids = spans.iter().flat_map(|span| span.tokens);
        for (x, &id) in x.chunks_exact_mut(hidden).zip(ids) {
            weights.embed_tokens.row_to_f32(kernels, id as usize, x);
        }
        let angles = spans.iter().flat_map(|span| {
            let inv_freq = sequences[&span.seq].inv_freq.as_ref().unwrap_or(inv_freq);
            let positions = span.start..span.start + span.tokens.len();
            positions.flat_map(move |position| inv_freq.iter().map(move |f| position as f32 * f))
        });
        let attention_factor = config.rope.attention_factor();
        for ((cos, sin), angle) in cos.iter_mut().zip(sin.iter_mut()).zip(angles) {
            let (angle_sin, angle_cos) = angle.sin_cos();
            (*sin, *cos) = (angle_sin * attention_factor, angle_cos * attention_factor);
        }
        Ok(Chunk { spans: chunk_spans, layers, head, residuals, sublayers: 0, _held: held })
    }

    fn has_sublayers(&self, chunk: &Chunk) -> bool {
        chunk.sublayers < SUBLAYERS * self.weights.layers.len()
    }

    /// Runs a chunk's next sublayer. After an error, the chunk is of no use.
    fn run_sublayer(&mut self, chunk: &mut Chunk, cancel: &Cancel) -> Result<()> {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let layer = chunk.sublayers / SUBLAYERS;
        if chunk.sublayers.is_multiple_of(SUBLAYERS) {
            self.run_attention(chunk, layer, cancel)?;
        } else {
            self.run_mlp(chunk, layer, cancel);
        }
        chunk.sublayers += 1;
        Ok(())
    }

    /// `x += o_proj(attention(...))`
    fn run_attention(&mut self, chunk: &mut Chunk, index: usize, cancel: &Cancel) -> Result<()> {
        let CpuModel { config, kernels, weights, block_pool, sequences, scratch, .. } = self;
        let layer = &weights.layers[index];
        let Chunk { spans, layers: arithmetic, residuals, .. } = chunk;
        let rows = arithmetic.len();
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let (query_heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let x = grown(&mut residuals.x, rows * hidden);
        let cos = grown(&mut residuals.cos, rows * head_dim / 2);
        let sin = grown(&mut residuals.sin, rows * head_dim / 2);
        let normed = grown(&mut scratch.normed, rows * hidden);
        let queries = grown(&mut scratch.queries, rows * query_heads * head_dim);
        let keys = grown(&mut scratch.keys, rows * kv_heads * head_dim);
        let values = grown(&mut scratch.values, rows * kv_heads * head_dim);
        let attended = grown(&mut scratch.attended, rows * query_heads * head_dim);
        let mut projector =
            Projector { kernels, quantized: &mut scratch.quantized, gemm: &mut scratch.gemm, cancel };

        kernels.rms_norm(x, &layer.input_layernorm, config.rms_norm_eps as f32, normed, cancel);
        let projections =
            [project(&layer.q_proj, queries), project(&layer.k_proj, keys), project(&layer.v_proj, values)];
        projector.run(normed, arithmetic, projections);
        kernels.rope(queries, head_dim, cos, sin, cancel);
        kernels.rope(keys, head_dim, cos, sin, cancel);
        // A cancelled product leaves its output unfinished, which must not reach the KV cache.
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let mut first = 0;
        for &ChunkSpan { seq, start, rows, .. } in &*spans {
            let part = first * kv_heads * head_dim..(first + rows) * kv_heads * head_dim;
            sequences[&seq].kv.write(block_pool, index, start, &keys[part.clone()], &values[part]);
            first += rows;
        }
        let attention: Vec<AttentionSpan> = spans
            .iter()
            .map(|span| AttentionSpan {
                rows: span.rows,
                position: span.start,
                bits16: span.attention_bits16,
                kv_blocks: sequences[&span.seq].kv.layer(block_pool, index),
            })
            .collect();
        kernels.attention(queries, &attention, query_heads, kv_heads, head_dim, attended, cancel);
        projector.run(attended, arithmetic, [project_onto(&layer.o_proj, x)]);
        Ok(())
    }

    /// `x += down_proj(...)`
    fn run_mlp(&mut self, chunk: &mut Chunk, index: usize, cancel: &Cancel) {
        let CpuModel { config, kernels, weights, scratch, .. } = self;
        let layer = &weights.layers[index];
        let len = chunk.layers.len() * config.hidden_size;
        let x = grown(&mut chunk.residuals.x, len);
        let normed = grown(&mut scratch.normed, len);
        kernels.rms_norm(x, &layer.post_attention_layernorm, config.rms_norm_eps as f32, normed, cancel);
        let mut projector =
            Projector { kernels, quantized: &mut scratch.quantized, gemm: &mut scratch.gemm, cancel };
        let buffers = [&mut scratch.gate, &mut scratch.up];
        projector.run_mlp(normed, &chunk.layers, layer, config.hidden_act, buffers, x);
    }

    /// Writes the logits of a chunk that is through the layers to the beginning of `out`. Returns the rest of
    /// `out`.
    fn end_chunk<'a>(&mut self, chunk: Chunk, out: &'a mut [f32], cancel: &Cancel) -> Result<&'a mut [f32]> {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let CpuModel { config, kernels, weights, scratch, .. } = self;
        let Chunk { spans, layers, head, mut residuals, .. } = chunk;
        let hidden = config.hidden_size;
        let x = grown(&mut residuals.x, layers.len() * hidden);
        // Move the rows whose logits are wanted to the front.
        let (mut first, mut moved) = (0, 0);
        for ChunkSpan { rows, wanted, .. } in spans {
            let last = first + rows;
            x.copy_within((last - wanted) * hidden..last * hidden, moved * hidden);
            moved += wanted;
            first = last;
        }
        let normed = grown(&mut scratch.normed, head.len() * hidden);
        kernels.rms_norm(
            &x[..head.len() * hidden],
            &weights.norm,
            config.rms_norm_eps as f32,
            normed,
            cancel,
        );
        let (out, later) = out.split_at_mut(head.len() * config.vocab_size);
        let lm_head = Projection { weight: weights.lm_head(), bias: None, out, output: Output::Set };
        let mut projector =
            Projector { kernels, quantized: &mut scratch.quantized, gemm: &mut scratch.gemm, cancel };
        projector.run(normed, &head, [lm_head]);
        scratch.largest = scratch.largest.max(BufferRows::of_chunk(&layers, &head));
        scratch.residuals.push(residuals);
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        Ok(later)
    }
}
