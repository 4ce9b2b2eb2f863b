//! What each system answers in its own way. A question that a system cannot answer is None.
#![allow(unsafe_code)]

pub(super) use here::*;

#[cfg(target_os = "linux")]
mod here {
    pub(crate) fn is_main_thread() -> Option<bool> {
        // SAFETY: both calls take nothing and cannot fail.
        Some(unsafe { libc::gettid() == libc::getpid() })
    }

    /// Linux has files for this.
    pub(crate) fn performance_cores() -> Option<usize> {
        None
    }

    /// The limit of this process's address space in bytes.
    pub(crate) fn address_space_limit() -> Option<u64> {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `limit` is a valid rlimit to write to, for the length of the call.
        let failed = unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) } != 0;
        (!failed && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
    }
}

#[cfg(target_os = "macos")]
mod here {
    pub(crate) fn is_main_thread() -> Option<bool> {
        // SAFETY: the call takes nothing and cannot fail.
        Some(unsafe { libc::pthread_main_np() } != 0)
    }

    /// Apple calls the performance cores level 0.
    pub(crate) fn performance_cores() -> Option<usize> {
        let (mut cores, mut size): (libc::c_int, _) = (0, size_of::<libc::c_int>());
        let (name, value) = (c"hw.perflevel0.physicalcpu".as_ptr(), (&raw mut cores).cast());
        // SAFETY: the name ends with a zero byte, `value` points to `size` bytes to write to, nothing is set.
        let failed = unsafe { libc::sysctlbyname(name, value, &mut size, std::ptr::null_mut(), 0) } != 0;
        usize::try_from(cores).ok().filter(|&cores| !failed && cores > 0)
    }

    pub(crate) fn address_space_limit() -> Option<u64> {
        None
    }
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
mod here {
    pub(crate) fn is_main_thread() -> Option<bool> {
        None
    }

    pub(crate) fn performance_cores() -> Option<usize> {
        None
    }

    pub(crate) fn address_space_limit() -> Option<u64> {
        None
    }
}
