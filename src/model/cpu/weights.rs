//! The tensors of a Llama, in their storage types, with the shapes that the config asks for.
//!
//! Float matrices stay in the file's map. Those of blocks of 32 are packed for products with 8-bit
//! activations, unless every product is to be exact.

use crate::checkpoint::tied::{EMBED_TOKENS, LM_HEAD, LmHead};
use crate::checkpoint::{Checkpoint, Format, MappedFiles, Tensor};
use crate::config::{LlamaConfig, ROPE_FREQS};
use crate::error::{Error, Result};
use crate::kernels::{Cancel, Kernels, PackedRows, WeightRows, WeightType};
use crate::model::Storage;
use half::{bf16, f16};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet};

/// All weights of a model.
pub(super) struct Weights {
    /// `(vocab_size, hidden_size)`
    pub(super) embed_tokens: Matrix,
    pub(super) layers: Vec<Layer>,
    /// `(hidden_size,)`
    pub(super) norm: Vec<f32>,
    /// `(vocab_size, hidden_size)`; None if the embedding is the head.
    lm_head: Option<Matrix>,
    /// What the stored matrices lie in.
    pub(super) files: MappedFiles,
    /// See [`super::CpuModel::unused_tensors`].
    pub(super) unused: Vec<String>,
}

/// The weights of one decoder layer.
pub(super) struct Layer {
    /// `(hidden_size,)`
    pub(super) input_layernorm: Vec<f32>,
    /// `(num_attention_heads * head_dim, hidden_size)`
    pub(super) q_proj: Linear,
    /// `(num_key_value_heads * head_dim, hidden_size)`
    pub(super) k_proj: Linear,
    /// As `k_proj`.
    pub(super) v_proj: Linear,
    /// `(hidden_size, num_attention_heads * head_dim)`
    pub(super) o_proj: Linear,
    /// `(hidden_size,)`
    pub(super) post_attention_layernorm: Vec<f32>,
    /// `(intermediate_size, hidden_size)`
    pub(super) gate_proj: Linear,
    /// As `gate_proj`.
    pub(super) up_proj: Linear,
    /// `(hidden_size, intermediate_size)`
    pub(super) down_proj: Linear,
}

/// A projection: `x · wᵀ`, plus the bias where there is one.
pub(super) struct Linear {
    /// `(out_features, in_features)`
    pub(super) weight: Matrix,
    /// `(out_features,)`
    pub(super) bias: Option<Vec<f32>>,
}

/// A weight matrix: the file's own bytes, or a copy in another type or layout.
pub(super) struct Matrix {
    dtype: WeightType,
    rows: usize,
    cols: usize,
    data: Data,
}

enum Data {
    Stored(Tensor),
    Converted(Vec<u8>),
    Packed(PackedRows),
}

/// A matrix as the kernels take it.
pub(super) enum View<'a> {
    Rows(WeightRows<'a>),
    Packed(&'a PackedRows),
}

impl Matrix {
    /// The view that the kernels take.
    pub(super) fn view(&self) -> View<'_> {
        let bytes = match &self.data {
            Data::Stored(tensor) => tensor.bytes(),
            Data::Converted(bytes) => bytes,
            Data::Packed(packed) => return View::Packed(packed),
        };
        let rows = WeightRows::new(self.dtype, bytes, self.rows, self.cols);
        View::Rows(rows.expect("the shape was checked when the matrix was loaded"))
    }

    /// Writes row `row` as f32 to `out`, `(cols,)`.
    pub(super) fn row_to_f32(&self, kernels: &Kernels, row: usize, out: &mut [f32]) {
        match self.view() {
            View::Rows(rows) => kernels.dequantize(rows, row, out),
            View::Packed(packed) => packed.row_to_f32(row, out),
        }
    }

    fn len_bytes(&self) -> usize {
        match &self.data {
            Data::Stored(tensor) => tensor.bytes().len(),
            Data::Converted(bytes) => bytes.len(),
            Data::Packed(packed) => packed.len_bytes(),
        }
    }
}

/// Reads tensors, and remembers which.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    dtype: Option<WeightType>,
    /// Those that pack what they can, if anything is to be packed.
    packer: Option<&'a Kernels>,
    used: RefCell<HashSet<String>>,
    /// Whether a matrix still lies in the files.
    stored: Cell<bool>,
}

impl Loader<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.used.borrow_mut().insert(name.into());
        self.checkpoint.tensor_with_shape(name, shape)
    }

    /// Tensors that were not asked for and that mean something.
    fn unused(&self) -> Vec<String> {
        let used = self.used.borrow();
        let derived = |name: &str| {
            // Buffers that older versions of transformers saved, what the config has read, and a head
            // whose choice has been reported.
            name.ends_with(".rotary_emb.inv_freq") || name == ROPE_FREQS || name == LM_HEAD
        };
        let names = self.checkpoint.infos().into_iter().map(|info| info.name);
        names.filter(|name| !used.contains(name) && !derived(name)).collect()
    }

    /// A norm's weight or a bias, widened: it is tiny and used for every row.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        Ok(self.tensor(name, &[len])?.to_f32())
    }

    /// `name` without `.weight`. `has_bias` is config.json's word; in GGUF each bias that is there counts.
    fn linear(&self, name: &str, rows: usize, cols: usize, has_bias: bool) -> Result<Linear> {
        let bias = format!("{name}.bias");
        let has_bias =
            has_bias && (self.checkpoint.format() != Format::Gguf || self.checkpoint.contains(&bias));
        Ok(Linear {
            weight: self.matrix(&format!("{name}.weight"), rows, cols)?,
            bias: if has_bias { Some(self.vector(&bias, rows)?) } else { None },
        })
    }

    /// A matrix that is multiplied with: packed if it can be.
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let matrix = self.table(name, rows, cols)?;
        let (Some(kernels), View::Rows(weight)) = (self.packer, matrix.view()) else { return Ok(matrix) };
        let fill = |row: usize, out: &mut [u8]| out.copy_from_slice(weight.row(row));
        let packed = kernels.pack(matrix.dtype, rows, cols, &Cancel::never(), &fill);
        let packed = packed.map_err(|_| Error::Generation { reason: format!("no memory to pack {name}") })?;
        Ok(match packed {
            Some(packed) => Matrix { data: Data::Packed(packed), ..matrix },
            None => self.kept(matrix),
        })
    }

    /// A matrix of which single rows are read.
    fn rows(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        Ok(self.kept(self.table(name, rows, cols)?))
    }

    /// Remembers that what the matrix lies in is still needed.
    fn kept(&self, matrix: Matrix) -> Matrix {
        if matches!(matrix.data, Data::Stored(_)) {
            self.stored.set(true);
        }
        matrix
    }

    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let tensor = self.tensor(name, &[rows, cols])?;
        let stored = tensor.dtype();
        let dtype = self.dtype.unwrap_or(stored);
        if dtype.bytes_for(cols).is_none() {
            return Err(Error::TensorType {
                tensor: name.into(),
                dtype: format!("{dtype} in rows of {cols}"),
                path: self.checkpoint.path().into(),
            });
        }
        let data =
            if dtype == stored { Data::Stored(tensor) } else { Data::Converted(convert(&tensor, dtype)?) };
        Ok(Matrix { dtype, rows, cols, data })
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
            _ => {
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
        packer: Option<&Kernels>,
    ) -> Result<Self> {
        let (used, stored) = (RefCell::default(), Cell::default());
        let loader = Loader { checkpoint, dtype, packer, used, stored };
        let (vocab, hidden, inner) = (config.vocab_size, config.hidden_size, config.intermediate_size);
        let query = config.num_attention_heads * config.head_dim;
        let key_value = config.num_key_value_heads * config.head_dim;
        let layer = |index: usize| {
            let name = |part: &str| format!("model.layers.{index}.{part}");
            let norm = |part: &str| loader.vector(&name(&format!("{part}.weight")), hidden);
            let attention = |part: &str, rows, cols| {
                loader.linear(&name(&format!("self_attn.{part}")), rows, cols, config.attention_bias)
            };
            let mlp = |part: &str, rows, cols| {
                loader.linear(&name(&format!("mlp.{part}")), rows, cols, config.mlp_bias)
            };
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
        };
        let (embed_tokens, lm_head) = match lm_head {
            LmHead::Tied => (loader.matrix(EMBED_TOKENS, vocab, hidden)?, None),
            LmHead::Separate => {
                (loader.rows(EMBED_TOKENS, vocab, hidden)?, Some(loader.matrix(LM_HEAD, vocab, hidden)?))
            }
        };
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        Ok(Weights {
            embed_tokens,
            layers,
            norm: loader.vector("model.norm.weight", hidden)?,
            lm_head,
            files: if loader.stored.get() { checkpoint.files() } else { MappedFiles::default() },
            unused: loader.unused(),
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
            add(matrix.dtype, matrix.len_bytes());
        }
        add(WeightType::F32, size_of_val(&self.norm[..]));
        for layer in &self.layers {
            let attention = [&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj];
            let mlp = [&layer.gate_proj, &layer.up_proj, &layer.down_proj];
            for linear in attention.into_iter().chain(mlp) {
                add(linear.weight.dtype, linear.weight.len_bytes());
                if let Some(bias) = &linear.bias {
                    add(WeightType::F32, size_of_val(&bias[..]));
                }
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
