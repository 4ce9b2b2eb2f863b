//! The threads that share the tasks of a kernel call, and how to cancel them.
//!
//! The calling thread works too, so a pool of n threads has n - 1 workers. A call opens a job. Every worker
//! that is awake joins it and claims tasks until none is left. Between jobs, workers spin for a short time,
//! because the next job usually follows within microseconds, and then park. The caller waits only for workers
//! that have joined, so a worker that sleeps or is not scheduled costs nothing. After a fork the child has no
//! workers, and the calling thread does all of the work.

use crate::output::SharedOut;
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long an idle worker spins before it parks.
const SPIN: Duration = Duration::from_micros(50);
/// The shortest time between two calls of `poll`.
const POLL_EVERY: Duration = Duration::from_millis(10);

/// Tells kernels to stop. It is checked between tasks.
pub struct Cancel<'a> {
    flag: &'a AtomicBool,
    poll: Option<&'a dyn Fn() -> bool>,
    next_poll: Cell<Instant>,
}

impl<'a> Cancel<'a> {
    /// Stops once `flag` is true.
    pub fn new(flag: &'a AtomicBool) -> Self {
        Cancel { flag, poll: None, next_poll: Cell::new(Instant::now()) }
    }

    /// Stops once `flag` is true or `poll` returns true. Only the calling thread calls `poll`, between its
    /// own tasks, at most every 10 ms.
    pub fn with_poll(flag: &'a AtomicBool, poll: &'a dyn Fn() -> bool) -> Self {
        Cancel { flag, poll: Some(poll), next_poll: Cell::new(Instant::now() + POLL_EVERY) }
    }

    /// Never stops.
    pub fn never() -> Cancel<'static> {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Cancel::new(&NEVER)
    }

    /// Whether to stop. Once true, it stays true.
    pub fn is_cancelled(&self) -> bool {
        if self.flag.load(Ordering::Relaxed) {
            return true;
        }
        let Some(poll) = self.poll else { return false };
        let now = Instant::now();
        if now < self.next_poll.get() {
            return false;
        }
        self.next_poll.set(now + POLL_EVERY);
        if poll() {
            self.flag.store(true, Ordering::Relaxed);
        }
        self.flag.load(Ordering::Relaxed)
    }
}

/// A job as the workers see it. The pointers are valid while the job is open or a worker has joined it.
#[derive(Clone, Copy)]
struct Job {
    run: *const (dyn Fn(usize) + Sync),
    tasks: usize,
    stop: *const AtomicBool,
}

/// `state` consists of the job's number, a bit that says whether the job is open, and the count of workers
/// that have joined it (or are about to see that it is closed).
const OPEN: u64 = 1 << 16;
const NEXT: u64 = 1 << 17;
const JOINED: u64 = OPEN - 1;

/// A value with two cache lines of its own, because processors fetch lines in pairs.
#[derive(Default)]
#[repr(align(128))]
struct OwnLine<T>(T);

struct Shared {
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    /// For every thread, the next of its own tasks. The caller's is the first.
    next_tasks: Box<[OwnLine<AtomicUsize>]>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    parked: Box<[AtomicBool]>,
    shutdown: AtomicBool,
}

// SAFETY: `job` is written only by the caller that holds the pool's lock, while the job is closed and no
// worker has joined. It is read only by workers that have joined, that is, that were counted in `state` while
// it was open. The count orders the read after the write.
unsafe impl Sync for Shared {}
// SAFETY: as above; what `job` points at is `Sync`.
unsafe impl Send for Shared {}

/// A pool of threads for kernel calls.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
    /// Held while a job runs, so that there is one at a time.
    lock: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` threads (at least 1), including the calling one.
    ///
    /// # Errors
    /// The system's error if a thread cannot be started.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let workers = threads.saturating_sub(1);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next_tasks: (0..=workers).map(|_| OwnLine::default()).collect(),
            panic: Mutex::new(None),
            parked: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            shutdown: AtomicBool::new(false),
        });
        // From here on, an early return drops the pool, which ends the workers started so far.
        let mut pool = Pool { shared, workers: Vec::new(), handles: Vec::new(), lock: Mutex::new(()) };
        for index in 0..workers {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("candle-llama-{index}"))
                .spawn(move || shared.work(index))?;
            pool.handles.push(worker.thread().clone());
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// The number of threads that share the work, including the calling one.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `run(i)` once for every i below `tasks`, on all threads and in no particular order. Returns when
    /// all calls have returned. If `cancel` fires, tasks that have not begun are left out.
    ///
    /// `run` must not call into the same pool.
    ///
    /// # Panics
    /// If `run` panics, with the same panic.
    pub fn run(&self, tasks: usize, cancel: &Cancel, run: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() {
            for task in 0..tasks {
                if cancel.is_cancelled() {
                    return;
                }
                run(task);
            }
            return;
        }
        let _one_job = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: only the lifetime is changed. `close` returns after the last worker that joined has
        // left the job, before `run` and `cancel` end; no worker joins a closed job.
        let run_for_workers: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(run) };
        let job = Job { run: run_for_workers, tasks, stop: cancel.flag };
        // SAFETY: we hold the lock, the last job is closed, and all its workers have left.
        unsafe { *self.shared.job.get() = Some(job) };
        for (thread, next) in self.shared.next_tasks.iter().enumerate() {
            next.0.store(self.shared.own_tasks(thread, tasks).start, Ordering::Relaxed);
        }
        self.shared.state.fetch_add(NEXT + OPEN, Ordering::SeqCst);
        for (parked, handle) in self.shared.parked.iter().zip(&self.handles) {
            if parked.load(Ordering::SeqCst) {
                handle.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| {
            self.shared.claim_tasks(0, tasks, || cancel.is_cancelled(), run);
        }));
        self.shared.close();
        let theirs = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }

    /// Calls `run(i, chunk)` for every chunk of `len` elements of `data`, on all threads.
    ///
    /// # Panics
    /// If `len` is 0, or `run` panics.
    pub fn for_each_chunk<T: Send>(
        &self,
        data: &mut [T],
        len: usize,
        cancel: &Cancel,
        run: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        let total = data.len();
        let out = SharedOut::new(data);
        self.run(total.div_ceil(len), cancel, &|chunk| {
            let start = chunk * len;
            // SAFETY: every chunk number comes once, and chunks do not overlap.
            run(chunk, unsafe { out.slice_mut(start, len.min(total - start)) });
        });
    }

    /// Calls `run(i, range)` for ranges of at most `step` elements that cover `0..lens[i]`, for every i, on
    /// all threads.
    ///
    /// # Panics
    /// If `step` is 0, or `run` panics.
    pub fn for_each_range(
        &self,
        lens: &[usize],
        step: usize,
        cancel: &Cancel,
        run: &(dyn Fn(usize, Range<usize>) + Sync),
    ) {
        let tasks = lens.iter().map(|len| len.div_ceil(step)).sum();
        self.run(tasks, cancel, &|mut task| {
            for (index, len) in lens.iter().enumerate() {
                let own = len.div_ceil(step);
                if task < own {
                    return run(index, task * step..((task + 1) * step).min(*len));
                }
                task -= own;
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::SeqCst);
        for handle in &self.handles {
            handle.unpark();
        }
        for worker in self.workers.drain(..) {
            // Workers catch the panics of their tasks, so joining has nothing to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self, index: usize) {
        let mut seen = 0;
        let mut idle_since = Instant::now();
        while !self.shutdown.load(Ordering::Relaxed) {
            let state = self.state.load(Ordering::SeqCst);
            if state / NEXT != seen && state & OPEN != 0 {
                // A worker first adds itself to the count and then checks whether the job is open:
                // compare-and-exchange loops of many workers would delay each other. A worker that comes too
                // late is counted for a moment and touches nothing.
                let state = self.state.fetch_add(1, Ordering::AcqRel);
                if state & OPEN != 0 {
                    seen = state / NEXT;
                    self.run_job(index + 1);
                }
                self.state.fetch_sub(1, Ordering::Release);
                idle_since = Instant::now();
                continue;
            }
            if idle_since.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            self.parked[index].store(true, Ordering::SeqCst);
            // Checked once more after `parked` is set: a caller that opened a job just before may not have
            // seen `parked`, and then does not unpark this thread.
            let state = self.state.load(Ordering::SeqCst);
            if (state / NEXT == seen || state & OPEN == 0) && !self.shutdown.load(Ordering::SeqCst) {
                std::thread::park();
            }
            self.parked[index].store(false, Ordering::SeqCst);
            idle_since = Instant::now();
        }
    }

    /// The tasks that `thread` claims before it takes those of others. They are neighbours, so that the
    /// thread reads memory in one long stream.
    fn own_tasks(&self, thread: usize, tasks: usize) -> Range<usize> {
        let threads = self.next_tasks.len();
        let end = |thread| tasks / threads * thread + (tasks % threads).min(thread);
        end(thread)..end(thread + 1)
    }

    /// Claims and runs tasks until none is left or `stop` returns true: first those of `thread`, then those
    /// that other threads have not begun.
    fn claim_tasks(
        &self,
        thread: usize,
        tasks: usize,
        stop: impl Fn() -> bool,
        run: &(dyn Fn(usize) + Sync),
    ) {
        let threads = self.next_tasks.len();
        for owner in (thread..threads).chain(0..thread) {
            let (next, end) = (&self.next_tasks[owner].0, self.own_tasks(owner, tasks).end);
            // Read before it is incremented: all threads come here at about the same time, and reading a
            // shared cache line is cheaper than writing it.
            while next.load(Ordering::Relaxed) < end {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= end {
                    break;
                }
                if stop() {
                    return;
                }
                run(task);
            }
        }
    }

    /// Claims tasks of the job that this worker has joined, until none is left.
    fn run_job(&self, thread: usize) {
        // SAFETY: this worker has joined, so the job stays as it is until it leaves.
        let Some(job) = (unsafe { *self.job.get() }) else { return };
        // SAFETY: the caller keeps both alive until every worker that joined has left.
        let (run, stop) = unsafe { (&*job.run, &*job.stop) };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            self.claim_tasks(thread, job.tasks, || stop.load(Ordering::Relaxed), run);
        }));
        if let Err(panic) = outcome {
            // After a panic no more tasks are started.
            for next in &*self.next_tasks {
                next.0.store(job.tasks, Ordering::Relaxed);
            }
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    /// Closes the job, so that no worker can join any more, and waits for those that have.
    fn close(&self) {
        let mut state = self.state.fetch_and(!OPEN, Ordering::AcqRel) & !OPEN;
        let mut spins = 0_u32;
        while state & JOINED != 0 {
            // Where threads share cores, the worker may need this core to finish.
            if spins < 4096 {
                spins += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
            state = self.state.load(Ordering::Acquire);
        }
    }
}
