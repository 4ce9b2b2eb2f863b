//! Memory that is read from start to end many times, in pages of 2 MiB where the system has them. Large pages
//! need fewer address translations, and the processor's prefetcher does not have to stop every 4 KiB.

use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Asks the system for large pages for `len` bytes from `start` on, before they are written. Without them,
/// nothing else changes.
pub(super) fn prefer_huge(start: *const u8, len: usize) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let before = start.align_offset(PAGE);
        if let Some(inside) = len.checked_sub(before) {
            // SAFETY: whole pages of the caller's own memory; the advice changes nothing that they hold.
            unsafe {
                let first = start.wrapping_add(before).cast_mut().cast();
                libc::madvise(first, inside / PAGE * PAGE, libc::MADV_HUGEPAGE);
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, len);
}

/// The first `len` elements of `buffer` that begin at a cache line. The buffer grows if needed and never
/// shrinks. The elements may have any value.
pub fn grown<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    let whole = len + LINE / size_of::<T>();
    if buffer.len() < whole {
        buffer.reserve(whole - buffer.len());
        prefer_huge(buffer.as_ptr().cast(), size_of::<T>() * buffer.capacity());
        buffer.resize(whole, T::default());
    }
    let start = buffer.as_ptr().align_offset(LINE);
    &mut buffer[start..][..len]
}

/// Bytes of a cache line. Pieces begin at a multiple of it.
const LINE: usize = 64;
/// The alignment of chunks: a large page.
const CHUNK_ALIGNMENT: usize = 2 << 20;
/// The smallest chunk. Memory that has not been handed out is never touched, so it takes no physical memory.
const CHUNK_BYTES: usize = 64 << 20;

/// Zeroed memory that is handed out in adjacent pieces, so that small pieces share large pages. It is freed
/// when the arena and all pieces are dropped.
#[derive(Default)]
pub struct Arena {
    /// Each chunk with the number of its bytes that are handed out.
    chunks: Mutex<Vec<(Arc<Chunk>, usize)>>,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an arena")
    }
}

impl Arena {
    /// A piece of `len` zeros. None if there is no memory.
    pub fn piece(&self, len: usize) -> Option<Piece> {
        let taken = len.checked_next_multiple_of(LINE)?;
        let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        let with_room = chunks.iter_mut().find(|(chunk, used)| taken <= chunk.len - *used);
        let (chunk, used) = match with_room {
            Some(chunk) => chunk,
            None => {
                // If there is no memory for a whole chunk, the requested size may still fit.
                let chunk = Chunk::new(taken.max(CHUNK_BYTES)).or_else(|| Chunk::new(taken))?;
                chunks.push((Arc::new(chunk), 0));
                chunks.last_mut()?
            }
        };
        // SAFETY: the chunk has room for the piece after `used`.
        let start = unsafe { chunk.start.add(*used) };
        *used += taken;
        Some(Piece { _chunk: Arc::clone(chunk), start, len })
    }
}

/// Zeroed memory that has not been touched since the system provided it. Each page is allocated when a thread
/// first writes to it, near that thread.
struct Chunk {
    /// The pointer of a Vec. The Vec itself is not kept, as it would be a second way to reach the bytes.
    allocation: NonNull<u8>,
    capacity: usize,
    /// Inside the allocation, at [`CHUNK_ALIGNMENT`].
    start: NonNull<u8>,
    /// Bytes from `start` on.
    len: usize,
}

impl Chunk {
    fn new(len: usize) -> Option<Self> {
        let bytes: Vec<u8> = bytemuck::try_zeroed_vec(len.checked_add(CHUNK_ALIGNMENT)?).ok()?;
        prefer_huge(bytes.as_ptr(), bytes.len());
        let mut bytes = ManuallyDrop::new(bytes);
        let (allocation, capacity) = (NonNull::new(bytes.as_mut_ptr())?, bytes.capacity());
        // The padding is less than the alignment, which was allocated in addition to `len`.
        let start = NonNull::new(bytes.as_mut_ptr().wrapping_add(allocation.align_offset(CHUNK_ALIGNMENT)))?;
        Some(Chunk { allocation, capacity, start, len })
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: pointer and capacity come from a Vec that nothing else drops. No piece is left, as each
        // keeps the chunk alive.
        drop(unsafe { Vec::from_raw_parts(self.allocation.as_ptr(), 0, self.capacity) });
    }
}

// SAFETY: a chunk's bytes are reached only through its pieces, and each byte through one of them.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

/// Bytes of a chunk that only this piece can reach, beginning at a cache line.
pub struct Piece {
    /// Keeps the chunk alive.
    _chunk: Arc<Chunk>,
    start: NonNull<u8>,
    len: usize,
}

impl std::fmt::Debug for Piece {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

// SAFETY: a piece is the only owner of its bytes, as a Vec is.
unsafe impl Send for Piece {}
// SAFETY: as above.
unsafe impl Sync for Piece {}

impl Deref for Piece {
    type Target = [u8];

    #[inline(always)]
    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes are inside the chunk, which the piece keeps alive; all are initialised; borrowed
        // as `self` is.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Piece {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and no other piece has these bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_grow_and_begin_at_a_line() {
        let mut buffer: Vec<f32> = Vec::new();
        for len in [0, 1, 15, 100, 7, 1 << 20, 3] {
            let elements = grown(&mut buffer, len);
            assert_eq!((elements.len(), elements.as_ptr().align_offset(LINE)), (len, 0));
            elements.fill(1.0);
        }
    }

    #[test]
    fn pieces_are_zeros_of_their_own() {
        let arena = Arena::default();
        let lens = [0, 1, 63, 64, 65, 3 << 20, CHUNK_BYTES - 100, CHUNK_BYTES + 1, 7];
        let mut pieces: Vec<Piece> = lens.iter().map(|&len| arena.piece(len).unwrap()).collect();
        for (piece, len) in pieces.iter_mut().zip(lens) {
            assert_eq!(piece.len(), len);
            assert_eq!(piece.as_ptr().align_offset(LINE), 0);
            assert!(piece.iter().all(|&byte| byte == 0));
        }
        for (piece, i) in pieces.iter_mut().zip(1..) {
            piece.fill(i);
        }
        drop(arena);
        for (piece, i) in pieces.iter().zip(1..) {
            assert!(piece.iter().all(|&byte| byte == i), "piece {i}");
        }
    }

    #[test]
    fn small_pieces_fill_what_large_ones_left() {
        let arena = Arena::default();
        let most = CHUNK_BYTES - (1 << 20);
        let (first, second) = (arena.piece(most).unwrap(), arena.piece(most).unwrap());
        let small = arena.piece(1 << 20).unwrap();
        assert_eq!(small.as_ptr() as usize, first.as_ptr() as usize + most);
        assert_eq!(first.as_ptr().align_offset(CHUNK_ALIGNMENT), 0);
        assert_eq!(second.as_ptr().align_offset(CHUNK_ALIGNMENT), 0);
    }

    #[test]
    fn more_than_there_is_gives_none() {
        let arena = Arena::default();
        for len in [usize::MAX, usize::MAX - 63, isize::MAX as usize] {
            assert!(arena.piece(len).is_none());
        }
        assert!(arena.piece(10).is_some());
    }
}
