//! Tests of the KV cache: contents, sharing, eviction.

use super::*;
use crate::kv_cache::KvBlocks;

const SHAPE: KvShape = KvShape { layers: 1, kv_heads: 1, head_dim: 1, dtype: WeightType::F32 };

fn shape(dtype: WeightType) -> KvShape {
    KvShape { layers: 2, kv_heads: 2, head_dim: 4, dtype }
}

/// A pool of at most `blocks` blocks.
pub(super) fn pool(blocks: usize) -> BlockPool {
    BlockPool::new(SHAPE, (blocks * SHAPE.block_bytes().unwrap()) as u64, u64::MAX).unwrap()
}

pub(super) fn context(salt: &str) -> Context {
    Context { arithmetic: None, rope_tokens: 0, salt: salt.into() }
}

/// A sequence that may reuse all of `tokens`.
fn begin(tokens: &[u32], pool: &mut BlockPool) -> PagedKv {
    PagedKv::shared(context(""), usize::MAX, tokens, pool)
}

/// Stands for the key at the end of `tokens`: f32 holds it exactly.
fn key(salt: &str, tokens: &[u32]) -> f32 {
    let mix = |hash: u32, next: u32| (hash ^ next).wrapping_mul(0x0100_0193) ^ (hash >> 15);
    (tokens.iter().fold(salt.len() as u32 + 7, |hash, &token| mix(hash, token + 1)) >> 8) as f32
}

/// Runs `tokens[start..]`, after `tokens[..start]`, as a model does.
pub(super) fn forward(
    kv: &mut PagedKv,
    salt: &str,
    tokens: &[u32],
    start: usize,
    pool: &mut BlockPool,
) -> crate::error::Result<()> {
    kv.truncate(start, pool);
    kv.reserve(start..tokens.len(), pool).inspect_err(|_| kv.truncate(start, pool))?;
    let keys: Vec<f32> = (start..tokens.len()).map(|end| key(salt, &tokens[..=end])).collect();
    kv.write(pool, 0, start, &keys, &keys);
    kv.complete(start, &tokens[start..]);
    kv.share(pool);
    Ok(())
}

/// Begins a sequence and runs what is not cached.
fn run(tokens: &[u32], pool: &mut BlockPool) -> PagedKv {
    let mut kv = begin(tokens, pool);
    let cached_tokens = kv.cached_tokens();
    forward(&mut kv, "", tokens, cached_tokens, pool).unwrap();
    assert_contents(&kv, "", tokens, pool);
    kv
}

pub(super) fn assert_contents(kv: &PagedKv, salt: &str, tokens: &[u32], pool: &BlockPool) {
    let layer = kv.layer(pool, 0);
    for position in 0..tokens.len() {
        let (block, at) = (layer[position / 64], 4 * (position % 64));
        let expected = key(salt, &tokens[..=position]).to_le_bytes();
        assert_eq!(block.keys[at..at + 4], expected, "key {position}");
        assert_eq!(block.values[at..at + 4], expected, "value {position}");
    }
}

/// `len` tokens that begin with `first`.
fn tokens(first: u32, len: usize) -> Vec<u32> {
    std::iter::once(first).chain(0..).take(len).collect()
}

#[test]
fn q8_0_has_a_scale_for_each_32_numbers_of_a_position() {
    let shape = KvShape { layers: 1, kv_heads: 2, head_dim: 64, dtype: WeightType::Q8_0 };
    let mut pool = BlockPool::new(shape, u64::MAX, 0).unwrap();
    let mut kv = PagedKv::default();
    kv.reserve(0..70, &mut pool).unwrap();
    // The quants of 32 numbers are -127 to 127 in steps of 8 or so, and their scale is a power of two.
    let quant = |d: usize| if d % 32 == 31 { 127 } else { (8 * (d % 32)) as i16 - 127 };
    let scale = |row: usize, part: usize| 2.0_f32.powi(row as i32 - part as i32);
    let number = |row: usize, index: usize| f32::from(quant(index)) * scale(row, index / 32);
    let mut keys: Vec<f32> = (0..10 * 128).map(|i| number(i / 128, i % 128)).collect();
    let values: Vec<f32> = keys.iter().map(|k| -k).collect();
    keys[9 * 128] = f32::INFINITY;
    kv.write(&mut pool, 0, 60, &keys, &values);
    let half = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
    for row in 0..10 {
        let (block, at) = ((60 + row) / 64, (60 + row) % 64);
        let layer = kv.layer(&pool, 0)[block];
        for part in 0..4 {
            let key = &layer.keys[part * 34 * 64..][..34 * 64];
            let value = &layer.values[((part / 2 * 64 + at) * 2 + part % 2) * 34..][..34];
            assert_eq!(half(value), scale(row, part));
            if (row, part) == (9, 0) {
                assert!(half(&key[2 * at..]).is_nan());
                continue;
            }
            assert_eq!(half(&key[2 * at..]), scale(row, part));
            for d in 0..32 {
                assert_eq!(i16::from(key[128 + d * 64 + at] as i8), quant(d));
                assert_eq!(i16::from(value[2 + d] as i8), -quant(d));
            }
        }
    }
}

#[test]
fn keys_are_written_transposed_and_values_are_not() {
    for dtype in [WeightType::F32, WeightType::F16, WeightType::BF16] {
        let mut pool = BlockPool::new(shape(dtype), u64::MAX, 0).unwrap();
        let mut kv = PagedKv::default();
        kv.reserve(0..70, &mut pool).unwrap();
        // Small integers, which the 16-bit types hold exactly.
        let keys: Vec<f32> = (0..10 * 8).map(|i| i as f32).collect();
        let values: Vec<f32> = keys.iter().map(|k| -k).collect();
        kv.write(&mut pool, 1, 60, &keys, &values);
        let number = |bytes: &[u8], at: usize| match dtype {
            WeightType::F32 => f32::from_le_bytes(bytes[4 * at..4 * at + 4].try_into().unwrap()),
            WeightType::BF16 => bf16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32(),
            _ => f16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32(),
        };
        for row in 0..10 {
            let (block, at) = ((60 + row) / 64, (60 + row) % 64);
            let layer = kv.layer(&pool, 1)[block];
            for head in 0..2 {
                for d in 0..4 {
                    let expected = (row * 8 + head * 4 + d) as f32;
                    assert_eq!(number(layer.keys, (head * 4 + d) * 64 + at), expected);
                    assert_eq!(number(layer.values, (head * 64 + at) * 4 + d), -expected);
                }
            }
        }
        assert!(kv.layer(&pool, 0).iter().all(|layer| layer.keys.iter().all(|&byte| byte == 0)));
    }
}

#[test]
fn the_pool_is_bounded_and_reuses_returned_blocks() {
    let mut pool = pool(2);
    let mut kv = PagedKv::default();
    kv.reserve(0..128, &mut pool).unwrap();
    assert!(kv.reserve(128..129, &mut pool).is_err());
    assert_eq!(pool.blocks(), KvBlocks { total: 2, free: 0, cached: 0 });
    kv.truncate(0, &mut pool);
    assert_eq!(pool.blocks(), KvBlocks { total: 2, free: 2, cached: 0 });
    PagedKv::default().reserve(0..128, &mut pool).unwrap();
    assert_eq!(pool.blocks().free, 0);
}

#[test]
fn cached_blocks_are_bounded_and_the_oldest_go_first() {
    let two_blocks = 2 * SHAPE.block_bytes().unwrap() as u64;
    let mut pool = BlockPool::new(SHAPE, u64::MAX, two_blocks).unwrap();
    for first in [1000, 2000, 3000] {
        run(&tokens(first, 64), &mut pool).truncate(0, &mut pool);
    }
    assert_eq!(pool.blocks().cached, 2);
    let cached = [1000, 2000, 3000].map(|first| {
        let mut kv = begin(&tokens(first, 64), &mut pool);
        let cached_tokens = kv.cached_tokens();
        kv.truncate(0, &mut pool);
        cached_tokens
    });
    assert_eq!(cached, [0, 64, 64]);
}

#[test]
fn a_shape_that_overflows_is_refused() {
    let shape = KvShape { layers: usize::MAX, kv_heads: 1 << 20, head_dim: 1 << 20, dtype: WeightType::F32 };
    assert!(BlockPool::new(shape, 1, 1).is_err());
}

#[test]
fn a_later_sequence_takes_the_full_blocks_of_the_common_prefix() {
    let mut pool = pool(10);
    let mut first = run(&tokens(1, 200), &mut pool);
    assert_eq!(pool.blocks(), KvBlocks { total: 10, free: 6, cached: 0 });
    let mut other = tokens(1, 200);
    other[150] = 9;
    let cases = [
        (tokens(1, 200), 192),
        (tokens(1, 191), 128),
        (tokens(1, 63), 0),
        (other, 128),
        (tokens(2, 200), 0),
        (vec![], 0),
    ];
    for (tokens, cached_tokens) in &cases {
        let mut kv = begin(tokens, &mut pool);
        assert_eq!(kv.cached_tokens(), *cached_tokens);
        assert_contents(&kv, "", &tokens[..*cached_tokens], &pool);
        assert_eq!(pool.blocks().free, 6, "both refer to the same blocks");
        kv.truncate(0, &mut pool);
    }
    first.truncate(0, &mut pool);
    assert_eq!(pool.blocks(), KvBlocks { total: 10, free: 10, cached: 3 });
    let mut again = begin(&tokens(1, 200), &mut pool);
    assert_eq!((again.cached_tokens(), pool.blocks().free, pool.blocks().cached), (192, 7, 0));
    again.truncate(0, &mut pool);
    assert_eq!(pool.blocks(), KvBlocks { total: 10, free: 10, cached: 3 });
}

#[test]
fn only_equal_contexts_share() {
    let mut pool = pool(10);
    let tokens = tokens(1, 64);
    run(&tokens, &mut pool);
    let contexts = [
        (context(""), 64),
        (context("x"), 0),
        (Context { arithmetic: Some(0), ..context("") }, 0),
        (Context { rope_tokens: 1, ..context("") }, 0),
    ];
    for (context, cached_tokens) in contexts {
        let kv = PagedKv::shared(context, usize::MAX, &tokens, &mut pool);
        assert_eq!(kv.cached_tokens(), cached_tokens);
    }
}

#[test]
fn tokens_beyond_the_shared_part_are_neither_shared_nor_reused() {
    let mut pool = pool(10);
    let tokens = tokens(1, 256);
    let mut kv = PagedKv::shared(context(""), 191, &tokens, &mut pool);
    forward(&mut kv, "", &tokens, 0, &mut pool).unwrap();
    kv.truncate(0, &mut pool);
    assert_eq!(pool.blocks().cached, 2);
    let mut kv = run(&tokens, &mut pool);
    kv.truncate(0, &mut pool);
    assert_eq!(pool.blocks().cached, 4);
    assert_eq!(PagedKv::shared(context(""), 191, &tokens, &mut pool).cached_tokens(), 128);
}

#[test]
fn equal_blocks_of_sequences_that_ran_together_become_one() {
    let mut pool = pool(10);
    let tokens = tokens(1, 130);
    let (mut first, mut second) = (begin(&tokens, &mut pool), begin(&tokens, &mut pool));
    forward(&mut first, "", &tokens, 0, &mut pool).unwrap();
    assert_eq!(pool.blocks().free, 7);
    forward(&mut second, "", &tokens, 0, &mut pool).unwrap();
    assert_eq!(pool.blocks().free, 6, "two common blocks and an own one for each");
    assert_eq!(first.blocks[..2], second.blocks[..2]);
    assert_contents(&second, "", &tokens, &pool);
    first.truncate(0, &mut pool);
    assert_eq!(pool.blocks(), KvBlocks { total: 10, free: 7, cached: 0 });
    second.truncate(0, &mut pool);
    assert_eq!(pool.blocks(), KvBlocks { total: 10, free: 10, cached: 2 });
}

#[test]
fn the_longest_unused_block_is_evicted_first_and_the_end_of_a_sequence_before_its_beginning() {
    let mut pool = pool(4);
    for first in [1, 2] {
        run(&tokens(first, 128), &mut pool).truncate(0, &mut pool);
    }
    let known = |first, pool: &mut BlockPool| {
        // Looks without changing the order.
        let mut kv = begin(&tokens(first, 128), pool);
        let cached_tokens = kv.cached_tokens();
        kv.truncate(0, pool);
        cached_tokens
    };
    assert_eq!(pool.blocks(), KvBlocks { total: 4, free: 4, cached: 4 });
    let mut private = PagedKv::default();
    for (end, left) in [(64, (64, 128)), (128, (0, 128)), (192, (0, 64)), (256, (0, 0))] {
        private.reserve(end - 64..end, &mut pool).unwrap();
        assert_eq!((known(1, &mut pool), known(2, &mut pool)), left, "{end}");
    }
    assert!(private.reserve(256..257, &mut pool).is_err());
}

#[test]
fn a_block_in_use_is_never_evicted() {
    let mut pool = pool(3);
    let mut kv = run(&tokens(1, 128), &mut pool);
    let mut other = PagedKv::default();
    assert!(other.reserve(0..128, &mut pool).is_err());
    assert_contents(&kv, "", &tokens(1, 128), &pool);
    kv.truncate(0, &mut pool);
    assert!(other.reserve(64..128, &mut pool).is_ok(), "the first block is kept after the error");
}

#[test]
fn returning_into_a_shared_block_copies_it() {
    let mut pool = pool(10);
    let (common, mut changed) = (tokens(1, 128), tokens(1, 128));
    let mut first = run(&common, &mut pool);
    let mut second = run(&common, &mut pool);
    changed[100..].fill(7);
    forward(&mut second, "", &changed, 100, &mut pool).unwrap();
    assert_eq!(pool.blocks().free, 7);
    assert_contents(&first, "", &common, &pool);
    assert_contents(&second, "", &changed, &pool);
    // The other sequence is now the only one that refers to its second block, so it is changed in place.
    let mut again = tokens(1, 128);
    again[90..].fill(8);
    forward(&mut first, "", &again, 90, &mut pool).unwrap();
    assert_eq!(pool.blocks().free, 7);
    assert_contents(&first, "", &again, &pool);
    for (tokens, cached_tokens) in [(common, 64), (changed, 128), (again, 128)] {
        let mut kv = begin(&tokens, &mut pool);
        assert_eq!(kv.cached_tokens(), cached_tokens);
        assert_contents(&kv, "", &tokens[..cached_tokens], &pool);
        kv.truncate(0, &mut pool);
    }
}

#[test]
fn positions_that_were_left_out_end_the_sharing() {
    let mut pool = pool(10);
    let mut kv = begin(&[], &mut pool);
    kv.reserve(64..128, &mut pool).unwrap();
    kv.complete(64, &tokens(1, 64));
    kv.share(&mut pool);
    kv.truncate(0, &mut pool);
    assert_eq!(pool.blocks(), KvBlocks { total: 10, free: 10, cached: 0 });
}

#[test]
#[should_panic(expected = "a shared block is never written")]
fn writing_into_a_shared_block_panics() {
    let mut pool = pool(10);
    let kv = run(&tokens(1, 64), &mut pool);
    kv.write(&mut pool, 0, 0, &[1.0], &[1.0]);
}
