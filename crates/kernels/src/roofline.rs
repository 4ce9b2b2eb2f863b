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

#[cfg(test)]
mod tests {
    use super::super::tests::{isas, kernels};
    use super::*;
    use crate::Isa;
    use std::sync::atomic::AtomicBool;

    /// Small, because ISAs may be emulated. The tests do not check the speed itself.
    const BUFFER_BYTES: usize = 1 << 20;

    #[test]
    fn roofline_loops_do_the_operations_that_they_count() {
        for isa in isas() {
            let peaks = &isa.table().peaks;
            let loops = [Some(peaks.int8), (peaks.bf16)(), Some(peaks.f32)];
            for (peak, name) in loops.into_iter().zip(["int8", "bf16", "f32"]) {
                let Some(peak) = peak else { continue };
                for iterations in [0, 1, 2, 1000] {
                    // SAFETY: the ISA is available, and bf16 is there only if the CPU has it.
                    let sum = unsafe { (peak.run)(iterations) };
                    assert_eq!(
                        sum,
                        (iterations as u64 * peak.operations / 2) as f64,
                        "{name}, {}, {iterations}",
                        isa.name()
                    );
                }
            }
        }
    }

    #[test]
    fn roofline_reads_every_word() {
        let words: Vec<u64> = (1..5000_u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        for isa in isas() {
            for (start, len) in [(0, 0), (0, 1), (3, 63), (0, 64), (1, 64), (5, 65), (0, 4999), (7, 1031)] {
                let part = &words[start..start + len];
                let expected = part.iter().fold(0, |all, word| all ^ word);
                for (i, read) in isa.table().peaks.reads.iter().enumerate() {
                    // SAFETY: the ISA is available.
                    let all = unsafe { read(part) };
                    assert_eq!(all, expected, "{}, loop {i}, {len} words from {start}", isa.name());
                }
            }
        }
    }

    #[test]
    fn roofline_limits_are_positive_and_finite_for_any_buffer() {
        for isa in isas() {
            for (threads, bytes) in [(1, BUFFER_BYTES), (3, BUFFER_BYTES + 13), (2, 0)] {
                let peaks = kernels(isa, threads).roofline_peaks(bytes, &Cancel::never()).unwrap();
                let bf16 = peaks.bf16_operations_per_second;
                for rate in [
                    peaks.read_bytes_per_second,
                    peaks.int8_operations_per_second,
                    bf16.unwrap_or(1.0),
                    peaks.f32_operations_per_second,
                ] {
                    assert!(rate.is_finite() && rate > 0.0, "{peaks:?}");
                }
                assert!(bf16.is_none() || isa >= Isa::Avx512, "{peaks:?}");
            }
        }
    }

    #[test]
    fn roofline_bytes_are_faster_than_floats_where_there_are_instructions() {
        for isa in isas().into_iter().filter(|isa| isa.packs_weights()) {
            let faster = || {
                let peaks = kernels(isa, 1).roofline_peaks(BUFFER_BYTES, &Cancel::never()).unwrap();
                peaks.int8_operations_per_second >= peaks.f32_operations_per_second
            };
            // Another process may have used the core during a whole measurement.
            assert!((0..5).any(|_| faster()), "{}", isa.name());
        }
    }

    #[test]
    fn roofline_threads_neither_multiply_the_limit_nor_divide_it() {
        let isa = *isas().last().expect("one level is always there");
        let rate = |threads| {
            kernels(isa, threads)
                .roofline_peaks(BUFFER_BYTES, &Cancel::never())
                .unwrap()
                .f32_operations_per_second
        };
        // Two threads reach between one busy core and two free ones. The bounds leave room for other
        // processes.
        let sane = || (0.4..3.0).contains(&(rate(2) / rate(1)));
        assert!((0..5).any(|_| sane()));
    }

    #[test]
    fn roofline_stops_when_told_and_says_if_there_is_no_memory() {
        let kernels = kernels(Isa::Scalar, 2);
        let peaks = kernels.roofline_peaks(BUFFER_BYTES, &Cancel::new(&AtomicBool::new(true)));
        assert_eq!(peaks, Err(RooflineError::Cancelled));
        assert_eq!(kernels.roofline_peaks(usize::MAX, &Cancel::never()), Err(RooflineError::NoMemory));
    }
}
