//! Memory that is held back for the moment when the system has no more.
//!
//! Rust ends the process when an allocation fails, unless the code asks for a `Result`. Our large buffers do.
//! The many small ones and those of other crates do not. So [`Allocator`] first frees the memory that is held
//! back here and tries again. Before work begins, [`refill`] checks that [`BASE_BYTES`] are held. Work that
//! is known to need more holds more with [`hold`].
//!
//! Once the base is touched, [`is_exhausted`] is true, and the running work should stop with an error.

use super::sync::ForkLock;
use crate::error::{Error, Result};
use memmap2::MmapMut;
use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// Held while nothing is known about the work: far more than what is allocated between two checks of
/// [`is_exhausted`], and far less than a model.
const BASE_BYTES: usize = 16 << 20;
/// Work that needs less is covered by the base.
const SMALL_BYTES: usize = 1 << 20;
/// The most bytes of a piece. glibc keeps a heap of 64 MiB for each thread, at a multiple of its size. If it
/// has no room for another heap, it maps a page for every small allocation. So a piece has room for a heap.
const PIECE_BYTES: usize = 128 << 20;
/// The most pieces.
const MAX_PIECES: usize = 256;
/// A thread's stack, and the room for its own variables.
const THREAD_BYTES: usize = 3 << 20;

/// The pieces: mapped, but never written, so that they take no physical memory. Each is null or a boxed map.
static PIECES: [AtomicPtr<MmapMut>; MAX_PIECES] = [const { AtomicPtr::new(null_mut()) }; MAX_PIECES];
/// Bytes of all pieces.
static HELD: AtomicUsize = AtomicUsize::new(0);
/// Bytes to hold: those of all [`Held`], in addition to the base.
static WANTED: AtomicUsize = AtomicUsize::new(0);
/// Held by those who change `WANTED` and map pieces. A fork waits for other threads' mappings, so it often
/// comes while one of them holds this lock.
static MAPPING: ForkLock = ForkLock::new();
/// Whether an allocation has used the base since the last refill.
static EXHAUSTED: AtomicBool = AtomicBool::new(false);
/// Whether [`Allocator`] is the process's allocator. Without it, memory is not held, only looked for.
static ENABLED: AtomicBool = AtomicBool::new(false);

/// To be called where [`Allocator`] is the global allocator.
pub fn enable() {
    ENABLED.store(true, Ordering::Relaxed);
}

/// Memory that is held back for some work. Dropping it ends that.
#[derive(Debug)]
pub struct Held {
    bytes: usize,
}

/// Holds back memory for work that needs at most `bytes` and whose allocations would end the process.
///
/// # Errors
/// [`Error::Generation`] with the size.
pub fn hold(what: &str, bytes: usize) -> Result<Held> {
    if bytes <= SMALL_BYTES {
        refill()?;
        return Ok(Held { bytes: 0 });
    }
    let _mapping = MAPPING.lock();
    let wanted = WANTED.load(Ordering::Relaxed);
    let total = wanted.checked_add(bytes);
    if !total.and_then(|total| total.checked_add(BASE_BYTES)).is_some_and(fill) {
        trim(wanted.saturating_add(BASE_BYTES));
        let reason = format!("no memory for {what}, which may take {bytes} bytes");
        return Err(Error::Generation { reason });
    }
    if !ENABLED.load(Ordering::Relaxed) {
        trim(0);
        return Ok(Held { bytes: 0 });
    }
    WANTED.store(wanted + bytes, Ordering::Relaxed);
    Ok(Held { bytes })
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let _mapping = MAPPING.lock();
        let wanted = WANTED.load(Ordering::Relaxed) - self.bytes;
        WANTED.store(wanted, Ordering::Relaxed);
        trim(wanted.saturating_add(BASE_BYTES));
    }
}

/// Holds back again what was used. To be called before work begins.
///
/// # Errors
/// [`Error::Generation`] if there is no memory.
pub fn refill() -> Result<()> {
    if !ENABLED.load(Ordering::Relaxed) {
        return Ok(());
    }
    if HELD.load(Ordering::Relaxed) < BASE_BYTES {
        let _mapping = MAPPING.lock();
        if !fill(BASE_BYTES) {
            let reason = format!("the system has no memory left, not even {BASE_BYTES} bytes");
            return Err(Error::Generation { reason });
        }
    }
    EXHAUSTED.store(false, Ordering::Relaxed);
    Ok(())
}

/// Checks that `count` threads can be started, and have room for a heap. The C library ends the process if it
/// has no memory for a thread's own variables.
///
/// # Errors
/// [`Error::Generation`] with the size.
pub fn check_threads(count: usize) -> Result<()> {
    let bytes = count.saturating_mul(THREAD_BYTES);
    // A heap takes address space, but only what is used of it counts as data.
    if MmapMut::map_anon(bytes).is_ok() && has_address_space(bytes.saturating_add(PIECE_BYTES)) {
        return Ok(());
    }
    let bytes = bytes.saturating_add(PIECE_BYTES);
    let reason = format!("no room for a thread, which may take {bytes} bytes of address space");
    Err(Error::Generation { reason })
}

/// Whether so many bytes can be mapped without being used.
#[cfg(unix)]
#[allow(unsafe_code)]
fn has_address_space(bytes: usize) -> bool {
    // SAFETY: a new private mapping that nothing can read or write, at an address that the system chooses.
    let address = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(null_mut(), bytes, libc::PROT_NONE, flags, -1, 0)
    };
    // SAFETY: unmaps the mapping that was just made.
    address != libc::MAP_FAILED && unsafe { libc::munmap(address, bytes) } == 0
}

#[cfg(not(unix))]
fn has_address_space(bytes: usize) -> bool {
    MmapMut::map_anon(bytes).is_ok()
}

/// Whether the system has no memory left and the base is being used. Work should stop.
pub fn is_exhausted() -> bool {
    EXHAUSTED.load(Ordering::Relaxed)
}

/// The error of work that was stopped because [`is_exhausted`] was true.
pub fn exhausted() -> Error {
    Error::Generation { reason: "stopped, because the system has no memory left".into() }
}

/// Maps pieces until `total` bytes are held. Returns whether they are.
fn fill(total: usize) -> bool {
    loop {
        let Some(missing) = total.checked_sub(HELD.load(Ordering::Relaxed)).filter(|&missing| missing > 0)
        else {
            return true;
        };
        let len = missing.min(PIECE_BYTES);
        let Ok(map) = MmapMut::map_anon(len) else { return false };
        let piece = Box::into_raw(Box::new(map));
        let put = |slot: &AtomicPtr<MmapMut>| {
            slot.compare_exchange(null_mut(), piece, Ordering::Release, Ordering::Relaxed).is_ok()
        };
        // Counted first, so that whoever frees the piece never subtracts more than was added.
        HELD.fetch_add(len, Ordering::Relaxed);
        if !PIECES.iter().any(put) {
            HELD.fetch_sub(len, Ordering::Relaxed);
            free(piece);
            return false;
        }
    }
}

/// Unmaps pieces until at most `total` bytes are held, and maps what is then missing.
fn trim(total: usize) {
    for slot in &PIECES {
        if HELD.load(Ordering::Relaxed) <= total {
            break;
        }
        release(slot);
    }
    fill(total);
}

/// Unmaps the piece in `slot`, if there is one.
fn release(slot: &AtomicPtr<MmapMut>) -> bool {
    let piece = slot.swap(null_mut(), Ordering::Acquire);
    if piece.is_null() {
        return false;
    }
    HELD.fetch_sub(free(piece), Ordering::Relaxed);
    true
}

/// Unmaps a piece that is in no slot. Returns its size.
#[allow(unsafe_code)]
fn free(piece: *mut MmapMut) -> usize {
    // SAFETY: the pointer comes from `Box::into_raw` in `fill`. Nobody else has it: it was never put into a
    // slot, or `release` has taken it out by an atomic swap.
    let piece = unsafe { Box::from_raw(piece) };
    piece.len()
}

/// The system's allocator. If an allocation fails, it frees memory that is held back, and tries again.
pub struct Allocator;

/// Frees piece after piece until `allocate` succeeds. Requests for more than is held fail at once: what is
/// held is for those that cannot fail, and those are small.
#[cold]
fn with_pieces(size: usize, allocate: impl Fn() -> *mut u8) -> *mut u8 {
    for slot in &PIECES {
        let held = HELD.load(Ordering::Relaxed);
        if size > held {
            break;
        }
        if release(slot) {
            if HELD.load(Ordering::Relaxed) < BASE_BYTES {
                EXHAUSTED.store(true, Ordering::Relaxed);
            }
            let allocated = allocate();
            if !allocated.is_null() {
                return allocated;
            }
        }
    }
    null_mut()
}

// SAFETY: all memory comes from the system's allocator and returns to it, with the caller's layouts. Nothing
// here allocates through this allocator, or panics: the pieces are mapped, and their boxes only freed.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        let allocate = || unsafe { System.alloc(layout) };
        let allocated = allocate();
        if allocated.is_null() { with_pieces(layout.size(), allocate) } else { allocated }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        let allocate = || unsafe { System.alloc_zeroed(layout) };
        let allocated = allocate();
        if allocated.is_null() { with_pieces(layout.size(), allocate) } else { allocated }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as in `alloc`. An attempt that failed has left `old` as it was.
        let allocate = || unsafe { System.realloc(old, layout, size) };
        let allocated = allocate();
        if allocated.is_null() { with_pieces(size, allocate) } else { allocated }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`.
        unsafe { System.dealloc(old, layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// What is held belongs to the process, and other tests change it. So the tests run in a process of
    /// their own.
    #[test]
    fn memory_is_held_and_released() {
        let tests = ["--exact", "--ignored", "sys::reserve::tests::alone"];
        let run = Command::new(std::env::current_exe().unwrap()).args(tests).output().unwrap();
        let said = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success() && said.contains("1 passed"), "{said}");
    }

    #[test]
    #[ignore = "changes what the process holds"]
    fn alone() {
        let held = || HELD.load(Ordering::Relaxed);
        drop(hold("a test", 100 << 20).unwrap());
        assert_eq!(held(), 0, "not enabled");
        enable();
        refill().unwrap();
        assert_eq!(held(), BASE_BYTES);
        let more = hold("a test", 300 << 20).unwrap();
        assert_eq!(held(), BASE_BYTES + (300 << 20));
        let small = hold("a test", 10).unwrap();
        drop((more, small));
        assert_eq!(held(), BASE_BYTES);
        for bytes in [usize::MAX, usize::MAX / 2] {
            assert!(hold("a test", bytes).unwrap_err().to_string().contains("no memory for a test"));
            assert_eq!(held(), BASE_BYTES);
        }

        // An allocation that fails gets what is held.
        trim(0);
        refill().unwrap();
        let tries = std::cell::Cell::new(0);
        let allocate = || {
            tries.set(tries.get() + 1);
            std::ptr::dangling_mut()
        };
        assert!(with_pieces(1 << 40, allocate).is_null(), "more than is held");
        assert_eq!((tries.get(), is_exhausted()), (0, false));
        assert!(!with_pieces(100, allocate).is_null());
        assert_eq!((tries.get(), is_exhausted()), (1, true));
        refill().unwrap();
        assert!(!is_exhausted());
        assert_eq!(held(), BASE_BYTES);
    }
}
