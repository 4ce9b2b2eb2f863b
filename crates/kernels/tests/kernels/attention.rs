//! Tests of attention on every ISA of this CPU: against plain f64 arithmetic, and of the promise that a row's
//! result depends only on the row.

use crate::support::{Random, few_cases, isas, kernels, pairs};
use candle_llama_kernels::internals::{LANES, has_attention_bits16};
use candle_llama_kernels::quantize::quantize_row;
use candle_llama_kernels::*;
use half::{bf16, f16};

/// Random keys and values of one layer, `(positions, kv_heads, head_dim)`, and the bytes of their KV blocks.
struct Cache {
    dtype: WeightType,
    keys: Vec<f32>,
    values: Vec<f32>,
    blocks: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Cache {
    fn new(
        random: &mut Random,
        dtype: WeightType,
        positions: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Self {
        // Numbers that every type holds exactly. In Q8_0, the largest of 32 has a quant of 127.
        let exact = |(index, x): (usize, f32)| match dtype {
            WeightType::Q8_0 => {
                let quant = if index % LANES == 0 { 127.0 } else { (x * 127.0).round() };
                quant / [128.0, 256.0, 512.0][index / LANES % 3]
            }
            _ => (x * 128.0).round() / 128.0,
        };
        let mut numbers = || -> Vec<f32> {
            random.floats(positions * kv_heads * head_dim).into_iter().enumerate().map(exact).collect()
        };
        let (keys, values) = (numbers(), numbers());
        let blocks = (0..positions.div_ceil(KV_BLOCK_POSITIONS))
            .map(|block| {
                // Unused positions hold what an earlier sequence left there.
                let mut k = vec![f32::NAN; kv_heads * head_dim * KV_BLOCK_POSITIONS];
                let mut v = k.clone();
                for p in 0..KV_BLOCK_POSITIONS.min(positions - block * KV_BLOCK_POSITIONS) {
                    for head in 0..kv_heads {
                        for d in 0..head_dim {
                            let from = ((block * KV_BLOCK_POSITIONS + p) * kv_heads + head) * head_dim + d;
                            k[(head * head_dim + d) * KV_BLOCK_POSITIONS + p] = keys[from];
                            v[(head * KV_BLOCK_POSITIONS + p) * head_dim + d] = values[from];
                        }
                    }
                }
                let bytes = |x: Vec<f32>| -> Vec<u8> {
                    let stored = |x: f32| match dtype {
                        WeightType::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
                        WeightType::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
                        _ => x.to_le_bytes().to_vec(),
                    };
                    x.into_iter().flat_map(stored).collect()
                };
                if dtype == WeightType::Q8_0 {
                    return (quantized_keys(&k), quantized(&v));
                }
                (bytes(k), bytes(v))
            })
            .collect();
        Cache { dtype, keys, values, blocks }
    }

    /// Sets all keys and values from `position` on to NaN: all bits set, in every type.
    fn forget_from(&mut self, position: usize, head_dim: usize) {
        let (size, row_bytes) = (self.dtype.block_bytes(), self.dtype.bytes_for(head_dim).unwrap());
        for (block, (keys, values)) in self.blocks.iter_mut().enumerate() {
            let from = position.saturating_sub(block * KV_BLOCK_POSITIONS).min(KV_BLOCK_POSITIONS);
            if self.dtype == WeightType::Q8_0 {
                for part in keys.chunks_exact_mut(KV_BLOCK_POSITIONS * size) {
                    part[2 * from..2 * KV_BLOCK_POSITIONS].fill(0xff);
                }
            } else {
                for row in keys.chunks_exact_mut(KV_BLOCK_POSITIONS * size) {
                    row[from * size..].fill(0xff);
                }
            }
            for head in values.chunks_exact_mut(KV_BLOCK_POSITIONS * row_bytes) {
                head[from * row_bytes..].fill(0xff);
            }
        }
    }

    fn span(&self, position: usize, rows: usize, bits16: bool) -> AttentionSpan<'_> {
        let blocks = self.blocks.iter().map(|(keys, values)| KvBlock { dtype: self.dtype, keys, values });
        AttentionSpan { rows, position, bits16, kv_blocks: blocks.collect() }
    }
}

/// Blocks of Q8_0; those with NaN have a scale of NaN.
fn quantized(numbers: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; WeightType::Q8_0.bytes_for(numbers.len()).unwrap()];
    for (numbers, block) in numbers.chunks_exact(LANES).zip(bytes.chunks_exact_mut(34)) {
        if quantize_row(WeightType::Q8_0, numbers, block).is_err() {
            block.fill(0xff);
        }
    }
    bytes
}

/// The keys of a block in Q8_0, from keys `(kv_heads * head_dim, KV_BLOCK_POSITIONS)`.
fn quantized_keys(keys: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in keys.chunks_exact(LANES * KV_BLOCK_POSITIONS) {
        let key = |p: usize| -> Vec<f32> { (0..LANES).map(|d| part[d * KV_BLOCK_POSITIONS + p]).collect() };
        let blocks: Vec<_> = (0..KV_BLOCK_POSITIONS).map(|p| quantized(&key(p))).collect();
        bytes.extend(blocks.iter().flat_map(|block| &block[..2]));
        bytes.extend((0..LANES).flat_map(|d| blocks.iter().map(move |block| block[2 + d])));
    }
    bytes
}

/// All ISAs, and again those that can round to about 16 bits.
fn modes() -> impl Iterator<Item = (Isa, bool)> {
    let rounding = isas().into_iter().filter(|isa| has_attention_bits16(*isa));
    isas().into_iter().map(|isa| (isa, false)).chain(rounding.map(|isa| (isa, true)))
}

#[test]
fn attention_is_softmax_of_scores_times_values() {
    let mut random = Random(4);
    for (isa, bits16) in modes() {
        for (kv_heads, group, head_dim, dtype, first, rows) in [
            (1, 1, 2, WeightType::F32, 60, 90),
            (2, 3, 10, WeightType::F16, 60, 90),
            (3, 2, 64, WeightType::BF16, 60, 90),
            (1, 4, 80, WeightType::F32, 60, 90),
            (1, 1, 34, WeightType::F16, 0, 70),
            // More than one unit: read whole by many rows, and unit by unit by a single row.
            (1, 5, 32, WeightType::F16, 500, 40),
            (2, 3, 80, WeightType::BF16, 1100, 1),
            (2, 1, 12, WeightType::F16, 1023, 2),
            (1, 12, 32, WeightType::F32, 0, 1),
            (2, 2, 96, WeightType::F16, 130, 40),
            (1, 3, 128, WeightType::BF16, 1000, 50),
            (2, 3, 64, WeightType::Q8_0, 60, 90),
            (1, 4, 32, WeightType::Q8_0, 1023, 2),
            (2, 2, 96, WeightType::Q8_0, 500, 1),
        ] {
            let heads = kv_heads * group;
            let cache = Cache::new(&mut random, dtype, first + rows, kv_heads, head_dim);
            let mut queries = random.floats(rows * heads * head_dim);
            queries.iter_mut().for_each(|q| *q *= 4.0);
            let mut out = vec![0.0; queries.len()];
            let span = [cache.span(first, rows, bits16)];
            let never = Cancel::never();
            let kernels = kernels(isa, 2);
            kernels.attention(&queries, &span, heads, kv_heads, head_dim, &mut out, &never);
            // Values are below 1 and the weights add up to 1. So the error is that of exp in f32, or that of
            // scores of up to 8 and weights in 16 bits.
            // AMX computes with sums of two bf16, the others with scaled 16-bit integers.
            let bound = match (bits16, isa) {
                (false, _) => 4e-6,
                (true, Isa::Amx) => 8e-5,
                (true, _) => 2e-4,
            };
            for row in 0..rows {
                for head in 0..heads {
                    let at = |p: usize| (p * kv_heads + head / group) * head_dim;
                    let q = &queries[(row * heads + head) * head_dim..][..head_dim];
                    let scores: Vec<f64> = (0..=first + row)
                        .map(|p| {
                            let k = &cache.keys[at(p)..][..head_dim];
                            let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                            dot / (head_dim as f64).sqrt()
                        })
                        .collect();
                    let maximum = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - maximum).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for d in 0..head_dim {
                        let value = |p: usize| f64::from(cache.values[at(p) + d]);
                        let expected: f64 =
                            weights.iter().enumerate().map(|(p, w)| w / total * value(p)).sum();
                        let got = f64::from(out[(row * heads + head) * head_dim + d]);
                        assert!((got - expected).abs() < bound, "{got} {expected} {dtype} {}", isa.name());
                    }
                }
            }
        }
    }
}

#[test]
fn a_score_far_below_the_largest_weighs_nothing() {
    let (rows, head_dim) = (300, 64);
    let mut random = Random(8);
    let cache = Cache::new(&mut random, WeightType::F16, rows, 1, head_dim);
    let mut queries = random.floats(rows * head_dim);
    // The powers of e that differences of such scores give are far below the smallest number. An error of the
    // largest score's power, which must be 1, would grow with the score and overflow 16 bits.
    queries.iter_mut().for_each(|q| *q *= 4000.0);
    for (isa, bits16) in modes() {
        let mut out = vec![0.0; queries.len()];
        let span = [cache.span(0, rows, bits16)];
        kernels(isa, 2).attention(&queries, &span, 1, 1, head_dim, &mut out, &Cancel::never());
        let mut clear_rows = 0;
        for (row, (q, out)) in queries.chunks_exact(head_dim).zip(out.chunks_exact(head_dim)).enumerate() {
            let keys = cache.keys.chunks_exact(head_dim).take(row + 1);
            let scores = keys.map(|k| k.iter().zip(q).map(|(k, q)| k * q).sum::<f32>() / 8.0);
            let mut scores: Vec<(f32, usize)> = scores.zip(0..).collect();
            scores.sort_by(|a, b| b.0.total_cmp(&a.0));
            if scores.len() == 1 || scores[0].0 - scores[1].0 > 30.0 {
                clear_rows += 1;
                for (value, out) in cache.values[scores[0].1 * head_dim..].iter().zip(out) {
                    assert!((value - out).abs() < 1e-4, "{value} {out} {row} {} {bits16}", isa.name());
                }
            }
        }
        assert!(clear_rows > rows / 2, "{clear_rows}");
    }
}

#[test]
fn a_row_of_attention_depends_on_nothing_but_the_row() {
    let mut random = Random(5);
    for (isa, bits16) in modes() {
        for (dtype, group, head_dim) in [
            (WeightType::F32, 2, 64),
            (WeightType::F16, 3, 48),
            (WeightType::F16, 3, 96),
            (WeightType::BF16, 1, 6),
            (WeightType::Q8_0, 3, 64),
        ] {
            let (positions, kv_heads) = (if few_cases() { 600 } else { 1100 }, 2);
            let heads = kv_heads * group;
            let width = heads * head_dim;
            let mut cache = Cache::new(&mut random, dtype, positions, kv_heads, head_dim);
            let mut queries = random.floats(positions * width);
            let run = |cache: &Cache, queries: &[f32], threads: usize, spans: &[(usize, usize)]| {
                let rows = |&(position, rows): &(usize, usize)| {
                    &queries[position * width..(position + rows) * width]
                };
                let queries = spans.iter().map(rows).collect::<Vec<_>>().concat();
                let mut out = vec![0.0; queries.len()];
                let spans: Vec<_> =
                    spans.iter().map(|&(position, rows)| cache.span(position, rows, bits16)).collect();
                let kernels = kernels(isa, threads);
                let never = Cancel::never();
                kernels.attention(&queries, &spans, heads, kv_heads, head_dim, &mut out, &never);
                out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let whole = run(&cache, &queries, 1, &[(0, positions)]);
            let rows = |first: usize, count: usize| &whole[first * width..(first + count) * width];
            let all = [(0, positions)];
            let mut cuts = vec![
                &all[..],
                &[(0, 1), (63, 2), (100, 17)],
                &[(511, 1)],
                &[(510, 4)],
                &[(512, 1), (597, 3)],
                &[(599, 1), (550, 0), (300, 200)],
            ];
            if !few_cases() {
                cuts.extend([&[(512, 1), (1023, 3)][..], &[(1099, 1), (600, 0), (300, 200)]]);
            }
            for (threads, cut) in pairs(&[2, 3, 1], &cuts) {
                let expected: Vec<_> = cut.iter().map(|&(first, count)| rows(first, count)).collect();
                assert_eq!(run(&cache, &queries, threads, cut), expected.concat(), "{cut:?} {}", isa.name());
            }
            // NaN in rows that a query does not see must not change its result either.
            let seen = 590;
            queries[seen * width..].fill(f32::NAN);
            cache.forget_from(seen, head_dim);
            assert_eq!(run(&cache, &queries, 2, &[(0, seen + 10)])[..seen * width], *rows(0, seen));
        }
    }
}

#[test]
fn a_row_of_attention_does_not_depend_on_the_rounding_of_other_spans() {
    let (positions, kv_heads, heads, head_dim) = (600, 2, 6, 64);
    let mut random = Random(7);
    let cache = Cache::new(&mut random, WeightType::F16, positions, kv_heads, head_dim);
    let queries = random.floats(positions * heads * head_dim);
    let spans = [(0, 1, false), (1, 2, false), (3, 500, true), (503, 20, false), (523, 77, true)];
    let span = |(position, rows, bits16)| cache.span(position, rows, bits16);
    for isa in isas() {
        let kernels = kernels(isa, 2);
        let run = |queries: &[f32], spans: &[AttentionSpan]| {
            let mut out = vec![0.0; queries.len()];
            kernels.attention(queries, spans, heads, kv_heads, head_dim, &mut out, &Cancel::never());
            out
        };
        let together = run(&queries, &spans.map(span));
        for (position, rows, bits16) in spans {
            let numbers = position * heads * head_dim..(position + rows) * heads * head_dim;
            let alone = run(&queries[numbers.clone()], &[span((position, rows, bits16))]);
            assert_eq!(together[numbers], alone, "{position} {}", isa.name());
        }
    }
}

#[test]
fn a_value_that_is_not_finite_reaches_the_rows_that_see_it() {
    let mut random = Random(6);
    for (isa, bits16) in modes() {
        let (positions, head_dim) = (200, 64);
        let mut cache = Cache::new(&mut random, WeightType::F32, positions, 1, head_dim);
        let queries = random.floats(positions * head_dim);
        let run = |cache: &Cache| {
            let mut out = vec![0.0; queries.len()];
            let span = [cache.span(0, positions, bits16)];
            kernels(isa, 2).attention(&queries, &span, 1, 1, head_dim, &mut out, &Cancel::never());
            out
        };
        let finite = run(&cache);
        let (position, element) = (70, 5);
        let at = 4 * ((position % KV_BLOCK_POSITIONS) * head_dim + element);
        cache.blocks[position / KV_BLOCK_POSITIONS].1[at..at + 4]
            .copy_from_slice(&f32::INFINITY.to_le_bytes());
        let infinite = run(&cache);
        assert_eq!(finite[..position * head_dim], infinite[..position * head_dim], "{}", isa.name());
        for (row, out) in infinite.chunks_exact(head_dim).enumerate().skip(position) {
            for (index, (x, before)) in out.iter().zip(&finite[row * head_dim..]).enumerate() {
                if index == element {
                    assert_eq!(*x, f32::INFINITY, "{}", isa.name());
                } else {
                    assert!((x - before).abs() < 2e-4, "{x} {before} {}", isa.name());
                }
            }
        }
    }
}
