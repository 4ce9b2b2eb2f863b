//! Tests of packed weights and quantised activations on every ISA of this CPU, against plain arithmetic.

use crate::support::{Random, isas, kernels, pairs};
use candle_llama_kernels::internals::{
    FLOAT_OFFSET, FLOAT_START, GROUPS, HALF_SUM, OFFSET, SCALE, START_8, START_128, TOTAL, block_words,
    group_word,
};
use candle_llama_kernels::*;

/// The types that can be packed.
pub(crate) fn types() -> impl Iterator<Item = WeightType> {
    WeightType::ALL.into_iter().filter(|dtype| PackedRows::bytes_for(*dtype, 1, dtype.block_len()).is_some())
}

fn pack(kernels: &Kernels, weight: WeightRows) -> PackedRows {
    let fill = |row: usize, out: &mut [u8]| out.copy_from_slice(weight.row(row));
    let packed = kernels.pack(weight.dtype(), weight.rows(), weight.cols(), &Cancel::never(), &fill);
    packed.expect("there is memory").expect("the type can be packed")
}

fn product(kernels: &Kernels, x: &QuantizedRows, weight: &PackedRows) -> Vec<f32> {
    let mut out = vec![0.0; x.rows() * weight.rows()];
    let product = PackedProduct { weight, out: &mut out, output: Output::Set };
    kernels.matmul_packed(x, &mut [product], &Cancel::never());
    out
}

const PRECISIONS: [Precision; 3] = [Precision::Bits8, Precision::Mixed, Precision::Bits16];

fn quantized(kernels: &Kernels, x: &[f32], rows: usize, precision: Precision) -> QuantizedRows {
    let mut out = QuantizedRows::default();
    kernels.quantize(x, &vec![precision; rows], &mut out, &Cancel::never());
    out
}

/// 32 columns of a row, or their residual, as the kernels read them.
struct Block {
    /// The index of the 32 columns.
    index: usize,
    bytes: Vec<i8>,
    scale: f32,
    /// Minus [`FLOAT_START`].
    starts: [i32; 2],
    offset: f32,
    total: f32,
    half_sum: i32,
}

impl Block {
    /// What the block adds to its columns.
    fn values(&self) -> impl Iterator<Item = f64> {
        self.bytes.iter().map(|&byte| f64::from(byte) * f64::from(self.scale))
    }
}

fn blocks(x: &QuantizedRows, row: usize) -> Vec<Block> {
    let panel = x.panels().find(|panel| row < panel.first + panel.rows).unwrap();
    let unpack = |words: &[u32]| {
        let row = row - panel.first;
        let word = |kind: usize| words[1 + kind * panel.rows + row];
        let groups = (0..GROUPS).map(|group| words[1 + group_word(group, panel.rows, row)]);
        let bytes = groups.flat_map(u32::to_le_bytes).map(|byte| byte as i8).collect();
        let [scale, offset, total] = [SCALE, OFFSET, TOTAL].map(|kind| f32::from_bits(word(kind)));
        let starts = [START_8, START_128].map(|kind| word(kind) as i32 - FLOAT_START);
        let half_sum = word(HALF_SUM) as i32;
        Block { index: words[0] as usize, bytes, scale, starts, offset, total, half_sum }
    };
    panel.blocks.chunks_exact(block_words(panel.rows)).map(unpack).collect()
}

/// A row as the kernels see it, with residuals.
fn rounded(x: &QuantizedRows, row: usize) -> Vec<f64> {
    let mut out = vec![0.0; x.cols()];
    for block in blocks(x, row) {
        out[32 * block.index..].iter_mut().zip(block.values()).for_each(|(out, value)| *out += value);
    }
    out
}

#[test]
fn packing_keeps_every_weight() {
    let mut random = Random(11);
    let kernels = kernels(Isa::Scalar, 2);
    for dtype in types() {
        for (rows, cols) in [(1, 32), (15, 96), (16, 64), (17, 576), (50, 32)] {
            let cols = usize::next_multiple_of(cols, dtype.block_len());
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
fn types_without_a_tile_layout_are_not_packed() {
    let kernels = kernels(Isa::Scalar, 1);
    let pack = |dtype, rows, cols| kernels.pack(dtype, rows, cols, &Cancel::never(), &|_, _| {}).unwrap();
    assert!(pack(WeightType::F32, 16, 32).is_none());
    assert!(pack(WeightType::Q4_K, 16, 128).is_none());
    assert!(pack(WeightType::Q4_0, 16, 33).is_none());
    assert!(pack(WeightType::Q4_0, usize::MAX, 1 << 20).is_none());
    assert!(kernels.pack(WeightType::Q4_0, 1 << 40, 1 << 20, &Cancel::never(), &|_, _| {}).is_err());
}

#[test]
fn activations_are_rounded_to_the_nearest_127th_of_the_largest_of_32() {
    let mut random = Random(12);
    for isa in isas() {
        let kernels = kernels(isa, 2);
        for (rows, cols) in [(1, 32), (3, 64), (8, 96), (9, 576), (23, 32)] {
            let mut x = random.floats(rows * cols);
            x[..32].fill(0.0);
            x[5] = 1e-35;
            x.iter_mut().skip(32).step_by(7).for_each(|x| *x *= 1000.0);
            let quantized = quantized(&kernels, &x, rows, Precision::Bits8);
            assert_eq!((quantized.rows(), quantized.cols()), (rows, cols));
            for (row, x) in x.chunks_exact(cols).enumerate() {
                let blocks = blocks(&quantized, row);
                assert!(blocks.iter().map(|block| block.index).eq(0..cols / 32), "{}", isa.name());
                for (x, block) in x.chunks_exact(32).zip(blocks) {
                    let Block { bytes, scale, starts, offset, total, half_sum, .. } = block;
                    let largest = x.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
                    // The nearest number whose last two bits are 0.
                    let expected = if largest < 1e-30 { 0.0 } else { largest / 127.0 };
                    assert_eq!(scale.to_bits(), (expected.to_bits() + 2) & !3, "{}", isa.name());
                    // Has to be exact: only then does an integer sum become a float without rounding.
                    assert_eq!(
                        f64::from(offset),
                        f64::from(FLOAT_OFFSET) * f64::from(scale),
                        "{}",
                        isa.name()
                    );
                    for (&x, &byte) in x.iter().zip(&bytes) {
                        let error = (x - f32::from(byte) * scale).abs();
                        assert!(error <= 0.5001 * scale + 1e-30, "{x} {byte} {scale} {}", isa.name());
                    }
                    let sum: i32 = bytes.iter().map(|&byte| i32::from(byte)).sum();
                    let first: i32 = bytes[..16].iter().map(|&byte| i32::from(byte)).sum();
                    assert_eq!(half_sum, first, "{}", isa.name());
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
fn non_finite_activations_give_non_finite_outputs() {
    let bytes = Random(13).weights(WeightType::Q4_0, 16 * 64);
    let weight = WeightRows::new(WeightType::Q4_0, &bytes, 16, 64).unwrap();
    for isa in isas() {
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

/// Blocks of the largest, the smallest and random integers, with scales of 1 and no minimum.
fn extremes(random: &mut Random, dtype: WeightType, elements: usize) -> Vec<u8> {
    let mut bytes = random.weights(dtype, elements);
    for (index, block) in bytes.chunks_exact_mut(dtype.block_bytes()).enumerate() {
        match index % 3 {
            0 => block.fill(0xff),
            1 => block.fill(if dtype == WeightType::Q8_0 { 0x80 } else { 0 }),
            _ => {}
        }
        let (one, zero) = (half::f16::ONE.to_le_bytes(), [0; 2]);
        // Where the numbers are that a block has besides its weights.
        let parts: &[(usize, &[u8])] = match dtype {
            WeightType::Q4_1 | WeightType::Q5_1 => &[(0, &one), (2, &zero)],
            WeightType::Q2_K => &[(0, &[1; 16]), (80, &one), (82, &zero)],
            WeightType::Q3_K => &[(96, &[0x11; 8]), (104, &[0xaa; 4]), (108, &one)],
            WeightType::Q4_K | WeightType::Q5_K => {
                &[(0, &one), (2, &zero), (4, &[1; 4]), (8, &[0; 4]), (12, &[1; 4])]
            }
            WeightType::Q6_K => &[(192, &[1; 16]), (208, &one)],
            WeightType::IQ4_XS => &[(0, &one), (2, &[0xaa; 2]), (4, &[0x11; 4])],
            _ => &[(0, &one)],
        };
        for (at, part) in parts {
            block[*at..][..part.len()].copy_from_slice(part);
        }
    }
    bytes
}

#[test]
fn sums_of_integers_are_exact_on_every_isa() {
    let mut random = Random(14);
    for isa in isas() {
        let kernels = kernels(isa, 2);
        for dtype in types() {
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
                let cols = usize::next_multiple_of(cols, dtype.block_len());
                let bytes = extremes(&mut random, dtype, weight_rows * cols);
                let packed = pack(&kernels, WeightRows::new(dtype, &bytes, weight_rows, cols).unwrap());
                // Integers up to 127 are quantised without error if the largest is 127.
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
    for isa in isas() {
        let kernels = kernels(isa, 2);
        for dtype in types() {
            for (rows, weight_rows, cols, precision) in [
                (1, 40, 576, Precision::Bits8),
                (4, 16, 128, Precision::Bits8),
                (11, 50, 96, Precision::Bits8),
                (1, 17, 64, Precision::Bits16),
                (3, 32, 64, Precision::Bits16),
                (11, 50, 96, Precision::Bits16),
                (50, 70, 64, Precision::Bits8),
                (25, 35, 96, Precision::Bits16),
                (7, 35, 576, Precision::Mixed),
                (55, 35, 96, Precision::Mixed),
            ] {
                let cols = usize::next_multiple_of(cols, dtype.block_len());
                let bytes = random.weights(dtype, weight_rows * cols);
                let packed = pack(&kernels, WeightRows::new(dtype, &bytes, weight_rows, cols).unwrap());
                let mut x = random.floats(rows * cols);
                x[cols - 1] *= 100.0;
                let quantized = quantized(&kernels, &x, rows, precision);
                let mut out = random.floats(rows * weight_rows);
                let before = out.clone();
                let add = PackedProduct { weight: &packed, out: &mut out, output: Output::Add };
                kernels.matmul_packed(&quantized, &mut [add], &Cancel::never());
                let mut weights = vec![0.0; cols];
                for feature in 0..weight_rows {
                    packed.row_to_f32(feature, &mut weights);
                    for row in 0..rows {
                        let (mut dot, mut magnitude) = (0.0, 0.0);
                        for block in blocks(&quantized, row) {
                            for (value, &w) in block.values().zip(&weights[32 * block.index..]) {
                                dot += value * f64::from(w);
                                magnitude += (value * f64::from(w)).abs();
                            }
                        }
                        let at = row * weight_rows + feature;
                        let error = (f64::from(out[at]) - f64::from(before[at]) - dot).abs();
                        // Every 32 columns are rounded a few times. With a minimum, the parts may be larger
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
    let weight_rows = 70;
    for isa in isas() {
        for dtype in types() {
            let cols = 96_usize.next_multiple_of(dtype.block_len());
            let bytes = random.weights(dtype, weight_rows * cols);
            let mut x = random.floats(60 * cols);
            // In some rows some blocks have residuals, while those of neighbouring rows have none.
            x.iter_mut().step_by(7 * 32 + 1).for_each(|x| *x *= 100.0);
            for precision in PRECISIONS {
                let run = |threads: usize, rows: std::ops::Range<usize>| {
                    let kernels = kernels(isa, threads);
                    let packed = pack(&kernels, WeightRows::new(dtype, &bytes, weight_rows, cols).unwrap());
                    let x = &x[rows.start * cols..rows.end * cols];
                    product(&kernels, &quantized(&kernels, x, rows.len(), precision), &packed)
                };
                let whole = run(1, 0..60);
                let parts =
                    [(0, 1), (3, 5), (4, 7), (2, 6), (1, 8), (20, 28), (21, 30), (0, 30), (5, 55), (0, 60)];
                for ((start, end), threads) in pairs(&parts, &[1, 3]) {
                    let expected = &whole[start * weight_rows..end * weight_rows];
                    assert_eq!(run(threads, start..end), expected, "{dtype} {start}..{end} {}", isa.name());
                }
            }
        }
    }
}

#[test]
fn a_row_of_a_packed_product_does_not_depend_on_the_precision_of_others() {
    let mut random = Random(20);
    let weight_rows = 70;
    for isa in isas() {
        let kernels = kernels(isa, 2);
        for dtype in types() {
            let cols = 96_usize.next_multiple_of(dtype.block_len());
            let bytes = random.weights(dtype, weight_rows * cols);
            let packed = pack(&kernels, WeightRows::new(dtype, &bytes, weight_rows, cols).unwrap());
            // One panel, two panels, many, and enough for strips that are unpacked together.
            for counts in [[1, 2, 1], [2, 5, 3], [8, 24, 5], [32, 70, 16]] {
                let rows: usize = counts.iter().sum();
                let mut x = random.floats(rows * cols);
                x.iter_mut().step_by(7 * 32 + 1).for_each(|x| *x *= 100.0);
                let mut quantized = QuantizedRows::default();
                let precisions = PRECISIONS.iter().zip(counts).flat_map(|(p, count)| vec![*p; count]);
                let precisions: Vec<_> = precisions.collect();
                kernels.quantize(&x, &precisions, &mut quantized, &Cancel::never());
                let together = product(&kernels, &quantized, &packed);
                for (row, precision) in precisions.into_iter().enumerate() {
                    let x = &x[row * cols..][..cols];
                    kernels.quantize(x, &[precision], &mut quantized, &Cancel::never());
                    let alone = product(&kernels, &quantized, &packed);
                    let got = &together[row * weight_rows..][..weight_rows];
                    assert_eq!(got, alone, "{dtype} row {row} of {counts:?} {}", isa.name());
                }
            }
        }
    }
}

#[test]
fn residuals_keep_a_row_to_a_few_millionths() {
    let mut random = Random(17);
    let x = random.floats(5 * 576);
    for isa in isas() {
        let quantized = quantized(&kernels(isa, 2), &x, 5, Precision::Bits16);
        for (row, x) in x.chunks_exact(576).enumerate() {
            for (x, rounded) in x.iter().zip(rounded(&quantized, row)) {
                let error = (rounded - f64::from(*x)).abs();
                // Half a step of the residual, whose largest number is half a step of the row.
                assert!(error <= 0.51 * 0.51 / 127.0 / 127.0, "{error} {}", isa.name());
            }
        }
    }
}

#[test]
fn blocks_with_an_outlier_keep_their_residual() {
    let (rows, cols) = (9, 576);
    let mut x = Random(19).floats(rows * cols);
    // The mean magnitude of the others is 0.5.
    x[2 * cols + 40] = 100.0;
    x[3 * cols + 500] = 7.0;
    x[7 * cols] = -9.0;
    for isa in isas() {
        let quantized = quantized(&kernels(isa, 2), &x, rows, Precision::Mixed);
        let residuals = |row: usize| -> Vec<usize> {
            let blocks = blocks(&quantized, row);
            let seconds = blocks.windows(2).filter(|pair| pair[0].index == pair[1].index);
            seconds
                .map(|pair| &pair[1])
                .filter(|residual| residual.scale > 0.0)
                .map(|residual| residual.index)
                .collect()
        };
        let expected = (0..rows).map(|row| match row {
            2 => vec![1],
            7 => vec![0],
            _ => vec![],
        });
        assert!((0..rows).map(residuals).eq(expected), "{}", isa.name());
        for (x, rounded) in x[2 * cols + 32..][..32].iter().zip(&rounded(&quantized, 2)[32..]) {
            let error = (rounded - f64::from(*x)).abs();
            assert!(error <= 100.0 * 0.51 * 0.51 / 127.0 / 127.0, "{error} {}", isa.name());
        }
    }
}

/// Above 1e33 the offset would not be finite, in some ISAs and some products only.
#[test]
fn numbers_too_large_for_a_scale_count_as_infinite() {
    let bytes = Random(18).weights(WeightType::Q8_0, 16 * 32);
    let weight = WeightRows::new(WeightType::Q8_0, &bytes, 16, 32).unwrap();
    for isa in isas() {
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
