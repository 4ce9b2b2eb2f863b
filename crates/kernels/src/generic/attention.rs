//! Causal attention: the queries of some rows over cached keys and values.
//!
//! Keys lie transposed inside a KV block, `(head_dim, KV_BLOCK_POSITIONS)`. So a lane is a position, and
//! scores need no sums across lanes. For each KV block, all queries that share a KV head first get their
//! scores, then the softmax weights, then the weighted sums of values. The microkernels load a vector of keys
//! or values once and use it for several queries. The softmax keeps a running maximum from block to block and
//! from unit to unit (`partial_attention.rs`). KV blocks and units begin at fixed positions, and queries
//! never mix. So a row's result depends neither on other rows nor on how the prompt or the work was divided.

// The compiler keeps arrays in registers if it unrolls the loops over them. It always does that for counted
// loops with constant bounds, but not always for iterators.
#![allow(clippy::needless_range_loop)]

use super::dequantize::dequantize_row;
use super::elementwise::exp_of_negative;
use super::partial_attention::{PartialAttention, part_start};
use super::storage::{F32, Q8_0, Storage, with_kv_storage};
use crate::blocks::WeightType;
use crate::kv_block::{KV_BLOCK_POSITIONS, KvBlock};
use crate::lanes::{LANES, Lanes};
use crate::output::SharedOut;
use crate::prefetch::{prefetch_l1, prefetch_l2};
use std::cell::Cell;
use std::ops::Range;

/// KV blocks of a unit, which is what one task of a single row reads. Results depend on it, so it is the same
/// on all machines.
const UNIT_KV_BLOCKS: usize = 8;
/// Positions in a unit.
pub(crate) const UNIT_POSITIONS: usize = UNIT_KV_BLOCKS * KV_BLOCK_POSITIONS;
/// Vectors of positions in a KV block.
const KV_BLOCK_VECTORS: usize = KV_BLOCK_POSITIONS / LANES;
/// Queries of a microkernel that converts keys and values, where one for f32 has `most`. The compiler would
/// keep sums in memory for the number of queries that takes all registers.
const fn converting_queries<L: Lanes>(most: usize) -> usize {
    if most == L::ROW_PRODUCT_SUMS { most - 1 } else { most }
}

/// With at most this many queries, a 16-bit KV block is converted to f32 wherever it is used. With more
/// queries it is converted once, before. Plain Rust, whose microkernel has one query, converts too slowly to
/// do it twice.
const fn few_queries<L: Lanes>(most: usize) -> usize {
    8 * (converting_queries::<L>(most) - 1)
}

/// Whether the sums over two vectors fit into registers for `most` queries. Keys and values are then read
/// cache line by cache line in order, which suits the processor's prefetcher.
const fn fits_two_vectors(most: usize) -> bool {
    most >= 4
}

/// Some rows of one sequence and one KV head, for all query heads that share it.
pub(crate) struct AttentionTask<'a> {
    /// `(rows, query_heads, head_dim)`
    pub(crate) queries: &'a [f32],
    pub(crate) query_heads: usize,
    pub(crate) head_dim: usize,
    /// The rows of `queries` and `out` that this task computes.
    pub(crate) rows: Range<usize>,
    /// The position of the first of these rows.
    pub(crate) position: usize,
    /// KV block i holds the positions from `i * KV_BLOCK_POSITIONS` on. There are blocks for all positions of
    /// the rows.
    pub(crate) kv_blocks: &'a [KvBlock<'a>],
    pub(crate) kv_head: usize,
    pub(crate) kv_heads: usize,
    pub(crate) output: AttentionOutput<'a>,
}

/// What a task computes, and where the result goes.
#[derive(Clone, Copy)]
pub(crate) enum AttentionOutput<'a> {
    /// All units; the result goes to the rows' heads in a slice of the same shape as `queries`.
    Rows(&'a SharedOut<'a>),
    /// One unit; the result goes to `slot`, and is merged with those of the other units.
    Unit { unit: usize, units: &'a SharedOut<'a, PartialAttention>, slot: usize },
}

impl AttentionTask<'_> {
    /// The number of query heads that share a KV head.
    #[inline(always)]
    pub(crate) fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// The index in `queries` and `out` of the task's first head in row `row`.
    #[inline(always)]
    pub(crate) fn heads_offset(&self, row: usize) -> usize {
        ((self.rows.start + row) * self.query_heads + self.kv_head * self.group()) * self.head_dim
    }

    /// The first of the queries, `(rows, group)`, that sees `position`. All later ones see it too.
    #[inline(always)]
    pub(crate) fn first_query_seeing(&self, position: usize) -> usize {
        position.saturating_sub(self.position).min(self.rows.len()) * self.group()
    }

    /// Elements from one position's values to the next one's, as [`attend_kv_block`] reads them.
    #[inline(always)]
    fn values_len(&self) -> usize {
        self.head_dim.max(LANES)
    }

    /// The number of KV blocks that the last row sees.
    #[inline(always)]
    pub(crate) fn seen_kv_blocks(&self) -> usize {
        (self.position + self.rows.len()).div_ceil(KV_BLOCK_POSITIONS)
    }

    /// The KV blocks of a unit that the last row sees.
    #[inline(always)]
    pub(crate) fn kv_blocks_of(&self, unit: usize) -> Range<usize> {
        unit * UNIT_KV_BLOCKS..((unit + 1) * UNIT_KV_BLOCKS).min(self.seen_kv_blocks())
    }

    /// Adds a unit's result to `total`, or hands it over if the task is only that unit.
    #[inline(always)]
    pub(crate) fn keep_unit(&self, unit: usize, result: &mut PartialAttention, total: &mut PartialAttention) {
        match self.output {
            AttentionOutput::Rows(_) => {
                let seen_by = self.first_query_seeing(unit * UNIT_POSITIONS)..self.rows.len() * self.group();
                total.merge(result, seen_by);
            }
            AttentionOutput::Unit { units, slot, .. } => {
                // SAFETY: this task alone has this slot.
                let slot = unsafe { &mut units.slice_mut(slot, 1)[0] };
                *slot = std::mem::take(result);
            }
        }
    }

    #[inline(always)]
    pub(crate) fn units(&self) -> Range<usize> {
        match self.output {
            AttentionOutput::Rows(_) => 0..self.seen_kv_blocks().div_ceil(UNIT_KV_BLOCKS),
            AttentionOutput::Unit { unit, .. } => unit..unit + 1,
        }
    }
}

/// Buffers that are kept between tasks. A query is a (row, head) of the task.
#[derive(Default)]
struct Scratch {
    /// `(head_dim, KV_BLOCK_POSITIONS)`
    keys: Vec<[f32; LANES]>,
    /// `(KV_BLOCK_POSITIONS, head_dim)`; rows are padded to a vector if head_dim is shorter.
    values: Vec<[f32; LANES]>,
    queries: Queries,
    total: PartialAttention,
}

/// The queries of a task and their intermediate results.
#[derive(Default)]
pub(crate) struct Queries {
    /// `(queries, head_dim)`, divided by the square root of head_dim.
    pub(crate) scaled: Vec<f32>,
    /// `(queries, KV_BLOCK_POSITIONS)`: the scores of a KV block, then the softmax weights.
    weights: Vec<[[f32; LANES]; KV_BLOCK_VECTORS]>,
    /// The number of positions of the KV block that each query sees.
    visible: Vec<usize>,
    /// The factor for the sums of earlier KV blocks, because the maximum has changed.
    rescale: Vec<[f32; LANES]>,
    /// The sum of the KV block's softmax weights.
    sums: Vec<f32>,
    pub(crate) unit: PartialAttention,
}

impl Queries {
    /// Takes over the task's queries.
    #[inline(always)]
    pub(crate) fn scale(&mut self, task: &AttentionTask) {
        let scale = 1.0 / (task.head_dim as f32).sqrt();
        let heads_len = task.group() * task.head_dim;
        self.scaled.clear();
        for row in 0..task.rows.len() {
            self.scaled.extend(task.queries[task.heads_offset(row)..][..heads_len].iter().map(|q| q * scale));
        }
    }

    /// Starts over, with no keys.
    #[inline(always)]
    pub(crate) fn clear(&mut self, task: &AttentionTask) {
        let count = task.rows.len() * task.group();
        self.weights.resize(count, [[0.0; LANES]; KV_BLOCK_VECTORS]);
        self.visible.resize(count, 0);
        self.rescale.resize(count.div_ceil(LANES), [0.0; LANES]);
        self.sums.resize(count, 0.0);
        self.unit.clear(count, task.head_dim.div_ceil(LANES));
    }
}

impl PartialAttention {
    /// Writes the results of a task's queries to their heads.
    #[inline(always)]
    pub(crate) fn write_rows(&self, task: &AttentionTask, out: &SharedOut) {
        let heads_len = task.group() * task.head_dim;
        for row in 0..task.rows.len() {
            // SAFETY: this task alone writes these rows' heads; `out` is as long as `queries`, which was read
            // at the same range.
            let heads = unsafe { out.slice_mut(task.heads_offset(row), heads_len) };
            for (head, out) in heads.chunks_exact_mut(task.head_dim).enumerate() {
                self.write(row * task.group() + head, out);
            }
        }
    }
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Some queries, and the KV block that they attend to.
pub(crate) struct SeenKvBlock<'a> {
    /// The queries, which see at least `first`.
    pub(crate) seen_by: Range<usize>,
    /// The block's first position.
    pub(crate) first: usize,
    /// Keys `(head_dim, KV_BLOCK_POSITIONS)` and values `(KV_BLOCK_POSITIONS, values_len)`, then those of the
    /// next block, to be prefetched.
    pub(crate) bytes: [&'a [u8]; 4],
}

/// Runs one task. `attend` is [`attend_kv_block`] for a storage type known at run time, with a microkernel of
/// up to `QUERIES` queries.
#[inline(always)]
pub(crate) fn attention<L: Lanes, const QUERIES: usize>(
    task: &AttentionTask,
    attend: impl Fn(WeightType, &mut Queries, SeenKvBlock),
) {
    // Taken out instead of borrowed in a closure: see [`take_buffer`](super::matmul::take_buffer).
    let mut scratch = SCRATCH.take();
    attention_with::<L, QUERIES>(task, &mut scratch, &attend);
    SCRATCH.set(scratch);
}

#[inline(always)]
fn attention_with<L: Lanes, const QUERIES: usize>(
    task: &AttentionTask,
    scratch: &mut Scratch,
    attend: &impl Fn(WeightType, &mut Queries, SeenKvBlock),
) {
    scratch.queries.scale(task);
    scratch.total.clear(task.rows.len() * task.group(), task.head_dim.div_ceil(LANES));
    for unit in task.units() {
        attend_unit::<L, QUERIES>(task, scratch, unit, attend);
        task.keep_unit(unit, &mut scratch.queries.unit, &mut scratch.total);
    }
    if let AttentionOutput::Rows(out) = task.output {
        scratch.total.write_rows(task, out);
    }
}

/// Computes one unit's part of the attention; it goes to `scratch.queries.unit`.
#[inline(always)]
fn attend_unit<L: Lanes, const QUERIES: usize>(
    task: &AttentionTask,
    scratch: &mut Scratch,
    unit: usize,
    attend: &impl Fn(WeightType, &mut Queries, SeenKvBlock),
) {
    let count = task.rows.len() * task.group();
    let Scratch { keys, values, queries, .. } = scratch;
    queries.clear(task);
    for index in task.kv_blocks_of(unit) {
        let block = &task.kv_blocks[index];
        let (mut dtype, first) = (block.dtype, index * KV_BLOCK_POSITIONS);
        let mut block_keys = block.keys(task.kv_head, task.kv_heads);
        let mut block_values = block.values(task.kv_head, task.kv_heads);
        let next = task.kv_blocks.get(index + 1).unwrap_or(block);
        let next_keys = next.keys(task.kv_head, task.kv_heads);
        let next_values = next.values(task.kv_head, task.kv_heads);
        if task.head_dim < LANES || dtype != WeightType::F32 && count > few_queries::<L>(QUERIES) {
            dequantize_kv_block::<L>(task, block, keys, values);
            (block_keys, block_values) = (bytemuck::cast_slice(keys), bytemuck::cast_slice(values));
            dtype = WeightType::F32;
        }
        let bytes = [block_keys, block_values, next_keys, next_values];
        let seen_by = task.first_query_seeing(first)..count;
        attend(dtype, queries, SeenKvBlock { seen_by, first, bytes });
    }
}

/// Converts a KV block to f32. Rows of values that are shorter than a vector are padded.
#[inline(always)]
pub(crate) fn dequantize_kv_block<L: Lanes>(
    task: &AttentionTask,
    block: &KvBlock,
    keys: &mut Vec<[f32; LANES]>,
    values: &mut Vec<[f32; LANES]>,
) {
    keys.resize(task.head_dim * KV_BLOCK_VECTORS, [0.0; LANES]);
    values.resize(task.values_len() * KV_BLOCK_VECTORS, [0.0; LANES]);
    dequantize_keys::<L>(block.dtype, block.keys(task.kv_head, task.kv_heads), keys);
    let stored = block.values(task.kv_head, task.kv_heads);
    if task.head_dim >= LANES {
        dequantize_values::<L>(block.dtype, stored, values);
    } else {
        let rows = stored.chunks_exact(stored.len() / KV_BLOCK_POSITIONS);
        for (row, out) in rows.zip(values.chunks_exact_mut(1)) {
            dequantize_values::<L>(block.dtype, row, out);
        }
    }
}

/// Converts the values of a head to f32.
#[inline(always)]
pub(crate) fn dequantize_values<L: Lanes>(dtype: WeightType, stored: &[u8], numbers: &mut [[f32; LANES]]) {
    with_kv_storage!(dtype, dequantize_row::<L>(stored, numbers));
}

/// Converts the keys of a head to f32.
#[inline(always)]
pub(crate) fn dequantize_keys<L: Lanes>(dtype: WeightType, stored: &[u8], numbers: &mut [[f32; LANES]]) {
    if dtype != WeightType::Q8_0 {
        return dequantize_values::<L>(dtype, stored, numbers);
    }
    let parts = stored.as_chunks().0.iter().zip(numbers.as_chunks_mut::<{ LANES * KV_BLOCK_VECTORS }>().0);
    for (part, numbers) in parts {
        let part = Q8Keys::of(part);
        let scales = part.scales::<L, KV_BLOCK_VECTORS>(0);
        for (row, numbers) in
            part.rows.as_chunks::<KV_BLOCK_VECTORS>().0.iter().zip(numbers.as_chunks_mut().0)
        {
            let numbers: &mut [[f32; LANES]; KV_BLOCK_VECTORS] = numbers;
            for vector in 0..KV_BLOCK_VECTORS {
                L::i8(&row[vector]).mul(scales[vector]).store(&mut numbers[vector]);
            }
        }
    }
}

/// Bytes of 32 elements of all keys in Q8_0.
const Q8_KEYS_BYTES: usize = Q8_0::BLOCK_BYTES * KV_BLOCK_POSITIONS;

/// 32 elements of all keys in Q8_0.
struct Q8Keys<'a> {
    /// f16, one for each position.
    scales: &'a [[u8; 2 * LANES]],
    /// i8, `(32, KV_BLOCK_VECTORS)` vectors.
    rows: &'a [[u8; LANES]],
}

impl<'a> Q8Keys<'a> {
    #[inline(always)]
    fn of(bytes: &'a [u8; Q8_KEYS_BYTES]) -> Self {
        let (scales, rows) = bytes.split_at(2 * KV_BLOCK_POSITIONS);
        Q8Keys { scales: scales.as_chunks().0, rows: rows.as_chunks().0 }
    }

    /// The scales of `P` vectors of positions.
    #[inline(always)]
    fn scales<L: Lanes, const P: usize>(&self, vector: usize) -> [L; P] {
        let mut scales = [L::splat(0.0); P];
        for p in 0..P {
            scales[p] = L::f16(&self.scales[vector + p]);
        }
        scales
    }
}

/// Calls `$function::<..., N>($args)` for N queries from `$query` on, until all are done. N is at most
/// `$most`, which is at most 4.
macro_rules! for_each_microkernel {
    ($queries:expr, $most:ident, $query:ident => $function:ident::<$($type:tt),*>($($arg:expr),*)) => {{
        let Range { start: mut $query, end } = $queries;
        while $query < end {
            let left = end - $query;
            // Avoids a call for one query alone: each of its additions would wait for the one before.
            let count = if left == $most + 1 && $most > 2 { $most - 1 } else { left.min($most) };
            match count {
                1 => $function::<$($type,)* 1>($($arg),*),
                2 => $function::<$($type,)* 2>($($arg),*),
                3 => $function::<$($type,)* 3>($($arg),*),
                _ => $function::<$($type,)* 4>($($arg),*),
            }
            $query += count;
        }
    }};
}

/// Keys or values, and the distances in bytes to the data that will be read soon and later, which is
/// prefetched. Without prefetching, the reads of one thread are limited by memory latency.
#[derive(Clone, Copy)]
struct Stream<'a> {
    bytes: &'a [u8],
    soon: usize,
    later: usize,
    later_into_l1: bool,
}

impl<'a> Stream<'a> {
    /// `bytes`, then the data that is read `soon` and `later`. All have the same length.
    #[inline(always)]
    fn new<L: Lanes>([bytes, soon, later]: [&'a [u8]; 3]) -> Self {
        let ahead = |other: &[u8]| other.as_ptr().addr().wrapping_sub(bytes.as_ptr().addr());
        Stream { bytes, soon: ahead(soon), later: ahead(later), later_into_l1: L::prefetches_kv_into_l1() }
    }

    /// 32 elements from byte `at` of `row`, which is a part of the stream.
    #[inline(always)]
    fn lanes<L: Lanes, S: Storage>(&self, row: &[u8], at: usize) -> L {
        let block = &row[at..][..S::BLOCK_BYTES];
        // F32 data has usually just been converted, for many queries. It is in the cache, and prefetching it
        // would only cost time.
        if S::BLOCK_BYTES < F32::BLOCK_BYTES {
            self.prefetch(block);
        }
        S::lanes::<L>(block, 0)
    }

    /// Prefetches what follows at the place of `part`, which is a part of the stream.
    #[inline(always)]
    fn prefetch(&self, part: &[u8]) {
        let later = part.as_ptr().wrapping_add(self.later);
        if self.later_into_l1 {
            prefetch_l1(later);
        } else {
            prefetch_l2(later);
        }
        prefetch_l1(part.as_ptr().wrapping_add(self.soon));
    }
}

/// Some queries attend to a KV block of type `S`.
#[inline(always)]
pub(crate) fn attend_kv_block<L: Lanes, S: Storage, const QUERIES: usize>(
    task: &AttentionTask,
    queries: &mut Queries,
    SeenKvBlock { seen_by, first, bytes: [keys, values, next_keys, next_values] }: SeenKvBlock,
) {
    let most = if S::BLOCK_BYTES < F32::BLOCK_BYTES { converting_queries::<L>(QUERIES) } else { QUERIES };
    let keys = Stream::new::<L>([keys, values, next_keys]);
    let values = Stream::new::<L>([values, next_keys, next_values]);
    if fits_two_vectors(QUERIES) {
        for_each_microkernel!(
            seen_by.clone(), most, query => scores::<L, S, 2>(queries, query, task.head_dim, 0, keys)
        );
    } else {
        for vector in 0..KV_BLOCK_VECTORS {
            let seen_by = task.first_query_seeing(first + vector * LANES).max(seen_by.start)..seen_by.end;
            for_each_microkernel!(
                seen_by, most, query => scores::<L, S, 1>(queries, query, task.head_dim, vector, keys)
            );
        }
    }
    for query in seen_by.clone() {
        let position = task.position + query / task.group();
        queries.visible[query] = (position + 1 - first).min(KV_BLOCK_POSITIONS);
        softmax_weights::<L>(queries, query);
    }
    // The first vector may include queries that do not see this block. Their factors are not read.
    for rescale in &mut queries.rescale[seen_by.start / LANES..seen_by.end.div_ceil(LANES)] {
        exp_of_negative(L::load(rescale)).store(rescale);
    }
    for query in seen_by.clone() {
        let rescale = queries.rescale.as_flattened()[query];
        queries.unit.sum[query] = queries.unit.sum[query] * rescale + queries.sums[query];
    }
    let (row_len, width) = (task.values_len(), task.head_dim.div_ceil(LANES));
    let mut index = 0;
    while index < width {
        let part = ValuesPart { index, width, row_len };
        if fits_two_vectors(QUERIES) && index + 1 < width {
            for_each_microkernel!(
                seen_by.clone(), most, query => add_values::<L, S, 2>(queries, query, part, values)
            );
            index += 2;
        } else {
            for_each_microkernel!(
                seen_by.clone(), most, query => add_values::<L, S, 1>(queries, query, part, values)
            );
            index += 1;
        }
    }
}

/// One or more vectors of every position's values.
#[derive(Clone, Copy)]
struct ValuesPart {
    /// The index of the first vector.
    index: usize,
    /// The number of vectors of a position's values.
    width: usize,
    /// Elements from one position's values to the next one's.
    row_len: usize,
}

/// Scores `q · keys` of `N` queries and `P` vectors of positions of a KV block.
#[inline(always)]
fn scores<L: Lanes, S: Storage, const P: usize, const N: usize>(
    queries: &mut Queries,
    query: usize,
    head_dim: usize,
    vector: usize,
    keys: Stream,
) {
    let mut q: [&[f32]; N] = [&[]; N];
    for i in 0..N {
        q[i] = &queries.scaled[(query + i) * head_dim..][..head_dim];
    }
    let mut sums = [[L::splat(0.0); P]; N];
    if S::IS_FLOAT {
        let mut starts = [0; P];
        for p in 0..P {
            starts[p] = (vector + p) * S::BLOCK_BYTES;
        }
        let rows = Rows { bytes: keys.bytes, row_bytes: KV_BLOCK_VECTORS * S::BLOCK_BYTES, starts };
        multiply_rows::<L, S, P, N>(&mut sums, keys, rows, q);
    } else {
        for (part, bytes) in keys.bytes.as_chunks().0.iter().enumerate() {
            let part_keys = Q8Keys::of(bytes);
            let scales = part_keys.scales::<L, P>(vector);
            keys.prefetch(&part_keys.scales[vector]);
            for (d, row) in part_keys.rows.as_chunks::<KV_BLOCK_VECTORS>().0.iter().enumerate() {
                keys.prefetch(&row[vector]);
                let mut lanes = [L::splat(0.0); P];
                for p in 0..P {
                    // Exact: 8 bits by 11.
                    lanes[p] = L::i8(&row[vector + p]).mul(scales[p]);
                }
                add_products(&mut sums, lanes, q, part * LANES + d);
            }
        }
    }
    for i in 0..N {
        for p in 0..P {
            sums[i][p].store(&mut queries.weights[query + i][vector + p]);
        }
    }
}

/// The rows of a stream that are multiplied: `bytes`, of which each row takes `row_bytes`.
#[derive(Clone, Copy)]
struct Rows<'a, const P: usize> {
    bytes: &'a [u8],
    row_bytes: usize,
    /// Where a row has the vectors that are multiplied.
    starts: [usize; P],
}

/// Adds the products of each row with its factor to N sums. Each sum has a factor for every row.
#[inline(always)]
fn multiply_rows<L: Lanes, S: Storage, const P: usize, const N: usize>(
    sums: &mut [[L; P]; N],
    stream: Stream,
    rows: Rows<P>,
    factors: [&[f32]; N],
) {
    if P == 1 && S::BLOCK_BYTES == F32::BLOCK_BYTES && N == L::ROW_PRODUCT_SUMS {
        let sums = sums.as_flattened_mut();
        return L::add_row_products(sums, rows.bytes, rows.row_bytes, rows.starts[0], &factors);
    }
    let count = factors[0].len();
    for (k, row) in rows.bytes.chunks_exact(rows.row_bytes).take(count).enumerate() {
        let mut lanes = [L::splat(0.0); P];
        for p in 0..P {
            lanes[p] = stream.lanes::<L, S>(row, rows.starts[p]);
        }
        add_products(sums, lanes, factors, k);
    }
}

/// Adds the products of the vectors with number `k` of each sum's factors.
#[inline(always)]
fn add_products<L: Lanes, const P: usize, const N: usize>(
    sums: &mut [[L; P]; N],
    lanes: [L; P],
    factors: [&[f32]; N],
    k: usize,
) {
    for i in 0..N {
        let factor = L::splat(factors[i][k]);
        for p in 0..P {
            sums[i][p] = lanes[p].mul_add(factor, sums[i][p]);
        }
    }
}

/// Turns a query's scores into softmax weights. Stores the logarithm of the factor for earlier sums in
/// `rescale`.
#[inline(always)]
fn softmax_weights<L: Lanes>(queries: &mut Queries, query: usize) {
    let visible = queries.visible[query];
    if visible < KV_BLOCK_POSITIONS {
        queries.weights[query].as_flattened_mut()[visible..].fill(f32::NEG_INFINITY);
    }
    let [first, second] = &mut queries.weights[query];
    let (low, high) = (L::load(first), L::load(second));
    let before = queries.unit.maximum[query];
    // The maximum ignores NaN, but the weights become NaN in any case.
    let maximum = L::splat(before).max(low).max(high).largest();
    let minus = L::splat(-maximum);
    let (low, high) = (exp_of_negative(low.add(minus)), exp_of_negative(high.add(minus)));
    low.store(first);
    high.store(second);
    queries.unit.maximum[query] = maximum;
    queries.sums[query] = low.add(high).sum();
    queries.rescale.as_flattened_mut()[query] = before - maximum;
}

/// `weighted = weighted * rescale + weights · values` for `N` queries and `P` vectors of the values.
#[inline(always)]
fn add_values<L: Lanes, S: Storage, const P: usize, const N: usize>(
    queries: &mut Queries,
    query: usize,
    part: ValuesPart,
    values: Stream,
) {
    let mut rescale = [0.0; N];
    rescale.copy_from_slice(&queries.rescale.as_flattened()[query..][..N]);
    // The first query sees the fewest positions. A query must not multiply what it does not see even by zero,
    // because it may be NaN.
    let common = queries.visible[query];
    add_seen::<L, S, P, N>(queries, query, part, values, 0..common, rescale);
    for query in query + 1..query + N {
        let more = common..queries.visible[query];
        if !more.is_empty() {
            add_seen::<L, S, P, 1>(queries, query, part, values, more, [1.0]);
        }
    }
}

#[inline(always)]
fn add_seen<L: Lanes, S: Storage, const P: usize, const N: usize>(
    queries: &mut Queries,
    query: usize,
    part: ValuesPart,
    values: Stream,
    positions: Range<usize>,
    rescale: [f32; N],
) {
    let at = |query: usize, p: usize| query * part.width + part.index + p;
    let mut weights: [&[f32]; N] = [&[]; N];
    let mut sums = [[L::splat(0.0); P]; N];
    for i in 0..N {
        weights[i] = &queries.weights[query + i].as_flattened()[positions.clone()];
        let rescale = L::splat(rescale[i]);
        for p in 0..P {
            sums[i][p] = L::load(&queries.unit.weighted[at(query + i, p)]).mul(rescale);
        }
    }
    let row_bytes = part.row_len * S::BLOCK_BYTES / LANES;
    let mut starts = [0; P];
    for p in 0..P {
        starts[p] = part_start(part.index + p, part.row_len) * S::BLOCK_BYTES / LANES;
    }
    let bytes = &values.bytes[positions.start * row_bytes..positions.end * row_bytes];
    multiply_rows::<L, S, P, N>(&mut sums, values, Rows { bytes, row_bytes, starts }, weights);
    for i in 0..N {
        for p in 0..P {
            sums[i][p].store(&mut queries.unit.weighted[at(query + i, p)]);
        }
    }
}
