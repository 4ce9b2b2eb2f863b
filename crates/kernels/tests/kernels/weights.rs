//! Tests of weights as they are stored: their shapes, and dequantising them.

use crate::support::{Random, element, isas, kernels, widths};
use candle_llama_kernels::{WeightRows, WeightType};
use half::f16;

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
const GOLDEN_BLOCKS: &str = include_str!("../golden/blocks.txt");

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

#[test]
fn a_view_has_exactly_its_bytes() {
    let bytes = [0; 36];
    assert!(WeightRows::new(WeightType::Q4_0, &bytes, 2, 32).is_some());
    assert!(WeightRows::new(WeightType::Q4_0, &bytes, 1, 32).is_none());
    assert!(WeightRows::new(WeightType::Q4_0, &bytes, 2, 31).is_none());
    assert!(WeightRows::new(WeightType::F32, &bytes, 0, 0).is_none());
    assert!(WeightRows::new(WeightType::F32, &[], usize::MAX, 4).is_none());
}
