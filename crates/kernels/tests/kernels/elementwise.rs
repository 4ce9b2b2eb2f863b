//! Tests of exp, activation functions, RMSNorm and RoPE against their formulas.

use crate::support::{Random, isas, kernels};
use candle_llama_kernels::{Activation, Cancel, exp};

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
