//! The arithmetic of each sampling parameter, over one row of logits. `logits[id]` is the logit of token
//! `id`. The logit of a masked token, which cannot be drawn, is negative infinity.
//!
//! [`super::Sampler`] has checked that no logit is NaN or positive infinity. This stays true: penalties and
//! biases keep finite logits finite, however extreme they are. Nothing sorts the whole vocabulary: filters
//! find a threshold by partial selection and then mask in one pass.

use std::cmp::Ordering;
use std::collections::HashMap;

use crate::kernels::exp;

/// Logits that loops process together, for vectorisation.
const LANES: usize = 32;
/// The nucleus is nearly always smaller than this, so one selection finds it.
const FIRST_NUCLEUS: usize = 256;
const NUCLEUS_GROWTH: usize = 8;

/// Divides positive logits and multiplies negative ones by `penalty`, once for each token id that occurs
/// in any of `sequences`, however often. Ids beyond the vocabulary are ignored.
///
/// Source: CTRL (Keskar et al. 2019), as in Hugging Face's `RepetitionPenaltyLogitsProcessor`.
pub fn repetition_penalty(logits: &mut [f32], sequences: &[&[u32]], penalty: f32) {
    let mut seen = vec![false; logits.len()];
    for &id in sequences.iter().copied().flatten() {
        let index = id as usize;
        if let (Some(logit), Some(seen)) = (logits.get_mut(index), seen.get_mut(index))
            && !std::mem::replace(seen, true)
        {
            change(logit, |logit| if logit < 0.0 { logit * penalty } else { logit / penalty });
        }
    }
}

/// Subtracts `presence` from the logit of every token in `output`, and `frequency` once per occurrence.
///
/// Source: OpenAI's API reference, "frequency and presence penalties".
pub fn presence_frequency_penalty(logits: &mut [f32], output: &[u32], presence: f32, frequency: f32) {
    let mut counts: HashMap<u32, u32> = HashMap::new();
    for &id in output {
        *counts.entry(id).or_insert(0) += 1;
    }
    for (id, count) in counts {
        if let Some(logit) = logits.get_mut(id as usize) {
            change(logit, |logit| logit - (presence + count as f32 * frequency));
        }
    }
}

/// Adds each bias to its token's logit.
pub fn logit_bias(logits: &mut [f32], bias: &[(u32, f32)]) {
    for &(id, bias) in bias {
        if let Some(logit) = logits.get_mut(id as usize) {
            change(logit, |logit| logit + bias);
        }
    }
}

/// Applies `to` to a logit that is not masked, and clamps the result to finite float32 values.
fn change(logit: &mut f32, to: impl Fn(f32) -> f32) {
    if *logit > f32::NEG_INFINITY {
        *logit = to(*logit).clamp(f32::MIN, f32::MAX);
    }
}

/// Masks `ids`.
pub fn mask(logits: &mut [f32], ids: &[u32]) {
    for &id in ids {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Divides the logits by `temperature` (above 0), after shifting their maximum to 0. The shift changes no
/// probability. It prevents an overflow to positive infinity, however small the temperature.
pub fn temperature(logits: &mut [f32], temperature: f32) {
    let max = max(logits);
    if max == f32::NEG_INFINITY {
        return;
    }
    for logit in logits {
        *logit = (*logit - max) / temperature;
    }
}

/// Keeps the `k` largest logits (k >= 1) and all logits equal to the smallest of these, as Hugging Face
/// does.
pub fn top_k(logits: &mut [f32], k: usize) {
    if k == 0 || k >= logits.len() {
        return;
    }
    let mut values = logits.to_vec();
    let (_, threshold, _) = values.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let threshold = *threshold;
    for logit in logits {
        if *logit < threshold {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Keeps the fewest most likely tokens whose probabilities sum to at least `p`, in (0, 1]; at least one
/// token.
/// Of equally likely tokens, lower ids are kept first.
///
/// Source: Holtzman et al. 2019 (nucleus sampling), as in Hugging Face's `TopPLogitsWarper`.
pub fn top_p(logits: &mut [f32], p: f32) {
    if p >= 1.0 {
        return;
    }
    let max = max(logits);
    let mut candidates: Vec<(f32, u32)> = (0..)
        .zip(logits.iter())
        .filter(|&(_, &logit)| logit > f32::NEG_INFINITY)
        .map(|(id, &logit)| (logit, id))
        .collect();
    let wanted = f64::from(p) * mass(logits, max);

    let mut reached = 0.0;
    let mut sorted = 0;
    let mut size = FIRST_NUCLEUS;
    while sorted < candidates.len() {
        // Each round moves the next `size` most likely candidates to the front and sorts those alone.
        let Some(rest) = candidates.get_mut(sorted..) else { return };
        let round = size.min(rest.len());
        if round < rest.len() {
            rest.select_nth_unstable_by(round - 1, more_likely_first);
        }
        let Some(rest) = rest.get_mut(..round) else { return };
        rest.sort_unstable_by(more_likely_first);
        for last in rest.iter() {
            reached += f64::from(weight(last.0, max));
            if reached >= wanted {
                return keep_up_to(logits, *last);
            }
        }
        sorted += round;
        size *= NUCLEUS_GROWTH;
    }
    // By rounding, the sum of all candidates is just below `wanted`: every token stays.
}

/// Masks every token that comes after `last` in the order of [`more_likely_first`].
fn keep_up_to(logits: &mut [f32], last: (f32, u32)) {
    for (id, logit) in (0..).zip(logits.iter_mut()) {
        if more_likely_first(&(*logit, id), &last) == Ordering::Greater {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Keeps tokens at least `min_p` times as likely as the most likely one; `min_p` in (0, 1].
///
/// Source: Nguyen et al. 2024 (min-p), as in Hugging Face's `MinPLogitsWarper`.
pub fn min_p(logits: &mut [f32], min_p: f32) {
    // A token is masked if p < min_p * p_max. The softmax's denominator cancels; this is the logarithm.
    let threshold = f64::from(max(logits)) + f64::from(min_p).ln();
    for logit in logits {
        if f64::from(*logit) < threshold {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// The id of the largest logit, the lowest such id if several are equal; `None` if every token is masked.
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let best = max(logits);
    if best == f32::NEG_INFINITY {
        return None;
    }
    // No early exit within a part, so that the compiler vectorises the comparisons.
    let is_in = |part: &[f32]| part.iter().fold(false, |found, &logit| found | (logit == best));
    let start = logits.chunks(LANES).position(is_in)? * LANES;
    let id = logits.iter().skip(start).position(|&logit| logit == best)?;
    u32::try_from(start + id).ok()
}

/// Descending by logit, then ascending by id: a total order, so that partial selection has one answer.
pub(crate) fn more_likely_first(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The largest logit; negative infinity if there is none.
pub(crate) fn max(logits: &[f32]) -> f32 {
    // One running maximum per lane, so that comparisons do not wait for each other.
    let (parts, rest) = logits.as_chunks::<LANES>();
    let mut largest = [f32::NEG_INFINITY; LANES];
    for part in parts {
        for (largest, &logit) in largest.iter_mut().zip(part) {
            *largest = if logit > *largest { logit } else { *largest };
        }
    }
    largest.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The softmax's numerator, `exp(logit - max)`, where `max` is the largest logit. It is 0 for a masked logit
/// and for one that is more than 87 below `max`.
#[inline(always)]
pub(crate) fn weight(logit: f32, max: f32) -> f32 {
    // The exponential of less than -87 is a subnormal number, for which processors take a hundred cycles.
    // The exponential is outside any branch, so that the compiler vectorises it.
    let weight = exp((logit - max).max(-87.0));
    let is_normal = u8::from(logit - max >= -87.0);
    weight * f32::from(is_normal)
}

/// The sum of all [`weight`]s.
pub(crate) fn mass(logits: &[f32], max: f32) -> f64 {
    let (parts, rest) = logits.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    // After a filter such as top_k, all tokens of most parts are masked; skip those parts.
    let has_weights = |part: &[f32]| part.iter().fold(false, |any, &logit| any | (logit > f32::NEG_INFINITY));
    for part in parts.iter().filter(|part| has_weights(&part[..])) {
        let mut weights = [0.0; LANES];
        for (out, &logit) in weights.iter_mut().zip(part) {
            *out = weight(logit, max);
        }
        sums.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += f64::from(weight));
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&logit| f64::from(weight(logit, max))).sum::<f64>()
}

/// Whether no logit is NaN or positive infinity.
pub(crate) fn are_below_infinity(logits: &[f32]) -> bool {
    logits.iter().fold(true, |all, &logit| all & (logit < f32::INFINITY))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MASKED: f32 = f32::NEG_INFINITY;

    fn kept(logits: &[f32]) -> Vec<usize> {
        (0..logits.len()).filter(|&i| logits[i] > MASKED).collect()
    }

    #[test]
    fn repetition_penalty_counts_each_id_once() {
        let mut logits = [2.0, -2.0, 3.0, 0.0];
        repetition_penalty(&mut logits, &[&[0, 0, 1], &[0, 3, 99]], 2.0);
        assert_eq!(logits, [1.0, -4.0, 3.0, 0.0]);
    }

    #[test]
    fn presence_counts_once_and_frequency_each_time() {
        let mut logits = [1.0, 1.0, 1.0];
        presence_frequency_penalty(&mut logits, &[0, 0, 0, 2], 0.5, 0.25);
        assert_eq!(logits, [1.0 - 0.5 - 0.75, 1.0, 1.0 - 0.5 - 0.25]);
    }

    #[test]
    fn bias_adds_and_mask_forbids() {
        let mut logits = [1.0, 2.0, 3.0];
        logit_bias(&mut logits, &[(1, 5.0), (7, 1.0)]);
        mask(&mut logits, &[2, 9]);
        assert_eq!(logits, [1.0, 7.0, MASKED]);
    }

    #[test]
    fn mass_is_the_denominator_of_the_softmax() {
        for count in [1, 31, 32, 33, 1000] {
            let mut logits: Vec<f32> = (0..count).map(|i| (i * 37 % 91) as f32 * -1.3 + 5.0).collect();
            logits.iter_mut().skip(1).step_by(3).for_each(|logit| *logit = MASKED);
            let expected: f64 = logits.iter().map(|&logit| f64::from(logit - 5.0).exp()).sum();
            let error = (mass(&logits, 5.0) - expected).abs() / expected;
            assert!(error < 3e-7, "{count}: {error}");
        }
        assert_eq!(mass(&[MASKED; 50], 0.0), 0.0);
        for (logit, max, expected) in
            [(MASKED, 3.0, 0.0), (-85.0, 3.0, 0.0), (-f32::MAX, f32::MAX, 0.0), (3.0, 3.0, 1.0)]
        {
            assert_eq!(weight(logit, max), expected, "{logit} below {max}");
        }
    }

    #[test]
    fn temperature_scales_differences_and_never_overflows() {
        let mut logits = [1.0, 3.0, MASKED];
        temperature(&mut logits, 0.5);
        assert_eq!(logits, [-4.0, 0.0, MASKED]);
        let mut logits = [1000.0, 1000.0, 0.0];
        temperature(&mut logits, f32::MIN_POSITIVE);
        assert_eq!(logits, [0.0, 0.0, MASKED]);
    }

    #[test]
    fn top_k_keeps_the_largest_and_ties() {
        let mut logits = [1.0, 4.0, 3.0, 3.0, 0.0];
        top_k(&mut logits, 2);
        assert_eq!(kept(&logits), [1, 2, 3]);
        let mut logits = [1.0, 4.0, 3.0];
        top_k(&mut logits, 1);
        assert_eq!(kept(&logits), [1]);
        let mut logits = [1.0, 4.0, 3.0];
        top_k(&mut logits, 50);
        assert_eq!(kept(&logits), [0, 1, 2]);
    }

    #[test]
    fn top_p_keeps_the_smallest_nucleus() {
        let probabilities = [0.1f32, 0.5, 0.25, 0.15];
        let logits = probabilities.map(f32::ln);
        let nucleus = |p: f32| {
            let mut logits = logits;
            top_p(&mut logits, p);
            kept(&logits)
        };
        assert_eq!(nucleus(1e-6), [1], "at least one token stays");
        assert_eq!(nucleus(0.49), [1]);
        assert_eq!(nucleus(0.51), [1, 2]);
        assert_eq!(nucleus(0.8), [1, 2, 3]);
        assert_eq!(nucleus(0.95), [0, 1, 2, 3]);
        assert_eq!(nucleus(1.0), [0, 1, 2, 3]);
    }

    #[test]
    fn top_p_breaks_ties_by_id() {
        let mut logits = [0.0f32; 4];
        top_p(&mut logits, 0.5);
        assert_eq!(kept(&logits), [0, 1]);
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely() {
        let mut logits = [0.5f32, 0.26, 0.24].map(f32::ln);
        min_p(&mut logits, 0.5);
        assert_eq!(kept(&logits), [0, 1]);
        let mut logits = [1.0, 1.0, 0.5];
        min_p(&mut logits, 1.0);
        assert_eq!(kept(&logits), [0, 1]);
    }

    #[test]
    fn argmax_takes_the_lowest_id_of_equals() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), Some(1));
        assert_eq!(argmax(&[MASKED, MASKED]), None);
        assert_eq!(argmax(&[]), None);
    }

    proptest! {
        /// `max`, `argmax` and `are_below_infinity`, which work in parts, against their definitions.
        #[test]
        fn functions_in_parts_equal_their_definitions(
            mut logits in prop::collection::vec((-5i32..5).prop_map(|x| x as f32), 0..200),
            masked in 0usize..200,
        ) {
            logits.iter_mut().take(masked).for_each(|logit| *logit = MASKED);
            let best = logits.iter().copied().fold(MASKED, f32::max);
            prop_assert_eq!(max(&logits), best);
            let first = logits.iter().position(|&logit| logit == best && best > MASKED);
            prop_assert_eq!(argmax(&logits), first.map(|id| id as u32));
            prop_assert!(are_below_infinity(&logits));
            let (middle, last) = (logits.len() / 2, logits.len().max(1) - 1);
            for (id, bad) in [(0, f32::NAN), (middle, f32::INFINITY), (last, f32::NAN)] {
                let mut logits = logits.clone();
                if let Some(logit) = logits.get_mut(id) {
                    *logit = bad;
                    prop_assert!(!are_below_infinity(&logits));
                }
            }
        }

        /// Partial selection against the definition, which sorts the whole vocabulary.
        #[test]
        fn top_p_equals_its_definition(
            logits in prop::collection::vec((-40i32..40).prop_map(|x| x as f32 / 8.0), 1..3000),
            p in 0.001f32..1.0,
        ) {
            let mut order: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
            order.sort_by(more_likely_first);
            let weights: Vec<f64> = order.iter().map(|&(l, _)| f64::from(l - order[0].0).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut mass = 0.0;
            let mut expected = Vec::new();
            for (&(_, id), weight) in order.iter().zip(&weights) {
                // A token stays if the tokens above it sum to less than p.
                if mass / total < f64::from(p) - 1e-12 {
                    expected.push(id as usize);
                }
                mass += weight;
            }
            expected.sort_unstable();
            let mut filtered = logits.clone();
            top_p(&mut filtered, p);
            prop_assert_eq!(kept(&filtered), expected);
        }

        #[test]
        fn top_k_equals_its_definition(
            logits in prop::collection::vec((-40i32..40).prop_map(|x| x as f32), 1..200),
            k in 1usize..250,
        ) {
            let mut sorted = logits.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let threshold = sorted[k.min(sorted.len()) - 1];
            let expected: Vec<usize> = (0..logits.len()).filter(|&i| logits[i] >= threshold).collect();
            let mut filtered = logits.clone();
            top_k(&mut filtered, k);
            prop_assert_eq!(kept(&filtered), expected);
        }
    }
}
