//! The weights as Candle tensors on the device.
//!
//! [`Matrices`] says which matrices stay in their type. Everything else becomes floats of the type that the
//! model computes with.

use super::stored::{Multiplier, StoredMatrix};
use super::{Matrices, on_device};
use crate::checkpoint::background::no_thread;
use crate::checkpoint::tied::{EMBED_TOKENS, LM_HEAD, LmHead, to_candle};
use crate::checkpoint::{Checkpoint, MappedFiles};
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::kernels::WeightType;
use crate::model::layer::{self, LinearName};
use crate::model::{Cancel, Storage};
use crate::sys::reserve;
use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// All weights of a model.
pub(super) struct Weights {
    /// `(vocab_size, hidden_size)`
    pub(super) embed_tokens: Matrix,
    pub(super) layers: Vec<Layer>,
    /// `(hidden_size,)`
    pub(super) norm: Tensor,
    /// `(vocab_size, hidden_size)`
    pub(super) lm_head: Matrix,
    /// The mapped files that stored matrices point into.
    pub(super) files: MappedFiles,
    pub(super) storage: Vec<Storage>,
    /// The stored types of those that have another type on the device.
    pub(super) converted: Vec<WeightType>,
}

/// The weights of one decoder layer.
pub(super) type Layer = layer::Layer<Tensor, Linear>;

/// A projection: `x · wᵀ`, plus the bias where there is one.
pub(super) struct Linear {
    weight: Matrix,
    /// `(out_features,)`
    bias: Option<Tensor>,
}

impl Linear {
    /// `x`: `(rows, in_features)`. Returns `(rows, out_features)`.
    pub(super) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let out = self.weight.forward(x)?;
        match &self.bias {
            Some(bias) => out.broadcast_add(bias),
            None => Ok(out),
        }
    }
}

/// A matrix, `(out_features, in_features)`. It is cheap to clone.
#[derive(Clone)]
pub(super) enum Matrix {
    Float(Tensor),
    Quantized(Arc<QTensor>, QMatMul),
    Stored(Arc<StoredMatrix>),
}

impl Matrix {
    /// The product `x · wᵀ`, in the type of `x`.
    pub(super) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Matrix::Float(weight) => x.matmul(&weight.t()?),
            // Candle's quantised products take f32 on every device.
            Matrix::Quantized(_, product) => product.forward(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype()),
            Matrix::Stored(weight) => x.apply_op1_no_bwd(weight.as_ref()),
        }
    }

    /// The rows with these numbers, as `dtype`.
    pub(super) fn rows(&self, ids: &[u32], dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        match self {
            Matrix::Float(weight) => weight.index_select(&Tensor::new(ids, device)?, 0),
            Matrix::Quantized(weight, _) => weight.embedding(&Tensor::new(ids, device)?)?.to_dtype(dtype),
            Matrix::Stored(weight) => Tensor::new(weight.rows(ids), device)?.reshape((ids.len(), ())),
        }
    }
}

/// Candle's name of a quantised type that it can multiply with.
fn candle_type(dtype: WeightType) -> Option<GgmlDType> {
    Some(match dtype {
        WeightType::Q4_0 => GgmlDType::Q4_0,
        WeightType::Q4_1 => GgmlDType::Q4_1,
        WeightType::Q5_0 => GgmlDType::Q5_0,
        WeightType::Q5_1 => GgmlDType::Q5_1,
        WeightType::Q8_0 => GgmlDType::Q8_0,
        WeightType::Q2_K => GgmlDType::Q2K,
        WeightType::Q3_K => GgmlDType::Q3K,
        WeightType::Q4_K => GgmlDType::Q4K,
        WeightType::Q5_K => GgmlDType::Q5K,
        WeightType::Q6_K => GgmlDType::Q6K,
        _ => return None,
    })
}

/// Whether a matrix that is stored as `stored` stays in its type.
pub(super) fn keeps(matrices: Matrices, stored: WeightType) -> bool {
    match matrices {
        Matrices::Stored { .. } => true,
        Matrices::Quantized => candle_type(stored).is_some(),
        Matrices::Float => false,
    }
}

/// Loads tensors, and counts them by their types on the device.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    dtype: DType,
    matrices: Matrices,
    /// Our kernels, with [`Matrices::Stored`].
    multiplier: Option<Arc<Multiplier>>,
    device: &'a Device,
    cancel: &'a Cancel<'a>,
    types: RefCell<BTreeMap<String, (usize, u64)>>,
    converted: RefCell<BTreeSet<WeightType>>,
}

impl Loader<'_> {
    fn count(&self, dtype: String, bytes: usize) {
        let mut types = self.types.borrow_mut();
        let (count, total) = types.entry(dtype).or_default();
        *count += 1;
        *total += bytes as u64;
    }

    fn float(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        if self.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let stored = self.checkpoint.tensor_with_shape(name, shape)?;
        let bytes = stored.elements() * self.dtype.size_in_bytes();
        let failed = on_device(self.device, format!("{name}: {bytes} bytes"));
        let tensor = to_candle(&stored, self.dtype, self.device).map_err(failed)?;
        stored.forget();
        self.count(format!("{:?}", self.dtype), bytes);
        Ok(tensor)
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let stored = self.checkpoint.tensor_with_shape(name, &[rows, cols])?;
        if let Some(multiplier) = &self.multiplier {
            self.count(stored.dtype().to_string(), stored.bytes().len());
            let matrix = StoredMatrix::new(stored, (rows, cols), Arc::clone(multiplier));
            return Ok(Matrix::Stored(Arc::new(matrix)));
        }
        let Some(dtype) = candle_type(stored.dtype()).filter(|_| self.matrices == Matrices::Quantized) else {
            if stored.dtype().name() != format!("{:?}", self.dtype) {
                self.converted.borrow_mut().insert(stored.dtype());
            }
            return Ok(Matrix::Float(self.float(name, &[rows, cols])?));
        };
        if self.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let failed = on_device(self.device, format!("{name}: {} bytes", stored.bytes().len()));
        let quantized = || -> candle_core::Result<_> {
            let storage = QStorage::from_data(aligned(stored.bytes()), self.device, dtype)?;
            let tensor = Arc::new(QTensor::new(storage, (rows, cols))?);
            Ok(Matrix::Quantized(Arc::clone(&tensor), QMatMul::from_arc(tensor)?))
        };
        let matrix = quantized().map_err(failed)?;
        self.count(stored.dtype().to_string(), stored.bytes().len());
        stored.forget();
        Ok(matrix)
    }

    fn linear(&self, LinearName { weight, bias, rows, cols }: LinearName) -> Result<Linear> {
        Ok(Linear {
            weight: self.matrix(weight, rows, cols)?,
            bias: bias.map(|bias| self.float(bias, &[rows])).transpose()?,
        })
    }
}

/// The bytes at an address that Candle can read blocks from.
fn aligned(bytes: &[u8]) -> Cow<'_, [u8]> {
    if bytes.as_ptr().align_offset(align_of::<u64>()) == 0 {
        return Cow::Borrowed(bytes);
    }
    // An allocation of this size begins at a multiple of 8 on every platform that Candle runs on.
    Cow::Owned(bytes.to_vec())
}

impl Weights {
    /// Loads the tensors that `config` requires.
    ///
    /// # Errors
    /// As [`super::TensorModel::new`].
    pub(super) fn load(
        config: &LlamaConfig,
        checkpoint: &Checkpoint,
        lm_head: LmHead,
        (dtype, matrices): (DType, Matrices),
        device: &Device,
        cancel: &Cancel,
    ) -> Result<Self> {
        let multiplier = match matrices {
            Matrices::Stored { isa, threads, exact } => {
                reserve::check_threads(threads)?;
                Some(Arc::new(Multiplier::new(isa, threads, exact).map_err(no_thread)?))
            }
            _ => None,
        };
        let files = if multiplier.is_some() { checkpoint.files() } else { MappedFiles::default() };
        let (types, converted) = Default::default();
        let loader = Loader { checkpoint, dtype, matrices, multiplier, device, cancel, types, converted };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let layer = |index| {
            Layer::load(
                config,
                checkpoint,
                index,
                |name, len| loader.float(name, &[len]),
                |name| loader.linear(name),
            )
        };
        let embed_tokens = loader.matrix(EMBED_TOKENS, vocab, hidden)?;
        let lm_head = match lm_head {
            LmHead::Tied => embed_tokens.clone(),
            LmHead::Separate => loader.matrix(LM_HEAD, vocab, hidden)?,
        };
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        let norm = loader.float("model.norm.weight", &[hidden])?;
        let storage = |(dtype, (count, bytes))| Storage { dtype, count, bytes };
        Ok(Weights {
            embed_tokens,
            layers,
            norm,
            lm_head,
            files,
            storage: loader.types.into_inner().into_iter().map(storage).collect(),
            converted: loader.converted.into_inner().into_iter().collect(),
        })
    }
}
