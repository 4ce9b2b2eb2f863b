//! Tests of the quantisers: the blocks of the `gguf` package and of ggml, and numbers that do not fit.

use candle_llama_kernels::quantize::{TARGETS, Unstorable, quantize_row};
use candle_llama_kernels::{WeightType, dequantize};

/// Files with the bits of rows of numbers. Then, for each type, its name and the blocks that another program
/// makes of them. The scripts beside the files write them. The first has rows of 32 numbers and blocks of the
/// `gguf` Python package, the second has rows of 256 and blocks of ggml.
const GOLDEN: [&str; 2] =
    [include_str!("../golden/quantized.txt"), include_str!("../golden/k_quantized.txt")];

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn quantized(dtype: WeightType, row: &[f32]) -> Result<Vec<u8>, Unstorable> {
    let mut out = vec![0xAA; dtype.bytes_for(row.len()).unwrap()];
    quantize_row(dtype, row, &mut out).map(|()| out)
}

#[test]
fn blocks_are_those_of_the_gguf_package_and_of_ggml() {
    let mut tested = vec![WeightType::F32];
    let mut row = Vec::new();
    for line in GOLDEN.iter().flat_map(|golden| golden.lines()) {
        let (name, blocks) = line.split_once(' ').unwrap();
        if name == "rows" {
            row = hex(blocks).as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
            continue;
        }
        let dtype = TARGETS.into_iter().find(|dtype| dtype.name() == name).unwrap();
        let (got, expected) = (quantized(dtype, &row).unwrap(), hex(blocks));
        let (block, bytes) = (dtype.block_len(), dtype.block_bytes());
        for (at, (got, expected)) in got.chunks(bytes).zip(expected.chunks(bytes)).enumerate() {
            assert_eq!(got, expected, "{dtype} {:?}", &row[at * block..(at + 1) * block]);
        }
        tested.push(dtype);
    }
    assert_eq!(tested, TARGETS);
}

#[test]
fn unstorable_numbers_are_refused_with_index_and_value() {
    for dtype in TARGETS {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut row = [0.5; 512];
            row[470] = bad;
            let refusal = quantized(dtype, &row).unwrap_err();
            assert_eq!((refusal.index, refusal.value.to_bits()), (470, bad.to_bits()), "{dtype}");
        }
        let mut row = [0.5; 512];
        (row[3], row[470]) = (2.0, -f32::MAX);
        let refused = Unstorable { index: 470, value: -f32::MAX };
        match dtype {
            WeightType::F32 => assert!(quantized(dtype, &row).is_ok()),
            _ => assert_eq!(quantized(dtype, &row), Err(refused), "{dtype}"),
        }
    }
}

#[test]
fn the_largest_numbers_that_fit_stay_finite() {
    let largest = [
        (WeightType::F16, 65_519.0),
        (WeightType::Q8_0, 65_519.0 * 127.0),
        (WeightType::Q4_0, 65_519.0 * 8.0),
        (WeightType::Q5_0, 65_519.0 * 16.0),
        // The minimum is a half too.
        (WeightType::Q4_1, 65_519.0),
        (WeightType::Q5_1, 65_519.0),
    ];
    for (dtype, value) in largest {
        for value in [value, -value] {
            let mut row = [1.0; 32];
            row[9] = value;
            let mut dequantized = [0.0; 32];
            dequantize(dtype, &quantized(dtype, &row).unwrap(), &mut dequantized);
            assert!(dequantized.iter().all(|x| x.is_finite()), "{dtype} {dequantized:?}");
            row[9] = value * 1.01;
            row[10] = -row[9];
            assert!(quantized(dtype, &row).is_err(), "{dtype}");
        }
    }
}

#[test]
fn numbers_too_small_for_a_scale_become_zero() {
    for dtype in TARGETS.into_iter().filter(|dtype| dtype.block_len() > 1) {
        for tiny in [1e-45, 1e-40, 1e-38, -1e-38, -0.0] {
            let mut row = [0.0; 256];
            (row[5], row[6]) = (tiny, tiny / -2.0);
            let mut dequantized = [1.0; 256];
            dequantize(dtype, &quantized(dtype, &row).unwrap(), &mut dequantized);
            assert_eq!(dequantized, [0.0; 256], "{dtype} {tiny}");
        }
    }
}

#[test]
fn any_bits_become_finite_numbers_or_are_refused() {
    let mut bits = 1_u64;
    for _ in 0..20_000 {
        let row: [f32; 32] = std::array::from_fn(|_| {
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            f32::from_bits((bits >> 32) as u32)
        });
        for dtype in TARGETS.into_iter().filter(|dtype| dtype.block_len() <= 32) {
            match quantized(dtype, &row) {
                Err(refused) => assert_eq!(refused.value.to_bits(), row[refused.index].to_bits()),
                Ok(bytes) => {
                    let mut dequantized = [f32::NAN; 32];
                    dequantize(dtype, &bytes, &mut dequantized);
                    assert!(dequantized.iter().all(|number| number.is_finite()), "{dtype} {row:?}");
                }
            }
        }
    }
}

#[test]
fn k_types_of_any_bits_below_their_range_are_finite_and_larger_ones_are_refused() {
    let k_types = TARGETS.into_iter().filter(|dtype| dtype.block_len() == 256);
    let mut bits = 1_u64;
    for (turn, dtype) in (0..4_000).zip(k_types.cycle()) {
        // Magnitudes of about 40 octaves, up to 2^92.
        let lowest = turn % 180;
        let row: [f32; 256] = std::array::from_fn(|_| {
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let exponent = lowest + (bits >> 20) as u32 % 40;
            f32::from_bits((bits >> 32) as u32 & 0x807F_FFFF | exponent << 23)
        });
        let largest = row.iter().fold(0.0, |max: f32, number| max.max(number.abs()));
        match quantized(dtype, &row) {
            Err(refused) => {
                assert_eq!(refused.value, row[refused.index]);
                assert!(refused.value.abs() == largest && largest > 65_504.0 * 15.0, "{dtype} {refused}");
            }
            Ok(bytes) => {
                let mut dequantized = [f32::NAN; 256];
                dequantize(dtype, &bytes, &mut dequantized);
                assert!(dequantized.iter().all(|number| number.is_finite()), "{dtype} {row:?}");
                assert!(largest < 65_520.0 * 128.0 * 32.0, "{dtype} {largest}");
            }
        }
    }
}

#[test]
fn rows_of_negative_zeros_have_ggmls_scale() {
    assert_eq!(quantized(WeightType::Q4_0, &[-0.0; 32]).unwrap()[..3], [0, 0x80, 0x88]);
    assert_eq!(quantized(WeightType::Q8_0, &[-0.0; 32]).unwrap(), [0; 34]);
}

#[test]
fn no_more_than_half_a_step_is_lost() {
    let mut bits = 1_u64;
    let mut random = || {
        bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (bits >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    for dtype in TARGETS {
        for _ in 0..200 {
            let row: [f32; 256] = std::array::from_fn(|_| random());
            let mut dequantized = [0.0; 256];
            dequantize(dtype, &quantized(dtype, &row).unwrap(), &mut dequantized);
            // The largest magnitude is below 1. Types without a minimum have one step less at one end,
            // which costs a whole step.
            let step = match dtype {
                WeightType::Q8_0 => 0.5 / 127.0,
                WeightType::Q4_0 => 1.0 / 8.0,
                WeightType::Q5_0 => 1.0 / 16.0,
                WeightType::Q4_1 => 0.5 * 2.0 / 15.0,
                WeightType::Q5_1 => 0.5 * 2.0 / 31.0,
                // Scales and minimums have 4 bits, then 6. The search lowers the mean error, not the largest.
                WeightType::Q2_K => 0.5,
                WeightType::Q3_K => 0.5,
                WeightType::Q4_K => 0.15,
                WeightType::Q5_K => 0.06,
                WeightType::Q6_K => 0.06,
                _ => 1.0 / 256.0,
            };
            for (got, expected) in dequantized.iter().zip(&row) {
                assert!((got - expected).abs() < step * 1.01 + 1e-3, "{dtype} {got} {expected}");
            }
        }
    }
}
