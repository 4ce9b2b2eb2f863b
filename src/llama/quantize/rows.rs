//! Converts a tensor's rows to another type and order, on several threads.

use crate::checkpoint::gguf::Writer;
use crate::checkpoint::{Tensor, hf_row};
use crate::error::{Error, Result};
use crate::kernels::WeightType;
use crate::kernels::quantize::{Unstorable, quantize_row};
use crate::sys::reserve;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Elements that a thread converts at a time: some milliseconds of work, some megabytes of memory.
const PART_ELEMENTS: usize = 1 << 20;
/// The same for the K types, whose search takes ten times as long.
const K_PART_ELEMENTS: usize = 1 << 17;
/// Maximum elements that all threads together convert at a time.
const STEP_ELEMENTS: usize = 1 << 26;

/// A tensor and the conversion to apply.
pub(super) struct Rows<'a> {
    /// Has at least one dimension.
    pub(super) stored: &'a Tensor,
    /// The new type. The kernels can write it, and a row is a whole number of its blocks.
    pub(super) dtype: WeightType,
    /// The number of rows of a head, if GGUF has them in another order.
    pub(super) head_dim: Option<usize>,
}

/// Why a tensor cannot be written.
pub(super) enum Failure {
    /// A number cannot be stored as `dtype`. `at` is its index in each dimension.
    Value { value: f32, at: Vec<usize>, dtype: WeightType },
    /// Anything else.
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Other(error)
    }
}

impl Failure {
    /// The error, with the tensor's name and file.
    pub(super) fn named(self, tensor: &str, path: &Path) -> Error {
        match self {
            Failure::Value { value, at, dtype } => {
                let (tensor, path) = (tensor.to_owned(), path.to_owned());
                Error::TensorValue { tensor, value, at, dtype: dtype.name(), path }
            }
            Failure::Other(error) => error,
        }
    }
}

impl Rows<'_> {
    /// Converts and writes all rows. Calls `step` with the number of elements after each part.
    pub(super) fn write(
        &self,
        writer: &mut Writer,
        threads: usize,
        step: &mut dyn FnMut(u64) -> Result<()>,
    ) -> std::result::Result<(), Failure> {
        let &[rows, cols] = self.stored.shape() else { return self.write_vector(writer, step) };
        let row_bytes = self.dtype.bytes_for(cols).unwrap_or(0);
        let elements = if self.dtype.block_len() > 32 { K_PART_ELEMENTS } else { PART_ELEMENTS };
        let per_thread = (elements / cols.max(1)).max(1);
        let max_rows = (STEP_ELEMENTS / cols.max(1)).max(1);
        let per_step = per_thread.saturating_mul(threads).min(max_rows).min(rows);
        let mut buffer = vec![0; per_step * row_bytes];
        for first in (0..rows).step_by(per_step.max(1)) {
            let count = per_step.min(rows - first);
            let out = &mut buffer[..count * row_bytes];
            self.convert(first, out, row_bytes, per_thread)?;
            writer.write(out)?;
            step(count as u64 * cols as u64)?;
        }
        Ok(())
    }

    /// Converts as many rows as fit in `out`, starting at row `first`. A thread takes `per_thread` rows at a
    /// time.
    fn convert(
        &self,
        first: usize,
        out: &mut [u8],
        row_bytes: usize,
        per_thread: usize,
    ) -> std::result::Result<(), Failure> {
        let wanted = out.len().div_ceil(per_thread * row_bytes);
        let parts = Mutex::new(out.chunks_mut(per_thread * row_bytes).enumerate());
        let work = || {
            loop {
                let part = parts.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((part, out)) = part else { return Ok(()) };
                self.convert_part(first + part * per_thread, out, row_bytes)?;
            }
        };
        let outcome = thread::scope(|scope| {
            // If a thread cannot be started, the others and this one share its parts.
            let start = |_| {
                reserve::check_threads(1).ok()?;
                thread::Builder::new().spawn_scoped(scope, work).ok()
            };
            let workers: Vec<_> = (1..wanted).filter_map(start).collect();
            let own = work();
            let theirs: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
            theirs.into_iter().try_fold(own, |outcome, theirs| theirs.map(|theirs| outcome.and(theirs)))
        });
        match outcome {
            Ok(converted) => converted.map_err(|(row, refused)| Failure::Value {
                value: refused.value,
                at: vec![row, refused.index],
                dtype: self.dtype,
            }),
            Err(_) => {
                let reason = "a thread that converted rows panicked".into();
                Err(Failure::Other(Error::Internal { reason }))
            }
        }
    }

    fn convert_part(
        &self,
        first: usize,
        out: &mut [u8],
        row_bytes: usize,
    ) -> std::result::Result<(), (usize, Unstorable)> {
        let cols = self.stored.shape().last().copied().unwrap_or(1);
        let mut numbers = vec![0.0; cols];
        for (row, out) in (first..).zip(out.chunks_exact_mut(row_bytes)) {
            let row = self.head_dim.map_or(row, |head_dim| hf_row(row, head_dim));
            // Floats are converted through float32, which checks that they are finite. Quant blocks of the
            // same type are copied.
            if self.stored.dtype() == self.dtype && self.dtype.block_len() > 1 {
                out.copy_from_slice(&self.stored.bytes()[row * row_bytes..][..row_bytes]);
                continue;
            }
            self.stored.row_to_f32(row, &mut numbers);
            quantize_row(self.dtype, &numbers, out).map_err(|refused| (row, refused))?;
        }
        Ok(())
    }

    /// Converts and writes a norm or a bias. The elements of a bias are reordered as a projection's rows.
    fn write_vector(
        &self,
        writer: &mut Writer,
        step: &mut dyn FnMut(u64) -> Result<()>,
    ) -> std::result::Result<(), Failure> {
        let numbers = self.stored.to_f32();
        let place = |row: usize| self.head_dim.map_or(row, |head_dim| hf_row(row, head_dim));
        let ordered: Vec<f32> = (0..numbers.len()).map(|row| numbers[place(row)]).collect();
        let mut out = vec![0; self.dtype.bytes_for(ordered.len()).unwrap_or(0)];
        quantize_row(self.dtype, &ordered, &mut out).map_err(|refused| Failure::Value {
            value: refused.value,
            at: vec![place(refused.index)],
            dtype: self.dtype,
        })?;
        writer.write(&out)?;
        Ok(step(ordered.len() as u64)?)
    }
}
