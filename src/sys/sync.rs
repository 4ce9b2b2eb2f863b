//! Locks that cannot stop a forked child. A child has a copy of the memory, but none of the other threads. So
//! a lock that one of them held stays held.
//!
//! The state of a [`Mutex`] and of a [`Condvar`] lies in the object alone, so that new ones work in a child.
//! (parking_lot keeps the waiting threads of all locks in one table, which has locks of its own.) Statics,
//! which a child shares with its parent, need a [`ForkLock`].

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{self, OnceLock, PoisonError};
use std::time::Instant;

pub use std::sync::MutexGuard;

/// The standard library's mutex, without poisoning: what it protects is valid after a panic too.
#[derive(Debug, Default)]
pub struct Mutex<T>(sync::Mutex<T>);

impl<T> Mutex<T> {
    /// An unlocked mutex.
    pub const fn new(value: T) -> Self {
        Mutex(sync::Mutex::new(value))
    }

    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it protects.
    pub fn into_inner(self) -> T {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The standard library's condition variable, for [`Mutex`].
#[derive(Debug, Default)]
pub struct Condvar(sync::Condvar);

impl Condvar {
    /// One that nobody waits for.
    pub const fn new() -> Self {
        Condvar(sync::Condvar::new())
    }

    /// Waits without the lock until it is signalled, or for no reason.
    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.0.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits without the lock until it is signalled, or for no reason, but not after `end`. Returns whether
    /// `end` was reached.
    pub fn wait_until<'a, T>(&self, guard: MutexGuard<'a, T>, end: Instant) -> (MutexGuard<'a, T>, bool) {
        let left = end.saturating_duration_since(Instant::now());
        let (guard, timeout) = self.0.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner);
        (guard, timeout.timed_out())
    }

    /// Wakes one waiting thread.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all waiting threads.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// The value of `cell`, which is made first if there is none. Two threads may make one at once, and the first
/// value stays: a thread that waited for the other one would wait for ever in a forked child.
pub fn get_or_make<T>(cell: &OnceLock<T>, make: impl FnOnce() -> T) -> &T {
    if let Some(value) = cell.get() {
        return value;
    }
    let value = make();
    cell.get_or_init(|| value)
}

/// A lock for a static and a short time. It knows which process holds it: a child that was forked while
/// another thread held it can take it.
#[derive(Debug)]
pub(super) struct ForkLock {
    /// The process's id; 0 if nobody holds the lock.
    holder: AtomicU32,
}

/// Releases the lock when it is dropped.
pub(super) struct ForkLockGuard<'a>(&'a ForkLock);

impl ForkLock {
    pub(super) const fn new() -> Self {
        ForkLock { holder: AtomicU32::new(0) }
    }

    /// Waits for the lock. Not for a thread that holds it already.
    pub(super) fn lock(&self) -> ForkLockGuard<'_> {
        let own = std::process::id();
        let mut expected = 0;
        while let Err(holder) =
            self.holder.compare_exchange(expected, own, Ordering::Acquire, Ordering::Relaxed)
        {
            if holder == own {
                std::thread::yield_now();
                expected = 0;
            } else {
                // Free, or held by a thread that does not exist in this process.
                expected = holder;
            }
        }
        ForkLockGuard(self)
    }
}

impl Drop for ForkLockGuard<'_> {
    fn drop(&mut self) {
        self.0.holder.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    #[test]
    fn a_panic_leaves_a_mutex_usable() {
        let mutex = Mutex::new(1);
        std::thread::scope(|scope| {
            let panics = || {
                let _guard = mutex.lock();
                panic!("a panic with the lock");
            };
            assert!(scope.spawn(panics).join().is_err());
        });
        *mutex.lock() += 1;
        assert_eq!(mutex.into_inner(), 2);
    }

    #[test]
    fn a_wait_ends_at_its_end_or_by_a_signal() {
        let (mutex, condvar) = (Mutex::new(false), Condvar::new());
        let (guard, is_late) = condvar.wait_until(mutex.lock(), Instant::now() + Duration::from_millis(1));
        assert!(!*guard && is_late);
        drop(guard);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                *mutex.lock() = true;
                condvar.notify_all();
            });
            let mut guard = mutex.lock();
            while !*guard {
                guard = condvar.wait(guard);
            }
        });
    }

    #[test]
    fn threads_do_not_wait_for_a_value_that_another_one_makes() {
        let cell = OnceLock::new();
        let slow = get_or_make(&cell, || {
            std::thread::scope(|scope| {
                scope.spawn(|| assert_eq!(get_or_make(&cell, || 1), &1));
            });
            2
        });
        assert_eq!((slow, cell.get()), (&1, Some(&1)));
    }

    #[test]
    fn a_fork_lock_excludes_the_threads_of_one_process() {
        let (lock, count) = (ForkLock::new(), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        let _guard = lock.lock();
                        let before = count.load(Ordering::Relaxed);
                        std::hint::spin_loop();
                        count.store(before + 1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 4000);
    }

    #[test]
    fn a_fork_lock_that_was_held_in_another_process_is_free() {
        let lock = ForkLock { holder: AtomicU32::new(std::process::id() + 1) };
        drop(lock.lock());
        assert_eq!(lock.holder.into_inner(), 0);
    }
}
