//! Measures the highest read bandwidth and arithmetic throughput of this machine. The speed of a kernel is
//! judged as a fraction of them (the roofline model).
//!
//! The loops are in the ISAs' folders (`peak.rs`), each in its own instructions. This file times them on the
//! threads that the kernels run on.

use crate::kernels::Kernels;
use crate::pages;
use crate::peaks::PeakLoop;
use crate::pool::Cancel;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// The highest throughput of all threads together. A multiplication and an addition count as two operations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RooflinePeaks {
    /// Bytes read from memory.
    pub read_bytes_per_second: f64,
    /// Operations of dot products of bytes.
    pub int8_operations_per_second: f64,
    /// Operations of dot products of bf16; None without an instruction for them.
    pub bf16_operations_per_second: Option<f64>,
    /// Operations of products of f32.
    pub f32_operations_per_second: f64,
}

/// Why [`RooflinePeaks`] could not be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RooflineError {
    /// There is no memory for the buffer.
    NoMemory,
    /// [`Cancel`] fired.
    Cancelled,
}

/// The shortest time of a pass, so that starting the threads does not count.
const PASS: Duration = Duration::from_millis(3);
/// How long passes are repeated. The fastest counts, because any disturbance makes a pass slower.
const REPEAT: Duration = Duration::from_millis(80);
/// The least number of passes.
const PASSES: usize = 3;
/// Words of a page. The threads' parts are a multiple of it.
const PAGE_WORDS: usize = 512;

impl Kernels {
    /// Measures what the threads can read and compute at most, in well under a second.
    ///
    /// - `buffer_bytes`: the size of what is read. To measure memory, it has to be larger than any cache
    ///
    /// # Errors
    /// See [`RooflineError`].
    pub fn roofline_peaks(
        &self,
        buffer_bytes: usize,
        cancel: &Cancel,
    ) -> Result<RooflinePeaks, RooflineError> {
        let peaks = &self.table.peaks;
        // The buffer is dropped before the other measurements.
        let read_bytes_per_second = self.read_rate(&self.touched_buffer(buffer_bytes, cancel)?, cancel)?;
        let bf16 = (peaks.bf16)();
        Ok(RooflinePeaks {
            read_bytes_per_second,
            int8_operations_per_second: self.operation_rate(peaks.int8, cancel)?,
            bf16_operations_per_second: bf16.map(|peak| self.operation_rate(peak, cancel)).transpose()?,
            f32_operations_per_second: self.operation_rate(peaks.f32, cancel)?,
        })
    }

    /// Words of each thread's part of the buffer.
    fn part_words(&self, words: usize) -> usize {
        words.div_ceil(self.pool.threads()).max(1).next_multiple_of(PAGE_WORDS)
    }

    /// A buffer whose pages are allocated. Each thread writes its own part, so that it lies in memory near
    /// the thread.
    fn touched_buffer(&self, bytes: usize, cancel: &Cancel) -> Result<Vec<u64>, RooflineError> {
        let words = (bytes / size_of::<u64>()).max(1);
        let mut buffer: Vec<u64> = Vec::new();
        buffer.try_reserve_exact(words).map_err(|_| RooflineError::NoMemory)?;
        pages::prefer_huge(buffer.as_ptr().cast(), size_of::<u64>() * words);
        let spare = &mut buffer.spare_capacity_mut()[..words];
        self.pool.for_each_chunk(spare, self.part_words(words), cancel, &|_, part| {
            for word in part {
                word.write(1);
            }
        });
        if cancel.is_cancelled() {
            return Err(RooflineError::Cancelled);
        }
        // SAFETY: that many words were reserved, and all are written: chunks are left out only if `cancel`
        // fires, which it then reports ever after.
        unsafe { buffer.set_len(words) };
        Ok(buffer)
    }

    /// Bytes per second if every thread reads its own part of `buffer` in one stream.
    fn read_rate(&self, buffer: &[u64], cancel: &Cancel) -> Result<f64, RooflineError> {
        let parts: Vec<&[u64]> = buffer.chunks(self.part_words(buffer.len())).collect();
        let mut best = 0.0_f64;
        for read in self.table.peaks.reads {
            let rate = best_rate(size_of_val(buffer) as f64, Duration::ZERO, cancel, |_| {
                self.pool.run(parts.len(), cancel, &|part| {
                    // SAFETY: the table was chosen for this CPU.
                    black_box(unsafe { read(parts[part]) });
                });
            })?;
            best = best.max(rate);
        }
        Ok(best)
    }

    /// Operations per second if every thread runs the loop.
    fn operation_rate(&self, peak: PeakLoop, cancel: &Cancel) -> Result<f64, RooflineError> {
        let threads = self.pool.threads();
        best_rate(threads as f64 * peak.operations as f64, PASS, cancel, |iterations| {
            self.pool.run(threads, cancel, &|_| {
                // SAFETY: the table was chosen for this CPU, and bfloat16 is there only if the CPU has it.
                black_box(unsafe { (peak.run)(iterations) });
            });
        })
    }
}

/// The highest rate of several passes, in units per second.
///
/// - `units`: units of one repetition
/// - `shortest`: the time that a pass must take to count
/// - `pass`: runs this many repetitions; one, if `shortest` is zero
fn best_rate(
    units: f64,
    shortest: Duration,
    cancel: &Cancel,
    pass: impl Fn(usize),
) -> Result<f64, RooflineError> {
    let started = Instant::now();
    let (mut best, mut passes, mut repetitions) = (0.0_f64, 0, 1_usize);
    while passes < PASSES || started.elapsed() < REPEAT {
        let began = Instant::now();
        pass(repetitions);
        let elapsed = began.elapsed();
        if cancel.is_cancelled() {
            return Err(RooflineError::Cancelled);
        }
        if elapsed < shortest {
            repetitions = repetitions.saturating_mul(2);
            continue;
        }
        best = best.max(units * repetitions as f64 / elapsed.max(Duration::from_nanos(1)).as_secs_f64());
        passes += 1;
    }
    Ok(best)
}
