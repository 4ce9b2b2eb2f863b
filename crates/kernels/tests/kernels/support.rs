//! What the tests share: the ISAs to test, random weights, and a weight's elements in plain arithmetic.

use candle_llama_kernels::internals::IQ4_VALUES;
use candle_llama_kernels::{Isa, Kernels, WeightType};
use half::{bf16, f16};

/// A small random generator with a seed, so that failures can be reproduced: Marsaglia's xorshift64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Uniform in [-1, 1).
    fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    /// Random weights of a type: random bits for the integers, and small scales.
    pub(crate) fn weights(&mut self, dtype: WeightType, len: usize) -> Vec<u8> {
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
pub(crate) fn isas() -> Vec<Isa> {
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
pub(crate) fn pairs<A: Copy, B: Copy>(first: &[A], second: &[B]) -> Vec<(A, B)> {
    if few_cases() {
        let count = first.len().max(second.len());
        let pair = |i: usize| (first[i % first.len()], second[i % second.len()]);
        return (0..count).map(pair).collect();
    }
    first.iter().flat_map(|&first| second.iter().map(move |&second| (first, second))).collect()
}

/// Whether there are to be few cases: CANDLE_LLAMA_TEST_CASES is few or all, the default. Few are for
/// emulators, which are a hundred times slower than a processor.
pub(crate) fn few_cases() -> bool {
    match std::env::var("CANDLE_LLAMA_TEST_CASES").as_deref() {
        Ok("few") => true,
        Ok("all") | Err(_) => false,
        Ok(other) => panic!("CANDLE_LLAMA_TEST_CASES is few or all, not {other}"),
    }
}

pub(crate) fn kernels(isa: Isa, threads: usize) -> Kernels {
    Kernels::new(isa, threads).expect("threads can be started")
}

/// Element `i` of a row, following the table in blocks.rs, rounded to f32 where ggml rounds.
pub(crate) fn element(dtype: WeightType, row: &[u8], i: usize) -> f32 {
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
    f32::from(IQ4_VALUES[usize::from(quant)])
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
pub(crate) fn widths(dtype: WeightType) -> Vec<usize> {
    match dtype.block_len() {
        1 => vec![1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 96, 576, 1000],
        block => [1, 2, 3, 5, 18].map(|blocks| blocks * block).to_vec(),
    }
}

/// The bound on the error: every product may be off by half a unit in its last place, and every sum as well.
pub(crate) fn dot_bound(x: &[f32], w: &[f32]) -> f64 {
    let magnitude: f64 = x.iter().zip(w).map(|(x, w)| f64::from(x * w).abs()).sum();
    magnitude * f64::from(f32::EPSILON) * 8.0 + 1e-30
}
