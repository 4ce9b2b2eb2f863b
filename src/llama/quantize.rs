//! A checkpoint to a GGUF file, in any of the types that `kernels::quantize` makes.
//!
//! - `plan.rs`: which tensors, under which names, in which types
//! - `metadata.rs`: config and tokenizer as the file has them
//! - `rows.rs`: a tensor's rows, converted on several threads
//! - this file: one after the other
//!
//! Memory holds a few megabytes of rows for each thread at a time; of a GGUF file's query and key
//! projections the whole tensor, whose rows are put into another order twice.

mod metadata;
mod plan;
mod rows;

use super::opened::Opened;
use super::options;
use crate::checkpoint::gguf::{Writer, check_destination};
use crate::checkpoint::{Checkpoint, Format};
use crate::error::{Error, Result};
use crate::kernels::quantize::TARGETS;
use crate::kernels::{Cancel, WeightType};
use crate::model::Storage;
use plan::{Data, Planned};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// What `quantize` may be told.
#[derive(Clone, Debug)]
pub struct QuantizeOptions {
    /// "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "f16", "bf16" or "f32", in either case.
    pub dtype: String,
    /// Replace a destination that is there.
    pub force: bool,
    /// Convert tensors that are quantised already, which loses more than converting the original.
    pub allow_requantize: bool,
    /// Write the tokenizer, too.
    pub tokenizer: bool,
    /// None: the cores that this process may use.
    pub threads: Option<usize>,
}

impl Default for QuantizeOptions {
    fn default() -> Self {
        let dtype = "q4_0".to_owned();
        QuantizeOptions { dtype, force: false, allow_requantize: false, tokenizer: true, threads: None }
    }
}

/// What was written.
#[derive(Clone, Debug)]
pub struct QuantizeReport {
    /// Length of the file.
    pub bytes: u64,
    /// Time that it took.
    pub elapsed: Duration,
    /// How the tensors are stored.
    pub tensors: Vec<Storage>,
    /// What the file cannot say, and what was read with a reservation.
    pub warnings: Vec<String>,
    /// What a careful reader may want to know, though nothing is wrong with it.
    pub notes: Vec<String>,
}

/// More threads do not help a disk, and each has its rows.
const ENOUGH_THREADS: usize = 64;
/// How often the caller is told of progress.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// Writes the checkpoint at `source`, a folder or a GGUF file, to the GGUF file `destination`.
///
/// Matrices are stored as `options.dtype`, or as F16 where their rows are no whole blocks; norms and biases
/// as F32. `progress` is told the elements done and those in all, now and then; if it returns false, the work
/// ends as if cancelled. The file is written under another name beside the destination and renamed when it
/// is whole.
///
/// # Errors
/// - [`Error::Exists`], [`Error::Write`] and [`Error::InvalidArgument`] for the destination and the options
/// - those of [`super::Llama::load`] for the source
/// - [`Error::Unsupported`] for what GGUF cannot express, and for tensors that are quantised already and
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
    let dtype = parse_dtype(&options.dtype)?;
    let threads = options::threads(options.threads)?;
    check_destination(destination, options.force)?;
    let opened = Opened::new(source, false)?;
    let mut warnings: Vec<String> = opened.head.warning.iter().cloned().collect();
    warnings.extend(opened.config.warnings.iter().cloned());
    let mut notes = Vec::new();

    // What GGUF cannot express is refused before the tensors are looked at.
    let (metadata, rope_freqs) =
        metadata::metadata(source, &opened, dtype, options.tokenizer, &mut warnings, cancel)?;
    let planned = plan::plan(&opened, dtype, options.allow_requantize, &mut warnings, &mut notes)?;
    let planned: Vec<Planned> = planned.into_iter().chain(rope_freqs.map(plan::rope_freqs)).collect();
    let specs: Vec<_> = planned.iter().map(|tensor| tensor.spec.clone()).collect();
    let mut writer = Writer::create(destination, options.force, &metadata, &specs)?;

    let total = planned.iter().map(Planned::elements).sum();
    let mut done = 0;
    let mut told = Instant::now();
    let mut advance = |elements: u64| {
        done += elements;
        let mut go_on = true;
        if told.elapsed() >= TELL_EVERY || done == total {
            told = Instant::now();
            go_on = progress(done, total);
        }
        if go_on && !cancel.is_cancelled() { Ok(()) } else { Err(Error::Cancelled) }
    };
    advance(0)?;
    let threads = threads.min(ENOUGH_THREADS);
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

fn parse_dtype(name: &str) -> Result<WeightType> {
    let found = TARGETS.into_iter().find(|dtype| dtype.name().eq_ignore_ascii_case(name));
    found.ok_or_else(|| {
        let names: Vec<String> = TARGETS.iter().map(|dtype| dtype.name().to_ascii_lowercase()).collect();
        Error::argument("dtype", format!("{name:?} is not one of {}", names.join(", ")))
    })
}

/// Counts and bytes by type.
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

/// Whether the checkpoint is a GGUF file, whose tensors and metadata say more than a config.
fn is_gguf(checkpoint: &Checkpoint) -> bool {
    checkpoint.format() == Format::Gguf
}
