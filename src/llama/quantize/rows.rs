//! A tensor's rows in another type and order, on several threads.

use crate::checkpoint::gguf::Writer;
use crate::checkpoint::{Tensor, hf_row};
use crate::error::{Error, Result};
use crate::kernels::WeightType;
use crate::kernels::quantize::{Unstorable, quantize_row};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Elements that a thread converts at a time: some milliseconds of work, some megabytes of memory.
const PART_ELEMENTS: usize = 1 << 20;
/// Elements that are converted at a time on all threads, however many those are.
const STEP_ELEMENTS: usize = 1 << 26;

/// A tensor and what is to become of it.
pub(super) struct Rows<'a> {
    /// With at least one dimension.
    pub(super) stored: &'a Tensor,
    /// A type that the kernels make, whose blocks make up whole rows.
    pub(super) dtype: WeightType,
    /// The rows of a head, if GGUF has them in another order.
    pub(super) head_dim: Option<usize>,
}

/// What can go wrong with a tensor.
pub(super) enum Failure {
    /// A number cannot be stored; its place.
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
    /// Converts and writes all rows; `step` is told of elements that are done.
    pub(super) fn write(
        &self,
        writer: &mut Writer,
        threads: usize,
        step: &mut dyn FnMut(u64) -> Result<()>,
    ) -> std::result::Result<(), Failure> {
        let &[rows, cols] = self.stored.shape() else { return self.write_vector(writer, step) };
        let row_bytes = self.dtype.bytes_for(cols).unwrap_or(0);
        let per_thread = (PART_ELEMENTS / cols.max(1)).max(1);
        let most = (STEP_ELEMENTS / cols.max(1)).max(1);
        let per_step = per_thread.saturating_mul(threads).min(most).min(rows);
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

    /// Converts the rows from `first` on that `out` has room for, `per_thread` of them on each thread.
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
            // Whatever threads there are to be had share the parts; this one takes part.
            let workers = (1..wanted).filter_map(|_| thread::Builder::new().spawn_scoped(scope, work).ok());
            let workers: Vec<_> = workers.collect();
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
            // Floats pass through float32, where they are looked at; blocks are copied as they are.
            if self.stored.dtype() == self.dtype && self.dtype.block_len() > 1 {
                out.copy_from_slice(&self.stored.bytes()[row * row_bytes..][..row_bytes]);
                continue;
            }
            self.stored.row_to_f32(row, &mut numbers);
            quantize_row(self.dtype, &numbers, out).map_err(|refused| (row, refused))?;
        }
        Ok(())
    }

    /// A norm or a bias: its elements are a projection's rows.
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
