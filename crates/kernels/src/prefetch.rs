//! Prefetching: cache lines are loaded before they are read. Without it, memory latency limits decoding.

#[cfg(target_arch = "aarch64")]
pub(crate) use crate::aarch64::prefetch::{prefetch_l1, prefetch_l2};
#[cfg(target_arch = "x86_64")]
pub(crate) use crate::x86_64::prefetch::{prefetch_l1, prefetch_l2};

/// Prefetches the cache line at `address` into L1; never faults. Does nothing on this architecture.
#[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
pub(crate) fn prefetch_l1(_address: *const u8) {}

/// Prefetches into L2 only, which allows more outstanding loads than L1; never faults. Does nothing on this
/// architecture.
#[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
pub(crate) fn prefetch_l2(_address: *const u8) {}

/// How far ahead a stream of weights is prefetched, in bytes. The processor's own prefetcher loses a tenth of
/// the speed without it, on some processors a third or a half.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamPrefetch {
    /// Into L1.
    pub(crate) l1: usize,
    /// Into L2 as well.
    pub(crate) l2: Option<usize>,
    /// From one prefetch to the next.
    pub(crate) step: usize,
}

impl StreamPrefetch {
    /// Prefetches every cache line `l1` bytes ahead into L1.
    pub(crate) const fn into_l1(l1: usize) -> Self {
        StreamPrefetch { l1, l2: None, step: 64 }
    }

    /// Prefetches what the stream will read some time after `part`.
    #[inline(always)]
    pub(crate) fn after(self, part: &[u8]) {
        for line in (0..part.len()).step_by(self.step) {
            let address = part.as_ptr().wrapping_add(line);
            if let Some(l2) = self.l2 {
                prefetch_l2(address.wrapping_add(l2));
            }
            prefetch_l1(address.wrapping_add(self.l1));
        }
    }
}
