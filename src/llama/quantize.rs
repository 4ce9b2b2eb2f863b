//! Converts a checkpoint to a GGUF file, in any type that `kernels::quantize` can write.
//!
//! - `mixture.rs`: the types of the matrices; `load` uses it too
//! - `plan.rs`: which tensors are written, and under which names
//! - `metadata.rs`: config and tokenizer as GGUF metadata
//! - `rows.rs`: converts a tensor's rows on several threads
//! - this file: writes the tensors one after the other
//!
//! Memory use is a few megabytes of rows per thread. The query and key projections of a GGUF source are held
//! whole, because their rows are reordered when they are read and again when they are written.

mod metadata;
mod mixture;
mod plan;
mod rows;

pub(super) use mixture::FileType;

use super::opened::Opened;
use super::options;
use crate::checkpoint::gguf::{Writer, check_destination};
use crate::checkpoint::names::hf_to_gguf;
use crate::checkpoint::tied::{EMBED_TOKENS, LmHead};
use crate::checkpoint::{Checkpoint, Format};
use crate::error::{Error, Result};
use crate::kernels::{Cancel, WeightType};
use crate::model::Storage;
use mixture::Mixture;
use plan::{Data, Planned};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// The options of [`quantize`].
#[derive(Clone, Debug)]
pub struct QuantizeOptions {
    /// "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "f16", "bf16" or "f32" for all matrices, or one of llama.cpp's
    /// mixtures, "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m" or "q6_k"; in either case.
    pub dtype: String,
    /// Replace an existing destination.
    pub force: bool,
    /// Convert tensors that are already quantised, which loses more precision than converting the original.
    pub allow_requantize: bool,
    /// Write the tokenizer, too.
    pub tokenizer: bool,
    /// Number of threads; None is the number of performance cores that this process may use.
    pub threads: Option<usize>,
}

impl Default for QuantizeOptions {
    fn default() -> Self {
        let dtype = "q4_0".to_owned();
        QuantizeOptions { dtype, force: false, allow_requantize: false, tokenizer: true, threads: None }
    }
}

/// The result of [`quantize`].
#[derive(Clone, Debug)]
pub struct QuantizeReport {
    /// Length of the file in bytes.
    pub bytes: u64,
    /// Time taken.
    pub elapsed: Duration,
    /// The written tensors, by storage type.
    pub tensors: Vec<Storage>,
    /// Possible problems with the source, and facts that the file cannot express.
    pub warnings: Vec<String>,
    /// Facts that may be worth knowing but are not problems.
    pub notes: Vec<String>,
}

/// Maximum number of threads. More would not help, because the disk is the limit, and each needs memory.
const MAX_THREADS: usize = 64;
/// Minimum time between two calls of `progress`.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Writes the checkpoint at `source`, a folder or a GGUF file, to the GGUF file `destination`.
///
/// Matrices are stored as `options.dtype`, or in another type if their rows cannot be cut into whole blocks.
/// Norms and biases are stored as F32. `progress` is called from time to time with the number of elements
/// done and the total. If it returns false, the work ends as if cancelled. The file is written under another
/// name beside the destination and renamed when it is complete.
///
/// # Errors
/// - [`Error::Exists`], [`Error::Write`] and [`Error::InvalidArgument`] for the destination and the options
/// - those of [`super::Llama::load`] for the source
/// - [`Error::Unsupported`] for what GGUF cannot express, and for tensors that are already quantised and
///   would have to change their type
/// - [`Error::TensorValue`] for a weight that is not finite, or too large for its new type
/// - [`Error::Cancelled`]
pub fn quantize(
    source: &Path,
    destination: &Path,
    options: &QuantizeOptions,
    progress: &mut dyn FnMut(u64, u64) -> bool,
    cancel: &Cancel,
) -> Result<QuantizeReport> {
    let started = Instant::now();
    let file_type = parse_dtype(&options.dtype)?;
    let threads = options::threads(options.threads)?;
    check_destination(destination, options.force)?;
    let opened = Opened::new(source, false)?;
    let mut warnings: Vec<String> = opened.head.warning.iter().cloned().collect();
    warnings.extend(opened.config.warnings.iter().cloned());
    let mut notes = opened.checkpoint.notes().to_vec();

    // A config that GGUF cannot express is refused before the tensors are checked.
    let (metadata, rope_freqs) =
        metadata::metadata(source, &opened, file_type, options.tokenizer, &mut warnings, cancel)?;
    let planned = plan::plan(&opened, file_type, options.allow_requantize, &mut warnings, &mut notes)?;
    let planned: Vec<Planned> = planned.into_iter().chain(rope_freqs.map(plan::rope_freqs)).collect();
    let specs: Vec<_> = planned.iter().map(|tensor| tensor.spec.clone()).collect();
    let mut writer = Writer::create(destination, options.force, &metadata, &specs)?;

    let total = planned.iter().map(Planned::elements).sum();
    let mut done = 0;
    let mut reported = Instant::now();
    let mut advance = |elements: u64| {
        done += elements;
        let mut continues = true;
        if reported.elapsed() >= PROGRESS_INTERVAL || done == total {
            reported = Instant::now();
            continues = progress(done, total);
        }
        if continues && !cancel.is_cancelled() { Ok(()) } else { Err(Error::Cancelled) }
    };
    advance(0)?;
    let threads = threads.min(MAX_THREADS);
    let files = opened.checkpoint.files();
    for tensor in &planned {
        let mut step = |elements| {
            files.check()?;
            advance(elements)
        };
        match &tensor.data {
            Data::Values(values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                writer.write(&bytes)?;
                step(values.len() as u64)?;
            }
            Data::Stored { name, head_dim } => {
                let stored = opened.checkpoint.tensor_with_shape(name, &tensor.spec.shape)?;
                let rows = rows::Rows { stored: &stored, dtype: tensor.spec.dtype, head_dim: *head_dim };
                rows.write(&mut writer, threads, &mut step).map_err(|error| error.named(name, source))?;
            }
        }
    }
    let bytes = writer.finish(cancel)?;
    Ok(QuantizeReport { bytes, elapsed: started.elapsed(), tensors: storage(&planned), warnings, notes })
}

fn parse_dtype(name: &str) -> Result<FileType> {
    let found = FileType::ALL.into_iter().find(|file_type| file_type.name().eq_ignore_ascii_case(name));
    found.ok_or_else(|| {
        let names = FileType::ALL.map(FileType::name);
        Error::argument("dtype", format!("{name:?} is not one of {}", names.join(", ")))
    })
}

/// The types that matrices get when a model is quantised while it loads, by Hugging Face's names. Matrices
/// that stay as they are stored are left out. Those are the ones whose rows cannot be cut into whole blocks,
/// and, unless `file_type` is a mixture, an embedding that is not the head.
pub(super) fn types_in_memory(opened: &Opened, file_type: FileType) -> BTreeMap<String, WeightType> {
    let lm_head = opened.head.lm_head;
    let mixture = Mixture::new(file_type, &opened.config, lm_head);
    let is_quantized = |name: &str| file_type.is_mixture() || name != EMBED_TOKENS || lm_head == LmHead::Tied;
    let infos = opened.checkpoint.infos().into_iter().filter(|info| hf_to_gguf(&info.name).is_some());
    infos
        .filter_map(|info| {
            let &[_, cols] = info.shape.as_slice() else { return None };
            let dtype = mixture.choose(&info.name, cols).dtype;
            (is_quantized(&info.name) && dtype.block_len() > 1).then_some((info.name, dtype))
        })
        .collect()
}

/// Notes about matrices that stay as they are stored, although they were to get one of `types`.
pub(super) fn notes_in_memory(opened: &Opened, types: &BTreeMap<String, WeightType>) -> Vec<String> {
    let looked_up = (opened.head.lm_head == LmHead::Separate).then_some(EMBED_TOKENS);
    let mut left = BTreeMap::<&str, (usize, String)>::new();
    for info in opened.checkpoint.infos() {
        let is_matrix = info.shape.len() == 2 && hf_to_gguf(&info.name).is_some();
        let is_quantized = WeightType::named(&info.dtype).is_some_and(|dtype| dtype.block_len() > 1);
        let reason = match (is_matrix, is_quantized, types.contains_key(&info.name)) {
            (false, ..) | (_, false, true) => continue,
            (_, true, _) => "they are quantised already",
            (_, false, false) if looked_up == Some(info.name.as_str()) => continue,
            (_, false, false) => "their rows cannot be cut into whole blocks",
        };
        left.entry(reason).or_insert_with(|| (0, info.name)).0 += 1;
    }
    left.into_iter()
        .map(|(reason, (count, first))| {
            format!("{count} matrices stay as they are stored, because {reason}; the first is {first}")
        })
        .collect()
}

/// The planned tensors by storage type.
fn storage(planned: &[Planned]) -> Vec<Storage> {
    let mut types = BTreeMap::<&str, Storage>::new();
    for tensor in planned {
        let name = tensor.spec.dtype.name();
        let storage = types.entry(name).or_insert_with(|| Storage { dtype: name.into(), count: 0, bytes: 0 });
        storage.count += 1;
        storage.bytes += tensor.spec.bytes().unwrap_or(0);
    }
    types.into_values().collect()
}

/// Whether the checkpoint is a GGUF file. Its metadata are copied, and its tensors show which biases exist.
fn is_gguf(checkpoint: &Checkpoint) -> bool {
    checkpoint.format() == Format::Gguf
}
