//! From a path and options to a model: which engine, which device, which types, how much context.

use super::Llama;
use super::memory::{self, MemoryEstimate};
use super::opened::Opened;
use super::options::{Choices, EngineKind, FloatType, LoadOptions};
use crate::checkpoint::tied::LmHead;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::kernels::{Cancel, Isa};
use crate::model::candle::CandleModel;
use crate::model::cpu::{CpuModel, CpuOptions};
use crate::model::{Model, Storage};
use crate::sys::Process;
use crate::tokenizer::Tokenizer;
use crate::{device, sys};
use candle_core::DType;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// What was loaded, and how.
#[derive(Clone, Debug)]
pub struct LoadReport {
    /// The decoder's name.
    pub engine: &'static str,
    /// The device's name.
    pub device: String,
    /// "auto" or "exact".
    pub compute: &'static str,
    /// The type of cached keys and values, as [`LoadOptions::kv_dtype`] spells it.
    pub kv_dtype: &'static str,
    /// The level of the kernels; None for Candle's own.
    pub isa: Option<&'static str>,
    /// Threads that share the work.
    pub threads: usize,
    /// Which tensor is the output head.
    pub lm_head: LmHead,
    /// Why.
    pub lm_head_reason: String,
    /// How the weights are held.
    pub storage: Vec<Storage>,
    /// What loaded with a reservation.
    pub warnings: Vec<String>,
    /// What a careful reader may want to know, though nothing is wrong with it.
    pub notes: Vec<String>,
    /// Time to load.
    pub elapsed: Duration,
    /// Bytes of all weights.
    pub bytes: u64,
}

/// The context that is offered however little memory is left.
const LEAST_CONTEXT: usize = 512;

/// The context that is offered, and the bytes that keys and values of all sequences may take.
///
/// # Errors
/// [`Error::OutOfMemory`] if the model has no room, or not with the context that was asked for.
fn context(
    opened: &Opened,
    options: &LoadOptions,
    choices: &Choices,
    warnings: &mut Vec<String>,
    notes: &mut Vec<String>,
) -> Result<(usize, u64)> {
    let own = opened.config.context_length();
    let asked = opened.asked_context(options)?;
    if asked > own {
        warnings.push(format!("context_length {asked} is beyond the model's own {own}"));
    }
    // A GPU's memory is Candle's to ask for.
    let memory = if choices.device.is_cpu() { sys::memory() } else { None };
    let Some(memory) = memory else { return Ok((asked, u64::MAX)) };
    let least = options.context_length.unwrap_or(own.min(LEAST_CONTEXT));
    let needed = MemoryEstimate::new(opened, choices, least);
    warnings.extend(memory::check(&needed, memory, sys::address_space_left())?);
    let block_bytes = opened.kv_shape(choices.kv_dtype().weight_type()).block_bytes().unwrap_or(usize::MAX);
    let (fits, budget) = memory::room(&needed, memory, block_bytes as u64);
    let fits = fits.max(LEAST_CONTEXT);
    let context_length = options.context_length.unwrap_or(own.min(fits));
    if context_length < asked {
        notes.push(format!(
            "context_length is {context_length}, not the model's own {own}, for want of memory"
        ));
    }
    Ok((context_length, budget))
}

pub(super) fn load(path: &Path, options: &LoadOptions, cancel: &Cancel) -> Result<Llama> {
    let started = Instant::now();
    let choices = Choices::new(options)?;
    let opened = Opened::new(path, options.strict)?;
    let mut warnings: Vec<String> = opened.head.warning.iter().cloned().collect();
    warnings.extend(opened.config.warnings.iter().cloned());
    warnings.extend(opened.generation.warnings.iter().cloned());
    let mut notes = Vec::new();

    let (context_length, kv_bytes) = context(&opened, options, &choices, &mut warnings, &mut notes)?;
    let (model, kind, kv_dtype) =
        load_model(&opened, &choices, context_length, kv_bytes, &mut notes, &mut warnings, cancel)?;
    let storage = model.storage();

    let tokenizer = OnceLock::new();
    match Tokenizer::open(path) {
        Ok(opened) => {
            warnings.extend(opened.warnings().iter().cloned());
            warnings.extend(beyond_vocabulary(opened.vocab_size(), model.vocab_size()));
            let _ = tokenizer.set(Arc::new(opened));
        }
        // Token ids need no tokenizer; who asks for text is told then.
        Err(error) => notes.push(format!("no tokenizer: {error}")),
    }
    if let (true, Some(reason)) = (options.strict, warnings.first()) {
        return Err(Error::Strict { reason: reason.clone() });
    }

    let own_ends = &opened.config.eos_token_ids;
    let mut eos_token_ids = opened.generation.eos_token_ids.clone().unwrap_or_else(|| own_ends.clone());
    if let Some(tokenizer) = tokenizer.get() {
        if eos_token_ids.is_empty() {
            eos_token_ids.extend(tokenizer.eos_token_id());
        }
        eos_token_ids.extend(tokenizer.extra_eos_token_ids());
    }
    eos_token_ids.sort_unstable();
    eos_token_ids.dedup();

    let cpu = kind == EngineKind::Cpu;
    let report = LoadReport {
        engine: kind.name(),
        device: if cpu { "cpu".into() } else { device::name(&choices.device) },
        compute: options.compute.name(),
        kv_dtype: kv_dtype.name(),
        isa: if cpu { Some(detect_isa()?.name()) } else { None },
        threads: choices.threads,
        lm_head: opened.head.lm_head,
        lm_head_reason: opened.head.reason,
        bytes: storage.iter().map(|storage| storage.bytes).sum(),
        storage,
        warnings,
        notes,
        elapsed: started.elapsed(),
    };
    Ok(Llama {
        path: path.into(),
        engine: Arc::new(Engine::new(model, context_length)),
        tokenizer,
        config: opened.config,
        generation: opened.generation,
        eos_token_ids,
        report,
    })
}

fn detect_isa() -> Result<Isa> {
    Isa::detect().map_err(|reason| Error::Device { device: "cpu".into(), reason: reason.into() })
}

fn load_model(
    opened: &Opened,
    choices: &Choices,
    context_length: usize,
    kv_bytes: u64,
    notes: &mut Vec<String>,
    warnings: &mut Vec<String>,
    cancel: &Cancel,
) -> Result<(Box<dyn Model>, EngineKind, FloatType)> {
    if choices.tries_candle() {
        match load_candle(opened, choices, context_length, notes) {
            Ok((model, dtype)) => {
                warnings.extend(unused_tensors(model.unused_tensors()));
                return Ok((Box::new(model), EngineKind::Candle, dtype));
            }
            // "auto" may fall back to what can express the config.
            Err(error @ Error::Unsupported { .. }) if choices.engine.is_none() => {
                notes.push(format!(
                    "on the CPU, because {} cannot run it: {error}",
                    device::name(&choices.device)
                ));
            }
            Err(error) => return Err(error),
        }
    }
    let options = CpuOptions {
        isa: detect_isa()?,
        threads: choices.threads,
        lm_head: opened.head.lm_head,
        types: choices.types(),
        exact: choices.exact,
        kv_dtype: choices.kv_dtype().weight_type(),
        kv_bytes,
    };
    let model = CpuModel::new(opened.config.clone(), &opened.checkpoint, &options, cancel)?;
    warnings.extend(unused_tensors(model.unused_tensors()));
    Ok((Box::new(model), EngineKind::Cpu, choices.kv_dtype()))
}

/// A larger model is padded; a larger tokenizer gives ids that the model refuses.
fn beyond_vocabulary(tokenizer: usize, model: usize) -> Option<String> {
    (tokenizer > model).then(|| {
        format!("the tokenizer has ids up to {}, the model refuses those from {model} on", tokenizer - 1)
    })
}

/// transformers ignores them too; but they may belong to another model's mathematics.
fn unused_tensors(names: &[String]) -> Option<String> {
    const SHOWN: usize = 3;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    let more = names.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!names.is_empty())
        .then(|| format!("tensors that this config's Llama does not have are ignored: {shown}{more}"))
}

/// The process that Candle's threads are in, once it has some.
static CANDLE_THREADS: OnceLock<Process> = OnceLock::new();

/// The model, and the type that it computes with, and keeps keys and values in.
fn load_candle(
    opened: &Opened,
    choices: &Choices,
    context_length: usize,
    notes: &mut Vec<String>,
) -> Result<(CandleModel, FloatType)> {
    if !CANDLE_THREADS.get_or_init(Process::current).is_current() {
        let reason = "Candle's threads stayed in the process that this one was forked from; use \
                      engine=\"cpu\", or start processes with multiprocessing's \"spawn\" method";
        return Err(Error::Device { device: device::name(&choices.device), reason: reason.into() });
    }
    let stored = opened.stored_type();
    let dtype = choices.candle_dtype(stored)?;
    let computes_with = match dtype {
        DType::F16 => FloatType::Float16,
        DType::BF16 => FloatType::Bfloat16,
        _ => FloatType::Float32,
    };
    if let Some(asked) = choices.kv_dtype.filter(|&asked| asked != computes_with) {
        let reason = format!(
            "{}: Candle's Llama keeps keys and values in the type that it computes with, here {}; use \
             engine=\"cpu\"",
            asked.name(),
            computes_with.name()
        );
        return Err(Error::unsupported("kv_dtype", reason));
    }
    let name = stored.map_or("mixed types".into(), |stored| stored.to_string());
    if stored != Some(computes_with.weight_type()) {
        notes.push(format!(
            "weights stored as {name} are held as {dtype:?}, which is what Candle's Llama computes with"
        ));
    }
    let checkpoint = Arc::clone(&opened.checkpoint);
    let model =
        CandleModel::new(&opened.config, checkpoint, &opened.head, dtype, &choices.device, context_length)?;
    Ok((model, computes_with))
}
