//! The keys and values of one sequence, in KV blocks.

use super::block_pool::{Block, BlockPool, KvShape};
use crate::error::Result;
use crate::kernels::{KV_BLOCK_POSITIONS, KvBlock, WeightType};
use half::vec::HalfFloatVecExt;
use half::{bf16, f16};

/// The blocks of one sequence, in the order of their positions.
#[derive(Debug, Default)]
pub struct PagedKv {
    blocks: Vec<Block>,
}

impl PagedKv {
    /// Takes blocks until all positions below `positions` have room.
    ///
    /// # Errors
    /// As [`BlockPool::take`]. The blocks taken so far are kept.
    pub fn reserve(&mut self, positions: usize, pool: &mut BlockPool) -> Result<()> {
        while self.blocks.len() * KV_BLOCK_POSITIONS < positions {
            self.blocks.push(pool.take()?);
        }
        Ok(())
    }

    /// Writes the keys and values of one layer for the positions from `position` on.
    ///
    /// - `keys`, `values`: `(rows, kv_heads, head_dim)`
    ///
    /// # Panics
    /// If there is no room ([`Self::reserve`]) or the lengths disagree with the shape.
    pub fn write(&mut self, shape: &KvShape, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        assert_eq!(keys.len(), values.len(), "as many values as keys");
        match shape.dtype {
            WeightType::F32 => self.write_as(shape, layer, position, keys, values),
            WeightType::F16 => self.write_as(
                shape,
                layer,
                position,
                &Vec::<f16>::from_f32_slice(keys),
                &Vec::<f16>::from_f32_slice(values),
            ),
            WeightType::BF16 => self.write_as(
                shape,
                layer,
                position,
                &Vec::<bf16>::from_f32_slice(keys),
                &Vec::<bf16>::from_f32_slice(values),
            ),
            other => unreachable!("a KV cache is never {other}"),
        }
    }

    /// As [`Self::write`], for numbers that are already converted to the cache's type.
    fn write_as<T: bytemuck::NoUninit>(
        &mut self,
        shape: &KvShape,
        layer: usize,
        position: usize,
        keys: &[T],
        values: &[T],
    ) {
        let width = shape.kv_heads * shape.head_dim;
        let rows = keys.chunks_exact(width).zip(values.chunks_exact(width));
        for (position, (keys, values)) in (position..).zip(rows) {
            let (block_keys, block_values) = self.blocks[position / KV_BLOCK_POSITIONS].layer_mut(layer);
            scatter(block_keys, block_values, shape, position % KV_BLOCK_POSITIONS, keys, values);
        }
    }

    /// One layer of every block, in the order of positions.
    pub fn layer(&self, layer: usize) -> Vec<KvBlock<'_>> {
        self.blocks.iter().map(|block| block.layer(layer)).collect()
    }

    /// Returns all blocks to the pool.
    pub fn release(self, pool: &mut BlockPool) {
        pool.give_back(self.blocks);
    }
}

/// Writes the keys and values of one position into its block. The block's keys are transposed.
fn scatter<T: bytemuck::NoUninit>(
    block_keys: &mut [u8],
    block_values: &mut [u8],
    shape: &KvShape,
    at: usize,
    keys: &[T],
    values: &[T],
) {
    let size = size_of::<T>();
    for (index, key) in keys.iter().enumerate() {
        let to = (index * KV_BLOCK_POSITIONS + at) * size;
        block_keys[to..to + size].copy_from_slice(bytemuck::bytes_of(key));
    }
    for (head, values) in values.chunks_exact(shape.head_dim).enumerate() {
        let to = (head * KV_BLOCK_POSITIONS + at) * shape.head_dim * size;
        block_values[to..to + shape.head_dim * size].copy_from_slice(bytemuck::cast_slice(values));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(dtype: WeightType) -> KvShape {
        KvShape { layers: 2, kv_heads: 2, head_dim: 4, dtype }
    }

    #[test]
    fn keys_are_written_transposed_and_values_are_not() {
        for dtype in [WeightType::F32, WeightType::F16, WeightType::BF16] {
            let shape = shape(dtype);
            let mut pool = BlockPool::new(shape, u64::MAX).unwrap();
            let mut kv = PagedKv::default();
            kv.reserve(70, &mut pool).unwrap();
            // Small integers, which the 16-bit types hold exactly.
            let keys: Vec<f32> = (0..10 * 8).map(|i| i as f32).collect();
            let values: Vec<f32> = keys.iter().map(|k| -k).collect();
            kv.write(&shape, 1, 60, &keys, &values);
            let number = |bytes: &[u8], at: usize| match dtype {
                WeightType::F32 => f32::from_le_bytes(bytes[4 * at..4 * at + 4].try_into().unwrap()),
                WeightType::BF16 => bf16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32(),
                _ => f16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32(),
            };
            for row in 0..10 {
                let (block, at) = ((60 + row) / 64, (60 + row) % 64);
                let layer = kv.layer(1)[block];
                for head in 0..2 {
                    for d in 0..4 {
                        let expected = (row * 8 + head * 4 + d) as f32;
                        assert_eq!(number(layer.keys, (head * 4 + d) * 64 + at), expected);
                        assert_eq!(number(layer.values, (head * 64 + at) * 4 + d), -expected);
                    }
                }
            }
            assert!(kv.layer(0).iter().all(|layer| layer.keys.iter().all(|&byte| byte == 0)));
        }
    }

    #[test]
    fn the_pool_is_bounded_and_reuses_returned_blocks() {
        let shape = shape(WeightType::F16);
        let block = shape.block_bytes().unwrap() as u64;
        let mut pool = BlockPool::new(shape, 2 * block).unwrap();
        let mut kv = PagedKv::default();
        kv.reserve(128, &mut pool).unwrap();
        assert!(kv.reserve(129, &mut pool).is_err());
        assert_eq!(kv.layer(0).len(), 2, "a failed reserve keeps the blocks");
        kv.release(&mut pool);
        assert_eq!(pool.free_blocks(), 2);
        PagedKv::default().reserve(128, &mut pool).unwrap();
        assert_eq!(pool.free_blocks(), 0);
    }

    #[test]
    fn a_shape_that_overflows_is_refused() {
        let shape =
            KvShape { layers: usize::MAX, kv_heads: 1 << 20, head_dim: 1 << 20, dtype: WeightType::F32 };
        assert!(BlockPool::new(shape, 1).is_err());
    }
}
