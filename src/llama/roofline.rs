//! Measures the machine's peak rates of reading memory and of computing.

use super::options;
use crate::checkpoint::background::no_thread;
use crate::error::{Error, Result};
use crate::kernels::{Isa, Kernels, RooflineError, RooflinePeaks};
use crate::model::Cancel;
use crate::sys;

/// The smallest buffer. Reading less would not measure a steady rate.
const MIN_BYTES: usize = 1 << 20;

/// Measures how fast `threads` threads can read and compute at most. None takes the performance
/// cores that this process may use.
///
/// Uses the best ISA of this CPU, even if another one is forced for models. Reads a buffer of
/// `buffer_bytes`; to measure main memory, it must be larger than all caches.
///
/// # Errors
/// - [`Error::InvalidArgument`] for `threads` and `buffer_bytes`
/// - [`Error::OutOfMemory`] if there is no room for the buffer
/// - [`Error::Cancelled`]
pub fn roofline_peaks(
    threads: Option<usize>,
    buffer_bytes: usize,
    cancel: &Cancel,
) -> Result<(Isa, RooflinePeaks)> {
    let threads = options::threads(threads)?;
    if buffer_bytes < MIN_BYTES {
        let reason = format!("{buffer_bytes} is less than {MIN_BYTES}");
        return Err(Error::argument("buffer_bytes", reason));
    }
    let needed = buffer_bytes as u64;
    let out_of_memory = |available| Error::OutOfMemory {
        what: "the buffer that is read to measure memory".to_owned(),
        needed,
        available,
    };
    // Checked first, because the system may grant memory that it does not have and kill the process when
    // it is used.
    let free = sys::memory().map_or(u64::MAX, |memory| memory.available);
    let free = free.min(sys::address_space_left().unwrap_or(u64::MAX));
    if needed > free {
        return Err(out_of_memory(free));
    }
    let isa = Isa::available().last().unwrap_or(Isa::Scalar);
    let kernels = Kernels::new(isa, threads).map_err(no_thread)?;
    match kernels.roofline_peaks(buffer_bytes, cancel) {
        Ok(peaks) => Ok((isa, peaks)),
        Err(RooflineError::NoMemory) => Err(out_of_memory(free)),
        Err(RooflineError::Cancelled) => Err(Error::Cancelled),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roofline_peaks_are_those_of_the_best_isa() {
        let (isa, peaks) = roofline_peaks(Some(1), MIN_BYTES, &Cancel::never()).unwrap();
        assert_eq!(Some(isa), Isa::available().last());
        assert!(peaks.read_bytes_per_second > 0.0);
    }

    #[test]
    fn roofline_peaks_refuse_bad_arguments_and_more_memory_than_there_is() {
        for (threads, bytes, name) in
            [(0, MIN_BYTES, "threads"), (usize::MAX, MIN_BYTES, "threads"), (1, 0, "buffer_bytes")]
        {
            match roofline_peaks(Some(threads), bytes, &Cancel::never()) {
                Err(Error::InvalidArgument { argument, .. }) => assert_eq!(argument, name),
                other => panic!("{other:?}"),
            }
        }
        let huge = roofline_peaks(Some(1), usize::MAX, &Cancel::never());
        assert!(matches!(huge, Err(Error::OutOfMemory { .. })), "{huge:?}");
    }
}
