//! Rotary position embedding: the frequencies.

use std::f64::consts::PI;

/// Rotary position embedding as the config describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f64,
    /// How they are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// How the frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Llama 3.1's: long waves are divided by `factor`, short ones kept, those between blended.
    Llama3 {
        /// The divisor of the lowest frequencies.
        factor: f64,
        /// Waves longer than the original context over this are long.
        low_freq_factor: f64,
        /// Waves shorter than the original context over this are short.
        high_freq_factor: f64,
        /// The context before stretching.
        original_max_position_embeddings: usize,
    },
    /// A divisor for each frequency, `head_dim / 2` of them (a GGUF's `rope_freqs.weight`).
    Factors(Vec<f32>),
}

impl Rope {
    /// The angle per position of each of the `head_dim / 2` rotated pairs.
    ///
    /// Computed in single precision, step by step as transformers does with torch, because the
    /// angles of late positions depend on the last bits. Missing [`RopeScaling::Factors`] count as
    /// 1; a checked config has none missing.
    ///
    /// Source: transformers, `modeling_rope_utils.py`, `_compute_default_rope_parameters` and
    /// `_compute_llama3_parameters`; for the factors ggml, `ggml_rope_cache_init`.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let theta = self.theta as f32;
        let default = (0..head_dim).step_by(2).map(|i| 1.0 / theta.powf(i as f32 / head_dim as f32));
        match &self.scaling {
            RopeScaling::Default => default.collect(),
            RopeScaling::Factors(factors) => {
                let factors = factors.iter().copied().chain(std::iter::repeat(1.0));
                default.zip(factors).map(|(inv_freq, factor)| inv_freq / factor).collect()
            }
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                // What is a Python float in transformers stays double until it meets a tensor.
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
                default.map(stretch).collect()
            }
        }
    }

    /// Checks ranges; the error is config.json's name of a field and what is wrong with it.
    pub(super) fn check(&self, head_dim: usize) -> std::result::Result<(), (&'static str, String)> {
        // As singles, because that is what they are used as.
        let positive = |field, value: f64| {
            let single = value as f32;
            if single.is_finite() && single > 0.0 {
                Ok(())
            } else {
                Err((field, format!("is {value}, expected a positive number")))
            }
        };
        positive("rope_theta", self.theta)?;
        match &self.scaling {
            RopeScaling::Default => Ok(()),
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
                if !(1..=super::MAX_SIZE).contains(original_max_position_embeddings) {
                    let reason =
                        format!("is {original_max_position_embeddings}, expected 1 to {}", super::MAX_SIZE);
                    return Err(("original_max_position_embeddings", reason));
                }
                Ok(())
            }
            RopeScaling::Factors(factors) => {
                if factors.len() != head_dim / 2 {
                    let reason = format!("has {} numbers, expected {}", factors.len(), head_dim / 2);
                    return Err(("rope_freqs.weight", reason));
                }
                factors.iter().try_for_each(|&factor| positive("rope_freqs.weight", factor.into()))
            }
        }
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
            // Six roundings to single precision, each at most half of 2^-23.
            assert!((f64::from(*got) / expected - 1.0).abs() < 4e-7, "{got} {expected}");
        }
    }

    #[test]
    fn default_frequencies() {
        let rope = Rope { theta: 10_000.0, scaling: RopeScaling::Default };
        assert_close(&rope.inv_freq(64), &reference(10_000.0, 64, None));
        assert_eq!(rope.inv_freq(4), [1.0, 0.01]);
    }

    #[test]
    fn llama3_keeps_short_waves_divides_long_ones_and_blends_between() {
        let rope = Rope { theta: 500_000.0, scaling: LLAMA_3_2 };
        let got = rope.inv_freq(64);
        assert_close(&got, &reference(500_000.0, 64, Some((32.0, 1.0, 4.0, 8192.0))));
        let plain = Rope { theta: 500_000.0, scaling: RopeScaling::Default }.inv_freq(64);
        assert_eq!(got[0], plain[0]);
        assert_eq!(got[31], plain[31] / 32.0);
        assert!(got.iter().zip(&plain).any(|(got, plain)| *got < *plain && *got > plain / 32.0));
    }

    #[test]
    fn factors_divide() {
        let rope = Rope { theta: 10_000.0, scaling: RopeScaling::Factors(vec![1.0, 8.0]) };
        assert_eq!(rope.inv_freq(4), [1.0, 0.01 / 8.0]);
    }

    #[test]
    fn bad_ranges_name_the_field() {
        let check = |theta, scaling| Rope { theta, scaling }.check(4).unwrap_err().0;
        assert_eq!(check(0.0, RopeScaling::Default), "rope_theta");
        assert_eq!(check(1e300, RopeScaling::Default), "rope_theta");
        assert_eq!(check(1e4, RopeScaling::Factors(vec![1.0])), "rope_freqs.weight");
        assert_eq!(check(1e4, RopeScaling::Factors(vec![1.0, f32::NAN])), "rope_freqs.weight");
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
