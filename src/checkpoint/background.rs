//! Runs work that cannot be interrupted in a thread of its own, so that its caller can be interrupted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::kernels::Cancel;
use crate::sys::reserve;

/// How often to check whether the caller has been cancelled.
const POLL_EVERY: Duration = Duration::from_millis(20);
/// The most threads that may still run after their time was over.
const MAX_LATE: usize = 8;
/// The stack that a thread has by default.
const STACK_BYTES: usize = 2 << 20;
/// Threads that still run although their time is over.
static LATE: AtomicUsize = AtomicUsize::new(0);

/// The limits of work.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// The longest time to wait for it.
    pub(crate) time: Duration,
    /// The size of its thread's stack.
    pub(crate) stack_bytes: usize,
}

impl From<Duration> for Limits {
    fn from(time: Duration) -> Self {
        Limits { time, stack_bytes: STACK_BYTES }
    }
}

/// Work that was started. If this is dropped, the work continues on its own and its result is dropped.
pub(crate) struct Started<T> {
    result: Receiver<T>,
    since: Instant,
}

/// Starts `work`, so that its caller can do something else meanwhile.
///
/// # Errors
/// [`Error::Device`] if no thread can be started; [`Error::Generation`] if there is no memory for one.
pub(crate) fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<Started<T>> {
    start_with_stack(STACK_BYTES, work)
}

/// Runs `work` and waits for its result. If the caller is cancelled meanwhile, `work` continues on its own
/// and its result is dropped.
///
/// # Errors
/// [`Error::Cancelled`]; [`Error::Internal`] if `work` panicked; [`Error::Device`] if no thread can be
/// started; [`Error::Generation`] if there is no memory for one.
pub(crate) fn run<T: Send + 'static>(
    cancel: &Cancel,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    wait(cancel, None, work)
}

/// As [`run`], but within `limits`. `what` names the work in messages.
///
/// # Errors
/// As [`run`]; [`Error::Text`] if the time is over, or if earlier work whose time was over still runs in
/// several threads.
pub(crate) fn run_within<T: Send + 'static>(
    what: &'static str,
    limits: impl Into<Limits>,
    cancel: &Cancel,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let late = LATE.load(Ordering::Relaxed);
    if late >= MAX_LATE {
        let reason = format!("{what} is still busy with {late} earlier texts that were given up");
        return Err(Error::Text { reason });
    }
    // The second of the two threads that sets this knows that the work was given up and has ended.
    let over = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&over);
    let waited = wait(cancel, Some((what, limits.into())), move || {
        let result = work();
        if ended.swap(true, Ordering::AcqRel) {
            LATE.fetch_sub(1, Ordering::Relaxed);
        }
        result
    });
    if matches!(waited, Err(Error::Text { .. } | Error::Cancelled)) {
        LATE.fetch_add(1, Ordering::Relaxed);
        if over.swap(true, Ordering::AcqRel) {
            LATE.fetch_sub(1, Ordering::Relaxed);
        }
    }
    waited
}

fn wait<T: Send + 'static>(
    cancel: &Cancel,
    limits: Option<(&'static str, Limits)>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let stack_bytes = limits.map_or(STACK_BYTES, |(_, limits)| limits.stack_bytes);
    let time = limits.map(|(what, limits)| (what, limits.time));
    start_with_stack(stack_bytes, work)?.wait_within(cancel, time)
}

fn start_with_stack<T: Send + 'static>(
    stack_bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Started<T>> {
    if stack_bytes > STACK_BYTES {
        reserve::hold("a thread's stack", stack_bytes)?;
    }
    reserve::check_threads(1)?;
    let (sender, result) = channel();
    // Sending fails if the caller no longer waits: nobody needs the result then.
    let work = move || _ = sender.send(work());
    std::thread::Builder::new().stack_size(stack_bytes).spawn(work).map_err(no_thread)?;
    Ok(Started { result, since: Instant::now() })
}

impl<T> Started<T> {
    /// Waits for the result.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; [`Error::Internal`] if the work panicked.
    pub(crate) fn wait(self, cancel: &Cancel) -> Result<T> {
        self.wait_within(cancel, None)
    }

    fn wait_within(self, cancel: &Cancel, limit: Option<(&'static str, Duration)>) -> Result<T> {
        loop {
            match self.result.recv_timeout(POLL_EVERY) {
                Ok(done) => return Ok(done),
                Err(RecvTimeoutError::Timeout) if cancel.is_cancelled() => return Err(Error::Cancelled),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Internal { reason: "a background thread panicked".into() });
                }
            }
            if let Some((what, limit)) = limit.filter(|(_, limit)| self.since.elapsed() >= *limit) {
                let seconds = limit.as_secs_f64();
                return Err(Error::Text { reason: format!("{what} did not finish within {seconds:.0} s") });
            }
        }
    }
}

/// The error for a thread that the system refuses to start.
pub(crate) fn no_thread(error: std::io::Error) -> Error {
    let reason = format!("the system starts no further thread: {error}");
    Error::Device { device: "cpu".into(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn started_work_runs_beside_its_caller() {
        let (question, asked) = channel();
        let (reply, replies) = channel();
        let started = start(move || {
            let asked: u32 = asked.recv().expect("the caller sends");
            reply.send(asked + 1).expect("the caller waits");
            asked + 2
        });
        let started = started.expect("a thread can be started");
        question.send(7).expect("the work waits");
        assert_eq!(replies.recv(), Ok(8));
        assert_eq!(started.wait(&Cancel::never()).unwrap(), 9);
    }

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

    #[test]
    fn work_has_a_time_limit_and_few_late_threads() {
        let limit = Duration::from_millis(30);
        let mut releases = Vec::new();
        let mut start = || {
            let (release, wait) = channel::<()>();
            releases.push(release);
            run_within("the work", limit, &Cancel::never(), move || wait.recv().is_ok())
                .unwrap_err()
                .to_string()
        };
        for _ in 0..MAX_LATE {
            assert!(start().contains("did not finish"));
        }
        assert!(start().contains("still busy"));
        drop(releases);
        while LATE.load(Ordering::Relaxed) > 0 {
            std::thread::yield_now();
        }
        assert_eq!(run_within("the work", Duration::from_secs(9), &Cancel::never(), || 7).unwrap(), 7);
    }
}
