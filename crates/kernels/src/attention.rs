//! The facade for attention over KV blocks, of several sequences at once.

use crate::blocks::WeightType;
use crate::generic::attention::{AttentionOutput, AttentionTask, UNIT_POSITIONS};
use crate::generic::partial_attention::PartialAttention;
use crate::kernels::Kernels;
use crate::kv_block::{KV_BLOCK_POSITIONS, KvBlock};
use crate::lanes::LANES;
use crate::output::SharedOut;
use crate::pool::Cancel;
use std::ops::Range;

/// Queries of one task; a query is a (row, head). With more, dequantising a KV block costs less per query.
/// With fewer, scores and sums stay in the cache.
const TASK_QUERIES: usize = 96;
/// The most queries of one task on any ISA, unless one row has more.
pub(crate) const MAX_TASK_QUERIES: usize = 768;
/// A sequence with at most this many rows, if they are not rounded, may have a task for every unit. More rows
/// convert KV blocks once for many queries.
const FEW_ROWS: usize = 4;
/// Maximum bytes of the results of a sequence's units, which are kept until they are merged.
const MAX_UNITS_BYTES: usize = 8 << 20;
/// Tasks per thread, at least if there is enough work: two threads cannot share three heads evenly.
const TASKS_PER_THREAD: usize = 4;

/// The rows of one sequence in a call of [`Kernels::attention`].
pub struct AttentionSpan<'a> {
    /// The number of rows. The rows of the spans follow each other in the queries.
    pub rows: usize,
    /// The position of the first row.
    pub position: usize,
    /// Whether queries, keys, weights and values may be rounded to about 16 bits. This is faster with AVX2,
    /// AVX-512 or AMX tiles if head_dim is a multiple of 32.
    pub bits16: bool,
    /// KV blocks for all positions up to the last row's, inclusive.
    pub kv_blocks: Vec<KvBlock<'a>>,
}

impl AttentionSpan<'_> {
    /// The number of units that the last row sees.
    fn units(&self) -> usize {
        (self.position + self.rows).div_ceil(UNIT_POSITIONS)
    }
}

/// Rows of one KV head whose units are tasks of their own. Their results are merged at the end.
struct UnitTasks {
    rows: Range<usize>,
    position: usize,
    kv_head: usize,
    /// The slots of the partial results of these units.
    slots: Range<usize>,
}

impl Kernels {
    /// Causal attention: `out = softmax(q · kᵀ / sqrt(head_dim)) · v` for every row and head.
    ///
    /// - `queries`, `out`: `(rows, query_heads, head_dim)`, the rows of the spans after each other
    ///
    /// A row's output depends only on its query, its keys, its values and its span's `bits16`, bit for bit.
    /// If `cancel` fires, `out` is incomplete.
    ///
    /// # Panics
    /// If a length disagrees with these shapes or with [`AttentionSpan`].
    #[allow(clippy::too_many_arguments)] // two buffers and the four sizes that give them shape
    pub fn attention(
        &self,
        queries: &[f32],
        spans: &[AttentionSpan],
        query_heads: usize,
        kv_heads: usize,
        head_dim: usize,
        out: &mut [f32],
        cancel: &Cancel,
    ) {
        assert!(
            kv_heads > 0 && query_heads.is_multiple_of(kv_heads),
            "query_heads is a multiple of kv_heads"
        );
        let rows: usize = spans.iter().map(|span| span.rows).sum();
        assert_eq!(queries.len(), rows * query_heads * head_dim, "(rows, query_heads, head_dim)");
        assert_eq!(queries.len(), out.len(), "out has the shape of queries");
        check_kv_blocks(spans, kv_heads, head_dim);
        let (mut queries, mut out) = (queries, out);
        for spans in spans.chunk_by(|a, b| a.bits16 == b.bits16) {
            let rows: usize = spans.iter().map(|span| span.rows).sum();
            let (these, later_queries) = queries.split_at(rows * query_heads * head_dim);
            let (outputs, later_outputs) = std::mem::take(&mut out).split_at_mut(these.len());
            (queries, out) = (later_queries, later_outputs);
            self.attend(these, spans, query_heads, kv_heads, head_dim, outputs, cancel);
        }
    }

    /// [`Kernels::attention`] of spans with the same `bits16`, whose lengths have been checked.
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        queries: &[f32],
        spans: &[AttentionSpan],
        query_heads: usize,
        kv_heads: usize,
        head_dim: usize,
        out: &mut [f32],
        cancel: &Cancel,
    ) {
        if queries.is_empty() {
            return;
        }
        let group = query_heads / kv_heads;
        let rows = queries.len() / (query_heads * head_dim);
        let rounding = self.table.attention_bits16.as_ref();
        let rounding = rounding.filter(|rounding| spans[0].bits16 && (rounding.takes)(head_dim));
        let run = rounding.map_or(self.table.attention, |rounding| rounding.run);
        let threads = self.pool().threads();
        let task_queries = rounding.map_or(TASK_QUERIES, |rounding| {
            let enough_tasks = rows * query_heads / (TASKS_PER_THREAD * threads);
            enough_tasks.clamp(*rounding.task_queries.start(), *rounding.task_queries.end())
        });
        let task_rows = (task_queries / group).max(1);
        let row_tasks: usize = spans.iter().map(|span| span.rows.div_ceil(task_rows) * kv_heads).sum();
        let threads_would_idle = threads > 1 && row_tasks < TASKS_PER_THREAD * threads;
        let most_rows = match rounding {
            None => FEW_ROWS,
            Some(rounding) if rounding.takes_units => MAX_TASK_QUERIES / group,
            Some(_) => 0,
        };
        let uses_unit_tasks = |span: &AttentionSpan| {
            let bytes = span.rows * query_heads * head_dim * span.units() * size_of::<f32>();
            threads_would_idle
                && (1..=most_rows).contains(&span.rows)
                && span.units() > 1
                && bytes <= MAX_UNITS_BYTES
        };

        let slots =
            spans.iter().filter(|span| uses_unit_tasks(span)).map(|span| span.units() * kv_heads).sum();
        let mut units: Vec<PartialAttention> = Vec::new();
        units.resize_with(slots, PartialAttention::default);
        let shared_units = SharedOut::new(&mut units);
        let shared_out = SharedOut::new(&mut *out);
        let (mut tasks, mut to_merge) = (Vec::new(), Vec::new());
        let (mut first, mut slot) = (0, 0);
        for span in spans {
            let step = if uses_unit_tasks(span) { span.rows } else { task_rows };
            for start in (0..span.rows).step_by(step) {
                let end = (start + step).min(span.rows);
                for kv_head in 0..kv_heads {
                    let (rows, position) = (first + start..first + end, span.position + start);
                    let task = |output| AttentionTask {
                        queries,
                        query_heads,
                        head_dim,
                        rows: rows.clone(),
                        position,
                        kv_blocks: &span.kv_blocks,
                        kv_head,
                        kv_heads,
                        output,
                    };
                    if uses_unit_tasks(span) {
                        let unit_output =
                            |unit| AttentionOutput::Unit { unit, units: &shared_units, slot: slot + unit };
                        tasks.extend((0..span.units()).map(|unit| task(unit_output(unit))));
                        to_merge.push(UnitTasks {
                            rows,
                            position,
                            kv_head,
                            slots: slot..slot + span.units(),
                        });
                        slot += span.units();
                    } else {
                        tasks.push(task(AttentionOutput::Rows(&shared_out)));
                    }
                }
            }
            first += span.rows;
        }
        // The last rows see the most keys. They are started first, so that all threads end at the same time.
        self.pool.run(tasks.len(), cancel, &|task| {
            // SAFETY: the table was chosen for this CPU; lengths were asserted above; the tasks'
            // (rows, heads) or slots do not overlap.
            unsafe { run(&tasks[tasks.len() - 1 - task]) }
        });
        if cancel.is_cancelled() {
            return;
        }
        self.pool.run(to_merge.len(), cancel, &|task| {
            let UnitTasks { rows, position, kv_head, slots } = &to_merge[task];
            let mut total = PartialAttention::default();
            total.clear(rows.len() * group, head_dim.div_ceil(LANES));
            for (unit, partial) in units[slots.clone()].iter().enumerate() {
                let first_row = (unit * UNIT_POSITIONS).saturating_sub(*position);
                total.merge(partial, first_row * group..rows.len() * group);
            }
            for (index, row) in rows.clone().enumerate() {
                let start = (row * query_heads + kv_head * group) * head_dim;
                // SAFETY: this task alone has these rows of these heads.
                let heads = unsafe { shared_out.slice_mut(start, group * head_dim) };
                for (head, out) in heads.chunks_exact_mut(head_dim).enumerate() {
                    total.write(index * group + head, out);
                }
            }
        });
    }
}

/// Asserts that there are KV blocks for all positions, of a type that they may have.
fn check_kv_blocks(spans: &[AttentionSpan], kv_heads: usize, head_dim: usize) {
    for span in spans {
        let positions = span.position + span.rows;
        assert!(span.kv_blocks.len() * KV_BLOCK_POSITIONS >= positions, "KV blocks for all positions");
        for block in &span.kv_blocks {
            let is_possible = match block.dtype {
                WeightType::F32 | WeightType::F16 | WeightType::BF16 => true,
                WeightType::Q8_0 => head_dim.is_multiple_of(LANES),
                _ => false,
            };
            assert!(is_possible, "keys and values are of a type that KV blocks may have");
            let len = block.dtype.bytes_for(kv_heads * head_dim * KV_BLOCK_POSITIONS);
            assert_eq!(Some(block.keys.len()), len, "(kv_heads, head_dim, KV_BLOCK_POSITIONS)");
            assert_eq!(Some(block.values.len()), len, "(kv_heads, KV_BLOCK_POSITIONS, head_dim)");
        }
    }
}
