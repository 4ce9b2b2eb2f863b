//! Benchmarks of the kernels on every ISA of this processor. Run `cargo bench`, with a part of a name such as
//! `packed/Q4_0` to run only some. They use one thread per core.
//!
//! Decoding reads weights that do not fit into any cache, so its throughput is in bytes. That of prompts is
//! in operations; a multiplication and an addition count as two.

use candle_llama_kernels::{
    AttentionSpan, Cancel, GemmInput, GemmScratch, Isa, KV_BLOCK_POSITIONS, Kernels, KvBlock, Output,
    PackedProduct, Precision, Product, QuantizedRows, WeightRows, WeightType,
    quantize::{TARGETS, quantize_row},
};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const COLS: usize = 2048;
/// Rows of a weight that fits into no cache: 288 MiB as float32, 42 MiB in blocks of 4 bits.
const MANY_ROWS: usize = 36_864;
/// Rows of a weight that is multiplied with a prompt.
const FEW_ROWS: usize = 2048;
const PROMPT: usize = 256;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 64;

/// Numbers between -1 and 1, the same in every run.
fn numbers(len: usize) -> Vec<f32> {
    let mut state = 0x2545_f491_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / (u32::MAX / 2) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// `rows` times the same row of weights.
fn weights(dtype: WeightType, rows: usize) -> Vec<u8> {
    // Any bytes are weights; these make the scales small numbers.
    let mut row = vec![0x2c; dtype.bytes_for(COLS).expect("whole blocks")];
    if TARGETS.contains(&dtype) {
        quantize_row(dtype, &numbers(COLS), &mut row).expect("the numbers are small");
    }
    row.repeat(rows)
}

/// The ISAs of this processor, with their kernels.
fn isas() -> Vec<(Isa, Kernels)> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Isa::available().map(|isa| (isa, Kernels::new(isa, threads).expect("threads can be started"))).collect()
}

/// A prompt's operations; for fewer rows, the bytes of the weights.
fn throughput(rows: usize, features: usize, stored: &[u8]) -> Throughput {
    match rows {
        PROMPT => Throughput::Elements(2 * (rows * features * COLS) as u64),
        _ => Throughput::Bytes(stored.len() as u64),
    }
}

/// Packed weights: one row, eight rows, a prompt.
fn packed(criterion: &mut Criterion) {
    use WeightType::*;
    for dtype in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS] {
        for (rows, features) in [(1, MANY_ROWS), (8, MANY_ROWS), (PROMPT, FEW_ROWS)] {
            let stored = weights(dtype, features);
            let mut group = criterion.benchmark_group(format!("packed/{dtype}/{rows} rows"));
            group.sample_size(20).throughput(throughput(rows, features, &stored));
            let x = numbers(rows * COLS);
            let mut out = vec![0.0; rows * features];
            for (isa, kernels) in isas().into_iter().filter(|(isa, _)| isa.packs_weights()) {
                let fill = |row: usize, out: &mut [u8]| {
                    let len = out.len();
                    out.copy_from_slice(&stored[row * len..][..len]);
                };
                let weight = kernels.pack(dtype, features, COLS, &Cancel::never(), &fill);
                let weight = weight.expect("there is memory").expect("these types can be packed");
                let (mut quantized, precisions) = (QuantizedRows::default(), vec![Precision::Bits8; rows]);
                group.bench_function(BenchmarkId::from_parameter(isa.name()), |bencher| {
                    bencher.iter(|| {
                        kernels.quantize(&x, &precisions, &mut quantized, &Cancel::never());
                        let product = PackedProduct { weight: &weight, out: &mut out, output: Output::Set };
                        kernels.matmul_packed(&quantized, &mut [product], &Cancel::never());
                    });
                });
            }
        }
    }
}

/// Packing a weight into fresh memory, as loading does. The ISA does not matter.
fn packing(criterion: &mut Criterion) {
    use WeightType::*;
    let Some(isa) = Isa::available().filter(|isa| isa.packs_weights()).last() else { return };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // Kernels keep the memory of packed weights, so each call has kernels of its own.
    let make = || Kernels::new(isa, threads).expect("threads can be started");
    for dtype in [Q4_0, Q8_0, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS] {
        let stored = weights(dtype, FEW_ROWS);
        let fill = |row: usize, out: &mut [u8]| {
            let len = out.len();
            out.copy_from_slice(&stored[row * len..][..len]);
        };
        let mut group = criterion.benchmark_group(format!("packing/{dtype}"));
        group.sample_size(20).throughput(Throughput::Bytes(stored.len() as u64));
        group.bench_function(BenchmarkId::from_parameter(isa.name()), |bencher| {
            let pack = |kernels: &mut Kernels| kernels.pack(dtype, FEW_ROWS, COLS, &Cancel::never(), &fill);
            bencher.iter_batched_ref(make, pack, BatchSize::PerIteration);
        });
    }
}

/// Float weights: one row, a prompt.
fn floats(criterion: &mut Criterion) {
    for dtype in [WeightType::F32, WeightType::BF16, WeightType::F16] {
        for (rows, features) in [(1, MANY_ROWS), (PROMPT, FEW_ROWS)] {
            let stored = weights(dtype, features);
            let weight =
                WeightRows::new(dtype, &stored, features, COLS).expect("bytes have the length of the matrix");
            let mut group = criterion.benchmark_group(format!("floats/{dtype}/{rows} rows"));
            group.sample_size(20).throughput(throughput(rows, features, &stored));
            let x = numbers(rows * COLS);
            let mut out = vec![0.0; rows * features];
            for (isa, kernels) in isas() {
                let mut scratch = GemmScratch::default();
                group.bench_function(BenchmarkId::from_parameter(isa.name()), |bencher| {
                    bencher.iter(|| {
                        let products = &mut [Product { weight, out: &mut out, output: Output::Set }];
                        match rows {
                            1 => kernels.matmul(&x, rows, products, &Cancel::never()),
                            _ => kernels.gemm(
                                &x,
                                rows,
                                GemmInput::Bf16,
                                products,
                                &mut scratch,
                                &Cancel::never(),
                            ),
                        }
                    });
                });
            }
        }
    }
}

/// One generated token with 4095 positions before it, and a prompt on its own.
fn attention(criterion: &mut Criterion) {
    for (rows, position) in [(1, 4095), (PROMPT, 0)] {
        let len =
            WeightType::F16.bytes_for(KV_HEADS * HEAD_DIM * KV_BLOCK_POSITIONS).expect("whole elements");
        let blocks = (position + rows).div_ceil(KV_BLOCK_POSITIONS);
        let (keys, values) = (vec![0; blocks * len], vec![0; blocks * len]);
        let queries = numbers(rows * HEADS * HEAD_DIM);
        let mut out = vec![0.0; queries.len()];
        let mut group = criterion.benchmark_group(format!("attention/F16/{rows} rows"));
        group.sample_size(20).throughput(match rows {
            PROMPT => Throughput::Elements((2 * rows * rows * HEADS * HEAD_DIM) as u64),
            _ => Throughput::Bytes((keys.len() + values.len()) as u64),
        });
        for (isa, kernels) in isas() {
            let block = |(keys, values)| KvBlock { dtype: WeightType::F16, keys, values };
            let spans = [AttentionSpan {
                rows,
                position,
                bits16: rows == PROMPT,
                kv_blocks: keys.chunks_exact(len).zip(values.chunks_exact(len)).map(block).collect(),
            }];
            group.bench_function(BenchmarkId::from_parameter(isa.name()), |bencher| {
                bencher.iter(|| {
                    kernels.attention(
                        &queries,
                        &spans,
                        HEADS,
                        KV_HEADS,
                        HEAD_DIM,
                        &mut out,
                        &Cancel::never(),
                    );
                });
            });
        }
    }
}

criterion_group!(benches, packed, packing, floats, attention);
criterion_main!(benches);
