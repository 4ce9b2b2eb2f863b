//! Elementwise operations on a row of activations, between the products.

use crate::lanes::{LANES, Lanes, load_partial};
use crate::mlp::Activation;

/// `out = x / sqrt(mean(x²) + epsilon) * weight`; all have the same length.
///
/// Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
#[inline(always)]
pub(crate) fn rms_norm<L: Lanes>(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let mut squares = L::splat(0.0);
    let chunks = x.chunks_exact(LANES);
    let tail = load_partial::<L>(chunks.remainder());
    for chunk in chunks {
        let values = L::load(chunk.try_into().expect("chunks of LANES"));
        squares = values.mul_add(values, squares);
    }
    squares = tail.mul_add(tail, squares);
    let scale = 1.0 / (squares.sum() / x.len() as f32 + epsilon).sqrt();
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// `gate = activation(gate) * up`, elementwise.
///
/// GELU's tanh is computed with exp: `x (1 + tanh(u)) / 2` equals `x / (1 + e^-2u)`.
///
/// Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415, for GELU and its two
/// approximations.
#[inline(always)]
pub(crate) fn gate_mul(activation: Activation, gate: &mut [f32], up: &[f32]) {
    /// sqrt(2 / pi)
    const SCALE: f32 = 0.797_884_6;
    match activation {
        Activation::Silu => {
            for (gate, &up) in gate.iter_mut().zip(up) {
                *gate = *gate / (1.0 + exp(-*gate)) * up;
            }
        }
        Activation::Gelu => {
            for (gate, &up) in gate.iter_mut().zip(up) {
                let x = *gate;
                *gate = 0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2)) * up;
            }
        }
        Activation::GeluTanh => {
            for (gate, &up) in gate.iter_mut().zip(up) {
                let x = *gate;
                *gate = x / (1.0 + exp(-2.0 * SCALE * (x + 0.044_715 * x * x * x))) * up;
            }
        }
        Activation::QuickGelu => {
            for (gate, &up) in gate.iter_mut().zip(up) {
                *gate = *gate / (1.0 + exp(-1.702 * *gate)) * up;
            }
        }
    }
}

/// e^x within 2 units in the last place. It has no branches, so loops over it are vectorised.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2. e^r is its Taylor polynomial of degree 7 (truncation error below
/// 2^-26), and n goes into the exponent. Beyond the range of f32 the result is 0 or infinity.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Limited to [-150 ln 2, 129 ln 2], where the two factors below are normal numbers.
    let clamped = x.clamp(-104.0, 89.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut power = COEFFICIENTS[0];
    for &coefficient in &COEFFICIENTS[1..] {
        power = power * r + coefficient;
    }
    // 2^n is a product of two factors, because n can be below the smallest normal exponent. n is in the low
    // bits of `shifted`; a conversion would cost more, as it handles numbers beyond i32. Nothing overflows
    // here: wrapping operations are used because a check would prevent vectorisation.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let two_to = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let result = power * two_to(half) * two_to(n.wrapping_sub(half));
    if x.is_nan() { x } else { result }
}

/// e^x for x <= 0, like [`exp`]. Below the smallest normal number the result is 0.
#[inline(always)]
pub(crate) fn exp_of_negative<L: Lanes>(x: L) -> L {
    // At this limit n is -127, and `two_to` returns 0. NaN stays NaN.
    let clamped = x.max(L::splat(-88.0));
    let shifted = clamped.mul_add(L::splat(std::f32::consts::LOG2_E), L::splat(ROUND));
    let n = shifted.add(L::splat(-ROUND));
    let r = n.mul_add(L::splat(-LN2_LOW), n.mul_add(L::splat(-LN2_HIGH), clamped));
    let mut power = L::splat(COEFFICIENTS[0]);
    for &coefficient in &COEFFICIENTS[1..] {
        power = power.mul_add(r, L::splat(coefficient));
    }
    power.mul(shifted.two_to())
}

// Adding 1.5 * 2^23 rounds to the nearest integer, which is then in the low bits.
const ROUND: f32 = 12_582_912.0;
// ln 2 as a sum of two numbers. The first ends in zero bits, so that n * LN2_HIGH is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// The coefficients of e^r, from the highest power to the lowest.
const COEFFICIENTS: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scalar::ScalarLanes;

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
            check::<ScalarLanes>(step as f32 * -0.032);
        }
        let special = [0.0, -0.0, -87.9, f32::NEG_INFINITY, f32::NAN];
        let mut out = [0.0; LANES];
        exp_of_negative(load_partial::<ScalarLanes>(&special)).store(&mut out);
        assert_eq!(out[..4], [1.0, 1.0, 0.0, 0.0]);
        assert!(out[4].is_nan());
    }
}
