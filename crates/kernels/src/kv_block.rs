//! KV blocks: the keys and values of 64 positions, as attention reads them.

use crate::blocks::WeightType;

/// Positions in a KV block.
pub const KV_BLOCK_POSITIONS: usize = 64;

/// The keys and values of 64 positions in one layer.
#[derive(Clone, Copy, Debug)]
pub struct KvBlock<'a> {
    /// F32, F16 or BF16.
    pub dtype: WeightType,
    /// `(kv_heads, head_dim, KV_BLOCK_POSITIONS)`: transposed, so that a lane is a position
    pub keys: &'a [u8],
    /// `(kv_heads, KV_BLOCK_POSITIONS, head_dim)`
    pub values: &'a [u8],
}

impl<'a> KvBlock<'a> {
    #[inline(always)]
    pub(crate) fn keys(&self, kv_head: usize, kv_heads: usize) -> &'a [u8] {
        let len = self.keys.len() / kv_heads;
        &self.keys[kv_head * len..][..len]
    }

    #[inline(always)]
    pub(crate) fn values(&self, kv_head: usize, kv_heads: usize) -> &'a [u8] {
        let len = self.values.len() / kv_heads;
        &self.values[kv_head * len..][..len]
    }
}
