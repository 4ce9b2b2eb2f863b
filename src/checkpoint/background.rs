//! Runs work that cannot be interrupted in a thread of its own, so that its caller can be interrupted.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::kernels::Cancel;

/// How often to check whether the caller has been cancelled.
const POLL_EVERY: Duration = Duration::from_millis(20);

/// Runs `work` and waits for its result. If the caller is cancelled meanwhile, `work` continues on its own
/// and its result is dropped.
///
/// # Errors
/// [`Error::Cancelled`]; [`Error::Internal`] if `work` panicked or no thread can be started.
pub(crate) fn run<T: Send + 'static>(
    cancel: &Cancel,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = channel();
    // Sending fails if the caller was cancelled: nobody needs the result then.
    let work = move || _ = sender.send(work());
    std::thread::Builder::new()
        .spawn(work)
        .map_err(|error| Error::Internal { reason: format!("cannot start a thread: {error}") })?;
    loop {
        match receiver.recv_timeout(POLL_EVERY) {
            Ok(done) => return Ok(done),
            Err(RecvTimeoutError::Timeout) if cancel.is_cancelled() => return Err(Error::Cancelled),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::Internal { reason: "a background thread panicked".into() });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_caller_waits_unless_it_is_cancelled() {
        assert_eq!(run(&Cancel::never(), || 7).unwrap(), 7);
        let flag = AtomicBool::new(true);
        let (release, wait) = channel::<()>();
        let stopped = run(&Cancel::new(&flag), move || wait.recv().is_ok());
        assert!(matches!(stopped, Err(Error::Cancelled)));
        drop(release);
    }

    #[test]
    fn a_panic_is_an_error() {
        let panicked: Result<()> = run(&Cancel::never(), || panic!("on purpose"));
        assert!(matches!(panicked, Err(Error::Internal { .. })));
    }
}
