//! Our decoder in Candle's tensor operations, on any of Candle's devices.
//!
//! - `weights.rs`: the checkpoint's tensors on the device
//! - `stored.rs`: matrices as they are stored, for our CPU kernels
//! - `decoder.rs`: the decoder stack, for the rows of several sequences at a time
//! - `attention.rs`: attention over the slots of the KV cache
//! - `slots.rs`: the KV cache, a slot for each sequence
//!
//! A sequence shares no keys and values with others: a matrix product needs a sequence's positions in one
//! piece.

mod attention;
mod decoder;
mod slots;
mod stored;
mod weights;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::tied::LmHead;
use crate::config::LlamaConfig;
use crate::device;
use crate::error::{Error, Result};
use crate::kernels::{Isa, WeightType};
use crate::model::worker::Worker;
use crate::model::{Beginning, Cancel, Logits, Model, SeqId, Span, Storage, cpu};
use candle_core::{DType, Device};
use decoder::Decoder;
pub use decoder::scratch_bytes;
use slots::SlotShape;
use weights::Weights;

/// The fewest rows in a pass that are not much slower per row than many.
const MIN_ROWS: usize = 32;

/// How matrices are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matrices {
    /// As they are stored, multiplied by our CPU kernels. Only on the CPU, and with activations in f32.
    Stored {
        /// The kernels' ISA.
        isa: Isa,
        /// Number of threads, including the calling one.
        threads: usize,
        /// Whether activations are f32 even where AMX would take about 16 bits of them.
        exact: bool,
    },
    /// Quantised ones in their blocks, multiplied by Candle with activations of 8 bits. Those of types that
    /// Candle lacks, and all others, become floats.
    Quantized,
    /// As floats.
    Float,
}

/// How to load and run a model.
#[derive(Clone, Debug)]
pub struct TensorOptions {
    /// Where it runs.
    pub device: Device,
    /// The type of activations, keys and values, and of weights that become floats.
    pub dtype: DType,
    /// How matrices are kept.
    pub matrices: Matrices,
    /// Which tensor is the output head.
    pub lm_head: LmHead,
    /// The most positions of a sequence.
    pub context_length: usize,
    /// The most sequences that have keys and values at the same time.
    pub max_seqs: usize,
}

/// A Llama in Candle's tensors.
pub struct TensorModel {
    worker: Worker,
    vocab_size: usize,
    max_seqs: usize,
    storage: Vec<Storage>,
    converted: Vec<WeightType>,
    unused: Vec<String>,
}

impl TensorModel {
    /// Loads the tensors that `config` requires from `checkpoint`.
    ///
    /// # Errors
    /// A checkpoint error for a tensor that is missing, misshaped or of a type that is not supported;
    /// [`Error::Device`] if the device fails; [`Error::Generation`] if the CPU does, or if no thread can be
    /// started; [`Error::Cancelled`].
    pub fn new(
        config: LlamaConfig,
        checkpoint: &Checkpoint,
        options: &TensorOptions,
        cancel: &Cancel,
    ) -> Result<Self> {
        let &TensorOptions { dtype, matrices, lm_head, context_length, max_seqs, .. } = options;
        let device = &options.device;
        let unused = cpu::check_tensors(&config, checkpoint, lm_head)?;
        let mut weights = Weights::load(&config, checkpoint, lm_head, (dtype, matrices), device, cancel)?;
        let (storage, converted) =
            (std::mem::take(&mut weights.storage), std::mem::take(&mut weights.converted));
        let shape = SlotShape {
            layers: config.num_hidden_layers,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            dtype,
            max_slots: max_seqs,
            max_capacity: context_length,
        };
        let vocab_size = config.vocab_size;
        let decoder = Decoder::new(config, weights, shape, device);
        let worker = Worker::new(decoder)?;
        Ok(TensorModel { worker, vocab_size, max_seqs, storage, converted, unused })
    }

    /// Names of the checkpoint's tensors that a Llama of this config does not have.
    pub fn unused_tensors(&self) -> &[String] {
        &self.unused
    }

    /// The stored types of weights that have another type on the device.
    pub fn converted_types(&self) -> &[WeightType] {
        &self.converted
    }
}

/// Bytes of a matrix on the device. None if they are too many to count.
pub fn matrix_bytes(stored: WeightType, elements: u64, dtype: DType, matrices: Matrices) -> Option<u64> {
    if weights::keeps(matrices, stored) {
        elements.div_ceil(stored.block_len() as u64).checked_mul(stored.block_bytes() as u64)
    } else {
        elements.checked_mul(dtype.size_in_bytes() as u64)
    }
}

impl Model for TensorModel {
    fn forward(&mut self, spans: &[Span], cancel: &Cancel) -> Result<Logits> {
        super::check_spans(spans, self.vocab_size)?;
        self.worker.forward(spans, cancel)
    }

    fn begin(&mut self, seq: SeqId, beginning: &Beginning) -> usize {
        self.worker.begin(seq, beginning.prompt_tokens);
        0
    }

    fn free(&mut self, seq: SeqId) {
        self.worker.free(seq);
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_num_seqs(&self) -> usize {
        self.max_seqs
    }

    fn max_held_seqs(&self) -> usize {
        self.max_seqs
    }

    fn max_spans(&self) -> usize {
        usize::MAX
    }

    fn min_rows(&self) -> usize {
        MIN_ROWS
    }

    fn storage(&self) -> Vec<Storage> {
        self.storage.clone()
    }
}

/// Wraps an error of Candle's. `what` says for what the device was needed, with its size in bytes if it has
/// one.
fn on_device(device: &Device, what: String) -> impl Fn(candle_core::Error) -> Error + use<> {
    let device = (!device.is_cpu()).then(|| device::name(device));
    move |error| {
        let reason = format!("{what}: Candle: {error}");
        match &device {
            None => Error::Generation { reason },
            Some(device) => Error::Device { device: device.clone(), reason },
        }
    }
}
