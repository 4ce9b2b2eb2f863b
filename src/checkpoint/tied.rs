//! Decides which tensor is the output head, and makes a `VarBuilder` that serves it.
//!
//! Many Llamas ship no `lm_head.weight`: the embedding is the head. The config flag for this
//! (`tie_word_embeddings`) is often missing or wrong, so the weights decide. [`choose_head`] has the whole
//! table. [`var_builder`] then serves `lm_head.weight` and `model.embed_tokens.weight` as one tensor, so that
//! models which expect an `lm_head.weight`, such as Candle's own Llama, load unchanged.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use half::{bf16, f16};

use crate::checkpoint::{Checkpoint, Format, Tensor};
use crate::error::{Error, Result};
use crate::kernels::WeightType;

/// The output head's name.
pub const LM_HEAD: &str = "lm_head.weight";
/// The embedding's name.
pub const EMBED_TOKENS: &str = "model.embed_tokens.weight";

/// The tensor that serves as the output head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LmHead {
    /// `lm_head.weight`.
    Separate,
    /// `model.embed_tokens.weight`.
    Tied,
}

/// The chosen output head and the reason.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadChoice {
    /// The tensor that serves as the head.
    pub lm_head: LmHead,
    /// The reason, in one sentence.
    pub reason: String,
    /// A warning for the user, if config and weights disagree.
    pub warning: Option<String>,
}

/// Decides which tensor is the output head.
///
/// | `tie_word_embeddings` | `lm_head.weight` | head |
/// |---|---|---|
/// | true | absent | the embedding |
/// | true | present, equal | the embedding, one copy |
/// | true | present, without an embedding | `lm_head.weight`, which is the embedding too |
/// | true | present, different | `lm_head.weight`, with a warning; `strict` refuses |
/// | false or none | absent | the embedding, with a warning; `strict` refuses |
/// | false or none | present | `lm_head.weight` |
///
/// GGUF has no flag: a missing head means tied, without a warning.
///
/// # Errors
/// - [`Error::Strict`] as in the table
/// - [`Error::TensorType`] or [`Error::TensorShape`] if the head is present but cannot be read, or does not
///   have the embedding's shape; only a missing head is replaced by the embedding
/// - [`Error::MissingTensor`] if there is no embedding, unless `lm_head.weight` replaces it
/// - [`Error::Malformed`] if an index names a file for the head or the embedding that does not have it, and
///   the other of the two does not replace it
pub fn choose_head(
    checkpoint: &Checkpoint,
    tie_word_embeddings: Option<bool>,
    strict: bool,
) -> Result<HeadChoice> {
    if tie_word_embeddings == Some(true) && embedding_name(checkpoint) == LM_HEAD {
        checkpoint.tensor(LM_HEAD)?;
        return Ok(HeadChoice { lm_head: LmHead::Tied, reason: SWAPPED.into(), warning: None });
    }
    let embedding = checkpoint.tensor(EMBED_TOKENS)?;
    if tie_word_embeddings != Some(true) {
        checkpoint.check_not_lost(LM_HEAD)?;
    }
    let head = if checkpoint.contains(LM_HEAD) {
        Some(checkpoint.tensor_with_shape(LM_HEAD, embedding.shape())?)
    } else {
        None
    };
    let plain = |lm_head, reason: &str| Ok(HeadChoice { lm_head, reason: reason.into(), warning: None });
    let reserved = |lm_head, reason: &str, warning: &str| {
        if strict {
            return Err(Error::Strict { reason: warning.into() });
        }
        Ok(HeadChoice { lm_head, reason: reason.into(), warning: Some(warning.into()) })
    };
    if checkpoint.format() == Format::Gguf {
        return match head {
            Some(_) => plain(LmHead::Separate, "the file has output.weight"),
            None => plain(LmHead::Tied, "the file has no output.weight"),
        };
    }
    match (tie_word_embeddings, head) {
        (Some(true), None) => {
            plain(LmHead::Tied, "tie_word_embeddings is true and there is no lm_head.weight")
        }
        (Some(true), Some(head)) if equal(&head, &embedding) => {
            plain(LmHead::Tied, "tie_word_embeddings is true and lm_head.weight equals the embedding")
        }
        (Some(true), Some(_)) => reserved(
            LmHead::Separate,
            "lm_head.weight differs from the embedding",
            "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight; \
             lm_head.weight is used",
        ),
        (_, Some(_)) => plain(LmHead::Separate, "there is an lm_head.weight"),
        (flag, None) => {
            let flag = if flag.is_some() {
                "tie_word_embeddings is false"
            } else {
                "tie_word_embeddings is not set"
            };
            let warning = format!(
                "{flag}, but there is no lm_head.weight; model.embed_tokens.weight is used as the head"
            );
            reserved(LmHead::Tied, "there is no lm_head.weight", &warning)
        }
    }
}

/// Why a head is tied whose embedding is absent.
const SWAPPED: &str =
    "tie_word_embeddings is true and there is no model.embed_tokens.weight; lm_head.weight is the embedding";

/// The name under which the files have the embedding of a tied model: training tools that save a tensor only
/// once may keep either name.
fn embedding_name(checkpoint: &Checkpoint) -> &'static str {
    let swapped = !checkpoint.contains(EMBED_TOKENS) && checkpoint.contains(LM_HEAD);
    if swapped && checkpoint.format() == Format::Safetensors { LM_HEAD } else { EMBED_TOKENS }
}

/// Names the tensor of a tied head as the embedding, if the files have it only as `lm_head.weight`.
pub(crate) fn name_embedding(checkpoint: &mut Checkpoint, head: &HeadChoice) {
    if head.lm_head == LmHead::Tied && embedding_name(checkpoint) == LM_HEAD {
        checkpoint.rename(LM_HEAD, EMBED_TOKENS, SWAPPED);
    }
}

/// Whether two tensors of the same shape hold the same numbers, possibly in different types.
fn equal(one: &Tensor, other: &Tensor) -> bool {
    if one.dtype() == other.dtype() && one.bytes() == other.bytes() {
        return true;
    }
    // Compares row by row, because a whole tensor as float32 may exceed the memory. Comparing numbers also
    // treats 0.0 and -0.0 as equal.
    let (elements, row_len) = (one.elements(), one.shape().last().copied().unwrap_or(1));
    if elements == 0 {
        return true; // the division below needs a row length above zero
    }
    let rows = elements / row_len;
    let (mut left, mut right) = (vec![0.0; row_len], vec![0.0; row_len]);
    (0..rows).all(|row| {
        one.row_to_f32(row, &mut left);
        other.row_to_f32(row, &mut right);
        left == right
    })
}

/// A `VarBuilder` backend over a checkpoint that serves the head chosen by [`choose_head`].
///
/// Tensors are created in the requested type and on the requested device. Storage types that Candle's models
/// cannot compute with are converted. If the head is tied, `lm_head.weight` and `model.embed_tokens.weight`
/// are the same Candle tensor, so there is only one allocation.
pub struct TiedBackend {
    checkpoint: Arc<Checkpoint>,
    lm_head: LmHead,
    /// The embedding in each type and on each device requested so far. Used only if the head is tied.
    embedding: Mutex<Vec<candle_core::Tensor>>,
}

impl TiedBackend {
    /// Creates a backend over `checkpoint` with this head.
    pub fn new(checkpoint: Arc<Checkpoint>, lm_head: LmHead) -> Self {
        Self { checkpoint, lm_head, embedding: Mutex::new(Vec::new()) }
    }

    fn is_tied(&self, name: &str) -> bool {
        self.lm_head == LmHead::Tied && (name == LM_HEAD || name == EMBED_TOKENS)
    }

    fn load(
        &self,
        name: &str,
        shape: Option<&[usize]>,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<candle_core::Tensor> {
        if !self.is_tied(name) {
            let tensor = self.stored(name, shape).map_err(candle_core::Error::wrap)?;
            return to_candle(&tensor, dtype, device);
        }
        let stored =
            self.stored(embedding_name(&self.checkpoint), shape).map_err(candle_core::Error::wrap)?;
        // The list is consistent even if a panic elsewhere poisoned the lock.
        let mut cache = self.embedding.lock().unwrap_or_else(PoisonError::into_inner);
        let same =
            |cached: &&candle_core::Tensor| cached.dtype() == dtype && cached.device().same_device(device);
        if let Some(cached) = cache.iter().find(same) {
            return Ok(cached.clone());
        }
        let tensor = to_candle(&stored, dtype, device)?;
        cache.push(tensor.clone());
        Ok(tensor)
    }

    fn stored(&self, name: &str, shape: Option<&[usize]>) -> Result<Tensor> {
        match shape {
            Some(shape) => self.checkpoint.tensor_with_shape(name, shape),
            None => self.checkpoint.tensor(name),
        }
    }
}

impl SimpleBackend for TiedBackend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<candle_core::Tensor> {
        self.load(name, Some(shape.dims()), dtype, device)
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<candle_core::Tensor> {
        self.load(name, None, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        let name = if self.is_tied(name) { embedding_name(&self.checkpoint) } else { name };
        self.checkpoint.contains(name)
    }
}

/// Creates a `VarBuilder` over `checkpoint` that serves `head`, for Candle's models:
/// `candle_transformers::models::llama::Llama::load(var_builder(...), &config)`. Set
/// `config.tie_word_embeddings` to false, so that the model asks for the head.
///
/// Errors from loading through it carry the message of this crate's [`Error`].
pub fn var_builder(
    checkpoint: Arc<Checkpoint>,
    head: &HeadChoice,
    dtype: DType,
    device: &Device,
) -> VarBuilder<'static> {
    VarBuilder::from_backend(Box::new(TiedBackend::new(checkpoint, head.lm_head)), dtype, device.clone())
}

/// Converts a tensor to a Candle tensor of the requested type.
pub(crate) fn to_candle(
    tensor: &Tensor,
    dtype: DType,
    device: &Device,
) -> candle_core::Result<candle_core::Tensor> {
    if !dtype.is_float() {
        let reason = format!("{dtype:?} cannot hold weights; use a float type");
        return Err(candle_core::Error::wrap(Error::argument("dtype", reason)));
    }
    let shape = tensor.shape();
    // 16-bit types that stay as they are must not pass through float32, which would take three times their
    // memory.
    match (tensor.dtype(), dtype) {
        (WeightType::F16, DType::F16) => {
            let numbers = tensor.bytes().as_chunks::<2>().0.iter().map(|&bytes| f16::from_le_bytes(bytes));
            candle_core::Tensor::from_vec(numbers.collect::<Vec<_>>(), shape, device)
        }
        (WeightType::BF16, DType::BF16) => {
            let numbers = tensor.bytes().as_chunks::<2>().0.iter().map(|&bytes| bf16::from_le_bytes(bytes));
            candle_core::Tensor::from_vec(numbers.collect::<Vec<_>>(), shape, device)
        }
        _ => candle_core::Tensor::from_vec(tensor.to_f32(), shape, device)?.to_dtype(dtype),
    }
}
