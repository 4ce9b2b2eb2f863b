//! The pool of KV blocks of 64 positions: allocated when first needed, counted, cached and evicted.
//!
//! A block is in one of three states:
//!
//! - in use: one or more sequences refer to it
//! - cached: no sequence refers to it, but it is in the [`PrefixIndex`], where later sequences find it
//! - unused: anything may be in it
//!
//! A block that is released becomes cached if it is in the index, else unused. A sequence that needs a block
//! gets an unused one, then new memory up to the limit, then the cached block that was released first. There
//! is a limit for cached blocks too: beyond it, the one that was released first becomes unused.

use super::prefix::{Key, NodeId, PrefixIndex};
use crate::error::{Error, Result};
use crate::kernels::{Arena, KV_BLOCK_POSITIONS, KvBlock, Piece, WeightType};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// The shape and type of a model's KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// `num_hidden_layers`
    pub layers: usize,
    /// `num_key_value_heads`
    pub kv_heads: usize,
    /// Elements of a key or value in one head.
    pub head_dim: usize,
    /// F32, F16 or BF16; Q8_0 if head_dim is a multiple of 32.
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

/// The keys and values of 64 positions in all layers: layer by layer the keys, then the values, as
/// [`KvBlock`] has them.
#[derive(Debug)]
struct Block {
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
    fn layer(&self, layer: usize) -> KvBlock<'_> {
        let keys = self.keys_range(layer);
        let values = keys.end..keys.end + self.part_bytes;
        KvBlock { dtype: self.dtype, keys: &self.bytes[keys], values: &self.bytes[values] }
    }

    /// The keys and the values of one layer, for writing.
    fn layer_mut(&mut self, layer: usize) -> (&mut [u8], &mut [u8]) {
        let keys = self.keys_range(layer);
        let end = keys.end + self.part_bytes;
        self.bytes[keys.start..end].split_at_mut(self.part_bytes)
    }
}

/// The number of a block in its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockId(usize);

/// Numbers of KV blocks, of [`KV_BLOCK_POSITIONS`] positions each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvBlocks {
    /// All that there may be.
    pub total: usize,
    /// Those that can be taken, unused or cached.
    pub free: usize,
    /// Those of `free` whose keys and values a later sequence may reuse.
    pub cached: usize,
}

/// A block and who needs it.
#[derive(Debug)]
struct Slot {
    block: Block,
    /// Number of sequences that refer to the block.
    references: usize,
    /// Where the block is in the index; None if it is not there.
    key: Option<Arc<Key>>,
    /// When the block was last released.
    released: u64,
}

/// Owns all blocks, up to a limit, and knows which of them sequences share.
#[derive(Debug)]
pub struct BlockPool {
    shape: KvShape,
    part_bytes: usize,
    block_bytes: usize,
    /// The memory that blocks are allocated from.
    arena: Arena,
    max_blocks: usize,
    max_cached: usize,
    /// All blocks allocated so far, by number.
    slots: Vec<Slot>,
    unused: Vec<BlockId>,
    /// The cached blocks, by the time of their release.
    cached: BTreeMap<u64, BlockId>,
    index: PrefixIndex,
    /// Number of releases so far.
    releases: u64,
}

impl BlockPool {
    /// A pool of at most `max_bytes`, or of one block if that is larger. At most `cached_bytes` of these stay
    /// cached. Allocates nothing yet.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if a single block is too large to address.
    pub fn new(shape: KvShape, max_bytes: u64, cached_bytes: u64) -> Result<Self> {
        let (Some(part_bytes), Some(block_bytes)) = (shape.part_bytes(), shape.block_bytes()) else {
            return Err(Error::unsupported("KV cache", format!("{shape:?} is too large")));
        };
        let blocks = |bytes: u64| usize::try_from(bytes / block_bytes.max(1) as u64).unwrap_or(usize::MAX);
        Ok(BlockPool {
            shape,
            part_bytes,
            block_bytes,
            arena: Arena::default(),
            max_blocks: blocks(max_bytes).max(1),
            max_cached: blocks(cached_bytes),
            slots: Vec::new(),
            unused: Vec::new(),
            cached: BTreeMap::new(),
            index: PrefixIndex::default(),
            releases: 0,
        })
    }

    /// The shape of the cache.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// How many blocks there are and how many are free.
    pub fn blocks(&self) -> KvBlocks {
        let cached = self.cached.len();
        let in_use = self.slots.len() - self.unused.len() - cached;
        KvBlocks { total: self.max_blocks, free: self.max_blocks - in_use, cached }
    }

    /// Takes a block that nobody refers to. It may still contain the data of an earlier sequence.
    ///
    /// # Errors
    /// [`Error::Generation`] if all blocks up to the limit are in use, or if the system has no memory.
    pub(super) fn take(&mut self) -> Result<BlockId> {
        let id = match self.unused.pop() {
            Some(id) => id,
            None => match self.allocate().or_else(|| self.evict()) {
                Some(id) => id,
                None => return Err(self.full()),
            },
        };
        self.slots[id.0].references = 1;
        Ok(id)
    }

    /// A new block; None at the limit or if the system has no memory.
    fn allocate(&mut self) -> Option<BlockId> {
        if self.slots.len() >= self.max_blocks {
            return None;
        }
        let bytes = self.arena.piece(self.block_bytes)?;
        let block = Block { bytes, part_bytes: self.part_bytes, dtype: self.shape.dtype };
        self.slots.push(Slot { block, references: 0, key: None, released: 0 });
        Some(BlockId(self.slots.len() - 1))
    }

    /// The cached block that was released first, no longer cached.
    fn evict(&mut self) -> Option<BlockId> {
        let (_, id) = self.cached.pop_first()?;
        self.forget(id);
        Some(id)
    }

    fn full(&self) -> Error {
        let advice = if self.slots.len() >= self.max_blocks {
            "close other streams, or load with a smaller context_length"
        } else {
            "the system has no memory left"
        };
        let reason = format!(
            "no room for more keys and values: {} blocks of {KV_BLOCK_POSITIONS} positions, {} bytes each, \
             are in use; {advice}",
            self.slots.len(),
            self.block_bytes,
        );
        Error::Generation { reason }
    }

    /// Adds a reference to the block with this key, if there is one.
    pub(super) fn find(&mut self, key: &Key) -> Option<(BlockId, NodeId)> {
        let (id, node) = self.index.get(key)?;
        let slot = &mut self.slots[id.0];
        if slot.references == 0 {
            self.cached.remove(&slot.released);
        }
        slot.references += 1;
        Some((id, node))
    }

    /// Lets later sequences find a block, which must be full. If an equal block is known already, returns
    /// that one instead, and releases `id`.
    pub(super) fn publish(&mut self, id: BlockId, key: Key) -> (BlockId, NodeId) {
        debug_assert!(self.slots[id.0].key.is_none(), "a block is in the index once");
        if let Some(known) = self.find(&key) {
            self.release(id);
            return known;
        }
        let key = Arc::new(key);
        self.slots[id.0].key = Some(Arc::clone(&key));
        (id, self.index.insert(key, id))
    }

    /// Takes a block out of the index.
    fn forget(&mut self, id: BlockId) {
        if let Some(key) = self.slots[id.0].key.take() {
            self.index.remove(&key);
        }
    }

    /// A block with the contents of `id` that may be written, in place of one reference to `id`. If there are
    /// no other references, that is `id` itself, which no later sequence finds any more.
    ///
    /// # Errors
    /// As [`BlockPool::take`]. The reference to `id` remains then.
    pub(super) fn make_writable(&mut self, id: BlockId) -> Result<BlockId> {
        if self.slots[id.0].references == 1 {
            self.forget(id);
            return Ok(id);
        }
        let copy = self.take()?;
        let [from, to] = self
            .slots
            .get_disjoint_mut([id.0, copy.0])
            .expect("the copy is a block that nobody referred to, so not `id`");
        to.block.bytes.copy_from_slice(&from.block.bytes);
        self.release(id);
        Ok(copy)
    }

    /// Drops one reference to a block.
    pub(super) fn release(&mut self, id: BlockId) {
        let slot = &mut self.slots[id.0];
        slot.references -= 1;
        if slot.references > 0 {
            return;
        }
        if slot.key.is_some() {
            self.releases += 1;
            slot.released = self.releases;
            self.cached.insert(self.releases, id);
            if self.cached.len() > self.max_cached {
                let oldest = self.evict();
                self.unused.extend(oldest);
            }
        } else {
            self.unused.push(id);
        }
    }

    /// One layer of a block, for the attention kernel.
    pub(super) fn layer(&self, id: BlockId, layer: usize) -> KvBlock<'_> {
        self.slots[id.0].block.layer(layer)
    }

    /// The keys and the values of one layer of a block, for writing.
    ///
    /// # Panics
    /// If the block is shared or a later sequence may find it.
    pub(super) fn layer_mut(&mut self, id: BlockId, layer: usize) -> (&mut [u8], &mut [u8]) {
        let slot = &mut self.slots[id.0];
        assert!(slot.references == 1 && slot.key.is_none(), "a shared block is never written");
        slot.block.layer_mut(layer)
    }
}
