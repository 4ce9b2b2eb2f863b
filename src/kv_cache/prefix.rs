//! The index of full KV blocks by the tokens whose keys and values they hold.
//!
//! A block's keys and values depend on its own tokens, on all tokens before them, and on how they were
//! computed. So the blocks form trees: a node is a block, and its parent is the block before it. The parent
//! of a first block is a [`Context`]. The map compares keys, not only their hashes, so two blocks of
//! different tokens are never confused. Hashes depend on random numbers, so nobody can choose tokens that
//! collide.
//!
//! Ids of nodes are never used again. If a node is removed, its children can no longer be found, and their
//! blocks are evicted in time.
//!
//! The index takes about 400 bytes for a block, whose keys and values take a megabyte or more.

use super::block_pool::BlockId;
use crate::kernels::KV_BLOCK_POSITIONS;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

/// What keys and values depend on besides the tokens. Only sequences with equal contexts share blocks.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Context {
    /// The way in which they are computed; None if there is only one.
    pub arithmetic: Option<u8>,
    /// The length that the RoPE frequencies are stretched for, 0 if they are not stretched by a length.
    pub rope_tokens: usize,
    /// Chosen by the caller.
    pub salt: Box<str>,
}

/// Identifies a node for as long as the index exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct NodeId(u64);

/// What stands before a block.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Parent {
    /// Nothing: the block is the first of its sequence.
    Context(Arc<Context>),
    /// Another block.
    Node(NodeId),
}

/// What the contents of a full block depend on.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) parent: Parent,
    pub(super) tokens: [u32; KV_BLOCK_POSITIONS],
}

/// Finds blocks by their [`Key`]. `S` makes the hashes.
#[derive(Debug, Default)]
pub(super) struct PrefixIndex<S = RandomState> {
    nodes: HashMap<Arc<Key>, (BlockId, NodeId), S>,
    /// Number of nodes inserted so far.
    inserted: u64,
}

impl<S: BuildHasher> PrefixIndex<S> {
    /// The block with this key.
    pub(super) fn get(&self, key: &Key) -> Option<(BlockId, NodeId)> {
        self.nodes.get(key).copied()
    }

    /// Adds a block under a key that is not in the index.
    pub(super) fn insert(&mut self, key: Arc<Key>, block: BlockId) -> NodeId {
        self.inserted += 1;
        let node = NodeId(self.inserted);
        self.nodes.insert(key, (block, node));
        node
    }

    /// Removes the block with this key.
    pub(super) fn remove(&mut self, key: &Key) {
        self.nodes.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv_cache::{BlockPool, KvShape};
    use std::hash::Hasher;

    /// Gives every key the same hash.
    #[derive(Default)]
    struct Colliding;

    impl BuildHasher for Colliding {
        type Hasher = Colliding;

        fn build_hasher(&self) -> Colliding {
            Colliding
        }
    }

    impl Hasher for Colliding {
        fn finish(&self) -> u64 {
            0
        }

        fn write(&mut self, _: &[u8]) {}
    }

    #[test]
    fn keys_with_equal_hashes_are_told_apart() {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 1, dtype: crate::kernels::WeightType::F32 };
        let mut pool = BlockPool::new(shape, u64::MAX, u64::MAX).unwrap();
        let context = |arithmetic, rope_tokens, salt: &str| {
            Parent::Context(Arc::new(Context { arithmetic, rope_tokens, salt: salt.into() }))
        };
        let parents = [
            context(None, 0, ""),
            context(Some(0), 0, ""),
            context(Some(1), 0, ""),
            context(None, 1, ""),
            context(None, 0, "a"),
            Parent::Node(NodeId(1)),
            Parent::Node(NodeId(2)),
        ];
        let mut index = PrefixIndex::<Colliding>::default();
        let mut expected = Vec::new();
        for parent in &parents {
            for changed in [0, 1, 32, 63] {
                let mut tokens = [5; KV_BLOCK_POSITIONS];
                tokens[changed] = 6;
                let key = || Key { parent: parent.clone(), tokens };
                assert_eq!(index.get(&key()), None);
                let block = pool.take().unwrap();
                let node = index.insert(Arc::new(key()), block);
                expected.push((key(), block, node));
            }
        }
        for removed in 0..expected.len() {
            for (key, block, node) in &expected[removed..] {
                assert_eq!(index.get(key), Some((*block, *node)));
            }
            index.remove(&expected[removed].0);
            assert_eq!(index.get(&expected[removed].0), None);
        }
    }

    #[test]
    fn an_id_is_never_used_again() {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 1, dtype: crate::kernels::WeightType::F32 };
        let block = BlockPool::new(shape, u64::MAX, u64::MAX).unwrap().take().unwrap();
        let mut index = PrefixIndex::<RandomState>::default();
        let key = Arc::new(Key { parent: Parent::Node(NodeId(0)), tokens: [0; KV_BLOCK_POSITIONS] });
        let first = index.insert(Arc::clone(&key), block);
        index.remove(&key);
        assert_ne!(index.insert(key, block), first);
    }
}
