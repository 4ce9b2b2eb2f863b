//! ggml's searches for the scale, the minimum and the quants of a group of numbers.
//!
//! A search tries several scales and keeps the one with the smallest weighted error. Its sums are rounded
//! after each number, in the order of the group, so a group cannot be divided into lanes. Instead eight
//! groups are searched at once, one per lane; the compiler vectorises the loops over lanes.
//!
//! Source: ggml, `ggml-quants.c`, `make_qkx2_quants`, `make_qx_quants`, `make_q3_quants`.

use std::array::from_fn;

/// Groups that are searched at once.
pub(super) const LANES: usize = 8;
/// One number of each group.
pub(super) type Lanes = [f32; LANES];
/// The quants of eight groups, as bytes from 0.
pub(super) type Quants<const LEN: usize> = [[u8; LANES]; LEN];

/// Groups without a larger number than this count as zeros.
const SMALLEST: f32 = 1e-15;

/// The numbers of eight groups of `LEN`: the first of each group, then the second of each, and so on.
#[inline(always)]
pub(super) fn lanes<const LEN: usize>(x: &[f32]) -> [Lanes; LEN] {
    let (groups, _) = x.as_chunks::<LEN>();
    from_fn(|i| from_fn(|lane| groups[lane][i]))
}

/// The nearest integer to a number between -2^22 and 2^22, halves to even. All other numbers give the integer
/// that ggml gives, from the low bits of a sum. A search can meet them in groups of tiny or almost equal
/// numbers.
#[inline(always)]
pub(super) fn nearest(number: f32) -> i32 {
    const ONES: f32 = 1.5 * (1 << 23) as f32;
    ((number + ONES).to_bits() & 0x7F_FFFF) as i32 - (1 << 22)
}

/// Which scales to try for groups with a scale and a minimum.
pub(super) struct MinSearch {
    /// The largest quant.
    pub(super) top: i32,
    /// The first scale divides the range of the group by `top` plus this. Later ones add 0.1 each.
    pub(super) first: f32,
    /// The number of further scales.
    pub(super) steps: i32,
    /// Whether the error is the sum of magnitudes instead of squares.
    pub(super) by_magnitude: bool,
}

impl MinSearch {
    #[inline(always)]
    fn quant(&self, number: f32, min: f32, inverse: f32) -> i32 {
        nearest(inverse * (number - min)).clamp(0, self.top)
    }

    /// `weight` times the error of a number that `fitted` stands for.
    #[inline(always)]
    fn error(&self, fitted: f32, number: f32, weight: f32) -> f32 {
        let error = fitted - number;
        weight * if self.by_magnitude { error.abs() } else { error * error }
    }

    /// Finds a scale, a minimum (to be subtracted, so it is not negative) and quants for each group.
    #[inline(always)]
    pub(super) fn find<const LEN: usize>(
        &self,
        x: &[Lanes; LEN],
        weights: &[Lanes; LEN],
    ) -> (Lanes, Lanes, Quants<LEN>) {
        let (mut min, mut max) = (x[0], x[0]);
        let mut sum_w = weights[0];
        let mut sum_x: Lanes = from_fn(|lane| weights[0][lane] * x[0][lane]);
        for (x, weights) in x.iter().zip(weights).skip(1) {
            for lane in 0..LANES {
                min[lane] = if x[lane] < min[lane] { x[lane] } else { min[lane] };
                max[lane] = if x[lane] > max[lane] { x[lane] } else { max[lane] };
                sum_w[lane] += weights[lane];
                sum_x[lane] += weights[lane] * x[lane];
            }
        }
        min = min.map(|min| if min > 0.0 { 0.0 } else { min });

        let is_flat: [bool; LANES] = from_fn(|lane| max[lane] == min[lane]);
        let first_min = min;
        let mut inverse: Lanes = from_fn(|lane| self.top as f32 / (max[lane] - min[lane]));
        let mut scale = inverse.map(|inverse| 1.0 / inverse);
        let mut least_error = [0.0; LANES];
        for (x, weights) in x.iter().zip(weights) {
            for lane in 0..LANES {
                let quant = self.quant(x[lane], min[lane], inverse[lane]) as f32;
                least_error[lane] += self.error(scale[lane] * quant + min[lane], x[lane], weights[lane]);
            }
        }

        // The minimum and the inverse scale that the best quants were computed with.
        let mut best_from = (min, inverse);
        for step in 0..=self.steps {
            let divisor = self.first + 0.1 * step as f32 + self.top as f32;
            inverse = from_fn(|lane| divisor / (max[lane] - min[lane]));
            let (mut sum_l, mut sum_l2, mut sum_xl) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
            let mut quants = [[0.0; LANES]; LEN];
            for (quants, (x, weights)) in quants.iter_mut().zip(x.iter().zip(weights)) {
                for lane in 0..LANES {
                    let quant = self.quant(x[lane], min[lane], inverse[lane]) as f32;
                    quants[lane] = quant;
                    let product = weights[lane] * quant;
                    sum_l[lane] += product;
                    sum_l2[lane] += product * quant;
                    sum_xl[lane] += product * x[lane];
                }
            }
            // The scale and the minimum with the least squares for these quants.
            let (mut new_scale, mut new_min, mut determinant) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
            for lane in 0..LANES {
                let d = sum_w[lane] * sum_l2[lane] - sum_l[lane] * sum_l[lane];
                let scale = (sum_w[lane] * sum_xl[lane] - sum_x[lane] * sum_l[lane]) / d;
                let min = (sum_l2[lane] * sum_x[lane] - sum_l[lane] * sum_xl[lane]) / d;
                determinant[lane] = d;
                new_min[lane] = if min > 0.0 { 0.0 } else { min };
                new_scale[lane] = if min > 0.0 { sum_xl[lane] / sum_l2[lane] } else { scale };
            }
            let mut error = [0.0; LANES];
            for (quants, (x, weights)) in quants.iter().zip(x.iter().zip(weights)) {
                for lane in 0..LANES {
                    let fitted = new_scale[lane] * quants[lane] + new_min[lane];
                    error[lane] += self.error(fitted, x[lane], weights[lane]);
                }
            }
            for lane in 0..LANES {
                if determinant[lane] > 0.0 && error[lane] < least_error[lane] {
                    best_from.0[lane] = min[lane];
                    best_from.1[lane] = inverse[lane];
                    least_error[lane] = error[lane];
                    scale[lane] = new_scale[lane];
                    min[lane] = new_min[lane];
                }
            }
        }

        let quants = from_fn(|i| {
            from_fn(|lane| {
                let quant = self.quant(x[i][lane], best_from.0[lane], best_from.1[lane]);
                if is_flat[lane] { 0 } else { quant as u8 }
            })
        });
        let scales = from_fn(|lane| if is_flat[lane] { 0.0 } else { scale[lane] });
        let mins = from_fn(|lane| if is_flat[lane] { -first_min[lane] } else { -min[lane] });
        (scales, mins, quants)
    }
}

/// The number with the largest magnitude of each group, with its sign, and its magnitude. It is the first of
/// several.
#[inline(always)]
fn signed_max<const LEN: usize>(x: &[Lanes; LEN]) -> (Lanes, Lanes) {
    let (mut max, mut magnitude) = ([0.0; LANES], [0.0; LANES]);
    for x in x {
        for lane in 0..LANES {
            let is_larger = x[lane].abs() > magnitude[lane];
            max[lane] = if is_larger { x[lane] } else { max[lane] };
            magnitude[lane] = if is_larger { x[lane].abs() } else { magnitude[lane] };
        }
    }
    (max, magnitude)
}

/// A quant from `-half` to `half - 1`.
#[inline(always)]
fn signed_quant(scaled: f32, half: i32) -> i32 {
    nearest(scaled).clamp(-half, half - 1)
}

/// Finds a scale and quants without a minimum: tries scales around the one that makes the largest number the
/// lowest quant. A quant is stored plus `half`. Squares of the numbers are the weights.
#[inline(always)]
pub(super) fn find_scale<const LEN: usize>(x: &[Lanes; LEN], half: i32) -> (Lanes, Quants<LEN>) {
    let (max, magnitude) = signed_max(x);
    let sums = |inverse: &Lanes| {
        let (mut sum_xl, mut sum_l2) = ([0.0; LANES], [0.0; LANES]);
        for x in x {
            for lane in 0..LANES {
                let quant = signed_quant(inverse[lane] * x[lane], half) as f32;
                let weight = x[lane] * x[lane];
                sum_xl[lane] += weight * x[lane] * quant;
                sum_l2[lane] += weight * quant * quant;
            }
        }
        (sum_xl, sum_l2)
    };
    let mut best_inverse = max.map(|max| -half as f32 / max);
    let (sum_xl, sum_l2) = sums(&best_inverse);
    let mut scale: Lanes =
        from_fn(|lane| if sum_l2[lane] == 0.0 { 0.0 } else { sum_xl[lane] / sum_l2[lane] });
    let mut best: Lanes = from_fn(|lane| scale[lane] * sum_xl[lane]);
    for step in (-9..=9).filter(|&step| step != 0) {
        let inverse = max.map(|max| -(half as f32 + 0.1 * step as f32) / max);
        let (sum_xl, sum_l2) = sums(&inverse);
        for lane in 0..LANES {
            if sum_l2[lane] > 0.0 && sum_xl[lane] * sum_xl[lane] > best[lane] * sum_l2[lane] {
                best_inverse[lane] = inverse[lane];
                scale[lane] = sum_xl[lane] / sum_l2[lane];
                best[lane] = scale[lane] * sum_xl[lane];
            }
        }
    }
    let is_zero = magnitude.map(|magnitude| magnitude < SMALLEST);
    let quants = from_fn(|i| {
        from_fn(|lane| {
            let quant = signed_quant(best_inverse[lane] * x[i][lane], half) + half;
            if is_zero[lane] { 0 } else { quant as u8 }
        })
    });
    (from_fn(|lane| if is_zero[lane] { 0.0 } else { scale[lane] }), quants)
}

/// The most passes of [`refine_scale`].
const PASSES: usize = 5;

/// Finds a scale and quants without a minimum: starts as [`find_scale`], then changes single quants for as
/// long as that lowers the error.
#[inline(always)]
pub(super) fn refine_scale<const LEN: usize>(x: &[Lanes; LEN], half: i32) -> (Lanes, Quants<LEN>) {
    let (max, magnitude) = signed_max(x);
    let inverse = max.map(|max| -half as f32 / max);
    let (mut sum_xl, mut sum_l2) = ([0.0; LANES], [0.0; LANES]);
    let mut quants = [[0; LANES]; LEN];
    for (quants, x) in quants.iter_mut().zip(x) {
        for lane in 0..LANES {
            quants[lane] = signed_quant(inverse[lane] * x[lane], half);
            let (quant, weight) = (quants[lane] as f32, x[lane] * x[lane]);
            sum_xl[lane] += weight * x[lane] * quant;
            sum_l2[lane] += weight * quant * quant;
        }
    }
    for _ in 0..PASSES {
        let mut changed = false;
        for (quants, x) in quants.iter_mut().zip(x) {
            for lane in 0..LANES {
                let (quant, weight) = (quants[lane] as f32, x[lane] * x[lane]);
                // The sums without this number, then with another quant for it.
                let mut new_xl = sum_xl[lane] - weight * x[lane] * quant;
                let mut new_l2 = sum_l2[lane] - weight * quant * quant;
                let new_quant = signed_quant(x[lane] * new_l2 / new_xl, half);
                let is_tried = new_xl > 0.0 && new_quant != quants[lane];
                new_xl += weight * x[lane] * new_quant as f32;
                new_l2 += weight * new_quant as f32 * new_quant as f32;
                let is_better =
                    new_l2 > 0.0 && new_xl * new_xl * sum_l2[lane] > sum_xl[lane] * sum_xl[lane] * new_l2;
                if is_tried && is_better {
                    quants[lane] = new_quant;
                    sum_xl[lane] = new_xl;
                    sum_l2[lane] = new_l2;
                    changed = true;
                }
            }
        }
        if !changed {
            break;
        }
    }
    let is_zero = magnitude.map(|magnitude| magnitude < SMALLEST);
    let scales = from_fn(|lane| match sum_l2[lane] > 0.0 && !is_zero[lane] {
        true => sum_xl[lane] / sum_l2[lane],
        false => 0.0,
    });
    let stored = |quant: i32, is_zero: bool| if is_zero { 0 } else { (quant + half) as u8 };
    (scales, from_fn(|i| from_fn(|lane| stored(quants[i][lane], is_zero[lane]))))
}
