//! Tests of products with many rows on every ISA of this CPU, against plain arithmetic.

use crate::packed::types as packable_types;
use crate::support::{Random, dot_bound, element, isas, kernels, pairs, widths};
use candle_llama_kernels::internals::bf16_dot_is_fast;
use candle_llama_kernels::*;
use half::bf16;

fn gemm(kernels: &Kernels, x: &[f32], rows: usize, input: GemmInput, product: Product) {
    kernels.gemm(x, rows, input, &mut [product], &mut GemmScratch::default(), &Cancel::never());
}

/// Whether an ISA rounds such weights and their activations to bf16, if it may.
fn rounds(isa: Isa, dtype: WeightType) -> bool {
    match isa {
        Isa::Amx => dtype == WeightType::BF16 || dtype.block_len() > 1,
        Isa::Avx512 => matches!(dtype, WeightType::BF16 | WeightType::F16) && bf16_dot_is_fast(),
        Isa::I8mm => dtype == WeightType::BF16,
        _ => false,
    }
}

/// The sum of two bf16, as AMX tiles take activations that keep about 16 bits.
fn bf16_pair(x: f32) -> f32 {
    let high = bf16::from_f32(x).to_f32();
    high + bf16::from_f32(x - high).to_f32()
}

#[test]
fn gemm_is_the_sum_of_products_on_every_isa() {
    let mut random = Random(21);
    for isa in isas() {
        let kernels = kernels(isa, 2);
        for dtype in WeightType::ALL {
            let widths = [widths(dtype), vec![256 * 3]].concat();
            let shapes = [(1, 1), (2, 17), (5, 33), (6, 16), (12, 32), (13, 40), (33, 31), (64, 64)];
            for (cols, (rows, weight_rows)) in pairs(&widths, &shapes) {
                let bytes = random.weights(dtype, weight_rows * cols);
                let weight = WeightRows::new(dtype, &bytes, weight_rows, cols).unwrap();
                let w: Vec<f32> = (0..weight_rows)
                    .flat_map(|row| (0..cols).map(move |i| element(dtype, weight.row(row), i)))
                    .collect();
                // ISAs without the instruction ignore the input's rounding.
                for input in [GemmInput::Bf16Pairs, GemmInput::Bf16] {
                    let x = random.floats(rows * cols);
                    let mut out = random.floats(rows * weight_rows);
                    let before = out.clone();
                    let output = if rows % 2 == 0 { Output::Set } else { Output::Add };
                    gemm(&kernels, &x, rows, input, Product { weight, out: &mut out, output });
                    let rounds = input == GemmInput::Bf16 && rounds(isa, dtype);
                    let round = |x: f32| if rounds { bf16::from_f32(x).to_f32() } else { x };
                    let uses_pairs =
                        isa == Isa::Amx && dtype == WeightType::BF16 && input == GemmInput::Bf16Pairs;
                    let x = x.into_iter().map(|x| if uses_pairs { bf16_pair(x) } else { round(x) });
                    let x: Vec<f32> = x.collect();
                    let w: Vec<f32> = w.iter().map(|&w| round(w)).collect();
                    for (at, got) in out.into_iter().enumerate() {
                        let x = &x[at / weight_rows * cols..][..cols];
                        let w = &w[at % weight_rows * cols..][..cols];
                        let dot: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                        let start = if output == Output::Add { f64::from(before[at]) } else { 0.0 };
                        let error = (f64::from(got) - start - dot).abs();
                        // Every addition of the chain may be off by half a unit in the last place of the
                        // sum so far.
                        let bound =
                            dot_bound(x, w) + f64::from(f32::EPSILON) * 8.0 * (start.abs() + dot.abs());
                        assert!(
                            error <= bound,
                            "{dtype} {rows}x{weight_rows}x{cols} {}: {error} > {bound}",
                            isa.name()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_of_gemm_depends_on_nothing_but_the_row() {
    let mut random = Random(22);
    for isa in isas() {
        for dtype in [WeightType::F32, WeightType::F16, WeightType::BF16, WeightType::Q4_0, WeightType::Q4_K]
        {
            let (weight_rows, cols) = (70, if dtype.block_len() == 1 { 900 } else { 1280 });
            let bytes = random.weights(dtype, weight_rows * cols);
            let weight = WeightRows::new(dtype, &bytes, weight_rows, cols).unwrap();
            let x = random.floats(40 * cols);
            let run = |input: GemmInput, threads: usize, rows: std::ops::Range<usize>| {
                let mut out = vec![0.0; rows.len() * weight_rows];
                let x = &x[rows.start * cols..rows.end * cols];
                let product = Product { weight, out: &mut out, output: Output::Set };
                gemm(&kernels(isa, threads), x, rows.len(), input, product);
                out
            };
            let inputs = [GemmInput::Bf16Pairs, GemmInput::Bf16];
            let whole = inputs.map(|input| run(input, 1, 0..40));
            let parts = [(0, 1), (3, 5), (4, 9), (2, 8), (1, 13), (20, 38), (0, 40)];
            for ((start, end), (index, threads)) in pairs(&parts, &[(0, 1), (0, 3), (1, 1), (1, 3)]) {
                let expected = &whole[index][start * weight_rows..end * weight_rows];
                let got = run(inputs[index], threads, start..end);
                assert_eq!(got, expected, "{dtype} {start}..{end} {}", isa.name());
            }
        }
    }
}

#[test]
fn gemm_packed_is_gemm_bit_for_bit() {
    let mut random = Random(23);
    for isa in isas() {
        let kernels = kernels(isa, 2);
        if !kernels.has_gemm_packed() {
            assert_ne!(isa, Isa::Amx);
            continue;
        }
        for dtype in packable_types() {
            for (rows, weight_rows, cols) in [(1, 1, 32), (33, 50, 576), (64, 64, 1024), (40, 130, 1056)] {
                let cols = usize::next_multiple_of(cols, dtype.block_len());
                let bytes = random.weights(dtype, weight_rows * cols);
                let weight = WeightRows::new(dtype, &bytes, weight_rows, cols).unwrap();
                let fill = |row: usize, out: &mut [u8]| out.copy_from_slice(weight.row(row));
                let packed =
                    kernels.pack(dtype, weight_rows, cols, &Cancel::never(), &fill).unwrap().unwrap();
                let x = random.floats(rows * cols);
                let before = random.floats(rows * weight_rows);
                for output in [Output::Set, Output::Add] {
                    let (mut expected, mut got) = (before.clone(), before.clone());
                    gemm(&kernels, &x, rows, GemmInput::Bf16, Product { weight, out: &mut expected, output });
                    let product = PackedProduct { weight: &packed, out: &mut got, output };
                    let mut scratch = GemmScratch::default();
                    kernels.gemm_packed(&x, rows, &mut [product], &mut scratch, &Cancel::never());
                    assert_eq!(got, expected, "{dtype} {rows}x{weight_rows}x{cols} {output:?}");
                }
            }
        }
    }
}

/// A weight, `(rows, cols)`; packed if it can be.
struct Matrix {
    dtype: WeightType,
    bytes: Vec<u8>,
    rows: usize,
    cols: usize,
    packed: Option<PackedRows>,
}

impl Matrix {
    fn random(kernels: &Kernels, random: &mut Random, dtype: WeightType, rows: usize, cols: usize) -> Self {
        let bytes = random.weights(dtype, rows * cols);
        let fill = |row: usize, out: &mut [u8]| out.copy_from_slice(&bytes[row * out.len()..][..out.len()]);
        let packed = kernels.pack(dtype, rows, cols, &Cancel::never(), &fill).unwrap();
        Matrix { dtype, bytes, rows, cols, packed }
    }

    fn weight(&self) -> Weight<'_> {
        match &self.packed {
            Some(packed) => Weight::Packed(packed),
            None => Weight::Rows(WeightRows::new(self.dtype, &self.bytes, self.rows, self.cols).unwrap()),
        }
    }

    fn multiply(&self, kernels: &Kernels, x: &[f32], input: GemmInput, out: &mut [f32], output: Output) {
        let (rows, mut scratch, never) = (x.len() / self.cols, GemmScratch::default(), Cancel::never());
        match self.weight() {
            Weight::Packed(weight) => {
                let product = PackedProduct { weight, out, output };
                kernels.gemm_packed(x, rows, &mut [product], &mut scratch, &never);
            }
            Weight::Rows(weight) => gemm(kernels, x, rows, input, Product { weight, out, output }),
        }
    }
}

#[test]
fn gemm_mlp_is_its_three_products_bit_for_bit() {
    use Activation::*;
    use GemmInput::*;
    use WeightType::*;
    let mut random = Random(24);
    for isa in isas() {
        let kernels = kernels(isa, 2);
        let mut was_tested = false;
        for (gate, up, down) in [
            (BF16, BF16, BF16),
            (Q4_0, Q4_0, Q4_0),
            (Q8_0, Q5_1, Q4_1),
            (Q4_0, BF16, Q8_0),
            (F32, F32, F32),
            (F16, BF16, F16),
        ] {
            let shapes = [(1, 32, 32), (33, 64, 96), (40, 320, 544), (64, 96, 1120)];
            let odd = [(5, 7, 1), (34, 50, 45)].into_iter().filter(|_| (gate, down) == (BF16, BF16));
            for (rows, features, inner) in shapes.into_iter().chain(odd) {
                let mut matrix = |dtype, rows, cols| Matrix::random(&kernels, &mut random, dtype, rows, cols);
                let gate = matrix(gate, inner, features);
                let up = matrix(up, inner, features);
                let down = matrix(down, features, inner);
                let x = random.floats(rows * features);
                let before = random.floats(rows * features);
                for (activation, input) in
                    [(Silu, Bf16), (Gelu, Bf16), (Silu, Bf16Pairs), (QuickGelu, Bf16Pairs)]
                {
                    let mlp = Mlp { activation, gate: gate.weight(), up: up.weight(), down: down.weight() };
                    if !kernels.has_gemm_mlp(input, &mlp) {
                        continue;
                    }
                    was_tested = true;
                    let (mut gated, mut raised) = (vec![0.0; rows * inner], vec![0.0; rows * inner]);
                    gate.multiply(&kernels, &x, input, &mut gated, Output::Set);
                    up.multiply(&kernels, &x, input, &mut raised, Output::Set);
                    kernels.gate_mul(activation, &mut gated, &raised, &Cancel::never());
                    let (mut expected, mut got) = (before.clone(), before.clone());
                    down.multiply(&kernels, &gated, input, &mut expected, Output::Add);
                    let mut scratch = GemmScratch::default();
                    kernels.gemm_mlp(&x, rows, input, &mlp, &mut got, &mut scratch, &Cancel::never());
                    assert_eq!(got, expected, "{rows}x{features}x{inner} {activation:?} {input:?}");
                }
            }
        }
        let expected = match isa {
            Isa::Amx | Isa::I8mm => true,
            Isa::Avx512 => bf16_dot_is_fast(),
            _ => false,
        };
        assert_eq!(was_tested, expected, "{}", isa.name());
    }
}
