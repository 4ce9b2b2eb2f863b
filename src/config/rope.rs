//! Rotary position embedding (RoPE): the frequencies.

use serde::Serialize;
use serde_json::{Value, json};
use std::f64::consts::PI;

/// Rotary position embedding as the config describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f64,
    /// How the frequencies are scaled for longer contexts.
    pub scaling: RopeScaling,
    /// A further divisor for each of the `head_dim / 2` frequencies (a GGUF file's `rope_freqs.weight`).
    pub freq_factors: Option<Vec<f32>>,
}

/// How the frequencies are scaled for longer contexts. Serialised as config.json spells it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// All frequencies are divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// The base grows with the prompt's length once the prompt exceeds the original context.
    Dynamic {
        /// The longest context, as a multiple of the original one.
        factor: f64,
        /// The original context length: the config's `max_position_embeddings`.
        #[serde(skip)]
        original_max_position_embeddings: usize,
    },
    /// Llama 3.1's scaling. Frequencies with a long wavelength are divided by `factor`, those with a short
    /// wavelength are kept, those between are blended.
    Llama3 {
        /// The divisor of the lowest frequencies.
        factor: f64,
        /// A wavelength is long if it exceeds the original context divided by this number.
        low_freq_factor: f64,
        /// A wavelength is short if it is below the original context divided by this number.
        high_freq_factor: f64,
        /// The original context length.
        original_max_position_embeddings: usize,
    },
    /// As `Llama3` with other borders. Queries and keys are also multiplied by `attention_factor`.
    Yarn {
        /// The divisor of the lowest frequencies.
        factor: f64,
        /// The factor on cosines and sines.
        attention_factor: f64,
        /// Frequencies with more rotations than this within the original context are kept.
        beta_fast: f64,
        /// Frequencies with fewer rotations than this are divided.
        beta_slow: f64,
        /// The original context length.
        original_max_position_embeddings: usize,
        /// Whether the borders are rounded outwards to whole pairs, as in the paper's code.
        truncate: bool,
    },
}

impl RopeScaling {
    /// config.json's `rope_type`.
    pub fn rope_type(&self) -> String {
        json!(self).get("rope_type").and_then(Value::as_str).unwrap_or_default().to_owned()
    }
}

/// YaRN's factor on cosines and sines, used if the config does not set one.
///
/// Source: Peng et al., "YaRN", arXiv 2309.00071, equation 22, with the `mscale` of DeepSeek's configs.
pub(super) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

impl Rope {
    /// Finds a scaling without `freq_factors` that gives the same frequencies, if there is one. Converters to
    /// GGUF write the scaling of Llama 3.1 and later as factors, and every such checkpoint has these borders.
    pub fn without_factors(&self, head_dim: usize) -> Option<RopeScaling> {
        let Some(factors) = &self.freq_factors else { return Some(self.scaling.clone()) };
        let scaling = RopeScaling::Llama3 {
            factor: f64::from(factors.iter().copied().fold(1.0, f32::max)),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let stretched = Rope { scaling: scaling.clone(), freq_factors: None, ..*self };
        let same = |(a, b): (f32, f32)| (a - b).abs() <= 1e-6 * a.abs();
        let pairs = self.inv_freq(head_dim, 0).into_iter().zip(stretched.inv_freq(head_dim, 0));
        pairs.into_iter().all(same).then_some(scaling)
    }

    /// Computes the angle per position of each of the `head_dim / 2` rotated pairs, for a sequence whose
    /// prompt has `prompt_tokens` tokens. Only [`RopeScaling::Dynamic`] uses `prompt_tokens`.
    ///
    /// Computes in f32, in the same steps as transformers with torch, because the angles of late positions
    /// depend on the last bits. Missing `freq_factors` count as 1; a checked config has none missing.
    ///
    /// Source: transformers, `modeling_rope_utils.py`, `_compute_*_parameters`; for `freq_factors` ggml,
    /// `ggml_rope_cache_init`.
    pub fn inv_freq(&self, head_dim: usize, prompt_tokens: usize) -> Vec<f32> {
        let pos_freqs = |theta: f32| {
            let exponents = (0..head_dim).step_by(2).map(move |i| i as f32 / head_dim as f32);
            exponents.map(move |exponent| theta.powf(exponent))
        };
        let theta = self.theta as f32;
        let plain = pos_freqs(theta).map(|pos_freq| 1.0 / pos_freq);
        let mut inv_freq: Vec<f32> = match &self.scaling {
            RopeScaling::Default => plain.collect(),
            &RopeScaling::Linear { factor } => plain.map(|inv_freq| inv_freq / factor as f32).collect(),
            &RopeScaling::Dynamic { factor, original_max_position_embeddings: original } => {
                let grown = factor as f32 * self.stretched_tokens(prompt_tokens) as f32 / original as f32;
                let dim = head_dim as f64;
                let base = theta * (grown - (factor - 1.0) as f32).powf((dim / (dim - 2.0)) as f32);
                pos_freqs(base).map(|pos_freq| 1.0 / pos_freq).collect()
            }
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                // Python floats in transformers stay f64 until they meet a tensor.
                let context = original_max_position_embeddings as f64;
                let low_freq_wavelen = (context / low_freq_factor) as f32;
                let high_freq_wavelen = (context / high_freq_factor) as f32;
                let (context, factor) = (context as f32, factor as f32);
                let band = (high_freq_factor - low_freq_factor) as f32;
                let low_freq_factor = low_freq_factor as f32;
                let stretch = |inv_freq: f32| {
                    let wavelen = (2.0 * PI) as f32 / inv_freq;
                    if wavelen > low_freq_wavelen {
                        inv_freq / factor
                    } else if wavelen < high_freq_wavelen {
                        inv_freq
                    } else {
                        let smooth = (context / wavelen - low_freq_factor) / band;
                        (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
                    }
                };
                plain.map(stretch).collect()
            }
            &RopeScaling::Yarn { factor, .. } => {
                let (low, high) = self.yarn_borders(head_dim);
                let blend = |(pair, pos_freq): (usize, f32)| {
                    let ramp = ((pair as f32 - low) / (high - low)).clamp(0.0, 1.0);
                    let keep = 1.0 - ramp;
                    1.0 / (factor as f32 * pos_freq) * (1.0 - keep) + 1.0 / pos_freq * keep
                };
                pos_freqs(theta).enumerate().map(blend).collect()
            }
        };
        for (inv_freq, factor) in inv_freq.iter_mut().zip(self.freq_factors.iter().flatten()) {
            *inv_freq /= factor;
        }
        inv_freq
    }

    /// The length that [`Self::inv_freq`] stretches the frequencies for, 0 if it does not depend on the
    /// prompt. Equal lengths give equal frequencies.
    pub fn stretched_tokens(&self, prompt_tokens: usize) -> usize {
        match self.scaling {
            RopeScaling::Dynamic { original_max_position_embeddings: original, .. } => {
                prompt_tokens.max(original)
            }
            _ => 0,
        }
    }

    /// The borders as indices of pairs: frequencies below the first are kept, those above the second are
    /// divided.
    fn yarn_borders(&self, head_dim: usize) -> (f32, f32) {
        let RopeScaling::Yarn { beta_fast, beta_slow, original_max_position_embeddings, truncate, .. } =
            self.scaling
        else {
            return (0.0, 0.0);
        };
        let dim = head_dim as f64;
        // The index of the pair with this many rotations within the original context.
        let pair = |rotations: f64| {
            let context = original_max_position_embeddings as f64;
            dim * (context / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        (low as f32, high as f32)
    }

    /// The factor on cosines and sines.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Whether the frequencies depend on the prompt's length.
    pub fn is_dynamic(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. })
    }

    /// Checks ranges. An error is the field's name in config.json and the reason.
    pub(super) fn check(&self, head_dim: usize) -> std::result::Result<(), (&'static str, String)> {
        positive("rope_theta", self.theta)?;
        match &self.scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { factor } => positive("factor", *factor)?,
            RopeScaling::Dynamic { factor, original_max_position_embeddings } => {
                at_least_1("factor", *factor)?;
                context("max_position_embeddings", *original_max_position_embeddings)?;
                if head_dim <= 2 {
                    return Err(("head_dim", format!("is {head_dim}, too small for dynamic scaling")));
                }
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor)?;
                if low_freq_factor >= high_freq_factor {
                    let reason = format!(
                        "is {low_freq_factor}, expected less than high_freq_factor {high_freq_factor}"
                    );
                    return Err(("low_freq_factor", reason));
                }
                context("original_max_position_embeddings", *original_max_position_embeddings)?;
            }
            RopeScaling::Yarn {
                factor,
                attention_factor,
                beta_fast,
                beta_slow,
                original_max_position_embeddings,
                ..
            } => {
                at_least_1("factor", *factor)?;
                positive("attention_factor", *attention_factor)?;
                positive("beta_fast", *beta_fast)?;
                positive("beta_slow", *beta_slow)?;
                if beta_fast < beta_slow {
                    return Err((
                        "beta_fast",
                        format!("is {beta_fast}, expected at least beta_slow {beta_slow}"),
                    ));
                }
                context("original_max_position_embeddings", *original_max_position_embeddings)?;
                // The borders' formula divides by theta's logarithm.
                if self.theta <= 1.0 {
                    return Err(("rope_theta", format!("is {}, expected more than 1 for yarn", self.theta)));
                }
            }
        }
        let Some(factors) = &self.freq_factors else { return Ok(()) };
        if factors.len() != head_dim / 2 {
            let reason = format!("has {} numbers, expected {}", factors.len(), head_dim / 2);
            return Err(("rope_freqs.weight", reason));
        }
        factors.iter().try_for_each(|&factor| positive("rope_freqs.weight", factor.into()))
    }
}

type Checked = std::result::Result<(), (&'static str, String)>;

fn positive(field: &'static str, value: f64) -> Checked {
    // Checked as an f32, because that is how it is used.
    let single = value as f32;
    if single.is_finite() && single > 0.0 {
        Ok(())
    } else {
        Err((field, format!("is {value}, expected a positive number")))
    }
}

fn at_least_1(field: &'static str, value: f64) -> Checked {
    positive(field, value)?;
    if value >= 1.0 { Ok(()) } else { Err((field, format!("is {value}, expected at least 1"))) }
}

fn context(field: &'static str, value: usize) -> Checked {
    if (1..=super::MAX_SIZE).contains(&value) {
        Ok(())
    } else {
        Err((field, format!("is {value}, expected 1 to {}", super::MAX_SIZE)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA_3_2: RopeScaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };

    fn rope(theta: f64, scaling: RopeScaling) -> Rope {
        Rope { theta, scaling, freq_factors: None }
    }

    /// The same formulas in double precision.
    fn reference(theta: f64, head_dim: usize, llama3: Option<(f64, f64, f64, f64)>) -> Vec<f64> {
        let default = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64));
        let stretch = |inv_freq: f64| {
            let Some((factor, low, high, context)) = llama3 else { return inv_freq };
            let waves = context * inv_freq / (2.0 * PI);
            let smooth = ((waves - low) / (high - low)).clamp(0.0, 1.0);
            inv_freq * ((1.0 - smooth) / factor + smooth)
        };
        default.map(stretch).collect()
    }

    fn assert_close(got: &[f32], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(expected) {
            // Six roundings to f32, each of at most half of 2^-23.
            assert!((f64::from(*got) / expected - 1.0).abs() < 4e-7, "{got} {expected}");
        }
    }

    #[test]
    fn default_frequencies() {
        let rope = rope(10_000.0, RopeScaling::Default);
        assert_close(&rope.inv_freq(64, 1), &reference(10_000.0, 64, None));
        assert_eq!(rope.inv_freq(4, 1), [1.0, 0.01]);
    }

    #[test]
    fn llama3_keeps_short_wavelengths_divides_long_ones_and_blends_between() {
        let got = rope(500_000.0, LLAMA_3_2).inv_freq(64, 1);
        assert_close(&got, &reference(500_000.0, 64, Some((32.0, 1.0, 4.0, 8192.0))));
        let plain = rope(500_000.0, RopeScaling::Default).inv_freq(64, 1);
        assert_eq!(got[0], plain[0]);
        assert_eq!(got[31], plain[31] / 32.0);
        assert!(got.iter().zip(&plain).any(|(got, plain)| *got < *plain && *got > plain / 32.0));
    }

    #[test]
    fn freq_factors_divide_the_frequencies() {
        let mut rope = rope(10_000.0, RopeScaling::Default);
        rope.freq_factors = Some(vec![1.0, 8.0]);
        assert_eq!(rope.inv_freq(4, 1), [1.0, 0.01 / 8.0]);
        rope.scaling = RopeScaling::Linear { factor: 2.0 };
        assert_eq!(rope.inv_freq(4, 1), [0.5, 0.01 / 16.0]);
    }

    #[test]
    fn dynamic_frequencies_follow_the_prompt_beyond_the_original_context() {
        let scaling = RopeScaling::Dynamic { factor: 2.0, original_max_position_embeddings: 100 };
        let rope = rope(10_000.0, scaling);
        assert_eq!(rope.inv_freq(8, 100), rope.inv_freq(8, 1));
        assert_close(&rope.inv_freq(8, 100), &reference(10_000.0, 8, None));
        // For a prompt of 150 tokens the base is 10000 * (2 * 1.5 - 1)^(8 / 6).
        let base = 10_000.0 * 2.0_f64.powf(8.0 / 6.0);
        let expected = reference(base, 8, None);
        for (got, expected) in rope.inv_freq(8, 150).iter().zip(&expected) {
            assert!((f64::from(*got) / expected - 1.0).abs() < 1e-6, "{got} {expected}");
        }
    }

    #[test]
    fn yarn_keeps_fast_pairs_divides_slow_ones_and_blends_between() {
        let rope = rope(10_000.0, yarn(4.0, 32.0));
        let (got, plain) = (rope.inv_freq(64, 1), reference(10_000.0, 64, None));
        // Borders computed by hand: 64 ln(2048 / (32 * 2 pi)) / (2 ln 10000) = 8.06, and 20.1 for one
        // rotation.
        for (pair, (got, plain)) in got.iter().zip(&plain).enumerate() {
            let keep = 1.0 - ((pair as f64 - 8.0) / 13.0).clamp(0.0, 1.0);
            let expected = plain * (keep + (1.0 - keep) / 4.0);
            assert!((f64::from(*got) / expected - 1.0).abs() < 1e-6, "{pair}: {got} {expected}");
        }
        assert_eq!(rope.attention_factor(), yarn_mscale(4.0, 1.0) as f32);
        assert_eq!(yarn_mscale(0.5, 1.0), 1.0);
    }

    fn yarn(factor: f64, beta_fast: f64) -> RopeScaling {
        RopeScaling::Yarn {
            factor,
            attention_factor: yarn_mscale(factor, 1.0),
            beta_fast,
            beta_slow: 1.0,
            original_max_position_embeddings: 2048,
            truncate: true,
        }
    }

    #[test]
    fn bad_ranges_name_the_field() {
        let check = |theta, scaling| rope(theta, scaling).check(4).unwrap_err().0;
        assert_eq!(check(0.0, RopeScaling::Default), "rope_theta");
        assert_eq!(check(1e300, RopeScaling::Default), "rope_theta");
        for factors in [vec![1.0], vec![1.0, f32::NAN]] {
            let rope = Rope { freq_factors: Some(factors), ..rope(1e4, RopeScaling::Default) };
            assert_eq!(rope.check(4).unwrap_err().0, "rope_freqs.weight");
        }
        assert_eq!(check(1e4, RopeScaling::Linear { factor: 0.0 }), "factor");
        let dynamic = |factor, original_max_position_embeddings| RopeScaling::Dynamic {
            factor,
            original_max_position_embeddings,
        };
        assert_eq!(check(1e4, dynamic(0.5, 64)), "factor");
        assert_eq!(check(1e4, dynamic(2.0, 0)), "max_position_embeddings");
        assert_eq!(rope(1e4, dynamic(2.0, 64)).check(2).unwrap_err().0, "head_dim");
        assert_eq!(check(1e4, yarn(0.5, 32.0)), "factor");
        assert_eq!(check(1e4, yarn(4.0, 0.5)), "beta_fast");
        assert_eq!(check(1.0, yarn(4.0, 32.0)), "rope_theta");
        let llama3 = |factor, low_freq_factor, high_freq_factor, original_max_position_embeddings| {
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }
        };
        assert_eq!(check(1e4, llama3(0.0, 1.0, 4.0, 8192)), "factor");
        assert_eq!(check(1e4, llama3(8.0, 4.0, 4.0, 8192)), "low_freq_factor");
        assert_eq!(check(1e4, llama3(8.0, 1.0, f64::INFINITY, 8192)), "high_freq_factor");
        assert_eq!(check(1e4, llama3(8.0, 1.0, 4.0, 0)), "original_max_position_embeddings");
    }
}
