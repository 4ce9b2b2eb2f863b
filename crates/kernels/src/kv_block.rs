//! KV blocks: the keys and values of 64 positions, as attention reads them.

use crate::blocks::WeightType;

/// Positions in a KV block.
pub const KV_BLOCK_POSITIONS: usize = 64;

/// The keys and values of 64 positions in one layer.
///
/// In Q8_0, every 32 elements of a position's key or value share a scale. Values are blocks of Q8_0. Keys are
/// transposed: for every 32 elements of a head, the scales of all positions come first, f16, then
/// `(32, KV_BLOCK_POSITIONS)` i8. Both take as many bytes as blocks of Q8_0.
#[derive(Clone, Copy, Debug)]
pub struct KvBlock<'a> {
    /// F32, F16, BF16, or Q8_0 if head_dim is a multiple of 32.
    pub dtype: WeightType,
    /// `(kv_heads, head_dim, KV_BLOCK_POSITIONS)`: transposed, so that a lane is a position.
    pub keys: &'a [u8],
    /// `(kv_heads, KV_BLOCK_POSITIONS, head_dim)`.
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
