//! Plans which tensors are written, under which names.

use super::is_gguf;
use super::mixture::{Choice, FileType, Mixture};
use crate::checkpoint::gguf::TensorSpec;
use crate::checkpoint::names::{hf_to_gguf, permuted_by};
use crate::checkpoint::tied::{EMBED_TOKENS, LM_HEAD, LmHead};
use crate::checkpoint::{TensorInfo, names};
use crate::config::ROPE_FREQS;
use crate::error::{Error, Result};
use crate::kernels::WeightType;
use crate::llama::opened::Opened;
use std::collections::BTreeMap;

/// A tensor of the new file.
pub(super) struct Planned {
    pub(super) spec: TensorSpec,
    pub(super) data: Data,
}

/// The source of a tensor's elements.
pub(super) enum Data {
    /// These numbers.
    Values(Vec<f32>),
    /// The checkpoint's tensor of this name (Hugging Face's spelling). With `head_dim`, its rows are
    /// reordered as GGUF has them.
    Stored { name: String, head_dim: Option<usize> },
}

impl Planned {
    pub(super) fn elements(&self) -> u64 {
        self.spec.shape.iter().map(|&size| size as u64).product()
    }
}

/// The tensor of the divisors of the RoPE frequencies.
pub(super) fn rope_freqs(values: Vec<f32>) -> Planned {
    let spec = TensorSpec { name: ROPE_FREQS.into(), shape: vec![values.len()], dtype: WeightType::F32 };
    Planned { spec, data: Data::Values(values) }
}

/// All tensors of the model, in the order in which a forward pass uses them.
pub(super) fn plan(
    opened: &Opened,
    file_type: FileType,
    allow_requantize: bool,
    warnings: &mut Vec<String>,
    notes: &mut Vec<String>,
) -> Result<Vec<Planned>> {
    let infos = opened.checkpoint.infos().into_iter().map(|info| (info.name.clone(), info)).collect();
    let mut planner = Planner {
        opened,
        mixture: Mixture::new(file_type, &opened.config, opened.head.lm_head),
        allow_requantize,
        left: infos,
        planned: Vec::new(),
        replaced: BTreeMap::new(),
    };
    let config = &opened.config;
    let (vocab, hidden, inner) = (config.vocab_size, config.hidden_size, config.intermediate_size);
    let query = config.num_attention_heads * config.head_dim;
    let key_value = config.num_key_value_heads * config.head_dim;
    planner.matrix(EMBED_TOKENS, vocab, hidden)?;
    for layer in 0..config.num_hidden_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        planner.vector(&name("input_layernorm.weight"), hidden)?;
        let attention =
            [("q", query, hidden), ("k", key_value, hidden), ("v", key_value, hidden), ("o", hidden, query)];
        for (part, rows, cols) in attention {
            planner.linear(&name(&format!("self_attn.{part}_proj")), rows, cols, config.attention_bias)?;
        }
        planner.vector(&name("post_attention_layernorm.weight"), hidden)?;
        for (part, rows, cols) in [("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)] {
            planner.linear(&name(&format!("mlp.{part}_proj")), rows, cols, config.mlp_bias)?;
        }
    }
    planner.vector("model.norm.weight", hidden)?;
    if opened.head.lm_head == LmHead::Separate {
        planner.matrix(LM_HEAD, vocab, hidden)?;
    }
    warnings.extend(planner.left_out());
    notes.extend(planner.replaced.iter().map(|((wanted, dtype), (count, first))| {
        format!(
            "{count} tensors are stored as {dtype}, because their rows cannot be cut into whole blocks of \
             {wanted}; the first is {first}"
        )
    }));
    Ok(planner.planned)
}

struct Planner<'a> {
    opened: &'a Opened,
    mixture: Mixture,
    allow_requantize: bool,
    /// Tensors that are not planned yet.
    left: BTreeMap<String, TensorInfo>,
    planned: Vec<Planned>,
    /// By wanted and actual type: how many matrices cannot be stored as wanted, and the first one's name.
    replaced: BTreeMap<(WeightType, WeightType), (usize, String)>,
}

impl Planner<'_> {
    /// Plans a projection; `name` is without `.weight`. In GGUF each projection may have a bias or not,
    /// whatever the others have.
    fn linear(&mut self, name: &str, rows: usize, cols: usize, has_bias: bool) -> Result<()> {
        self.matrix(&format!("{name}.weight"), rows, cols)?;
        let bias = format!("{name}.bias");
        if has_bias && (!is_gguf(&self.opened.checkpoint) || self.left.contains_key(&bias)) {
            self.vector(&bias, rows)?;
        }
        Ok(())
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<()> {
        let Choice { wanted, dtype } = self.mixture.choose(name, cols);
        if dtype != wanted {
            let (count, _) = self.replaced.entry((wanted, dtype)).or_insert_with(|| (0, name.into()));
            *count += 1;
        }
        self.add(name, vec![rows, cols], dtype)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<()> {
        self.add(name, vec![len], WeightType::F32)
    }

    fn add(&mut self, name: &str, shape: Vec<usize>, dtype: WeightType) -> Result<()> {
        let checkpoint = &self.opened.checkpoint;
        checkpoint.check_shape(name, &shape)?;
        let path = || checkpoint.path().to_owned();
        let info = self.left.remove(name);
        let info = info.ok_or_else(|| Error::MissingTensor { tensor: name.into(), path: path() })?;
        let stored = WeightType::ALL.into_iter().find(|dtype| dtype.name() == info.dtype);
        let stored = stored.ok_or_else(|| Error::TensorType {
            tensor: name.into(),
            dtype: info.dtype.clone(),
            path: path(),
        })?;
        // As in llama.cpp, quantising twice must be allowed explicitly. Converting to F32 loses nothing.
        let is_requantized = stored.block_len() > 1 && stored != dtype && dtype != WeightType::F32;
        if is_requantized && !self.allow_requantize {
            let value = format!(
                "{name} is already stored as {stored}, and converting it to {dtype} would lose more \
                 precision than converting the original; quantise the original, or give \
                 allow_requantize=True, --allow-requantize"
            );
            return Err(Error::unsupported("requantizing", value));
        }
        let head_dim = permuted_by(name).map(|_| self.opened.config.head_dim);
        let gguf_name =
            hf_to_gguf(name).ok_or_else(|| Error::Internal { reason: format!("GGUF has no {name}") })?;
        self.planned.push(Planned {
            spec: TensorSpec { name: gguf_name, shape, dtype },
            data: Data::Stored { name: name.into(), head_dim },
        });
        Ok(())
    }

    /// A warning of tensors that are not part of the model.
    fn left_out(&self) -> Option<String> {
        // The config reads the first. The choice of the head was reported when it was made. The last can be
        // computed from the config.
        let is_harmless =
            |name: &str| name == ROPE_FREQS || name == LM_HEAD || name.ends_with(names::INV_FREQ);
        let left: Vec<&str> =
            self.left.keys().map(String::as_str).filter(|name| !is_harmless(name)).collect();
        let example = left.first()?;
        Some(format!("{} tensors that the model does not use are left out, such as {example}", left.len()))
    }
}
