//! Writes a config as a GGUF file's metadata, which `gguf.rs` and llama.cpp read.
//!
//! Source: llama.cpp, `convert_hf_to_gguf.py`, and `llama-context.cpp` for the meaning of YaRN's keys.

use super::{LlamaConfig, RopeScaling, rope::yarn_mscale};
use crate::checkpoint::gguf::Value;
use crate::error::{Error, Result};
use crate::kernels::Activation;

/// A config in GGUF's form.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufConfig {
    /// `general.architecture` and the `llama.*` keys.
    pub metadata: Vec<(String, Value)>,
    /// The tensor `rope_freqs.weight`, of shape `(head_dim / 2,)`: divisors of the frequencies. None if there
    /// are none.
    pub rope_freqs: Option<Vec<f32>>,
}

/// How many neighbouring f32 values are tried on each side to find one that is read back exactly.
const NEIGHBOURS: u32 = 4;

impl LlamaConfig {
    /// Writes the config as GGUF metadata. Biases need no key: the tensors show them.
    ///
    /// The config that is read back gives bit-identical results, with one exception: for the blended
    /// frequencies of llama3 scaling, an f32 divisor may miss the frequency by its last bit.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for settings without a key in GGUF's Llama: activations other than SiLU,
    /// dynamic RoPE, and YaRN with borders that are not truncated.
    pub fn to_gguf(&self) -> Result<GgufConfig> {
        if self.hidden_act != Activation::Silu {
            return Err(no_key("hidden_act", format!("{:?}, only \"silu\"", self.hidden_act.name())));
        }
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("context_length", self.context_length()),
            ("embedding_length", self.hidden_size),
            ("block_count", self.num_hidden_layers),
            ("feed_forward_length", self.intermediate_size),
            ("attention.head_count", self.num_attention_heads),
            ("attention.head_count_kv", self.num_key_value_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("rope.dimension_count", self.head_dim),
        ];
        let mut metadata = vec![("general.architecture".to_owned(), Value::String("llama".into()))];
        for (key, size) in sizes {
            let size = u32::try_from(size).map_err(|_| no_key(key, format!("{size}")))?;
            metadata.push((format!("llama.{key}"), Value::U32(size)));
        }
        let single = |key: &str, number: f64| (format!("llama.{key}"), Value::F32(number as f32));
        metadata.push(single("attention.layer_norm_rms_epsilon", self.rms_norm_eps));
        metadata.push(single("rope.freq_base", self.rope.theta));
        let scaling = |name: &str| ("llama.rope.scaling.type".to_owned(), Value::String(name.into()));
        let mut rope_freqs = self.rope.freq_factors.clone();
        match &self.rope.scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { factor } => {
                metadata.extend([scaling("linear"), single("rope.scaling.factor", *factor)]);
            }
            RopeScaling::Dynamic { .. } => return Err(no_key("rope_type", "\"dynamic\"")),
            RopeScaling::Llama3 { .. } => rope_freqs = Some(self.llama3_factors()),
            RopeScaling::Yarn {
                factor,
                attention_factor,
                beta_fast,
                beta_slow,
                original_max_position_embeddings,
                truncate,
            } => {
                if !truncate {
                    return Err(no_key("truncate", "false"));
                }
                let original = u32::try_from(*original_max_position_embeddings).unwrap_or(u32::MAX);
                metadata.extend([
                    scaling("yarn"),
                    single("rope.scaling.factor", *factor),
                    ("llama.rope.scaling.original_context_length".to_owned(), Value::U32(original)),
                    single("rope.scaling.yarn_beta_fast", *beta_fast),
                    single("rope.scaling.yarn_beta_slow", *beta_slow),
                ]);
                // llama.cpp computes its own factor and multiplies it by this one.
                let own = yarn_mscale(as_read(*factor as f32), 1.0);
                if own as f32 != *attention_factor as f32 {
                    let over = nearest((attention_factor / own) as f32, *attention_factor as f32, |over| {
                        (own * as_read(over)) as f32
                    });
                    metadata.push(single("rope.scaling.attn_factor", over.into()));
                }
            }
        }
        Ok(GgufConfig { metadata, rope_freqs })
    }

    /// The divisors that turn the plain frequencies into llama3's.
    fn llama3_factors(&self) -> Vec<f32> {
        let mut plain = self.rope.clone();
        plain.scaling = RopeScaling::Default;
        let (scaled, plain) = (self.rope.inv_freq(self.head_dim, 0), plain.inv_freq(self.head_dim, 0));
        let divisor = |(scaled, plain): (f32, f32)| nearest(plain / scaled, scaled, |factor| plain / factor);
        scaled.into_iter().zip(plain).map(divisor).collect()
    }
}

/// Returns the number among `start` and its neighbours for which `read` comes nearest to `wanted`.
fn nearest(start: f32, wanted: f32, read: impl Fn(f32) -> f32) -> f32 {
    let bits = start.to_bits();
    let up = (0..=NEIGHBOURS).map(|step| bits.saturating_add(step));
    let down = (1..=NEIGHBOURS).map(|step| bits.saturating_sub(step));
    let error = |candidate: f32| (read(candidate) - wanted).abs();
    up.chain(down)
        .map(f32::from_bits)
        .filter(|candidate| candidate.is_finite())
        .min_by(|one, other| error(*one).total_cmp(&error(*other)))
        .unwrap_or(start)
}

/// Converts to f64 through the shortest decimal form, as the metadata's getters do.
fn as_read(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

fn no_key(key: &str, value: impl Into<String>) -> Error {
    let value = value.into();
    Error::unsupported(key, format!("{value}: GGUF's Llama has no key for it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_neighbour_is_taken() {
        assert_eq!(nearest(2.0, 0.1, |factor| 0.2 / factor), 2.0);
        // Starts one step off.
        let start = f32::from_bits(3.0_f32.to_bits() + 1);
        assert_eq!(nearest(start, 3.0, |factor| factor), 3.0);
    }

    #[test]
    fn an_f32_becomes_the_f64_that_the_reader_gives() {
        assert_eq!(as_read(1e-5), 1e-5);
        assert_eq!(as_read(8.0), 8.0);
    }
}
