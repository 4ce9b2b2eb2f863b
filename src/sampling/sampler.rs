//! Draws a token from a row of logits, and computes log-probabilities.

use std::hash::{BuildHasher, Hasher, RandomState};

use rand_pcg::Pcg64;
use rand_pcg::rand_core::RngCore;

use super::processors::{self, more_likely_first};
use super::{SamplingParams, TokenMask};
use crate::error::{Error, Result};

/// Tokens per part of the vocabulary in [`draw`]. The exponentials of all parts are computed once, to sum
/// them. They are slow, so only those of the part that is drawn from are computed again.
const DRAW_PART: usize = 256;

/// PCG's default stream; the seed chooses the state.
const PCG_STREAM: u128 = 0xa02_bdbf_7bb3_c0a7_ac28_fa16_a64a_bf96;

/// Draws the tokens of one sequence. The same parameters, seed and logits give the same tokens.
pub struct Sampler {
    params: SamplingParams,
    end_token_ids: Vec<u32>,
    mask: Option<Box<dyn TokenMask>>,
    random: Pcg64,
}

impl Sampler {
    /// A sampler for a new sequence. Without a seed in `params` it takes one from the operating system.
    pub fn new(params: &SamplingParams) -> Self {
        let seed = params.seed.unwrap_or_else(|| {
            // The standard library seeds its hasher from the operating system's random source.
            RandomState::new().build_hasher().finish()
        });
        Sampler {
            end_token_ids: params.stop_token_ids.clone(),
            params: params.clone(),
            mask: None,
            random: Pcg64::new(u128::from(seed), PCG_STREAM),
        }
    }

    /// Sets the model's EOS tokens. Like `stop_token_ids`, they are masked until `min_new_tokens` tokens are
    /// generated. With `ignore_eos`, EOS is a token like any other and is never masked.
    #[must_use]
    pub fn with_eos_token_ids(mut self, eos_token_ids: &[u32]) -> Self {
        if !self.params.ignore_eos {
            self.end_token_ids.extend_from_slice(eos_token_ids);
        }
        self
    }

    /// Allows only the tokens of a constrained text. Tokens that end a text are drawn only where it may end.
    #[must_use]
    pub fn with_mask(mut self, mask: Option<Box<dyn TokenMask>>) -> Self {
        self.mask = mask;
        self
    }

    /// Takes the token that was drawn, unless it ended the text. Returns whether the text is complete,
    /// because its constraint allows nothing to follow.
    ///
    /// # Errors
    /// Those of [`TokenMask::accept`].
    pub fn accept(&mut self, token: u32) -> Result<bool> {
        self.mask.as_mut().map_or(Ok(false), |mask| mask.accept(token))
    }

    /// Draws the next token of a sequence: `tokens` has its prompt, of `prompt_tokens` tokens, and the tokens
    /// generated so far. Applies penalties, bias, logits processors, the constraint's mask, temperature,
    /// top_k, top_p and min_p in this order. The mask comes after everything that could undo it.
    ///
    /// - `logits`: `(vocab_size,)`; overwritten, so keep a copy for log-probabilities
    ///
    /// # Errors
    /// [`Error::Generation`] if a logit is NaN or positive infinity, or if no token is left to draw; the
    /// errors of logits processors.
    pub fn sample(&mut self, logits: &mut [f32], tokens: &[u32], prompt_tokens: usize) -> Result<u32> {
        let params = &self.params;
        let (prompt, output) = tokens.split_at(prompt_tokens);
        check(logits, "the model", "its weights or activations overflow")?;
        if params.repetition_penalty != 1.0 {
            processors::repetition_penalty(logits, &[prompt, output], params.repetition_penalty);
        }
        if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
            processors::presence_frequency_penalty(
                logits,
                output,
                params.presence_penalty,
                params.frequency_penalty,
            );
        }
        processors::logit_bias(logits, &params.logit_bias);
        for processor in &params.logits_processors {
            processor.0.process(tokens, logits)?;
            check(logits, "a logits processor", "it may return finite numbers and -inf")?;
        }
        let mut may_end = output.len() >= params.min_new_tokens;
        if let Some(mask) = &self.mask {
            let ends: Vec<(u32, f32)> =
                self.end_token_ids.iter().filter_map(|&id| Some((id, *logits.get(id as usize)?))).collect();
            may_end &= mask.apply(logits);
            for (id, logit) in ends {
                logits[id as usize] = logit;
            }
        }
        if !may_end {
            processors::mask(logits, &self.end_token_ids);
        }
        if params.temperature == 0.0 {
            return processors::argmax(logits).ok_or_else(nothing_left);
        }
        processors::temperature(logits, params.temperature);
        if params.top_k > 0 {
            processors::top_k(logits, params.top_k);
        }
        if params.top_p < 1.0 {
            processors::top_p(logits, params.top_p);
        }
        if params.min_p > 0.0 {
            processors::min_p(logits, params.min_p);
        }
        let unit = unit_interval(self.random.next_u64());
        draw(logits, unit).ok_or_else(nothing_left)
    }
}

/// Refuses logits that no arithmetic can use. `origin` returned them, and `cause` says why that may be.
fn check(logits: &[f32], origin: &str, cause: &str) -> Result<()> {
    if processors::are_below_infinity(logits) {
        return Ok(());
    }
    match logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        None => Ok(()),
        Some(id) => Err(Error::Generation {
            reason: format!("{origin} returned a logit of {} for token {id}: {cause}", logits[id]),
        }),
    }
}

fn nothing_left() -> Error {
    Error::Generation {
        reason:
            "no token is left to draw: the logits, logit_bias, logits processors, min_new_tokens and the \
                 constraint exclude all of them"
                .into(),
    }
}

/// The upper 53 bits as a number in [0, 1).
fn unit_interval(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Draws a token by inverse transform sampling: adds probabilities in the order of ids and returns the token
/// at which the sum exceeds `unit`, a random number in [0, 1). None if all tokens are masked.
fn draw(logits: &[f32], unit: f64) -> Option<u32> {
    let max = processors::max(logits);
    if max == f32::NEG_INFINITY {
        return None;
    }
    let masses: Vec<f64> = logits.chunks(DRAW_PART).map(|part| processors::mass(part, max)).collect();
    let target = unit * masses.iter().sum::<f64>();
    // Find the part, then the token, at which the sum exceeds the target. If rounding leaves the whole sum
    // at or below the target, take the last token that is not masked.
    let (mut reached, mut chosen) = (0.0, None);
    for (part, &mass) in masses.iter().enumerate().filter(|(_, mass)| **mass > 0.0) {
        chosen = Some((part * DRAW_PART, reached));
        reached += mass;
        if reached > target {
            break;
        }
    }
    let (start, mut reached) = chosen?;
    let mut last = None;
    for (id, &logit) in logits.iter().enumerate().skip(start).take(DRAW_PART) {
        let weight = f64::from(processors::weight(logit, max));
        if weight > 0.0 {
            reached += weight;
            last = u32::try_from(id).ok();
            if reached > target {
                break;
            }
        }
    }
    last
}

/// The log-probability of a generated token, with the most likely alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token that was chosen.
    pub token_id: u32,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens and their log-probabilities, most likely first; may hold `token_id`.
    pub top: Vec<(u32, f32)>,
}

/// The log-probability of `token` and of the `top` most likely tokens under the softmax of `logits`.
///
/// - `logits`: `(vocab_size,)`, as the model returned them
///
/// A token beyond the vocabulary has log-probability negative infinity.
pub fn token_logprob(logits: &[f32], token: u32, top: usize) -> TokenLogprob {
    let log_sum = log_sum_exp(logits);
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;

    let mut candidates: Vec<(f32, u32)> =
        if top == 0 { Vec::new() } else { logits.iter().copied().zip(0..).collect() };
    let top = top.min(candidates.len());
    if top > 0 && top < candidates.len() {
        candidates.select_nth_unstable_by(top - 1, more_likely_first);
    }
    candidates.truncate(top);
    candidates.sort_unstable_by(more_likely_first);
    TokenLogprob {
        token_id: token,
        logprob: logits.get(token as usize).map_or(f32::NEG_INFINITY, |&logit| logprob(logit)),
        top: candidates.into_iter().map(|(logit, id)| (id, logprob(logit))).collect(),
    }
}

/// The log-probability of a given token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenScore {
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// Whether greedy decoding would choose it: no token is more likely, and none with a lower id is equally
    /// likely.
    pub is_greedy: bool,
}

/// The log-probability of `token` under the softmax of `logits`.
///
/// - `logits`: `(vocab_size,)`, as the model returned them
///
/// # Errors
/// [`Error::Generation`] if a logit is NaN or positive infinity, or all are negative infinity.
pub fn score_token(logits: &[f32], token: u32) -> Result<TokenScore> {
    check(logits, "the model", "its weights or activations overflow")?;
    let best = processors::argmax(logits).ok_or_else(nothing_left)?;
    let logit = logits.get(token as usize).map_or(f64::NEG_INFINITY, |&logit| logit.into());
    Ok(TokenScore { logprob: (logit - log_sum_exp(logits)) as f32, is_greedy: token == best })
}

/// The logarithm of the softmax's denominator.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = processors::max(logits);
    f64::from(max) + processors::mass(logits, max).ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::GenerationConfig;
    use crate::sampling::SamplingOptions;

    fn sampler(given: SamplingOptions) -> Sampler {
        Sampler::new(&SamplingParams::resolve(&given, &GenerationConfig::default(), 1000).unwrap())
    }

    fn sampled(temperature: f64, seed: u64) -> SamplingOptions {
        SamplingOptions { temperature: Some(temperature), seed: Some(seed), ..Default::default() }
    }

    fn draws(sampler: &mut Sampler, logits: &[f32], count: usize) -> Vec<u32> {
        (0..count).map(|_| sampler.sample(&mut logits.to_vec(), &[], 0).unwrap()).collect()
    }

    #[test]
    fn greedy_takes_the_first_maximum() {
        let mut sampler = sampler(SamplingOptions::default());
        assert_eq!(sampler.sample(&mut [0.0, 5.0, 5.0, -1.0], &[], 0).unwrap(), 1);
    }

    #[test]
    fn nan_and_infinite_logits_are_an_error() {
        for (temperature, bad) in [(0.0, f32::NAN), (1.0, f32::NAN), (1.0, f32::INFINITY)] {
            let error = sampler(sampled(temperature, 0)).sample(&mut [0.0, bad], &[], 0).unwrap_err();
            assert!(matches!(error, Error::Generation { .. }), "{error}");
        }
        for temperature in [0.0, 1.0] {
            let error = sampler(sampled(temperature, 0)).sample(&mut [f32::NEG_INFINITY; 3], &[], 0);
            assert!(matches!(error, Err(Error::Generation { .. })));
            assert!(sampler(sampled(temperature, 0)).sample(&mut [], &[], 0).is_err());
        }
    }

    #[test]
    fn a_draw_is_the_inverse_of_the_cumulative_distribution() {
        // Four equally likely tokens in different parts; all others are masked.
        for ids in [[0, 1, 2, 3], [0, 255, 256, 999], [300, 301, 700, 998], [255, 511, 767, 768]] {
            let mut logits = vec![f32::NEG_INFINITY; 1000];
            ids.iter().for_each(|&id| logits[id] = -7.0);
            for (share, id) in ids.iter().enumerate() {
                for unit in [0.25 * share as f64, 0.25 * share as f64 + 0.249] {
                    assert_eq!(draw(&logits, unit), Some(*id as u32), "{ids:?} at {unit}");
                }
            }
            assert_eq!(draw(&logits, 1.0), Some(ids[3] as u32), "the last token, as after rounding");
        }
        assert_eq!(draw(&[f32::NEG_INFINITY; 600], 0.5), None);
    }

    #[test]
    fn a_seed_reproduces_and_another_differs() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32 / 3.0).collect();
        let first = draws(&mut sampler(sampled(1.0, 0)), &logits, 64);
        assert_eq!(first, draws(&mut sampler(sampled(1.0, 0)), &logits, 64));
        assert_ne!(first, draws(&mut sampler(sampled(1.0, 1)), &logits, 64));
        let unseeded = SamplingOptions { temperature: Some(1.0), ..Default::default() };
        let (a, b) = (sampler(unseeded.clone()), sampler(unseeded));
        assert_ne!(draws(&mut { a }, &logits, 64), draws(&mut { b }, &logits, 64));
    }

    /// Pins the draws of a seed. A change of the generator or of the drawing changes the results of every
    /// user's seeds, so it must be deliberate.
    #[test]
    fn the_stream_of_a_seed_is_pinned() {
        assert_eq!(draws(&mut sampler(sampled(1.0, 42)), &[0.0; 10], 8), [4, 5, 5, 2, 6, 9, 2, 8]);
    }

    /// Pearson's chi-squared statistic of `count` draws against the softmax of `logits / temperature`.
    fn chi_squared(given: SamplingOptions, logits: &[f32], expected: &[f64]) -> f64 {
        const COUNT: usize = 40_000;
        let mut observed = vec![0usize; logits.len()];
        for id in draws(&mut sampler(given), logits, COUNT) {
            observed[id as usize] += 1;
        }
        observed
            .iter()
            .zip(expected)
            .map(|(&observed, &p)| {
                if p == 0.0 {
                    assert_eq!(observed, 0, "drew a token that was filtered out");
                    return 0.0;
                }
                let expected = p * COUNT as f64;
                (observed as f64 - expected).powi(2) / expected
            })
            .sum()
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits: Vec<f32> = (0..10).map(|i| i as f32 / 4.0).collect();
        let weights: Vec<f64> = logits.iter().map(|&l| f64::from(l / 0.7).exp()).collect();
        let total: f64 = weights.iter().sum();
        let expected: Vec<f64> = weights.iter().map(|w| w / total).collect();
        for seed in [0, 1, 2] {
            // 9 degrees of freedom: above 27.88 with probability 0.001; the seeds are fixed.
            let statistic = chi_squared(sampled(0.7, seed), &logits, &expected);
            assert!(statistic < 27.88, "chi-squared {statistic} with seed {seed}");
        }
    }

    /// The first draws of neighbouring seeds must be as independent as the draws of one seed, because people
    /// use seeds 0, 1, 2, ... to get different answers.
    #[test]
    fn neighbouring_seeds_are_independent() {
        const COUNT: u64 = 20_000;
        let mut observed = [0usize; 10];
        for seed in 0..COUNT {
            observed[draws(&mut sampler(sampled(1.0, seed)), &[0.0; 10], 1)[0] as usize] += 1;
        }
        let expected = COUNT as f64 / 10.0;
        let statistic: f64 = observed.iter().map(|&o| (o as f64 - expected).powi(2) / expected).sum();
        assert!((0.97..27.88).contains(&statistic), "chi-squared {statistic}");
    }

    #[test]
    fn draws_follow_the_filtered_distribution() {
        // Probabilities 0.4, 0.3, 0.2, 0.1: top_k 3 leaves 4/9, 3/9, 2/9; top_p 0.7 then leaves two tokens.
        let logits = [0.4f32, 0.3, 0.2, 0.1].map(f32::ln);
        let given = SamplingOptions { top_k: Some(3), top_p: Some(0.7), ..sampled(1.0, 5) };
        // 1 degree of freedom: above 10.83 with probability 0.001.
        let statistic = chi_squared(given, &logits, &[4.0 / 7.0, 3.0 / 7.0, 0.0, 0.0]);
        assert!(statistic < 10.83, "chi-squared {statistic}");
        let given = SamplingOptions { min_p: Some(0.6), ..sampled(1.0, 6) };
        let statistic = chi_squared(given, &logits, &[4.0 / 7.0, 3.0 / 7.0, 0.0, 0.0]);
        assert!(statistic < 10.83, "chi-squared {statistic}");
    }

    #[test]
    fn only_the_repetition_penalty_counts_the_prompt() {
        let given = SamplingOptions { repetition_penalty: Some(2.0), ..Default::default() };
        // Token 0 falls from 3 to 1.5 whether it is in the prompt or in the output.
        assert_eq!(sampler(given.clone()).sample(&mut [3.0, 2.0], &[0], 1).unwrap(), 1);
        assert_eq!(sampler(given).sample(&mut [3.0, 2.0], &[0], 0).unwrap(), 1);
        let given = SamplingOptions { presence_penalty: Some(2.0), ..Default::default() };
        assert_eq!(sampler(given.clone()).sample(&mut [3.0, 2.0], &[0], 1).unwrap(), 0);
        assert_eq!(sampler(given).sample(&mut [3.0, 2.0], &[0], 0).unwrap(), 1);
        let given = SamplingOptions { frequency_penalty: Some(0.4), ..Default::default() };
        assert_eq!(sampler(given.clone()).sample(&mut [3.0, 2.0], &[0, 0], 0).unwrap(), 0);
        assert_eq!(sampler(given).sample(&mut [3.0, 2.0], &[0, 0, 0], 0).unwrap(), 1);
    }

    /// Allows some tokens, or also the end.
    struct Allow(&'static [usize], bool);

    impl TokenMask for Allow {
        fn apply(&self, logits: &mut [f32]) -> bool {
            let masked = logits.iter_mut().enumerate().filter(|(id, _)| !self.0.contains(id));
            masked.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
            self.1
        }

        fn accept(&mut self, _: u32) -> Result<bool> {
            Ok(true)
        }
    }

    #[test]
    fn a_mask_comes_after_the_bias_and_decides_about_the_end() {
        let given = SamplingOptions {
            logit_bias: Some(vec![(0, 100.0)]),
            stop_token_ids: Some(vec![3]),
            ..Default::default()
        };
        let draw = |allow, logits: &mut [f32]| {
            let sampler = sampler(given.clone()).with_eos_token_ids(&[2]).with_mask(Some(Box::new(allow)));
            { sampler }.sample(logits, &[], 0)
        };
        assert_eq!(draw(Allow(&[1], false), &mut [0.0, 1.0, 9.0, 9.0]).unwrap(), 1);
        assert_eq!(draw(Allow(&[1], true), &mut [0.0, 1.0, 9.0, 8.0]).unwrap(), 2);
        assert_eq!(draw(Allow(&[1], true), &mut [0.0, 1.0, 0.0, 8.0]).unwrap(), 3);
        assert_eq!(draw(Allow(&[1, 3], false), &mut [0.0, 1.0, 9.0, 9.0]).unwrap(), 1, "no early stop");
        assert!(draw(Allow(&[3], false), &mut [0.0, 1.0, 9.0, 9.0]).is_err());
    }

    /// Adds its number to the first logit.
    struct Add(f32);

    impl super::super::LogitsProcessor for Add {
        fn process(&self, tokens: &[u32], logits: &mut [f32]) -> Result<()> {
            logits[0] += self.0 * tokens.len() as f32;
            Ok(())
        }
    }

    #[test]
    fn logits_processors_come_after_the_bias_and_are_checked() {
        let with = |add| {
            let shared = super::super::SharedProcessor(std::sync::Arc::new(Add(add)));
            let bias = Some(vec![(0, 1.0)]);
            sampler(SamplingOptions {
                logit_bias: bias,
                logits_processors: vec![shared],
                ..Default::default()
            })
        };
        assert_eq!(with(1.0).sample(&mut [0.0, 2.5], &[7, 7], 1).unwrap(), 0);
        assert_eq!(with(0.5).sample(&mut [0.0, 2.5], &[7, 7], 1).unwrap(), 1);
        let error = with(f32::NAN).sample(&mut [0.0, 2.5], &[7], 1).unwrap_err();
        assert!(error.to_string().contains("a logits processor returned"), "{error}");
    }

    #[test]
    fn bias_comes_after_penalties() {
        // (4 / 2) + 1 = 3 beats 2.8; (4 + 1) / 2 = 2.5 would not.
        let given = SamplingOptions {
            repetition_penalty: Some(2.0),
            logit_bias: Some(vec![(0, 1.0)]),
            ..Default::default()
        };
        assert_eq!(sampler(given).sample(&mut [4.0, 2.8], &[0], 1).unwrap(), 0);
    }

    #[test]
    fn temperature_comes_before_top_p() {
        // 0.6 and 0.4 become 0.53 and 0.47 at temperature 4: top_p 0.55 then keeps both.
        let logits = [0.6f32, 0.4].map(f32::ln);
        let given = SamplingOptions { top_p: Some(0.55), ..sampled(4.0, 3) };
        assert!(draws(&mut sampler(given), &logits, 100).contains(&1));
        let given = SamplingOptions { top_p: Some(0.55), ..sampled(1.0, 3) };
        assert!(!draws(&mut sampler(given), &logits, 100).contains(&1));
    }

    /// The tokens that a sampler draws in many draws, sorted.
    fn drawn(given: SamplingOptions, logits: &[f32]) -> Vec<u32> {
        let mut ids = draws(&mut sampler(given), logits, 400);
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    #[test]
    fn bias_comes_before_temperature() {
        // (ln 1 + ln 4) / 2 gives a ratio of 2. With the bias after the temperature the ratio would be 4.
        let given = SamplingOptions { logit_bias: Some(vec![(0, 4.0_f64.ln())]), ..sampled(2.0, 7) };
        // 1 degree of freedom: above 10.83 with probability 0.001.
        let statistic = chi_squared(given, &[0.0, 0.0], &[2.0 / 3.0, 1.0 / 3.0]);
        assert!(statistic < 10.83, "chi-squared {statistic}");
    }

    #[test]
    fn temperature_comes_before_min_p() {
        // The ratio of 0.2 to 0.8 is 0.25, and 0.5 at temperature 2: min_p 0.4 then keeps both.
        let logits = [0.8f32, 0.2].map(f32::ln);
        assert_eq!(drawn(SamplingOptions { min_p: Some(0.4), ..sampled(2.0, 3) }, &logits), [0, 1]);
        assert_eq!(drawn(SamplingOptions { min_p: Some(0.4), ..sampled(1.0, 3) }, &logits), [0]);
    }

    #[test]
    fn top_k_comes_before_top_p_and_top_p_before_min_p() {
        // From 0.4, 0.3, 0.2, 0.1 top_k 2 leaves 4/7 and 3/7, of which top_p 0.5 keeps the first only.
        // From all four, top_p 0.5 keeps two.
        let logits = [0.4f32, 0.3, 0.2, 0.1].map(f32::ln);
        let given = SamplingOptions { top_p: Some(0.5), ..sampled(1.0, 3) };
        assert_eq!(drawn(given.clone(), &logits), [0, 1]);
        assert_eq!(drawn(SamplingOptions { top_k: Some(2), ..given }, &logits), [0]);
        // With min_p first, 0.4 and 0.3 would be left, that is 4/7 and 3/7, of which top_p 0.55 keeps one.
        let given = SamplingOptions { top_p: Some(0.55), min_p: Some(0.7), ..sampled(1.0, 3) };
        assert_eq!(drawn(given, &logits), [0, 1]);
    }

    #[test]
    fn extreme_parameters_give_tokens_and_never_nan() {
        let logits = [3.0f32, -2.0, 5.0, f32::NEG_INFINITY, 5.0];
        for temperature in [1e-45, 1e-38, 1e-30] {
            assert_eq!(drawn(sampled(temperature, 1), &logits), [2, 4], "at temperature {temperature}");
        }
        assert_eq!(drawn(sampled(f64::from(f32::MAX), 1), &logits), [0, 1, 2, 4], "all but the masked one");
        let everything = |penalty: f64, bias: f64, temperature: f64| SamplingOptions {
            repetition_penalty: Some(penalty),
            presence_penalty: Some(-2.0),
            frequency_penalty: Some(2.0),
            logit_bias: Some((0..5).map(|id| (id, bias)).collect()),
            top_k: Some(4),
            top_p: Some(0.999),
            min_p: Some(1e-30),
            ..sampled(temperature, 2)
        };
        let most = f64::from(f32::MAX);
        for penalty in [f64::from(f32::MIN_POSITIVE), 1.0, most] {
            for bias in [-most, 0.0, most] {
                for temperature in [0.0, 1e-30, 1.0, most] {
                    let mut sampler = sampler(everything(penalty, bias, temperature));
                    let id = sampler.sample(&mut logits.to_vec(), &[0, 1, 2, 3, 4, 4], 3).unwrap();
                    assert_ne!(id, 3, "a masked token stays masked");
                }
            }
        }
    }

    #[test]
    fn a_bias_of_minus_100_bans_a_token() {
        let given = SamplingOptions { logit_bias: Some(vec![(0, -100.0)]), ..sampled(1.0, 4) };
        assert_eq!(drawn(given, &[20.0, 0.0, 0.0]), [1, 2]);
    }

    #[test]
    fn filters_work_on_a_real_vocabulary() {
        let logits: Vec<f32> = (0..128_256).map(|id| ((id * 7919) % 128_256) as f32 / 10_000.0).collect();
        let given =
            SamplingOptions { top_k: Some(50), top_p: Some(0.9), min_p: Some(0.01), ..sampled(1.0, 8) };
        let mut best: Vec<u32> = (0..128_256).collect();
        best.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        for id in draws(&mut sampler(given), &logits, 20) {
            assert!(best[..50].contains(&id));
        }
    }

    #[test]
    fn scores_of_given_tokens_are_the_log_softmax() {
        let logits = [0.1f32, 0.2, 0.3, 0.4].map(|p| p.ln() - 50.0);
        for (id, p) in (0..).zip([0.1f32, 0.2, 0.3, 0.4]) {
            let found = score_token(&logits, id).unwrap();
            assert!((found.logprob - p.ln()).abs() < 1e-4);
            assert_eq!(found.is_greedy, id == 3);
            assert_eq!(found.logprob, token_logprob(&logits, id, 0).logprob, "as in generation");
        }
        assert_eq!(score_token(&[0.0, f32::NEG_INFINITY], 1).unwrap().logprob, f32::NEG_INFINITY);
        assert!(
            score_token(&[1.0, 1.0], 0).unwrap().is_greedy && !score_token(&[1.0, 1.0], 1).unwrap().is_greedy
        );
        for bad in [[0.0, f32::NAN], [0.0, f32::INFINITY], [f32::NEG_INFINITY; 2]] {
            assert!(matches!(score_token(&bad, 0), Err(Error::Generation { .. })), "{bad:?}");
        }
    }

    #[test]
    fn min_new_tokens_masks_eos_and_stop_tokens() {
        let given =
            SamplingOptions { min_new_tokens: Some(2), stop_token_ids: Some(vec![1]), ..Default::default() };
        let mut sampler = sampler(given.clone()).with_eos_token_ids(&[0]);
        assert_eq!(sampler.sample(&mut [9.0, 8.0, 1.0], &[], 0).unwrap(), 2);
        assert_eq!(sampler.sample(&mut [9.0, 8.0, 1.0], &[2], 0).unwrap(), 2);
        assert_eq!(sampler.sample(&mut [9.0, 8.0, 1.0], &[2, 2], 0).unwrap(), 0);
        let given = SamplingOptions { ignore_eos: Some(true), ..given };
        let mut sampler = self::sampler(given).with_eos_token_ids(&[0]);
        assert_eq!(sampler.sample(&mut [9.0, 8.0, 1.0], &[], 0).unwrap(), 0, "EOS is never masked");
    }

    #[test]
    fn logprobs_are_the_log_softmax() {
        let logits = [0.1f32, 0.2, 0.3, 0.4].map(|p| p.ln() + 700.0);
        let found = token_logprob(&logits, 1, 2);
        assert_eq!(found.token_id, 1);
        assert!((found.logprob - 0.2f32.ln()).abs() < 1e-4);
        let ids: Vec<u32> = found.top.iter().map(|t| t.0).collect();
        assert_eq!(ids, [3, 2]);
        assert!((found.top[0].1 - 0.4f32.ln()).abs() < 1e-4);
        assert_eq!(token_logprob(&logits, 0, 0).top, []);
        assert_eq!(token_logprob(&logits, 0, 99).top.len(), 4);
        assert_eq!(token_logprob(&logits, 9, 0).logprob, f32::NEG_INFINITY);
    }
}
