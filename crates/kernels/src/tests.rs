//! Tests on every ISA of this CPU: against plain f64 arithmetic, and of the promise that a row's result
//! depends only on the row. The pool's tests are here too.

use super::generic::elementwise::{exp, exp_of_negative};
use super::lanes::{LANES, Lanes, load_partial};
use super::*;
use half::{bf16, f16};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A small random generator with a seed, so that failures can be reproduced: Marsaglia's xorshift64.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Uniform in [-1, 1).
    fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(super) fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    /// Random weights of a type: random bits for the integers, and small scales.
    pub(super) fn weights(&mut self, dtype: WeightType, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..len / dtype.block_len() {
            match dtype {
                WeightType::F32 => bytes.extend(self.float().to_le_bytes()),
                WeightType::F16 => bytes.extend(f16::from_f32(self.float()).to_le_bytes()),
                WeightType::BF16 => bytes.extend(bf16::from_f32(self.float()).to_le_bytes()),
                _ => {
                    let mut block: Vec<u8> = (0..dtype.block_bytes()).map(|_| self.bits() as u8).collect();
                    for &at in half_offsets(dtype) {
                        let half = f16::from_f32(self.float() / 16.0).to_le_bytes();
                        block[at..at + 2].copy_from_slice(&half);
                    }
                    bytes.extend(block);
                }
            }
        }
        bytes
    }
}

/// The offsets of a block's f16 numbers.
fn half_offsets(dtype: WeightType) -> &'static [usize] {
    match dtype {
        WeightType::F32 | WeightType::F16 | WeightType::BF16 => &[],
        WeightType::Q8_0 | WeightType::Q4_0 | WeightType::Q5_0 | WeightType::IQ4_NL | WeightType::IQ4_XS => {
            &[0]
        }
        WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4_K | WeightType::Q5_K => &[0, 2],
        WeightType::Q2_K => &[80, 82],
        WeightType::Q3_K => &[108],
        WeightType::Q6_K => &[208],
    }
}

/// The ISAs to test: those that CANDLE_LLAMA_REQUIRE_ISA names, which have to be available, or else every ISA
/// of this CPU. Those that are left out are printed.
#[allow(clippy::print_stdout)] // what was not tested is said
pub(super) fn isas() -> Vec<Isa> {
    let isas: Vec<Isa> = match std::env::var("CANDLE_LLAMA_REQUIRE_ISA") {
        Ok(names) => names.split(',').map(required).collect(),
        Err(_) => Isa::available().collect(),
    };
    for isa in Isa::ALL.into_iter().filter(|isa| !isas.contains(isa)) {
        println!("skipped: {}", isa.name());
    }
    isas
}

fn required(name: &str) -> Isa {
    let isa = Isa::ALL.into_iter().find(|isa| isa.name() == name);
    let isa = isa.unwrap_or_else(|| panic!("there is no ISA {name}"));
    assert!(isa.is_available(), "{name} is required here");
    isa
}

/// All pairs of `first` and `second`. If there are to be few cases, only so many that each of either is in
/// one.
pub(super) fn pairs<A: Copy, B: Copy>(first: &[A], second: &[B]) -> Vec<(A, B)> {
    if few_cases() {
        let count = first.len().max(second.len());
        let pair = |i: usize| (first[i % first.len()], second[i % second.len()]);
        return (0..count).map(pair).collect();
    }
    first.iter().flat_map(|&first| second.iter().map(move |&second| (first, second))).collect()
}

/// Whether there are to be few cases: CANDLE_LLAMA_TEST_CASES is few or all, the default. Few are for
/// emulators, which are a hundred times slower than a processor.
pub(super) fn few_cases() -> bool {
    match std::env::var("CANDLE_LLAMA_TEST_CASES").as_deref() {
        Ok("few") => true,
        Ok("all") | Err(_) => false,
        Ok(other) => panic!("CANDLE_LLAMA_TEST_CASES is few or all, not {other}"),
    }
}

pub(super) fn kernels(isa: Isa, threads: usize) -> Kernels {
    Kernels::new(isa, threads).expect("threads can be started")
}

/// Element `i` of a row, following the table in blocks.rs, rounded to f32 where ggml rounds.
pub(super) fn element(dtype: WeightType, row: &[u8], i: usize) -> f32 {
    let half = |at: usize| f16::from_le_bytes([row[at], row[at + 1]]).to_f32();
    let block = i / dtype.block_len() * dtype.block_bytes();
    let i = i % dtype.block_len();
    let nibble = |at: usize| (row[at + i % 16] >> (4 * (i / 16))) & 15;
    match dtype {
        WeightType::F32 => f32::from_le_bytes(row[block..block + 4].try_into().unwrap()),
        WeightType::F16 => half(block),
        WeightType::BF16 => bf16::from_le_bytes([row[block], row[block + 1]]).to_f32(),
        WeightType::Q8_0 => f32::from(row[block + 2 + i] as i8) * half(block),
        WeightType::Q4_0 => (f32::from(nibble(block + 2)) - 8.0) * half(block),
        WeightType::Q4_1 => f32::from(nibble(block + 4)) * half(block) + half(block + 2),
        WeightType::Q5_0 => {
            let bit = row[block + 2 + i / 8] >> (i % 8) & 1;
            (f32::from(nibble(block + 6) + 16 * bit) - 16.0) * half(block)
        }
        WeightType::Q5_1 => {
            let bit = row[block + 4 + i / 8] >> (i % 8) & 1;
            f32::from(nibble(block + 8) + 16 * bit) * half(block) + half(block + 2)
        }
        WeightType::IQ4_NL => half(block) * iq4_value(nibble(block + 2)),
        _ => k_element(dtype, &row[block..block + dtype.block_bytes()], i),
    }
}

/// The value of a quant of IQ4_NL or IQ4_XS.
fn iq4_value(quant: u8) -> f32 {
    f32::from(super::blocks::IQ4_VALUES[usize::from(quant)])
}

/// Element `i` of a block of 256, bit by bit. Numbers of `width` bits are packed in runs of `run` bytes: a
/// run has numbers 0..run in the lowest bits of its bytes, the next `run` numbers above them, and so on.
fn k_element(dtype: WeightType, block: &[u8], i: usize) -> f32 {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let packed = |at: usize, width: usize, run: usize| {
        let per_run = run * 8 / width;
        let (byte, shift) = (i / per_run * run + i % run, i % per_run / run * width);
        block[at + byte] >> shift & ((1 << width) - 1)
    };
    match dtype {
        WeightType::Q2_K => {
            let scales = block[i / 16];
            let (scale, min) = (half(80) * f32::from(scales & 15), half(82) * f32::from(scales >> 4));
            scale * f32::from(packed(16, 2, 32)) - min
        }
        WeightType::Q3_K => {
            let j = i / 16;
            let low = block[96 + j % 8] >> (4 * (j / 8)) & 15;
            let high = block[104 + j % 4] >> (2 * (j / 4)) & 3;
            let scale = half(108) * (f32::from(low) + 16.0 * f32::from(high) - 32.0);
            scale * (f32::from(packed(32, 2, 32) + 4 * packed(0, 1, 32)) - 4.0)
        }
        WeightType::Q4_K | WeightType::Q5_K => {
            let scales = &block[4..16];
            let j = i / 32;
            let (scale, min) = match j {
                0..4 => (scales[j] % 64, scales[j + 4] % 64),
                _ => (scales[j + 4] % 16 + scales[j - 4] / 64 * 16, scales[j + 4] / 16 + scales[j] / 64 * 16),
            };
            let quant = match dtype {
                WeightType::Q4_K => packed(16, 4, 32),
                _ => packed(48, 4, 32) + 16 * packed(16, 1, 32),
            };
            half(0) * f32::from(scale) * f32::from(quant) - half(2) * f32::from(min)
        }
        WeightType::Q6_K => {
            let scale = half(208) * f32::from(block[192 + i / 16] as i8);
            scale * (f32::from(packed(0, 4, 64) + 16 * packed(128, 2, 32)) - 32.0)
        }
        WeightType::IQ4_XS => {
            let j = i / 32;
            let high = u16::from_le_bytes([block[2], block[3]]) >> (2 * j) & 3;
            let low = block[4 + j / 2] >> (4 * (j % 2)) & 15;
            let scale = half(0) * (f32::from(low) + 16.0 * f32::from(high) - 32.0);
            scale * iq4_value(packed(8, 4, 16))
        }
        _ => panic!("{dtype} has no blocks of 256"),
    }
}

/// Row lengths around the vectors and blocks that `dtype` can have.
pub(super) fn widths(dtype: WeightType) -> Vec<usize> {
    match dtype.block_len() {
        1 => vec![1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 96, 576, 1000],
        block => [1, 2, 3, 5, 18].map(|blocks| blocks * block).to_vec(),
    }
}

#[test]
fn dequantize_is_bit_exact_on_every_isa() {
    let mut random = Random(1);
    for isa in isas() {
        for dtype in WeightType::ALL {
            for cols in widths(dtype) {
                let bytes = random.weights(dtype, 3 * cols);
                let weight = WeightRows::new(dtype, &bytes, 3, cols).unwrap();
                let mut out = vec![0.0; cols];
                for row in 0..3 {
                    kernels(isa, 1).dequantize(weight, row, &mut out);
                    let row = weight.row(row);
                    let expected: Vec<f32> = (0..cols).map(|i| element(dtype, row, i)).collect();
                    assert_eq!(out, expected, "{dtype} {cols} {}", isa.name());
                }
            }
        }
    }
}

/// Each line has a type's name, the bytes of some blocks, and the bits of their elements as the `gguf` Python
/// package dequantises them. `crates/kernels/tests/golden/blocks.py` writes the file.
const GOLDEN_BLOCKS: &str = include_str!("../tests/golden/blocks.txt");

#[test]
fn blocks_are_dequantized_as_by_the_gguf_package() {
    let hex = |text: &str| -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    };
    let mut tested = Vec::new();
    for line in GOLDEN_BLOCKS.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let dtype = WeightType::named(fields[0]).unwrap();
        let (bytes, expected) = (hex(fields[1]), hex(fields[2]));
        let expected: Vec<u32> =
            expected.chunks(4).map(|bits| u32::from_le_bytes(bits.try_into().unwrap())).collect();
        let mut out = vec![0.0; expected.len()];
        for isa in isas() {
            let weight = WeightRows::new(dtype, &bytes, 1, expected.len()).unwrap();
            kernels(isa, 1).dequantize(weight, 0, &mut out);
            let got: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
            assert_eq!(got, expected, "{dtype} {}", isa.name());
        }
        tested.push(dtype);
    }
    assert_eq!(tested, WeightType::ALL);
}

#[test]
fn every_f16_is_converted_exactly() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let weight = WeightRows::new(WeightType::F16, &bytes, 1, 1 << 16).unwrap();
    for isa in isas() {
        let mut out = vec![0.0; 1 << 16];
        kernels(isa, 1).dequantize(weight, 0, &mut out);
        for (bits, value) in out.into_iter().enumerate() {
            let expected = f16::from_bits(bits as u16).to_f32_const();
            let same = value.to_bits() == expected.to_bits() || value.is_nan() && expected.is_nan();
            assert!(same, "{bits:#06x} {}", isa.name());
        }
    }
}

/// The bound on the error: every product may be off by half a unit in its last place, and every sum as well.
pub(super) fn dot_bound(x: &[f32], w: &[f32]) -> f64 {
    let magnitude: f64 = x.iter().zip(w).map(|(x, w)| f64::from(x * w).abs()).sum();
    magnitude * f64::from(f32::EPSILON) * 8.0 + 1e-30
}

#[test]
fn matmul_is_the_sum_of_products_on_every_isa() {
    let mut random = Random(2);
    for isa in isas() {
        let kernels = kernels(isa, 2);
        for dtype in WeightType::ALL {
            let shapes = [(1, 1), (1, 7), (2, 3), (3, 50), (4, 2), (5, 49), (9, 100)];
            for (cols, (rows, weight_rows)) in pairs(&widths(dtype), &shapes) {
                let bytes = random.weights(dtype, weight_rows * cols);
                let weight = WeightRows::new(dtype, &bytes, weight_rows, cols).unwrap();
                let x = random.floats(rows * cols);
                let mut out = random.floats(rows * weight_rows);
                let before = out.clone();
                let product = Product { weight, out: &mut out, output: Output::Add };
                kernels.matmul(&x, rows, &mut [product], &Cancel::never());
                for row in 0..rows {
                    for column in 0..weight_rows {
                        let x = &x[row * cols..][..cols];
                        let w: Vec<f32> = (0..cols).map(|i| element(dtype, weight.row(column), i)).collect();
                        let dot: f64 = x.iter().zip(&w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                        let at = row * weight_rows + column;
                        let error = (f64::from(out[at]) - f64::from(before[at]) - dot).abs();
                        let bound = dot_bound(x, &w) + f64::from(f32::EPSILON) * (2.0 + dot.abs());
                        assert!(error <= bound, "{dtype} {cols} {}: {error} > {bound}", isa.name());
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_of_matmul_depends_on_nothing_but_the_row() {
    let mut random = Random(3);
    for isa in isas() {
        for dtype in WeightType::ALL {
            let cols = if dtype.block_len() == 1 { 100 } else { 3 * dtype.block_len() };
            let bytes = random.weights(dtype, 130 * cols);
            let weight = WeightRows::new(dtype, &bytes, 130, cols).unwrap();
            let x = random.floats(11 * cols);
            let product = |threads: usize, rows: std::ops::Range<usize>| {
                let mut out = vec![0.0; rows.len() * 130];
                let product = Product { weight, out: &mut out, output: Output::Set };
                let x = &x[rows.start * cols..rows.end * cols];
                kernels(isa, threads).matmul(x, rows.len(), &mut [product], &Cancel::never());
                out
            };
            let whole = product(1, 0..11);
            let parts = [(0, 1), (3, 5), (3, 6), (2, 6), (0, 5), (3, 9), (2, 9), (1, 9), (0, 11), (10, 11)];
            for ((start, end), threads) in pairs(&parts, &[1, 2, 3]) {
                let expected = &whole[start * 130..end * 130];
                assert_eq!(product(threads, start..end), expected, "{dtype} {}", isa.name());
            }
        }
    }
}

#[test]
fn exp_is_within_two_units_in_the_last_place() {
    let mut worst = 0.0_f64;
    for step in -880_000..=880_000 {
        let x = step as f32 * 1e-4;
        let expected = f64::from(x).exp();
        if expected < f64::from(f32::MIN_POSITIVE) {
            continue;
        }
        worst = worst.max((f64::from(exp(x)) - expected).abs() / expected);
    }
    assert!(worst <= 2.0 * f64::from(f32::EPSILON), "{worst}");
    for (x, expected) in [(0.0, 1.0), (-200.0, 0.0), (f32::NEG_INFINITY, 0.0), (90.0, f32::INFINITY)] {
        assert_eq!(exp(x), expected, "exp({x})");
    }
    assert!(exp(f32::NAN).is_nan());
}

#[test]
fn exp_of_negative_numbers_is_within_two_units_in_the_last_place() {
    fn check<L: Lanes>(first: f32) {
        let x: [f32; LANES] = std::array::from_fn(|i| first - i as f32 * 1e-3);
        let mut out = [0.0; LANES];
        exp_of_negative(L::load(&x)).store(&mut out);
        for (x, got) in x.into_iter().zip(out) {
            let expected = f64::from(x).exp();
            // Results below the smallest normal number may be 0.
            let bound = expected * 2.0 * f64::from(f32::EPSILON) + f64::from(f32::MIN_POSITIVE);
            assert!((f64::from(got) - expected).abs() <= bound, "exp({x}) is not {got}");
        }
    }
    for step in 0..3200 {
        check::<super::scalar::ScalarLanes>(step as f32 * -0.032);
    }
    let special = [0.0, -0.0, -87.9, f32::NEG_INFINITY, f32::NAN];
    let mut out = [0.0; LANES];
    exp_of_negative(load_partial::<super::scalar::ScalarLanes>(&special)).store(&mut out);
    assert_eq!(out[..4], [1.0, 1.0, 0.0, 0.0]);
    assert!(out[4].is_nan());
}

#[test]
fn activations_follow_their_formulas() {
    type Formula = fn(f64) -> f64;
    let formulas: [(Activation, Formula); 4] = [
        (Activation::Silu, |x| x / (1.0 + (-x).exp())),
        (Activation::Gelu, |x| 0.5 * x * (1.0 + libm::erf(x / 2.0_f64.sqrt()))),
        (Activation::GeluTanh, |x| {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }),
        (Activation::QuickGelu, |x| x / (1.0 + (-1.702 * x).exp())),
    ];
    let mut random = Random(7);
    let mut x: Vec<f32> = random.floats(997).iter().map(|x| 8.0 * x).collect();
    x.extend([0.0, -0.0, 1e-30, 60.0, -60.0, 200.0, -200.0]);
    let up = random.floats(x.len());
    for isa in isas() {
        for (activation, formula) in formulas {
            let mut gate = x.clone();
            kernels(isa, 2).gate_mul(activation, &mut gate, &up, &Cancel::never());
            for ((&x, &up), &got) in x.iter().zip(&up).zip(&gate) {
                let expected = formula(f64::from(x)) * f64::from(up);
                let bound = 1e-6 * (1.0 + f64::from(x).abs());
                assert!((f64::from(got) - expected).abs() < bound, "{activation:?} {x} on {}", isa.name());
            }
        }
    }
}

#[test]
fn rms_norm_and_rope_follow_their_formulas() {
    let mut random = Random(6);
    for isa in isas() {
        let kernels = kernels(isa, 2);
        for width in [2, 31, 32, 33, 576] {
            let rows = 9;
            let (x, weight) = (random.floats(rows * width), random.floats(width));
            let mut out = vec![0.0; x.len()];
            kernels.rms_norm(&x, &weight, 1e-5, &mut out, &Cancel::never());
            for (i, &value) in x.iter().enumerate() {
                let row = &x[i / width * width..][..width];
                let mean: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                let norm = f64::from(value) / (mean + 1e-5).sqrt() * f64::from(weight[i % width]);
                assert!((f64::from(out[i]) - norm).abs() < 2e-6 * (1.0 + norm.abs()), "{}", isa.name());
            }
        }
        let (rows, heads, head_dim) = (3, 2, 6);
        let x = random.floats(rows * heads * head_dim);
        let angles = random.floats(rows * head_dim / 2);
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let mut rotated = x.clone();
        kernels.rope(&mut rotated, head_dim, &cos, &sin, &Cancel::never());
        for row in 0..rows {
            for head in 0..heads {
                for i in 0..head_dim / 2 {
                    let at = (row * heads + head) * head_dim + i;
                    let (a, b) = (x[at], x[at + head_dim / 2]);
                    let (c, s) = (cos[row * head_dim / 2 + i], sin[row * head_dim / 2 + i]);
                    assert_eq!(rotated[at], a * c - b * s);
                    assert_eq!(rotated[at + head_dim / 2], b * c + a * s);
                }
            }
        }
    }
}

#[test]
fn the_pool_runs_every_task_once_for_any_caller() {
    let pool = Pool::new(3).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for tasks in [0, 1, 2, 7, 100] {
                    for _ in 0..50 {
                        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                        pool.run(tasks, &Cancel::never(), &|task| {
                            counts[task].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                    }
                }
            });
        }
    });
}

#[test]
fn tasks_of_a_busy_thread_are_run_by_the_others() {
    let pool = Pool::new(2).unwrap();
    let done = AtomicUsize::new(0);
    // The caller's first task ends only when all other tasks are done, including those that the caller would
    // run next.
    pool.run(100, &Cancel::never(), &|task| {
        let started = Instant::now();
        while task == 0 && done.load(Ordering::SeqCst) < 99 {
            assert!(started.elapsed() < Duration::from_secs(60), "no other thread runs these tasks");
            std::thread::yield_now();
        }
        done.fetch_add(1, Ordering::SeqCst);
    });
    assert_eq!(done.into_inner(), 100);
}

#[test]
fn no_worker_runs_a_job_that_has_returned() {
    let pool = Pool::new(4).unwrap();
    for round in 0..20_000 {
        let (is_open, done) = (AtomicBool::new(true), AtomicUsize::new(0));
        let tasks = 2 + round % 7;
        pool.run(tasks, &Cancel::never(), &|_| {
            assert!(is_open.load(Ordering::SeqCst));
            done.fetch_add(1, Ordering::SeqCst);
        });
        is_open.store(false, Ordering::SeqCst);
        assert_eq!(done.load(Ordering::SeqCst), tasks);
    }
}

#[test]
fn ranges_cover_every_length_once() {
    let pool = Pool::new(3).unwrap();
    for (lens, step) in [(&[][..], 1), (&[0, 7, 0, 1, 12], 5), (&[1, 1, 1], 64), (&[300], 7)] {
        let seen: Vec<Vec<AtomicUsize>> =
            lens.iter().map(|&len| (0..len).map(|_| AtomicUsize::new(0)).collect()).collect();
        pool.for_each_range(lens, step, &Cancel::never(), &|index, range| {
            assert!(range.len() <= step && range.start.is_multiple_of(step));
            seen[index][range].iter().for_each(|count| _ = count.fetch_add(1, Ordering::Relaxed));
        });
        assert!(seen.iter().flatten().all(|count| count.load(Ordering::Relaxed) == 1), "{lens:?} by {step}");
    }
}

#[test]
fn a_parked_pool_wakes_again() {
    let pool = Pool::new(2).unwrap();
    for _ in 0..5 {
        std::thread::sleep(std::time::Duration::from_millis(3));
        let threads = std::sync::Mutex::new(std::collections::HashSet::new());
        pool.run(200, &Cancel::never(), &|_| {
            std::thread::sleep(std::time::Duration::from_micros(20));
            threads.lock().unwrap().insert(std::thread::current().id());
        });
        assert_eq!(threads.lock().unwrap().len(), 2, "the worker took part");
    }
}

#[test]
fn a_panic_in_a_task_reaches_the_caller_and_the_pool_goes_on() {
    let pool = Pool::new(2).unwrap();
    for _ in 0..20 {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(64, &Cancel::never(), &|task| assert!(task != 13, "unlucky"));
        }));
        assert!(caught.is_err());
        let count = AtomicUsize::new(0);
        pool.run(64, &Cancel::never(), &|_| _ = count.fetch_add(1, Ordering::Relaxed));
        assert_eq!(count.load(Ordering::Relaxed), 64);
    }
}

#[test]
fn cancelling_leaves_the_remaining_tasks_out() {
    for threads in [1, 2] {
        let pool = Pool::new(threads).unwrap();
        let flag = AtomicBool::new(false);
        let count = AtomicUsize::new(0);
        pool.run(10_000, &Cancel::new(&flag), &|_| {
            if count.fetch_add(1, Ordering::Relaxed) == 10 {
                flag.store(true, Ordering::Relaxed);
            }
        });
        assert!(count.load(Ordering::Relaxed) < 100);

        let flag = AtomicBool::new(false);
        let polls = Cell::new(0);
        let poll = || {
            polls.set(polls.get() + 1);
            polls.get() == 2
        };
        let cancel = Cancel::with_poll(&flag, &poll);
        pool.run(10_000, &cancel, &|_| std::thread::sleep(std::time::Duration::from_millis(1)));
        assert_eq!(polls.get(), 2);
        assert!(cancel.is_cancelled());
    }
}

#[test]
fn a_view_has_exactly_its_bytes() {
    let bytes = [0; 36];
    assert!(WeightRows::new(WeightType::Q4_0, &bytes, 2, 32).is_some());
    assert!(WeightRows::new(WeightType::Q4_0, &bytes, 1, 32).is_none());
    assert!(WeightRows::new(WeightType::Q4_0, &bytes, 2, 31).is_none());
    assert!(WeightRows::new(WeightType::F32, &bytes, 0, 0).is_none());
    assert!(WeightRows::new(WeightType::F32, &[], usize::MAX, 4).is_none());
}
