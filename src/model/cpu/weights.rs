//! Loads the tensors of a Llama in their storage types and checks their shapes against the config.
//!
//! Float matrices stay in the memory-mapped file. Quantised matrices are packed for products with 8-bit
//! activations, except in exact mode.

use crate::checkpoint::tied::{EMBED_TOKENS, LM_HEAD, LmHead};
use crate::checkpoint::{Checkpoint, MappedFiles, Tensor};
use crate::config::{LlamaConfig, ROPE_FREQS};
use crate::error::{Error, Result};
use crate::kernels::quantize::{Unstorable, quantize_row};
use crate::kernels::{Cancel, Kernels, NoMemory, PackedRows, Weight, WeightRows, WeightType};
use crate::model::Storage;
use crate::model::layer::{self, LinearName};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet};
use std::sync::{Mutex, PoisonError};

/// All weights of a model.
pub(super) struct Weights {
    /// `(vocab_size, hidden_size)`
    pub(super) embed_tokens: Matrix,
    pub(super) layers: Vec<Layer>,
    /// `(hidden_size,)`
    pub(super) norm: Vec<f32>,
    /// `(vocab_size, hidden_size)`; None if the embedding is the head.
    lm_head: Option<Matrix>,
    /// The mapped files that stored matrices point into.
    pub(super) files: MappedFiles,
    /// See [`super::CpuModel::unused_tensors`].
    pub(super) unused: Vec<String>,
}

/// The weights of one decoder layer.
pub(super) type Layer = layer::Layer<Vec<f32>, Linear>;

/// A projection: `x · wᵀ`, plus the bias where there is one.
pub(super) struct Linear {
    /// `(out_features, in_features)`
    pub(super) weight: Matrix,
    /// `(out_features,)`
    pub(super) bias: Option<Vec<f32>>,
}

/// A weight matrix: bytes of the mapped file, or a copy in another type or layout.
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

impl Matrix {
    /// A view for the kernels.
    pub(super) fn view(&self) -> Weight<'_> {
        let bytes = match &self.data {
            Data::Stored(tensor) => tensor.bytes(),
            Data::Converted(bytes) => bytes,
            Data::Packed(packed) => return Weight::Packed(packed),
        };
        let rows = WeightRows::new(self.dtype, bytes, self.rows, self.cols);
        Weight::Rows(rows.expect("the shape was checked when the matrix was loaded"))
    }

    /// Writes row `row` as f32 to `out`, `(cols,)`.
    pub(super) fn row_to_f32(&self, kernels: &Kernels, row: usize, out: &mut [f32]) {
        match self.view() {
            Weight::Rows(rows) => kernels.dequantize(rows, row, out),
            Weight::Packed(packed) => packed.row_to_f32(row, out),
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

/// The types of the weights in memory.
#[derive(Clone, Debug, Default)]
pub struct Types {
    /// F32, F16 or BF16, for all matrices; None keeps the checkpoint's types.
    pub dtype: Option<WeightType>,
    /// Types of quant blocks for single matrices, by name. They apply to matrices that are stored as floats.
    pub quantize: BTreeMap<String, WeightType>,
}

impl Types {
    /// The type in memory of a matrix that is stored as `stored`.
    pub fn in_memory(&self, name: &str, stored: WeightType) -> WeightType {
        let quantize = self.quantize.get(name).filter(|_| stored.block_len() == 1);
        quantize.copied().or(self.dtype).unwrap_or(stored)
    }
}

/// Loads tensors and records their names.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    types: Types,
    /// For converting and packing; None leaves every matrix as it is stored.
    kernels: Option<&'a Kernels>,
    /// Whether to pack the matrices that can be packed.
    packs: bool,
    cancel: &'a Cancel<'a>,
    used: RefCell<HashSet<String>>,
    /// Whether any matrix points into the mapped files.
    stored: Cell<bool>,
}

impl Loader<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.used.borrow_mut().insert(name.into());
        self.checkpoint.tensor_with_shape(name, shape)
    }

    /// Names of the tensors that were not loaded, without those that are known to be harmless.
    fn unused(&self) -> Vec<String> {
        let used = self.used.borrow();
        let is_harmless = |name: &str| {
            // Older versions of transformers saved the first. The config reads the second. The choice of
            // the head was reported when it was made.
            name.ends_with(".rotary_emb.inv_freq") || name == ROPE_FREQS || name == LM_HEAD
        };
        let names = self.checkpoint.infos().into_iter().map(|info| info.name);
        names.filter(|name| !used.contains(name) && !is_harmless(name)).collect()
    }

    /// Loads a norm's weight or a bias as f32: it is tiny and used for every row.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        Ok(self.tensor(name, &[len])?.to_f32())
    }

    fn linear(&self, LinearName { weight, bias, rows, cols }: LinearName) -> Result<Linear> {
        Ok(Linear {
            weight: self.matrix(weight, rows, cols)?,
            bias: bias.map(|bias| self.vector(bias, rows)).transpose()?,
        })
    }

    /// Loads a matrix that is multiplied. It is packed if possible.
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        self.table(name, rows, cols, true)
    }

    /// Loads a matrix. `multiplied` is false for an embedding of which only single rows are read.
    fn table(&self, name: &str, rows: usize, cols: usize, multiplied: bool) -> Result<Matrix> {
        let tensor = self.tensor(name, &[rows, cols])?;
        let stored = tensor.dtype();
        let dtype = self.types.in_memory(name, stored);
        let path = || self.checkpoint.path().into();
        let Some(row_bytes) = dtype.bytes_for(cols) else {
            let dtype = format!("{dtype} in rows of {cols}");
            return Err(Error::TensorType { tensor: name.into(), dtype, path: path() });
        };
        let refused = Mutex::new(None);
        let fill = |row: usize, out: &mut [u8]| {
            if dtype == stored {
                out.copy_from_slice(&tensor.bytes()[row * row_bytes..][..row_bytes]);
                return;
            }
            let mut numbers = vec![0.0; cols];
            tensor.row_to_f32(row, &mut numbers);
            if let Err(number) = quantize_row(dtype, &numbers, out) {
                refused.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert((row, number));
            }
        };
        let data = self.converted(dtype, stored, rows, cols, multiplied, &fill);
        let data = data.map_err(|error| Error::Generation {
            reason: format!("cannot hold {name} as {dtype}: {error}"),
        })?;
        if self.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if let Some((row, Unstorable { index, value })) =
            refused.into_inner().unwrap_or_else(PoisonError::into_inner)
        {
            let (tensor, at, dtype) = (name.into(), vec![row, index], dtype.name());
            return Err(Error::TensorValue { tensor, value, at, dtype, path: path() });
        }
        let data = match data {
            Some(data) => {
                tensor.forget();
                data
            }
            None => {
                self.stored.set(true);
                Data::Stored(tensor)
            }
        };
        Ok(Matrix { dtype, rows, cols, data })
    }

    /// Converts or packs a matrix. Returns None if it stays as it is stored. `fill` writes one row as
    /// `dtype`. After a cancellation the result is incomplete and must not be used.
    fn converted(
        &self,
        dtype: WeightType,
        stored: WeightType,
        rows: usize,
        cols: usize,
        multiplied: bool,
        fill: &(dyn Fn(usize, &mut [u8]) + Sync),
    ) -> std::result::Result<Option<Data>, NoMemory> {
        let (Some(kernels), Some(row_bytes)) = (self.kernels, dtype.bytes_for(cols)) else { return Ok(None) };
        if multiplied
            && self.packs
            && let Some(packed) = kernels.pack(dtype, rows, cols, self.cancel, fill)?
        {
            return Ok(Some(Data::Packed(packed)));
        }
        if dtype == stored {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(rows * row_bytes).map_err(|_| NoMemory(rows * row_bytes))?;
        bytes.resize(rows * row_bytes, 0);
        kernels.pool().for_each_chunk(&mut bytes, row_bytes, self.cancel, &|row, out| fill(row, out));
        Ok(Some(Data::Converted(bytes)))
    }
}

impl Weights {
    pub(super) fn load(
        config: &LlamaConfig,
        checkpoint: &Checkpoint,
        lm_head: LmHead,
        types: Types,
        kernels: Option<&Kernels>,
        packs: bool,
        cancel: &Cancel,
    ) -> Result<Self> {
        let (used, stored) = (RefCell::default(), Cell::default());
        let loader = Loader { checkpoint, types, kernels, packs, cancel, used, stored };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let layer = |index| {
            Layer::load(
                config,
                checkpoint,
                index,
                |name, len| loader.vector(name, len),
                |name| loader.linear(name),
            )
        };
        let (embed_tokens, lm_head) = match lm_head {
            LmHead::Tied => (loader.matrix(EMBED_TOKENS, vocab, hidden)?, None),
            LmHead::Separate => (
                loader.table(EMBED_TOKENS, vocab, hidden, false)?,
                Some(loader.matrix(LM_HEAD, vocab, hidden)?),
            ),
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
