//! The keys and values of one sequence, in KV blocks that it may share with other sequences.

use super::block_pool::{BlockId, BlockPool, KvShape};
use super::prefix::{Context, Key, NodeId, Parent};
use crate::error::Result;
use crate::kernels::quantize::quantize_row;
use crate::kernels::{KV_BLOCK_POSITIONS, KvBlock, WeightType};
use half::vec::HalfFloatVecExt;
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

/// The blocks of one sequence, in the order of their positions. The default shares none.
#[derive(Debug, Default)]
pub struct PagedKv {
    blocks: Vec<BlockId>,
    /// None if the sequence shares no blocks.
    prefix: Option<Prefix>,
}

/// The part of a sequence that it shares.
#[derive(Debug)]
struct Prefix {
    context: Arc<Context>,
    /// Number of leading tokens whose keys and values may be shared.
    max_shared: usize,
    /// The tokens whose keys and values are in the blocks.
    tokens: Vec<u32>,
    /// The nodes of the leading blocks that are in the index.
    nodes: Vec<NodeId>,
}

impl Prefix {
    /// The key of the first block that is not in the index. None if it is not full, or not to be shared.
    fn next_key(&self, tokens: &[u32]) -> Option<Key> {
        let start = self.nodes.len() * KV_BLOCK_POSITIONS;
        let shared = &tokens[..tokens.len().min(self.max_shared)];
        let tokens = *shared.get(start..)?.first_chunk()?;
        let parent = match self.nodes.last() {
            Some(&node) => Parent::Node(node),
            None => Parent::Context(Arc::clone(&self.context)),
        };
        Some(Key { parent, tokens })
    }
}

impl PagedKv {
    /// The keys and values of a new sequence, which shares blocks with others of the same context.
    ///
    /// - `max_shared`: how many leading tokens may be shared
    /// - `tokens`: the leading tokens whose keys and values need not be computed if they are known
    pub fn shared(context: Context, max_shared: usize, tokens: &[u32], pool: &mut BlockPool) -> Self {
        let context = Arc::new(context);
        let mut prefix = Prefix { context, max_shared, tokens: Vec::new(), nodes: Vec::new() };
        let mut blocks = Vec::new();
        while let Some((block, node)) = prefix.next_key(tokens).and_then(|key| pool.find(&key)) {
            blocks.push(block);
            prefix.nodes.push(node);
        }
        prefix.tokens.extend_from_slice(&tokens[..blocks.len() * KV_BLOCK_POSITIONS]);
        PagedKv { blocks, prefix: Some(prefix) }
    }

    /// The number of leading tokens whose keys and values a new sequence has: a multiple of
    /// [`KV_BLOCK_POSITIONS`].
    pub fn cached_tokens(&self) -> usize {
        self.prefix.as_ref().map_or(0, |prefix| prefix.tokens.len())
    }

    /// Drops the keys and values from `position` on, and releases the blocks that hold nothing else.
    pub fn truncate(&mut self, position: usize, pool: &mut BlockPool) {
        let kept = position.div_ceil(KV_BLOCK_POSITIONS).min(self.blocks.len());
        // The last block first, so that it is the first of them to be evicted.
        self.blocks.drain(kept..).rev().for_each(|block| pool.release(block));
        if let Some(prefix) = &mut self.prefix {
            prefix.tokens.truncate(position);
            prefix.nodes.truncate(position / KV_BLOCK_POSITIONS);
        }
    }

    /// Makes room for keys and values at these positions, after [`Self::truncate`] at their start.
    ///
    /// # Errors
    /// [`crate::error::Error::Generation`] if the limit is reached or the system has no memory. The blocks
    /// taken so far are kept.
    pub fn reserve(&mut self, positions: Range<usize>, pool: &mut BlockPool) -> Result<()> {
        if let Some(first) = self.blocks.get_mut(positions.start / KV_BLOCK_POSITIONS) {
            *first = pool.make_writable(*first)?;
        }
        while self.blocks.len() * KV_BLOCK_POSITIONS < positions.end {
            self.blocks.push(pool.take()?);
        }
        Ok(())
    }

    /// Records that the keys and values of `tokens` are complete, from position `start` on.
    pub fn complete(&mut self, start: usize, tokens: &[u32]) {
        let Some(prefix) = &mut self.prefix else { return };
        if start > prefix.tokens.len() {
            // The caller left out positions, and what is at them is unknown.
            self.prefix = None;
            return;
        }
        prefix.tokens.truncate(start);
        prefix.tokens.extend_from_slice(tokens);
    }

    /// Lets later sequences find the blocks that are full now. Takes an equal block for each that is known
    /// already. All writes must be complete.
    pub fn share(&mut self, pool: &mut BlockPool) {
        let Some(prefix) = &mut self.prefix else { return };
        while let Some(key) = prefix.next_key(&prefix.tokens) {
            let block = &mut self.blocks[prefix.nodes.len()];
            let node;
            (*block, node) = pool.publish(*block, key);
            prefix.nodes.push(node);
        }
    }

    /// Writes the keys and values of one layer for the positions from `position` on.
    ///
    /// - `keys`, `values`: `(rows, kv_heads, head_dim)`
    ///
    /// # Panics
    /// If there is no room ([`Self::reserve`]), if a block is shared, or if the lengths disagree with the
    /// shape.
    pub fn write(&self, pool: &mut BlockPool, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        assert_eq!(keys.len(), values.len(), "as many values as keys");
        match pool.shape().dtype {
            WeightType::F32 => self.write_as(pool, layer, position, keys, values),
            WeightType::F16 => self.write_as(
                pool,
                layer,
                position,
                &Vec::<f16>::from_f32_slice(keys),
                &Vec::<f16>::from_f32_slice(values),
            ),
            WeightType::BF16 => self.write_as(
                pool,
                layer,
                position,
                &Vec::<bf16>::from_f32_slice(keys),
                &Vec::<bf16>::from_f32_slice(values),
            ),
            WeightType::Q8_0 => {
                let (keys, values) = (q8_blocks(keys), q8_blocks(values));
                self.write_as(pool, layer, position, &keys, &values)
            }
            other => unreachable!("a KV cache is never {other}"),
        }
    }

    /// As [`Self::write`], for numbers that are already converted to the cache's type.
    fn write_as<T: Stored>(
        &self,
        pool: &mut BlockPool,
        layer: usize,
        position: usize,
        keys: &[T],
        values: &[T],
    ) {
        let shape = pool.shape();
        let width = shape.kv_heads * shape.head_dim / T::LEN;
        let rows = keys.chunks_exact(width).zip(values.chunks_exact(width));
        for (position, (keys, values)) in (position..).zip(rows) {
            let block = self.blocks[position / KV_BLOCK_POSITIONS];
            let (block_keys, block_values) = pool.layer_mut(block, layer);
            scatter(block_keys, block_values, &shape, position % KV_BLOCK_POSITIONS, keys, values);
        }
    }

    /// One layer of every block, in the order of positions.
    pub fn layer<'a>(&self, pool: &'a BlockPool, layer: usize) -> Vec<KvBlock<'a>> {
        self.blocks.iter().map(|&block| pool.layer(block, layer)).collect()
    }
}

/// Numbers as a KV block stores them.
trait Stored: bytemuck::NoUninit {
    /// How many numbers of a head these are.
    const LEN: usize = 1;

    /// Writes them as a part of position `at`'s key, to the bytes of this part for all positions.
    fn write_key(&self, at: usize, part: &mut [u8]) {
        let size = size_of::<Self>();
        part[at * size..][..size].copy_from_slice(bytemuck::bytes_of(self));
    }
}

impl Stored for f32 {}
impl Stored for f16 {}
impl Stored for bf16 {}

/// A block of Q8_0.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct Q8Block {
    /// f16.
    scale: [u8; 2],
    /// i8.
    numbers: [u8; 32],
}

impl Stored for Q8Block {
    const LEN: usize = 32;

    fn write_key(&self, at: usize, part: &mut [u8]) {
        let (scales, rows) = part.split_at_mut(2 * KV_BLOCK_POSITIONS);
        scales[2 * at..][..2].copy_from_slice(&self.scale);
        for (row, number) in rows.chunks_exact_mut(KV_BLOCK_POSITIONS).zip(&self.numbers) {
            row[at] = *number;
        }
    }
}

/// Converts to Q8_0. A block with a number that it cannot hold has a scale of NaN, so that the logits become
/// NaN, as with infinities in other types.
fn q8_blocks(numbers: &[f32]) -> Vec<Q8Block> {
    let quantized = numbers.as_chunks::<32>().0.iter().map(|numbers| {
        let mut bytes = [0; size_of::<Q8Block>()];
        let is_stored = quantize_row(WeightType::Q8_0, numbers, &mut bytes).is_ok();
        let (&scale, numbers) = bytes.split_first_chunk().expect("a block is longer");
        Q8Block {
            scale: if is_stored { scale } else { f16::NAN.to_le_bytes() },
            numbers: *numbers.first_chunk().expect("the rest has 32 bytes"),
        }
    });
    quantized.collect()
}

/// Writes the keys and values of one position into its block. The block's keys are transposed.
fn scatter<T: Stored>(
    block_keys: &mut [u8],
    block_values: &mut [u8],
    shape: &KvShape,
    at: usize,
    keys: &[T],
    values: &[T],
) {
    let size = size_of::<T>();
    for (key, part) in keys.iter().zip(block_keys.chunks_exact_mut(KV_BLOCK_POSITIONS * size)) {
        key.write_key(at, part);
    }
    let head_len = shape.head_dim / T::LEN;
    for (head, values) in values.chunks_exact(head_len).enumerate() {
        let to = (head * KV_BLOCK_POSITIONS + at) * head_len * size;
        block_values[to..to + head_len * size].copy_from_slice(bytemuck::cast_slice(values));
    }
}

#[cfg(test)]
mod random_tests;
#[cfg(test)]
mod tests;
