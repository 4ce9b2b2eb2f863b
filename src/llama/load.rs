//! From a path and options to a model: which engine, which device, which types, how much context.

use super::Llama;
use super::memory::{self, MemoryEstimate};
use crate::checkpoint::tied::{self, HeadChoice, LmHead};
use crate::checkpoint::{Checkpoint, Format};
use crate::config::{GenerationConfig, LlamaConfig};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::kernels::{Cancel, Isa, WeightType};
use crate::kv_cache::KvShape;
use crate::model::candle::CandleModel;
use crate::model::cpu::{CpuModel, CpuOptions, Types};
use crate::model::{Model, Storage};
use crate::sys::Process;
use crate::tokenizer::Tokenizer;
use crate::{device, sys};
use candle_core::{DType, Device};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// What `load` may be told; the defaults are the fields' "auto" and None.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// "auto", "cpu", "cuda", "cuda:N" or "metal".
    pub device: String,
    /// "auto" keeps the checkpoint's storage types; "float32", "float16", "bfloat16".
    pub dtype: String,
    /// None, "q8_0" or "q4_0": what float matrices are quantised to, tensor by tensor.
    pub quantize: Option<String>,
    /// "auto", or "exact": float32 activations, keys and values everywhere.
    pub compute: String,
    /// The type of cached keys and values: "auto" is float16, in exact mode float32; "float16", "bfloat16",
    /// "float32".
    pub kv_dtype: String,
    /// "auto", "cpu" or "candle".
    pub engine: String,
    /// None: the cores that this process may use.
    pub threads: Option<usize>,
    /// None: the model's own, bounded by memory.
    pub context_length: Option<usize>,
    /// Refuse what would otherwise load with a warning.
    pub strict: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        let auto = || "auto".to_owned();
        LoadOptions {
            device: auto(),
            dtype: auto(),
            quantize: None,
            compute: auto(),
            kv_dtype: auto(),
            engine: auto(),
            threads: None,
            context_length: None,
            strict: false,
        }
    }
}

/// What was loaded, and how.
#[derive(Clone, Debug)]
pub struct LoadReport {
    /// "cpu" or "candle".
    pub engine: &'static str,
    /// The device, as [`LoadOptions::device`] spells it.
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

/// The options, parsed.
pub(super) struct Choices {
    pub(super) dtype: Option<WeightType>,
    quantize: Option<WeightType>,
    pub(super) exact: bool,
    /// As asked for.
    kv_dtype: Option<WeightType>,
    engine: Option<EngineKind>,
    pub(super) device: Device,
    threads: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum EngineKind {
    Cpu,
    Candle,
}

/// The most threads that a caller may ask for: far above any machine's cores.
pub(super) const MOST_THREADS: usize = 4096;
/// The context that is offered however little memory is left.
const LEAST_CONTEXT: usize = 512;

impl Choices {
    pub(super) fn new(options: &LoadOptions) -> Result<Self> {
        let unknown = |argument: &str, value: &str, known: &str| {
            Error::argument(argument, format!("{value:?} is not one of {known}"))
        };
        let float = |argument: &str, value: &str| match value {
            "auto" => Ok(None),
            "float32" => Ok(Some(WeightType::F32)),
            "float16" => Ok(Some(WeightType::F16)),
            "bfloat16" => Ok(Some(WeightType::BF16)),
            other => Err(unknown(argument, other, "auto, float32, float16, bfloat16")),
        };
        let dtype = float("dtype", &options.dtype)?;
        let kv_dtype = float("kv_dtype", &options.kv_dtype)?;
        let quantize = match options.quantize.as_deref() {
            None => None,
            Some("q8_0") => Some(WeightType::Q8_0),
            Some("q4_0") => Some(WeightType::Q4_0),
            Some(other) => return Err(unknown("quantize", other, "None, q8_0, q4_0")),
        };
        if let (Some(_), Some(dtype)) = (quantize, dtype) {
            let reason = format!("cannot be with dtype {dtype}: quantised weights have one type");
            return Err(Error::argument("quantize", reason));
        }
        let exact = match options.compute.as_str() {
            "auto" => false,
            "exact" => true,
            other => return Err(unknown("compute", other, "auto, exact")),
        };
        if exact && !matches!(kv_dtype, None | Some(WeightType::F32)) {
            let reason = format!(
                "{:?} cannot be with compute=\"exact\", which keeps keys and values in float32",
                options.kv_dtype
            );
            return Err(Error::argument("kv_dtype", reason));
        }
        let engine = match options.engine.as_str() {
            "auto" => None,
            "cpu" => Some(EngineKind::Cpu),
            "candle" => Some(EngineKind::Candle),
            other => return Err(unknown("engine", other, "auto, cpu, candle")),
        };
        // The cpu engine takes no accelerator, so "auto" must not find one for it.
        let name =
            if engine == Some(EngineKind::Cpu) && options.device == "auto" { "cpu" } else { &options.device };
        let device = device::open(name)?;
        if engine == Some(EngineKind::Cpu) && !device.is_cpu() {
            return Err(Error::argument("engine", format!("\"cpu\" does not run on device {name}")));
        }
        let threads = match options.threads {
            Some(threads @ 1..=MOST_THREADS) => threads,
            Some(other) => {
                return Err(Error::argument("threads", format!("{other} is not from 1 to {MOST_THREADS}")));
            }
            None => sys::usable_cores(),
        };
        Ok(Choices { dtype, quantize, exact, kv_dtype, engine, device, threads })
    }

    /// In which types the cpu engine holds weights.
    pub(super) fn types(&self) -> Types {
        Types { dtype: self.dtype, quantize: self.quantize }
    }

    /// Whether Candle's Llama is tried; else it is the cpu engine.
    pub(super) fn tries_candle(&self) -> bool {
        self.engine == Some(EngineKind::Candle) || !self.device.is_cpu()
    }

    /// The type of the cpu engine's keys and values.
    pub(super) fn kv_dtype(&self) -> WeightType {
        self.kv_dtype.unwrap_or(if self.exact { WeightType::F32 } else { WeightType::F16 })
    }
}

/// Everything that is known before weights are read.
pub(super) struct Opened {
    pub(super) checkpoint: Arc<Checkpoint>,
    pub(super) config: LlamaConfig,
    generation: GenerationConfig,
    pub(super) head: HeadChoice,
}

impl Opened {
    pub(super) fn new(path: &Path, strict: bool) -> Result<Self> {
        let (checkpoint, config) = open_checkpoint(path)?;
        let generation = match checkpoint.format() {
            Format::Safetensors => GenerationConfig::from_folder(path)?,
            Format::Gguf => GenerationConfig::default(),
        };
        let head = tied::choose_head(&checkpoint, config.tie_word_embeddings, strict)?;
        check_sizes(&checkpoint, &config)?;
        Ok(Opened { checkpoint: Arc::new(checkpoint), config, generation, head })
    }

    /// The context that was asked for; else the model's own.
    pub(super) fn asked_context(&self, options: &LoadOptions) -> Result<usize> {
        match options.context_length {
            Some(asked) if !(1..=crate::config::MAX_SIZE).contains(&asked) => {
                let reason = format!("{asked} is not from 1 to {}", crate::config::MAX_SIZE);
                Err(Error::argument("context_length", reason))
            }
            asked => Ok(asked.unwrap_or(self.config.context_length())),
        }
    }

    /// The shape of the cpu engine's keys and values.
    pub(super) fn kv_shape(&self, dtype: WeightType) -> KvShape {
        KvShape {
            layers: self.config.num_hidden_layers,
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
            dtype,
        }
    }

    /// The context that is offered, and the bytes that keys and values of all sequences may take.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the model has no room, or not with the context that was asked for.
    fn context(
        &self,
        options: &LoadOptions,
        choices: &Choices,
        warnings: &mut Vec<String>,
        notes: &mut Vec<String>,
    ) -> Result<(usize, u64)> {
        let own = self.config.context_length();
        let asked = self.asked_context(options)?;
        if asked > own {
            warnings.push(format!("context_length {asked} is beyond the model's own {own}"));
        }
        // A GPU's memory is Candle's to ask for.
        let memory = if choices.device.is_cpu() { sys::memory() } else { None };
        let Some(memory) = memory else { return Ok((asked, u64::MAX)) };
        let least = options.context_length.unwrap_or(own.min(LEAST_CONTEXT));
        let needed = MemoryEstimate::new(self, choices, least);
        warnings.extend(memory::check(&needed, memory, sys::address_space_left())?);
        let block_bytes = self.kv_shape(choices.kv_dtype()).block_bytes().unwrap_or(usize::MAX);
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
}

/// Checks the config's sizes against one tensor of each shape. Otherwise a config that lies would seem to
/// ask for more memory than there is.
fn check_sizes(checkpoint: &Checkpoint, config: &LlamaConfig) -> Result<()> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let query = config.num_attention_heads * config.head_dim;
    let key_value = config.num_key_value_heads * config.head_dim;
    checkpoint.check_shape(tied::EMBED_TOKENS, &[config.vocab_size, hidden])?;
    checkpoint.check_shape("model.layers.0.self_attn.q_proj.weight", &[query, hidden])?;
    checkpoint.check_shape("model.layers.0.self_attn.k_proj.weight", &[key_value, hidden])?;
    checkpoint.check_shape("model.layers.0.mlp.gate_proj.weight", &[inner, hidden])
}

/// Opens a checkpoint and reads its config, without touching weights.
pub(super) fn open_checkpoint(path: &Path) -> Result<(Checkpoint, LlamaConfig)> {
    // A folder's config first: a folder without one is told so, whatever else it lacks.
    if path.is_dir() {
        let config = LlamaConfig::from_folder(path)?;
        return Ok((Checkpoint::open(path)?, config));
    }
    let checkpoint = Checkpoint::open(path)?;
    let metadata =
        checkpoint.metadata().ok_or_else(|| Error::malformed(path, "is neither a folder nor a GGUF file"))?;
    let config = LlamaConfig::from_gguf(metadata, Some(&checkpoint))?;
    Ok((checkpoint, config))
}

pub(super) fn load(path: &Path, options: &LoadOptions, cancel: &Cancel) -> Result<Llama> {
    let started = Instant::now();
    let choices = Choices::new(options)?;
    let opened = Opened::new(path, options.strict)?;
    let mut warnings: Vec<String> = opened.head.warning.iter().cloned().collect();
    warnings.extend(opened.config.warnings.iter().cloned());
    warnings.extend(opened.generation.warnings.iter().cloned());
    let mut notes = Vec::new();

    let (context_length, kv_bytes) = opened.context(options, &choices, &mut warnings, &mut notes)?;
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
        engine: if cpu { "cpu" } else { "candle" },
        device: if cpu { "cpu".into() } else { device::name(&choices.device) },
        compute: if choices.exact { "exact" } else { "auto" },
        kv_dtype: float_name(kv_dtype),
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
) -> Result<(Box<dyn Model>, EngineKind, WeightType)> {
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
        kv_dtype: choices.kv_dtype(),
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
) -> Result<(CandleModel, WeightType)> {
    if !CANDLE_THREADS.get_or_init(Process::current).is_current() {
        let reason = "Candle's threads stayed in the process that this one was forked from; use \
                      engine=\"cpu\", or start processes with multiprocessing's \"spawn\" method";
        return Err(Error::Device { device: device::name(&choices.device), reason: reason.into() });
    }
    let stored = stored_type(&opened.checkpoint);
    let dtype = candle_dtype(choices, stored)?;
    let computes_with = match dtype {
        DType::F16 => WeightType::F16,
        DType::BF16 => WeightType::BF16,
        _ => WeightType::F32,
    };
    if let Some(asked) = choices.kv_dtype.filter(|&asked| asked != computes_with) {
        let reason = format!(
            "{}: Candle's Llama keeps keys and values in the type that it computes with, here {}; use \
             engine=\"cpu\"",
            float_name(asked),
            float_name(computes_with)
        );
        return Err(Error::unsupported("kv_dtype", reason));
    }
    let name = stored.map_or("mixed types".into(), |stored| stored.to_string());
    if stored != Some(computes_with) {
        notes.push(format!(
            "weights stored as {name} are held as {dtype:?}, which is what Candle's Llama computes with"
        ));
    }
    let checkpoint = Arc::clone(&opened.checkpoint);
    let model =
        CandleModel::new(&opened.config, checkpoint, &opened.head, dtype, &choices.device, context_length)?;
    Ok((model, computes_with))
}

/// A float type, as the options spell it.
fn float_name(dtype: WeightType) -> &'static str {
    match dtype {
        WeightType::F16 => "float16",
        WeightType::BF16 => "bfloat16",
        _ => "float32",
    }
}

/// The type in which Candle's Llama holds weights that are stored as `stored`.
pub(super) fn candle_dtype(choices: &Choices, stored: Option<WeightType>) -> Result<DType> {
    if choices.quantize.is_some() {
        let reason = "Candle's Llama computes with floats; use engine=\"cpu\"";
        return Err(Error::unsupported("quantize", reason));
    }
    let on_cpu = choices.device.is_cpu();
    Ok(match (choices.exact, choices.dtype, stored) {
        (true, None | Some(WeightType::F32), _) | (false, Some(WeightType::F32), _) => DType::F32,
        (true, Some(other), _) => {
            return Err(Error::argument(
                "dtype",
                format!("{other} cannot be with compute=\"exact\" in Candle"),
            ));
        }
        (false, Some(WeightType::F16), _) => DType::F16,
        (false, Some(_), _) if on_cpu => {
            return Err(Error::unsupported(
                "dtype",
                "bfloat16: Candle's CPU has no such matmul; use engine=\"cpu\"",
            ));
        }
        (false, Some(_), _) => DType::BF16,
        (false, None, Some(WeightType::F16)) => DType::F16,
        (false, None, Some(WeightType::BF16)) if !on_cpu => DType::BF16,
        (false, None, Some(WeightType::F32)) => DType::F32,
        // BF16 on the CPU, and blocks of integers.
        (false, None, _) => {
            if on_cpu {
                DType::F32
            } else {
                DType::BF16
            }
        }
    })
}

/// The type that most bytes of the matrices are stored in; None if it cannot be read.
pub(super) fn stored_type(checkpoint: &Checkpoint) -> Option<WeightType> {
    let mut totals = std::collections::BTreeMap::<String, u64>::new();
    for info in checkpoint.infos() {
        *totals.entry(info.dtype).or_default() += info.bytes;
    }
    let (name, _) = totals.into_iter().max_by_key(|(_, bytes)| *bytes)?;
    WeightType::named(&name)
}
