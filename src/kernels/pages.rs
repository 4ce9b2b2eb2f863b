//! What the system is asked of memory that is read from end to end, again and again.

/// Asks for pages of 2 MiB where `len` bytes from `start` on will be written: they spare the processor most of its
/// looking up of addresses, and its prefetchers do not stop every 4 KiB. Nothing is lost where there are none.
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
