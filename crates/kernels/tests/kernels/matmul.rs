//! Tests of products with few rows and weights as they are stored, against plain f64 arithmetic.

use crate::support::{Random, dot_bound, element, isas, kernels, pairs, widths};
use candle_llama_kernels::{Cancel, Output, Product, WeightRows, WeightType};

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
