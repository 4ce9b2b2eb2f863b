//! KV blocks of 64 positions: allocated when first needed, returned to the pool when a sequence ends.

use crate::error::{Error, Result};
use crate::kernels::{Arena, KV_BLOCK_POSITIONS, KvBlock, Piece, WeightType};
use std::ops::Range;

/// The shape and type of a model's KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// `num_hidden_layers`
    pub layers: usize,
    /// `num_key_value_heads`
    pub kv_heads: usize,
    /// Elements of a key or value in one head.
    pub head_dim: usize,
    /// F32, F16 or BF16.
    pub dtype: WeightType,
}

impl KvShape {
    /// Bytes of one layer's keys in a block, which is also the size of its values; None on overflow.
    fn part_bytes(&self) -> Option<usize> {
        self.dtype.bytes_for(self.kv_heads.checked_mul(self.head_dim)?.checked_mul(KV_BLOCK_POSITIONS)?)
    }

    /// Bytes of one block over all layers; None on overflow.
    pub fn block_bytes(&self) -> Option<usize> {
        self.part_bytes()?.checked_mul(2)?.checked_mul(self.layers)
    }
}

/// The keys and values of 64 positions in all layers. Layout, layer by layer: keys
/// `(kv_heads, head_dim, 64)`, then values `(kv_heads, 64, head_dim)`.
#[derive(Debug)]
pub struct Block {
    bytes: Piece,
    part_bytes: usize,
    dtype: WeightType,
}

impl Block {
    fn keys_range(&self, layer: usize) -> Range<usize> {
        let start = 2 * layer * self.part_bytes;
        start..start + self.part_bytes
    }

    /// One layer, for the attention kernel.
    pub fn layer(&self, layer: usize) -> KvBlock<'_> {
        let keys = self.keys_range(layer);
        let values = keys.end..keys.end + self.part_bytes;
        KvBlock { dtype: self.dtype, keys: &self.bytes[keys], values: &self.bytes[values] }
    }

    /// The keys and the values of one layer, for writing.
    pub(super) fn layer_mut(&mut self, layer: usize) -> (&mut [u8], &mut [u8]) {
        let keys = self.keys_range(layer);
        let end = keys.end + self.part_bytes;
        self.bytes[keys.start..end].split_at_mut(self.part_bytes)
    }
}

/// Hands out blocks up to a limit, and reuses those that are returned.
#[derive(Debug)]
pub struct BlockPool {
    shape: KvShape,
    part_bytes: usize,
    block_bytes: usize,
    /// The memory that blocks are allocated from.
    arena: Arena,
    free: Vec<Block>,
    /// Number of blocks allocated so far, in use or free.
    blocks: usize,
    max_blocks: usize,
}

impl BlockPool {
    /// A pool of at most `max_bytes`, or of one block if that is larger. Allocates nothing yet.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if a single block is too large to address.
    pub fn new(shape: KvShape, max_bytes: u64) -> Result<Self> {
        let (Some(part_bytes), Some(block_bytes)) = (shape.part_bytes(), shape.block_bytes()) else {
            return Err(Error::unsupported("KV cache", format!("{shape:?} is too large")));
        };
        let max_blocks = usize::try_from(max_bytes / block_bytes.max(1) as u64).unwrap_or(usize::MAX).max(1);
        let (arena, free) = (Arena::default(), Vec::new());
        Ok(BlockPool { shape, part_bytes, block_bytes, arena, free, blocks: 0, max_blocks })
    }

    /// The shape of the cache.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// The maximum number of blocks.
    pub fn max_blocks(&self) -> usize {
        self.max_blocks
    }

    /// The number of blocks that can still be taken.
    pub fn free_blocks(&self) -> usize {
        self.max_blocks - self.blocks + self.free.len()
    }

    /// Takes a block. It may still contain the data of an earlier sequence.
    ///
    /// # Errors
    /// [`Error::Generation`] if the limit is reached or the system has no memory.
    pub fn take(&mut self) -> Result<Block> {
        if let Some(block) = self.free.pop() {
            return Ok(block);
        }
        let full = |what: &str| Error::Generation {
            reason: format!(
                "no room for more keys and values: {} blocks of {} positions, {} bytes each, are in use; \
                 {what}",
                self.blocks, KV_BLOCK_POSITIONS, self.block_bytes,
            ),
        };
        if self.blocks >= self.max_blocks {
            return Err(full("close other streams, or load with a smaller context_length"));
        }
        let bytes =
            self.arena.piece(self.block_bytes).ok_or_else(|| full("the system has no memory left"))?;
        self.blocks += 1;
        Ok(Block { bytes, part_bytes: self.part_bytes, dtype: self.shape.dtype })
    }

    /// Returns blocks to the pool.
    pub fn give_back(&mut self, blocks: impl IntoIterator<Item = Block>) {
        self.free.extend(blocks);
    }
}
