//! Loads a model: chooses engine, device, types and context from a path and its options.

use super::Llama;
use super::memory::{self, MemoryEstimate};
use super::opened::Opened;
use super::options::{Choices, EngineKind, KvType, LoadOptions, detect_isa};
use crate::checkpoint::background;
use crate::checkpoint::tied::LmHead;
use crate::engine::{Engine, EngineOptions};
use crate::error::{Error, Result};
use crate::kernels::{Cancel, KV_BLOCK_POSITIONS};
use crate::model::candle::CandleModel;
use crate::model::cpu::{CpuModel, CpuOptions};
use crate::model::tensor::{Matrices, TensorModel, TensorOptions};
use crate::model::{Model, Storage};
use crate::sys::Process;
use crate::tokenizer::Tokenizer;
use crate::{device, sys};
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
    /// The ISA of our kernels; None if they do not run.
    pub isa: Option<&'static str>,
    /// Number of threads.
    pub threads: usize,
    /// Which tensor is the output head.
    pub lm_head: LmHead,
    /// Why that tensor is the head.
    pub lm_head_reason: String,
    /// The weights in memory, by storage type.
    pub storage: Vec<Storage>,
    /// Possible problems with the model.
    pub warnings: Vec<String>,
    /// Facts that may be worth knowing but are not problems.
    pub notes: Vec<String>,
    /// Time to load.
    pub elapsed: Duration,
    /// Bytes of all weights in memory.
    pub bytes: u64,
}

/// The context is never reduced below this, however little memory is left.
const MIN_CONTEXT: usize = 512;

/// Keys and values that no sequence needs may take this much, or as much as the weights. Otherwise a small
/// model would in time take all memory for prompts that may never come again.
const CACHED_KV_BYTES: u64 = 256 << 20;

/// The context length, and how much memory keys and values may take.
struct Context {
    context_length: usize,
    /// Maximum bytes of all sequences' keys and values.
    kv_bytes: u64,
    /// Maximum bytes of those that no sequence needs.
    cached_kv_bytes: u64,
}

/// Chooses the context length, and the memory of keys and values.
///
/// # Errors
/// [`Error::OutOfMemory`] if there is not enough memory for the model with the requested context, or with
/// [`MIN_CONTEXT`] without a request.
fn context(
    opened: &Opened,
    options: &LoadOptions,
    choices: &Choices,
    warnings: &mut Vec<String>,
    notes: &mut Vec<String>,
) -> Result<Context> {
    let own = opened.config.context_length();
    let requested = opened.requested_context(options)?;
    if requested > own {
        warnings.push(format!("context_length {requested} is larger than the model's own {own}"));
    }
    let block_bytes = MemoryEstimate::new(opened, choices, KV_BLOCK_POSITIONS).kv_cache;
    let mut limit = |requested: usize| match options.kv_cache_bytes {
        Some(bytes) if choices.engine_kind() != EngineKind::Candle => {
            let held = (bytes / block_bytes).max(1).saturating_mul(KV_BLOCK_POSITIONS as u64);
            let held = usize::try_from(held).unwrap_or(usize::MAX);
            if held < requested {
                let message =
                    format!("context_length is {held}, because kv_cache_bytes holds no more tokens");
                if options.context_length.is_some() { warnings.push(message) } else { notes.push(message) }
            }
            held.min(requested)
        }
        _ => requested,
    };
    let requested = limit(requested);
    let on_cpu = choices.device.is_cpu();
    let memory = if on_cpu { sys::memory() } else { device::memory(&choices.device) };
    let Some(memory) = memory else {
        let kv_bytes = options.kv_cache_bytes.unwrap_or(u64::MAX);
        return Ok(Context { context_length: requested, kv_bytes, cached_kv_bytes: kv_bytes });
    };
    let least = if options.context_length.is_some() { requested } else { requested.min(MIN_CONTEXT) };
    let needed = MemoryEstimate::new(opened, choices, least);
    let address_space_left = if on_cpu { sys::address_space_left() } else { None };
    warnings.extend(memory::check(&needed, memory, address_space_left).map_err(|error| match error {
        error if on_cpu => error,
        error => Error::Device { device: device::name(&choices.device), reason: error.to_string() },
    })?);
    let (fits, budget) = memory::room(&needed, memory, block_bytes);
    let fits = fits.max(MIN_CONTEXT);
    let context_length = if options.context_length.is_some() { requested } else { requested.min(fits) };
    if context_length < requested {
        notes.push(format!(
            "context_length is {context_length}, not the model's own {own}, because memory is short"
        ));
    }
    Ok(match options.kv_cache_bytes {
        Some(kv_bytes) => Context { context_length, kv_bytes, cached_kv_bytes: kv_bytes },
        None => {
            let cached_kv_bytes = needed.weights.max(CACHED_KV_BYTES);
            Context { context_length, kv_bytes: budget, cached_kv_bytes }
        }
    })
}

pub(super) fn load(path: &Path, options: &LoadOptions, cancel: &Cancel) -> Result<Llama> {
    let started = Instant::now();
    let mut choices = Choices::new(options)?;
    let opened = Opened::new(path, options.strict)?;
    let mut warnings: Vec<String> = opened.head.warning.iter().cloned().collect();
    warnings.extend(opened.config.warnings.iter().cloned());
    warnings.extend(opened.generation.warnings.iter().cloned());
    let mut notes = opened.checkpoint.notes().to_vec();
    if opened.generation.top_p == Some(0.0) {
        notes.push("generation_config.json: top_p 0 would keep no token; it is ignored".to_owned());
    }
    notes.extend(choices.fall_back(opened.stored_type()));
    notes.extend(choices.quantize_notes(&opened));
    choices.check_kv_dtype(opened.config.head_dim)?;

    let context = context(&opened, options, &choices, &mut warnings, &mut notes)?;
    // The tokenizer is read beside the weights, unless the address space is limited, because a thread's heap
    // takes much of it.
    let owned = path.to_owned();
    let read_tokenizer = match sys::address_space_left() {
        Some(_) => None,
        None => Some(background::start(move || Tokenizer::open(&owned))?),
    };
    let (model, kv_dtype) = load_model(&opened, &choices, &context, &mut notes, &mut warnings, cancel)?;
    let storage = model.storage();

    let tokenizer = OnceLock::new();
    let opened_tokenizer = match read_tokenizer {
        Some(started) => started.wait(cancel)?,
        None => Tokenizer::open(path),
    };
    match opened_tokenizer {
        Ok(mut opened) => {
            opened.pad(model.vocab_size());
            warnings.extend(opened.warnings().iter().cloned());
            warnings.extend(beyond_vocabulary(opened.vocab_size(), model.vocab_size()));
            let _ = tokenizer.set(Arc::new(opened));
        }
        // Token ids need no tokenizer. The first use of text raises the error again.
        Err(error) => notes.push(format!("no tokenizer: {error}")),
    }
    if let (true, Some(reason)) = (options.strict, warnings.first()) {
        return Err(Error::Strict { reason: reason.clone() });
    }

    let eos_token_ids = eos_token_ids(&opened, tokenizer.get().map(Arc::as_ref), &mut notes);

    let engine_options =
        EngineOptions { context_length: context.context_length, max_num_seqs: options.max_num_seqs };
    let kind = choices.engine_kind();
    let runs_kernels = match kind {
        EngineKind::Cpu => true,
        EngineKind::Tensor => matches!(choices.matrices()?, Matrices::Stored { .. }),
        EngineKind::Candle => false,
    };
    let report = LoadReport {
        engine: kind.name(),
        device: device::name(&choices.device),
        compute: options.compute.name(),
        kv_dtype: kv_dtype.name(),
        isa: if runs_kernels { Some(detect_isa()?.name()) } else { None },
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
        engine: Arc::new(Engine::new(model, engine_options)?),
        tokenizer,
        config: opened.config,
        generation: opened.generation,
        eos_token_ids,
        report,
        notices: Default::default(),
        grammars: Default::default(),
    })
}

/// The tokens that end a text. The files of a folder may name different ones. All end a text that
/// generation_config.json names, or config.json without it, and as well what the other files name if the
/// tokenizer agrees that it is a special token.
fn eos_token_ids(opened: &Opened, tokenizer: Option<&Tokenizer>, notes: &mut Vec<String>) -> Vec<u32> {
    let from_config = &opened.config.eos_token_ids;
    let mut ids = opened.generation.eos_token_ids.clone().unwrap_or_else(|| from_config.clone());
    if let Some(tokenizer) = tokenizer {
        let named = from_config.iter().map(|&id| ("config.json", id));
        let named = named.chain(tokenizer.eos_token_id().map(|id| ("the tokenizer", id)));
        let is_named = !ids.is_empty();
        for (place, id) in named {
            if ids.contains(&id) {
                continue;
            }
            let token = tokenizer.id_to_token(id).unwrap_or_default();
            let ends = tokenizer.eos_token_id() == Some(id) || tokenizer.is_end_token(id);
            if is_named {
                let what = if ends { "ends a text too" } else { "is no special token and is ignored" };
                notes.push(format!(
                    "the end token {id} ({token:?}) of {place}, which other files lack, {what}"
                ));
            }
            if ends {
                ids.push(id);
            }
        }
        ids.extend(tokenizer.extra_eos_token_ids());
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn load_model(
    opened: &Opened,
    choices: &Choices,
    context: &Context,
    notes: &mut Vec<String>,
    warnings: &mut Vec<String>,
    cancel: &Cancel,
) -> Result<(Box<dyn Model>, KvType)> {
    if choices.engine_kind() != EngineKind::Cpu {
        return load_on_candle(opened, choices, context, notes, warnings, cancel);
    }
    let options = CpuOptions {
        isa: detect_isa()?,
        threads: choices.threads,
        lm_head: opened.head.lm_head,
        types: choices.types(opened),
        exact: choices.exact,
        kv_dtype: choices.kv_dtype().weight_type(),
        kv_bytes: context.kv_bytes,
        cached_kv_bytes: context.cached_kv_bytes,
        prefix_cache: choices.prefix_cache,
    };
    let model = CpuModel::new(opened.config.clone(), &opened.checkpoint, &options, cancel)?;
    warnings.extend(unused_tensors(model.unused_tensors()));
    Ok((Box::new(model), choices.kv_dtype()))
}

/// A warning if the tokenizer has ids that the model refuses. A smaller tokenizer is normal, because models
/// pad their vocabulary.
fn beyond_vocabulary(tokenizer: usize, model: usize) -> Option<String> {
    (tokenizer > model).then(|| {
        format!("the tokenizer has ids up to {}, but the model only accepts ids below {model}", tokenizer - 1)
    })
}

/// A warning of unused tensors. transformers ignores them too, but they may mean that the model computes
/// something else.
fn unused_tensors(names: &[String]) -> Option<String> {
    const SHOWN: usize = 3;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    let more = names.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!names.is_empty())
        .then(|| format!("tensors that this config's Llama does not have are ignored: {shown}{more}"))
}

/// The process that first loaded a model in Candle. Candle's threads exist only there.
static CANDLE_THREADS: OnceLock<Process> = OnceLock::new();

/// Loads the candle or the tensor engine. Also returns the type that it computes with, which is the type of
/// its KV cache.
fn load_on_candle(
    opened: &Opened,
    choices: &Choices,
    context: &Context,
    notes: &mut Vec<String>,
    warnings: &mut Vec<String>,
    cancel: &Cancel,
) -> Result<(Box<dyn Model>, KvType)> {
    if !CANDLE_THREADS.get_or_init(Process::current).is_current() {
        let reason = "Candle's threads stayed in the process that this one was forked from; use \
                      engine=\"cpu\", or start processes with multiprocessing's \"spawn\" method";
        return Err(Error::Device { device: device::name(&choices.device), reason: reason.into() });
    }
    let stored = opened.stored_type();
    let computes_with = choices.candle_dtype(stored)?;
    let dtype = computes_with.candle_type();
    if choices.engine_kind() == EngineKind::Candle {
        let name = stored.map_or("mixed types".into(), |stored| stored.to_string());
        if stored != Some(computes_with.weight_type()) {
            notes.push(format!(
                "weights stored as {name} are converted to {dtype:?}, because Candle's Llama computes with it"
            ));
        }
        let (checkpoint, context_length) = (Arc::clone(&opened.checkpoint), context.context_length);
        let model = CandleModel::new(
            &opened.config,
            checkpoint,
            &opened.head,
            dtype,
            &choices.device,
            context_length,
        )?;
        warnings.extend(unused_tensors(model.unused_tensors()));
        return Ok((Box::new(model), computes_with.into()));
    }
    let options = TensorOptions {
        device: choices.device.clone(),
        dtype,
        matrices: choices.matrices()?,
        lm_head: opened.head.lm_head,
        context_length: context.context_length,
        max_seqs: max_seqs(opened, choices, context),
    };
    let model = TensorModel::new(opened.config.clone(), &opened.checkpoint, &options, cancel)?;
    warnings.extend(unused_tensors(model.unused_tensors()));
    for stored in model.converted_types() {
        notes.push(format!("weights stored as {stored} are converted to {dtype:?}"));
    }
    Ok((Box::new(model), computes_with.into()))
}

/// The most sequences of the tensor engine. Each may fill its context. The KV cache holds the old and the new
/// keys and values while it grows, the old ones being half as many.
fn max_seqs(opened: &Opened, choices: &Choices, context: &Context) -> usize {
    const MOST: u64 = 32;
    let each = MemoryEstimate::new(opened, choices, context.context_length).kv_cache.max(1);
    (context.kv_bytes / each.saturating_add(each / 2)).clamp(1, MOST) as usize
}
