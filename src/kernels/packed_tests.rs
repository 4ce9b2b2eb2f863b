//! The suite for packed weights and 8-bit activations: every level of this CPU against plain arithmetic.

use super::activations::{
    BLOCK_WORDS, FLOAT_OFFSET, FLOAT_START, GROUPS, OFFSET, SCALE, START_8, START_128, TOTAL,
};
use super::tests::{Random, kernels, levels};
use super::*;

const TYPES: [WeightType; 5] =
    [WeightType::Q8_0, WeightType::Q4_0, WeightType::Q4_1, WeightType::Q5_0, WeightType::Q5_1];

fn pack(kernels: &Kernels, weight: WeightRows) -> PackedRows {
    let fill = |row: usize, out: &mut [u8]| out.copy_from_slice(weight.row(row));
    let packed = kernels.pack(weight.dtype, weight.rows, weight.cols, &Cancel::never(), &fill);
    packed.expect("there is memory").expect("the type can be packed")
}

fn product(kernels: &Kernels, x: &QuantizedRows, weight: &PackedRows) -> Vec<f32> {
    let mut out = vec![0.0; x.rows() * weight.rows()];
    let product = PackedProduct { weight, out: &mut out, output: Output::Set };
    kernels.matmul_packed(x, &mut [product], &Cancel::never());
    out
}

const PRECISIONS: [Precision; 2] = [Precision::Bits8, Precision::Bits16];

fn quantized(kernels: &Kernels, x: &[f32], rows: usize, precision: Precision) -> QuantizedRows {
    let mut out = QuantizedRows::default();
    kernels.quantize(x, rows, precision, &mut out, &Cancel::never());
    out
}

/// What 32 columns of a line have besides their bytes.
struct Numbers {
    scale: f32,
    /// Less [`FLOAT_START`].
    starts: [i32; 2],
    offset: f32,
    total: f32,
}

/// Line `line` as the kernels read it: bytes, and the numbers for each 32.
fn unpacked(x: &QuantizedRows, line: usize) -> (Vec<i8>, Vec<Numbers>) {
    let (first, lines, panel) = x.panels().find(|(first, lines, _)| line < first + lines).unwrap();
    let m = line - first;
    let (mut bytes, mut numbers) = (Vec::new(), Vec::new());
    for words in panel.chunks_exact(BLOCK_WORDS * lines) {
        let word = |index: usize| words[index * lines + m];
        bytes.extend((0..GROUPS).flat_map(|group| word(group).to_le_bytes()).map(|byte| byte as i8));
        let [scale, offset, total] = [SCALE, OFFSET, TOTAL].map(|kind| f32::from_bits(word(kind)));
        let starts = [START_8, START_128].map(|kind| word(kind) as i32 - FLOAT_START);
        numbers.push(Numbers { scale, starts, offset, total });
    }
    (bytes, numbers)
}

#[test]
fn packing_keeps_every_weight() {
    let mut random = Random(11);
    let kernels = kernels(Isa::Scalar, 2);
    for dtype in TYPES {
        for (rows, cols) in [(1, 32), (15, 96), (16, 64), (17, 576), (50, 32)] {
            let bytes = random.weights(dtype, rows * cols);
            let weight = WeightRows::new(dtype, &bytes, rows, cols).unwrap();
            let packed = pack(&kernels, weight);
            assert_eq!((packed.rows(), packed.cols(), packed.dtype()), (rows, cols, dtype));
            let (mut got, mut expected) = (vec![0.0; cols], vec![0.0; cols]);
            for row in 0..rows {
                packed.row_to_f32(row, &mut got);
                dequantize(dtype, weight.row(row), &mut expected);
                assert_eq!(got, expected, "{dtype} row {row} of {rows}");
            }
        }
    }
}

#[test]
fn what_has_no_tiles_is_not_packed() {
    let kernels = kernels(Isa::Scalar, 1);
    let pack = |dtype, rows, cols| kernels.pack(dtype, rows, cols, &Cancel::never(), &|_, _| {}).unwrap();
    assert!(pack(WeightType::F32, 16, 32).is_none());
    assert!(pack(WeightType::Q4_K, 16, 256).is_none());
    assert!(pack(WeightType::Q4_0, 16, 33).is_none());
    assert!(pack(WeightType::Q4_0, usize::MAX, 1 << 20).is_none());
    assert!(kernels.pack(WeightType::Q4_0, 1 << 40, 1 << 20, &Cancel::never(), &|_, _| {}).is_err());
}

#[test]
fn activations_are_rounded_to_the_nearest_127th_of_the_largest_of_32() {
    let mut random = Random(12);
    for isa in levels() {
        let kernels = kernels(isa, 2);
        for (rows, cols) in [(1, 32), (3, 64), (8, 96), (9, 576), (23, 32)] {
            let mut x = random.floats(rows * cols);
            x[..32].fill(0.0);
            x[5] = 1e-35;
            x.iter_mut().skip(32).step_by(7).for_each(|x| *x *= 1000.0);
            let quantized = quantized(&kernels, &x, rows, Precision::Bits8);
            assert_eq!((quantized.rows(), quantized.cols()), (rows, cols));
            for (row, x) in x.chunks_exact(cols).enumerate() {
                let (bytes, numbers) = unpacked(&quantized, row);
                for ((x, bytes), numbers) in x.chunks_exact(32).zip(bytes.chunks_exact(32)).zip(numbers) {
                    let Numbers { scale, starts, offset, total } = numbers;
                    let largest = x.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
                    // The nearest number of 22 bits.
                    let expected = if largest < 1e-30 { 0.0 } else { largest / 127.0 };
                    assert_eq!(scale.to_bits(), (expected.to_bits() + 2) & !3, "{}", isa.name());
                    // Exactly: that makes a sum of integers a float without rounding.
                    assert_eq!(
                        f64::from(offset),
                        f64::from(FLOAT_OFFSET) * f64::from(scale),
                        "{}",
                        isa.name()
                    );
                    for (&x, &byte) in x.iter().zip(bytes) {
                        let error = (x - f32::from(byte) * scale).abs();
                        assert!(error <= 0.5001 * scale + 1e-30, "{x} {byte} {scale} {}", isa.name());
                    }
                    let sum: i32 = bytes.iter().map(|&byte| i32::from(byte)).sum();
                    assert_eq!(
                        (starts, total),
                        ([-8 * sum, -128 * sum], scale * sum as f32),
                        "{}",
                        isa.name()
                    );
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    let bytes = Random(13).weights(WeightType::Q4_0, 16 * 64);
    let weight = WeightRows::new(WeightType::Q4_0, &bytes, 16, 64).unwrap();
    for isa in levels() {
        let kernels = kernels(isa, 1);
        let packed = pack(&kernels, weight);
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        for (bad, precision) in bad.into_iter().flat_map(|bad| PRECISIONS.map(|precision| (bad, precision))) {
            let mut x = vec![0.5; 128];
            x[70] = bad;
            let out = product(&kernels, &quantized(&kernels, &x, 2, precision), &packed);
            assert!(out[..16].iter().all(|out| out.is_finite()), "{}", isa.name());
            assert!(out[16..].iter().all(|out| !out.is_finite()), "{}", isa.name());
        }
    }
}

/// Blocks of the largest and the smallest numbers and of random ones, with scales of 1 and no minimum.
fn extremes(random: &mut Random, dtype: WeightType, blocks: usize) -> Vec<u8> {
    let mut bytes = random.weights(dtype, 32 * blocks);
    for (index, block) in bytes.chunks_exact_mut(dtype.block_bytes()).enumerate() {
        match index % 3 {
            0 => block.fill(0xff),
            1 => block.fill(if dtype == WeightType::Q8_0 { 0x80 } else { 0 }),
            _ => {}
        }
        block[..2].copy_from_slice(&half::f16::ONE.to_le_bytes());
        if matches!(dtype, WeightType::Q4_1 | WeightType::Q5_1) {
            block[2..4].copy_from_slice(&half::f16::ZERO.to_le_bytes());
        }
    }
    bytes
}

#[test]
fn sums_of_integers_are_exact_at_every_level() {
    let mut random = Random(14);
    for isa in levels() {
        let kernels = kernels(isa, 2);
        for dtype in TYPES {
            for (rows, weight_rows, cols) in [
                (1, 16, 32),
                (1, 33, 96),
                (2, 17, 64),
                (3, 5, 64),
                (7, 48, 96),
                (8, 16, 32),
                (9, 70, 64),
                (13, 31, 32),
                (51, 70, 96),
            ] {
                let bytes = extremes(&mut random, dtype, weight_rows * cols / 32);
                let packed = pack(&kernels, WeightRows::new(dtype, &bytes, weight_rows, cols).unwrap());
                // Integers with a largest of 127 are their own 8 bits.
                let mut x: Vec<f32> =
                    (0..rows * cols).map(|_| (random.bits() % 255) as f32 - 127.0).collect();
                for (index, x) in x.chunks_exact_mut(32).enumerate() {
                    match index % 3 {
                        0 => x.fill(127.0),
                        1 => x.fill(-127.0),
                        _ => x[random.bits() as usize % 32] = 127.0,
                    }
                }
                let out = product(&kernels, &quantized(&kernels, &x, rows, Precision::Bits8), &packed);
                let mut weights = vec![0.0; cols];
                for feature in 0..weight_rows {
                    packed.row_to_f32(feature, &mut weights);
                    for (row, x) in x.chunks_exact(cols).enumerate() {
                        let expected: f32 = x.iter().zip(&weights).map(|(x, w)| x * w).sum();
                        let got = out[row * weight_rows + feature];
                        assert_eq!(got, expected, "{dtype} {rows}x{weight_rows}x{cols} {}", isa.name());
                    }
                }
            }
        }
    }
}

#[test]
fn products_are_those_of_the_rounded_activations() {
    let mut random = Random(15);
    for isa in levels() {
        let kernels = kernels(isa, 2);
        for dtype in TYPES {
            for (rows, weight_rows, cols, precision) in [
                (1, 40, 576, Precision::Bits8),
                (4, 16, 128, Precision::Bits8),
                (11, 50, 96, Precision::Bits8),
                (1, 17, 64, Precision::Bits16),
                (3, 32, 64, Precision::Bits16),
                (11, 50, 96, Precision::Bits16),
                (50, 70, 64, Precision::Bits8),
                (25, 35, 96, Precision::Bits16),
            ] {
                let bytes = random.weights(dtype, weight_rows * cols);
                let packed = pack(&kernels, WeightRows::new(dtype, &bytes, weight_rows, cols).unwrap());
                let quantized = quantized(&kernels, &random.floats(rows * cols), rows, precision);
                let lines = precision.lines();
                let mut out = random.floats(rows * weight_rows);
                let before = out.clone();
                let add = PackedProduct { weight: &packed, out: &mut out, output: Output::Add };
                kernels.matmul_packed(&quantized, &mut [add], &Cancel::never());
                let mut weights = vec![0.0; cols];
                for feature in 0..weight_rows {
                    packed.row_to_f32(feature, &mut weights);
                    for row in 0..rows {
                        let (mut dot, mut magnitude) = (0.0, 0.0);
                        for line in lines * row..lines * (row + 1) {
                            let (bytes, numbers) = unpacked(&quantized, line);
                            let scales = numbers.iter().flat_map(|numbers| [f64::from(numbers.scale); 32]);
                            for ((&byte, scale), &w) in bytes.iter().zip(scales).zip(&weights) {
                                let product = f64::from(byte) * scale * f64::from(w);
                                dot += product;
                                magnitude += product.abs();
                            }
                        }
                        let at = row * weight_rows + feature;
                        let error = (f64::from(out[at]) - f64::from(before[at]) - dot).abs();
                        // A few roundings for each 32 columns, of parts that a minimum may make larger
                        // than their sum.
                        let bound = f64::from(f32::EPSILON) * (8.0 * magnitude + 2.0 * dot.abs() + 4.0);
                        assert!(error <= bound, "{dtype} {error} > {bound} {}", isa.name());
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_of_a_packed_product_depends_on_nothing_but_the_row() {
    let mut random = Random(16);
    let (weight_rows, cols) = (70, 96);
    for isa in levels() {
        for dtype in TYPES {
            let bytes = random.weights(dtype, weight_rows * cols);
            let x = random.floats(60 * cols);
            for precision in PRECISIONS {
                let run = |threads: usize, rows: std::ops::Range<usize>| {
                    let kernels = kernels(isa, threads);
                    let packed = pack(&kernels, WeightRows::new(dtype, &bytes, weight_rows, cols).unwrap());
                    let x = &x[rows.start * cols..rows.end * cols];
                    product(&kernels, &quantized(&kernels, x, rows.len(), precision), &packed)
                };
                let whole = run(1, 0..60);
                for rows in [0..1, 3..5, 4..7, 2..6, 1..8, 20..28, 21..30, 0..30, 5..55, 0..60] {
                    for threads in [1, 3] {
                        let expected = &whole[rows.start * weight_rows..rows.end * weight_rows];
                        assert_eq!(run(threads, rows.clone()), expected, "{dtype} {rows:?} {}", isa.name());
                    }
                }
            }
        }
    }
}

#[test]
fn two_lines_keep_a_row_to_a_few_millionths() {
    let mut random = Random(17);
    let x = random.floats(5 * 576);
    for isa in levels() {
        let quantized = quantized(&kernels(isa, 2), &x, 5, Precision::Bits16);
        for (row, x) in x.chunks_exact(576).enumerate() {
            let [(high, high_scales), (low, low_scales)] =
                [2 * row, 2 * row + 1].map(|line| unpacked(&quantized, line));
            for (i, &x) in x.iter().enumerate() {
                let part = |bytes: &[i8], numbers: &[Numbers]| f32::from(bytes[i]) * numbers[i / 32].scale;
                let error = (part(&high, &high_scales) + part(&low, &low_scales) - x).abs();
                // Half a step of the second line, whose largest is half a step of the first.
                assert!(error <= 0.51 * 0.51 / 127.0 / 127.0, "{error} {}", isa.name());
            }
        }
    }
}

/// Above it an offset would not be finite, at some levels and in some products only.
#[test]
fn what_is_too_large_for_a_scale_counts_as_infinite() {
    let bytes = Random(18).weights(WeightType::Q8_0, 16 * 32);
    let weight = WeightRows::new(WeightType::Q8_0, &bytes, 16, 32).unwrap();
    for isa in levels() {
        let kernels = kernels(isa, 1);
        let packed = pack(&kernels, weight);
        for (x, is_finite) in [(1e33, true), (1.1e33, false), (f32::MAX, false)] {
            for rows in [1, 100] {
                let out = product(
                    &kernels,
                    &quantized(&kernels, &vec![x; 32 * rows], rows, Precision::Bits8),
                    &packed,
                );
                assert!(out.iter().all(|out| out.is_finite() == is_finite), "{x} {rows} rows {}", isa.name());
            }
        }
    }
}
