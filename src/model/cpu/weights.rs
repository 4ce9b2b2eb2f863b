//! The tensors of a Llama, in their storage types, with the shapes that the config asks for.

use crate::checkpoint::tied::{EMBED_TOKENS, LM_HEAD, LmHead};
use crate::checkpoint::{Checkpoint, Tensor};
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::kernels::{WeightRows, WeightType};
use crate::model::Storage;
use half::{bf16, f16};
use std::collections::BTreeMap;

/// All weights of a model.
pub(super) struct Weights {
    /// `(vocab_size, hidden_size)`
    pub(super) embed_tokens: Matrix,
    pub(super) layers: Vec<Layer>,
    /// `(hidden_size,)`
    pub(super) norm: Vec<f32>,
    /// `(vocab_size, hidden_size)`; None if the embedding is the head.
    lm_head: Option<Matrix>,
}

/// The weights of one decoder layer.
pub(super) struct Layer {
    /// `(hidden_size,)`
    pub(super) input_layernorm: Vec<f32>,
    /// `(num_attention_heads * head_dim, hidden_size)`
    pub(super) q_proj: Matrix,
    /// `(num_key_value_heads * head_dim, hidden_size)`
    pub(super) k_proj: Matrix,
    /// As `k_proj`.
    pub(super) v_proj: Matrix,
    /// `(hidden_size, num_attention_heads * head_dim)`
    pub(super) o_proj: Matrix,
    /// `(hidden_size,)`
    pub(super) post_attention_layernorm: Vec<f32>,
    /// `(intermediate_size, hidden_size)`
    pub(super) gate_proj: Matrix,
    /// As `gate_proj`.
    pub(super) up_proj: Matrix,
    /// `(hidden_size, intermediate_size)`
    pub(super) down_proj: Matrix,
}

/// A weight matrix: the file's own bytes, or a copy in another type.
pub(super) struct Matrix {
    dtype: WeightType,
    rows: usize,
    cols: usize,
    data: Data,
}

enum Data {
    Stored(Tensor),
    Converted(Vec<u8>),
}

impl Matrix {
    /// The view that the kernels take.
    pub(super) fn view(&self) -> WeightRows<'_> {
        WeightRows::new(self.dtype, self.bytes(), self.rows, self.cols)
            .expect("the shape was checked when the matrix was loaded")
    }

    fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Stored(tensor) => tensor.bytes(),
            Data::Converted(bytes) => bytes,
        }
    }
}

/// Reads tensors, and counts what they take.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    dtype: Option<WeightType>,
}

impl Loader<'_> {
    /// A norm's weight, widened: it is tiny and used for every row.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        Ok(self.checkpoint.tensor_with_shape(name, &[len])?.to_f32())
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let tensor = self.checkpoint.tensor_with_shape(name, &[rows, cols])?;
        let stored = tensor.dtype();
        let dtype = self.dtype.unwrap_or(stored);
        let data =
            if dtype == stored { Data::Stored(tensor) } else { Data::Converted(convert(&tensor, dtype)?) };
        let matrix = Matrix { dtype, rows, cols, data };
        if WeightRows::new(dtype, matrix.bytes(), rows, cols).is_none() {
            return Err(Error::TensorType {
                tensor: name.into(),
                dtype: format!("{dtype} in rows of {cols}"),
                path: self.checkpoint.path().into(),
            });
        }
        Ok(matrix)
    }
}

/// The tensor's elements in F32, F16 or BF16.
fn convert(tensor: &Tensor, dtype: WeightType) -> Result<Vec<u8>> {
    let len = dtype.bytes_for(tensor.elements()).unwrap_or(usize::MAX);
    let mut bytes = Vec::new();
    let reserved = bytes.try_reserve_exact(len);
    reserved
        .map_err(|_| Error::Generation { reason: format!("no memory to convert a tensor to {dtype}") })?;
    let cols = tensor.shape().last().copied().unwrap_or(1);
    let mut row = vec![0.0; cols];
    for index in 0..tensor.elements() / cols {
        tensor.row_to_f32(index, &mut row);
        match dtype {
            WeightType::F32 => bytes.extend(row.iter().flat_map(|x| x.to_le_bytes())),
            WeightType::F16 => bytes.extend(row.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes())),
            WeightType::BF16 => bytes.extend(row.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes())),
            WeightType::Q8_0 | WeightType::Q4_0 | WeightType::Q4_1 => {
                return Err(Error::argument("dtype", format!("{dtype} is no float type")));
            }
        }
    }
    Ok(bytes)
}

impl Weights {
    pub(super) fn load(
        config: &LlamaConfig,
        checkpoint: &Checkpoint,
        lm_head: LmHead,
        dtype: Option<WeightType>,
    ) -> Result<Self> {
        let loader = Loader { checkpoint, dtype };
        let (vocab, hidden, inner) = (config.vocab_size, config.hidden_size, config.intermediate_size);
        let query = config.num_attention_heads * config.head_dim;
        let key_value = config.num_key_value_heads * config.head_dim;
        let layer = |index: usize| {
            let name = |part: &str| format!("model.layers.{index}.{part}.weight");
            let matrix = |part: &str, rows, cols| loader.matrix(&name(part), rows, cols);
            Ok(Layer {
                input_layernorm: loader.vector(&name("input_layernorm"), hidden)?,
                q_proj: matrix("self_attn.q_proj", query, hidden)?,
                k_proj: matrix("self_attn.k_proj", key_value, hidden)?,
                v_proj: matrix("self_attn.v_proj", key_value, hidden)?,
                o_proj: matrix("self_attn.o_proj", hidden, query)?,
                post_attention_layernorm: loader.vector(&name("post_attention_layernorm"), hidden)?,
                gate_proj: matrix("mlp.gate_proj", inner, hidden)?,
                up_proj: matrix("mlp.up_proj", inner, hidden)?,
                down_proj: matrix("mlp.down_proj", hidden, inner)?,
            })
        };
        Ok(Weights {
            embed_tokens: loader.matrix(EMBED_TOKENS, vocab, hidden)?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            norm: loader.vector("model.norm.weight", hidden)?,
            lm_head: match lm_head {
                LmHead::Tied => None,
                LmHead::Separate => Some(loader.matrix(LM_HEAD, vocab, hidden)?),
            },
        })
    }

    /// The output head, `(vocab_size, hidden_size)`.
    pub(super) fn lm_head(&self) -> &Matrix {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    pub(super) fn storage(&self) -> Vec<Storage> {
        let mut types = BTreeMap::<WeightType, (usize, u64)>::new();
        let mut add = |dtype, bytes: usize| {
            let (count, total) = types.entry(dtype).or_default();
            *count += 1;
            *total += bytes as u64;
        };
        for matrix in [Some(&self.embed_tokens), self.lm_head.as_ref()].into_iter().flatten() {
            add(matrix.dtype, matrix.bytes().len());
        }
        add(WeightType::F32, size_of_val(&self.norm[..]));
        for layer in &self.layers {
            let attention = [&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj];
            let mlp = [&layer.gate_proj, &layer.up_proj, &layer.down_proj];
            for matrix in attention.into_iter().chain(mlp) {
                add(matrix.dtype, matrix.bytes().len());
            }
            for norm in [&layer.input_layernorm, &layer.post_attention_layernorm] {
                add(WeightType::F32, size_of_val(&norm[..]));
            }
        }
        let storage =
            |(dtype, (count, bytes)): (WeightType, _)| Storage { dtype: dtype.to_string(), count, bytes };
        types.into_iter().map(storage).collect()
    }
}
