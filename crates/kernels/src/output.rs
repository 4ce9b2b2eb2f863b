//! Outputs of products, which several threads write at the same time.

use std::marker::PhantomData;

/// Whether a product replaces `out` or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// `out = x · wᵀ`
    Set,
    /// `out += x · wᵀ`, as for a residual connection
    Add,
}

/// A slice that the tasks of one job write to. Each task writes a part of its own.
pub(crate) struct SharedOut<'a, T = f32> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: the methods that write require of their callers that no two tasks touch one element.
unsafe impl<T: Send> Sync for SharedOut<'_, T> {}

impl SharedOut<'_> {
    /// Sets element `index`, or adds to it.
    ///
    /// # Safety
    /// `index` is inside the slice, and no other task touches this element while this one runs.
    #[inline(always)]
    pub(crate) unsafe fn put(&self, index: usize, value: f32, output: Output) {
        debug_assert!(index < self.len);
        // SAFETY: the caller's promise.
        unsafe {
            let cell = self.start.add(index);
            *cell = match output {
                Output::Set => value,
                Output::Add => *cell + value,
            };
        }
    }
}

impl<'a, T> SharedOut<'a, T> {
    pub(crate) fn new(out: &'a mut [T]) -> Self {
        SharedOut { start: out.as_mut_ptr(), len: out.len(), borrow: PhantomData }
    }

    /// The `len` elements from `start` on.
    ///
    /// # Safety
    /// No other task touches them while this one runs.
    ///
    /// # Panics
    /// If they are not inside the slice.
    #[allow(clippy::mut_from_ref)] // exclusive by the caller's promise
    #[inline(always)]
    pub(crate) unsafe fn slice_mut(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "the range is inside the slice");
        // SAFETY: inside the slice by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
