//! The weights of a decoder layer, as in `modeling_llama.py`: their names and shapes, and which have a bias.
//! What a weight is in memory is for the model to say.

use crate::checkpoint::{Checkpoint, Format};
use crate::config::LlamaConfig;
use crate::error::Result;

/// The weights of one decoder layer.
pub(super) struct Layer<Norm, Linear> {
    /// `(hidden_size,)`
    pub(super) input_layernorm: Norm,
    /// `(num_attention_heads * head_dim, hidden_size)`
    pub(super) q_proj: Linear,
    /// `(num_key_value_heads * head_dim, hidden_size)`
    pub(super) k_proj: Linear,
    /// As `k_proj`.
    pub(super) v_proj: Linear,
    /// `(hidden_size, num_attention_heads * head_dim)`
    pub(super) o_proj: Linear,
    /// `(hidden_size,)`
    pub(super) post_attention_layernorm: Norm,
    /// `(intermediate_size, hidden_size)`
    pub(super) gate_proj: Linear,
    /// As `gate_proj`.
    pub(super) up_proj: Linear,
    /// `(hidden_size, intermediate_size)`
    pub(super) down_proj: Linear,
}

/// A projection to load.
pub(super) struct LinearName<'a> {
    /// The name of the matrix.
    pub(super) weight: &'a str,
    /// The name of the bias, `(rows,)`, if there is one.
    pub(super) bias: Option<&'a str>,
    /// `out_features`
    pub(super) rows: usize,
    /// `in_features`
    pub(super) cols: usize,
}

impl<Norm, Linear> Layer<Norm, Linear> {
    /// Loads layer `index`. `norm` loads a vector by its name and length.
    ///
    /// # Errors
    /// Those of `norm` and `linear`.
    pub(super) fn load(
        config: &LlamaConfig,
        checkpoint: &Checkpoint,
        index: usize,
        norm: impl Fn(&str, usize) -> Result<Norm>,
        linear: impl Fn(LinearName) -> Result<Linear>,
    ) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let query = config.num_attention_heads * config.head_dim;
        let key_value = config.num_key_value_heads * config.head_dim;
        let norm = |part: &str| norm(&format!("model.layers.{index}.{part}.weight"), hidden);
        let linear = |part: &str, rows, cols, has_bias| {
            let (weight, bias) =
                (format!("model.layers.{index}.{part}.weight"), format!("model.layers.{index}.{part}.bias"));
            // In GGUF, the config only says that some projection has a bias. The file shows which ones have.
            let has_bias = has_bias && (checkpoint.format() != Format::Gguf || checkpoint.contains(&bias));
            let bias = has_bias.then_some(bias.as_str());
            linear(LinearName { weight: &weight, bias, rows, cols })
        };
        let attention =
            |part: &str, rows, cols| linear(&format!("self_attn.{part}"), rows, cols, config.attention_bias);
        let mlp = |part: &str, rows, cols| linear(&format!("mlp.{part}"), rows, cols, config.mlp_bias);
        Ok(Layer {
            input_layernorm: norm("input_layernorm")?,
            q_proj: attention("q_proj", query, hidden)?,
            k_proj: attention("k_proj", key_value, hidden)?,
            v_proj: attention("v_proj", key_value, hidden)?,
            o_proj: attention("o_proj", hidden, query)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            gate_proj: mlp("gate_proj", inner, hidden)?,
            up_proj: mlp("up_proj", inner, hidden)?,
            down_proj: mlp("down_proj", hidden, inner)?,
        })
    }
}
