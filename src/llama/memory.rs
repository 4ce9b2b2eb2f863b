//! Estimates the memory that a model needs, before it is loaded, and checks that it is available.

use super::opened::Opened;
use super::options::{Choices, EngineKind, FloatType, LoadOptions};
use crate::checkpoint::tied::{EMBED_TOKENS, LM_HEAD, LmHead};
use crate::checkpoint::{Format, TensorInfo, names};
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::kernels::{Isa, KV_BLOCK_POSITIONS, PackedRows, WeightType};
use crate::model::cpu::{self, Types};
use crate::model::tensor::{self, Matrices};
use crate::sys::Memory;
use candle_core::DType;
use std::path::Path;

/// The share of the memory left after loading that keys and values may use.
const KV_SHARE: f64 = 0.8;
/// Maximum rows of one call to Candle's Llama.
const CANDLE_ROWS: u64 = 512;
const F32_BYTES: u64 = size_of::<f32>() as u64;

/// The memory that a model needs, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// All weights, in their types in memory. Mapped weights count too, because the model is only fast while
    /// they stay in memory.
    pub weights: u64,
    /// Keys and values of one sequence that fills the context.
    pub kv_cache: u64,
    /// Scratch buffers, at most.
    pub scratch: u64,
    /// Positions of the context.
    pub context_length: usize,
    /// "cpu", "tensor" or "candle".
    pub engine: &'static str,
    /// The part of the weights that is copied, not mapped.
    copied: u64,
}

/// Estimates the memory that [`super::Llama::load`] needs with these options. Reads only headers. Without a
/// `context_length` the estimate is for the model's own, while `load` takes a shorter one if memory is short.
///
/// # Errors
/// As [`super::Llama::load`], except those that need the weights to be read.
pub fn estimate_memory(path: &Path, options: &LoadOptions) -> Result<MemoryEstimate> {
    let mut choices = Choices::new(options)?;
    let opened = Opened::new(path, options.strict)?;
    choices.fall_back(opened.stored_type());
    choices.check_kv_dtype(opened.config.head_dim)?;
    Ok(MemoryEstimate::new(&opened, &choices, opened.requested_context(options)?))
}

/// The memory that a matrix takes in the cpu engine.
struct InMemory {
    bytes: u64,
    /// Whether it is a copy in another type or layout.
    copied: bool,
}

impl InMemory {
    /// None if the matrix cannot be loaded; loading reports why.
    fn new(info: &TensorInfo, types: &Types, exact: bool, lm_head: LmHead) -> Option<Self> {
        let &[rows, cols] = info.shape.as_slice() else { return None };
        let stored = WeightType::named(&info.dtype)?;
        // An embedding that is not also the head is only read row by row.
        let multiplied = info.name != EMBED_TOKENS || lm_head == LmHead::Tied;
        let dtype = types.in_memory(&info.name, stored);
        let packs = multiplied && !exact && Isa::detect().is_ok_and(Isa::packs_weights);
        let packed = PackedRows::bytes_for(dtype, rows, cols).filter(|_| packs);
        let bytes = packed.or_else(|| dtype.bytes_for(cols)?.checked_mul(rows))?;
        Some(InMemory { bytes: bytes as u64, copied: packed.is_some() || dtype != stored })
    }
}

impl MemoryEstimate {
    pub(super) fn new(opened: &Opened, choices: &Choices, context_length: usize) -> Self {
        match choices.engine_kind() {
            EngineKind::Cpu => MemoryEstimate::cpu(opened, choices, context_length),
            EngineKind::Tensor => MemoryEstimate::tensor(opened, choices, context_length),
            EngineKind::Candle => MemoryEstimate::candle(opened, choices, context_length),
        }
    }

    /// The sum of weights, KV cache and scratch buffers.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv_cache).saturating_add(self.scratch)
    }

    fn cpu(opened: &Opened, choices: &Choices, context_length: usize) -> Self {
        let (mut weights, mut copied) = (0_u64, 0_u64);
        let types = choices.types(opened);
        for info in used_tensors(opened) {
            // Norms and biases are converted to f32.
            let is_vector = info.shape.len() == 1;
            let as_stored = InMemory { bytes: info.bytes, copied: false };
            let in_memory = match is_vector {
                true => InMemory { bytes: elements(&info).saturating_mul(F32_BYTES), copied: true },
                false => {
                    InMemory::new(&info, &types, choices.exact, opened.head.lm_head).unwrap_or(as_stored)
                }
            };
            weights = weights.saturating_add(in_memory.bytes);
            if in_memory.copied || is_reordered(opened, &info) {
                copied = copied.saturating_add(in_memory.bytes);
            }
        }
        let block_bytes =
            opened.kv_shape(choices.kv_dtype().weight_type()).block_bytes().unwrap_or(usize::MAX) as u64;
        MemoryEstimate {
            weights,
            kv_cache: block_bytes.saturating_mul(context_length.div_ceil(KV_BLOCK_POSITIONS) as u64),
            scratch: cpu::scratch_bytes(&opened.config, choices.threads),
            context_length,
            engine: EngineKind::Cpu.name(),
            copied,
        }
    }

    fn tensor(opened: &Opened, choices: &Choices, context_length: usize) -> Self {
        let config = &opened.config;
        let dtype = choices.candle_dtype(opened.stored_type()).map_or(DType::F32, FloatType::candle_type);
        let matrices = choices.matrices().unwrap_or(Matrices::Float);
        let is_mapped = |info: &TensorInfo| {
            matches!(matrices, Matrices::Stored { .. })
                && info.shape.len() == 2
                && !is_reordered(opened, info)
        };
        let kernels = match matrices {
            Matrices::Stored { threads, .. } => cpu::scratch_bytes(config, threads),
            _ => 0,
        };
        let (mut weights, mut copied) = (0_u64, 0_u64);
        for info in used_tensors(opened) {
            let matrices = if info.shape.len() == 2 { matrices } else { Matrices::Float };
            // A type that cannot be read is reported when it is loaded.
            let stored = WeightType::named(&info.dtype).unwrap_or(WeightType::F32);
            let bytes = tensor::matrix_bytes(stored, elements(&info), dtype, matrices).unwrap_or(u64::MAX);
            weights = weights.saturating_add(bytes);
            if !is_mapped(&info) {
                copied = copied.saturating_add(bytes);
            }
        }
        MemoryEstimate {
            weights,
            kv_cache: kv_bytes(config, dtype, context_length),
            scratch: tensor::scratch_bytes(config, dtype, context_length).saturating_add(kernels),
            context_length,
            engine: EngineKind::Tensor.name(),
            copied,
        }
    }

    fn candle(opened: &Opened, choices: &Choices, context_length: usize) -> Self {
        let config = &opened.config;
        // A type that Candle cannot compute with is reported when the model is loaded.
        let dtype = choices.candle_dtype(opened.stored_type()).map_or(DType::F32, FloatType::candle_type);
        let element_bytes = dtype.size_in_bytes() as u64;
        let count: u64 = used_tensors(opened).map(|info| elements(&info)).fold(0, u64::saturating_add);
        let weights = count.saturating_mul(element_bytes);
        let product =
            |sizes: &[usize]| sizes.iter().fold(1, |bytes: u64, &size| bytes.saturating_mul(size as u64));
        let heads = product(&[config.num_attention_heads, context_length]);
        // Scores before and after the softmax, and a layer's keys and values repeated for all heads.
        let rows = CANDLE_ROWS.min(context_length as u64);
        let attention = heads.saturating_mul(rows.saturating_add(config.head_dim as u64));
        MemoryEstimate {
            weights,
            kv_cache: kv_bytes(config, dtype, context_length),
            scratch: cpu::scratch_bytes(config, choices.threads)
                .saturating_add(attention.saturating_mul(2 * F32_BYTES)),
            context_length,
            engine: EngineKind::Candle.name(),
            copied: weights,
        }
    }
}

/// Bytes of the keys and values of one sequence of `positions`.
fn kv_bytes(config: &LlamaConfig, dtype: DType, positions: usize) -> u64 {
    let sizes = [config.num_hidden_layers, config.num_key_value_heads, config.head_dim, positions, 2];
    sizes.iter().fold(dtype.size_in_bytes() as u64, |bytes, &size| bytes.saturating_mul(size as u64))
}

/// The tensors of the checkpoint that are loaded.
fn used_tensors(opened: &Opened) -> impl Iterator<Item = TensorInfo> {
    let tied = opened.head.lm_head == LmHead::Tied;
    let used =
        move |info: &TensorInfo| names::hf_to_gguf(&info.name).is_some() && !(tied && info.name == LM_HEAD);
    opened.checkpoint.infos().into_iter().filter(used)
}

/// Whether a matrix is copied because its rows have another order in the file.
fn is_reordered(opened: &Opened, info: &TensorInfo) -> bool {
    opened.checkpoint.format() == Format::Gguf && names::permuted_by(&info.name).is_some()
}

fn elements(info: &TensorInfo) -> u64 {
    info.shape.iter().fold(1, |product: u64, &size| product.saturating_mul(size as u64))
}

/// Refuses a model that does not fit in memory. Returns a warning if it fits only with swap. A limit on
/// address space, if there is one, is compared with copies and buffers only: files are already mapped.
///
/// # Errors
/// [`Error::OutOfMemory`]
pub(super) fn check(
    needed: &MemoryEstimate,
    memory: Memory,
    address_space_left: Option<u64>,
) -> Result<Option<String>> {
    let what = || format!("weights, scratch and a context of {}", needed.context_length);
    let own = needed.total() - needed.weights.saturating_sub(needed.copied);
    if let Some(left) = address_space_left.filter(|&left| own > left) {
        return Err(Error::OutOfMemory { what: what(), needed: own, available: left });
    }
    let total = needed.total();
    let with_swap = memory.available.saturating_add(memory.swap);
    if total > with_swap {
        return Err(Error::OutOfMemory { what: what(), needed: total, available: with_swap });
    }
    Ok((total > memory.available).then(|| {
        format!(
            "{} need {total} bytes of memory, but only {} are available without swapping: this will be slow",
            what(),
            memory.available
        )
    }))
}

/// The number of positions that fit in memory without swapping, and the maximum bytes of all sequences' keys
/// and values. The latter is at least `needed.kv_cache`, which [`check`] has accepted, possibly with swap.
pub(super) fn room(needed: &MemoryEstimate, memory: Memory, block_bytes: u64) -> (usize, u64) {
    let left = memory.available.saturating_sub(needed.weights.saturating_add(needed.scratch));
    let budget = (left as f64 * KV_SHARE) as u64;
    let positions = (budget / block_bytes.max(1)).saturating_mul(KV_BLOCK_POSITIONS as u64);
    (usize::try_from(positions).unwrap_or(usize::MAX), budget.max(needed.kv_cache))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDED: MemoryEstimate = MemoryEstimate {
        weights: 1000,
        kv_cache: 200,
        scratch: 30,
        context_length: 512,
        engine: "cpu",
        copied: 100,
    };

    fn memory(available: u64, swap: u64) -> Memory {
        Memory { total: 10_000, available, swap }
    }

    #[test]
    fn a_model_that_needs_swap_is_warned_about_and_a_larger_one_refused() {
        assert_eq!(check(&NEEDED, memory(1230, 0), None).unwrap(), None);
        let warning = check(&NEEDED, memory(1000, 230), None).unwrap().unwrap();
        assert!(warning.contains("1230 bytes") && warning.contains("swapping"), "{warning}");
        for (available, swap) in [(1229, 0), (1000, 229), (0, 0)] {
            match check(&NEEDED, memory(available, swap), None) {
                Err(Error::OutOfMemory { needed: 1230, available: got, .. }) => {
                    assert_eq!(got, available + swap);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn an_address_space_limit_does_not_count_mapped_weights() {
        assert_eq!(check(&NEEDED, memory(5000, 0), Some(330)).unwrap(), None);
        match check(&NEEDED, memory(5000, 0), Some(329)) {
            Err(Error::OutOfMemory { needed: 330, available: 329, .. }) => {}
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn keys_and_values_get_a_share_of_free_memory_and_never_less_than_needed() {
        let positions = KV_BLOCK_POSITIONS;
        assert_eq!(room(&NEEDED, memory(2030, 0), 100), (8 * positions, 800));
        assert_eq!(room(&NEEDED, memory(2029, 0), 100), (7 * positions, 799));
        assert_eq!(room(&NEEDED, memory(1100, 500), 100), (0, 200), "in swap");
        assert_eq!(room(&NEEDED, memory(2030, 0), u64::MAX), (0, 800));
        assert_eq!(room(&NEEDED, memory(u64::MAX, 0), 0).0, usize::MAX);
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let endless = MemoryEstimate { kv_cache: u64::MAX, ..NEEDED };
        assert!(check(&endless, memory(u64::MAX - 1, 0), Some(5000)).is_err());
        assert!(check(&endless, memory(u64::MAX - 1, 0), None).is_err());
    }
}
