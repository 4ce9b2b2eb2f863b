//! The handle of a model that several threads share, and the thread that owns the model.

use super::metrics::Metrics;
use super::output::{Ticket, TokenSink};
use super::scheduler::Scheduler;
use super::sequence::{Generate, Sequence, Stats, Task};
use crate::error::{Error, Result};
use crate::model::{Model, SeqId};
use crate::sampling::{OnOverflow, Sampler, SamplingParams, TokenMask};
use crate::sys::sync::{Condvar, Mutex};
use crate::sys::{Process, panics, reserve};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

/// The most sequences that wait for their turn.
const MAX_WAITING: usize = 1 << 16;
/// How long the engine's thread spins before it sleeps.
const SPIN: Duration = Duration::from_micros(100);

/// How an engine runs its model.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Maximum tokens of a sequence, prompt and output together.
    pub context_length: usize,
    /// Maximum sequences that run together; None is the model's own number.
    pub max_num_seqs: Option<usize>,
}

/// A model that runs the sequences of all callers together.
///
/// A thread of its own owns the model. Callers submit sequences and wait for their output. They never wait
/// for each other, and need no lock while they wait.
///
/// In a process that was forked after the engine was made, the engine refuses every use without waiting: its
/// thread does not exist there.
pub struct Engine {
    shared: Arc<Shared>,
    /// None once [`Engine::close`] has waited for it.
    thread: Mutex<Option<JoinHandle<()>>>,
    vocab_size: usize,
    context_length: usize,
    next_seq: AtomicU64,
}

/// What the callers and the engine's thread share.
pub(super) struct Shared {
    process: Process,
    /// The engine's thread; it sets this before all else.
    thread_id: OnceLock<ThreadId>,
    inbox: Mutex<Inbox>,
    /// Signalled when the inbox changes.
    arrival: Condvar,
    metrics: Mutex<Metrics>,
    is_closed: AtomicBool,
    /// Whether the inbox has sequences.
    has_submitted: AtomicBool,
    /// Whether the state of a known sequence has changed.
    is_woken: AtomicBool,
    /// Whether the engine's thread waits for `arrival`.
    is_asleep: AtomicBool,
}

#[derive(Default)]
struct Inbox {
    submitted: Vec<Sequence>,
    /// Why the engine's thread has ended, if it has.
    ended: Option<Ended>,
}

#[derive(Clone)]
enum Ended {
    Closed,
    Panicked(String),
}

impl Ended {
    fn error(&self) -> Error {
        match self {
            Ended::Closed => Error::Closed { what: "the model" },
            Ended::Panicked(reason) => {
                Error::Internal { reason: format!("the engine has ended: {reason}; load the model again") }
            }
        }
    }
}

impl Shared {
    /// Makes the engine's thread look at its sequences. Returns at once.
    pub(super) fn wake(&self) {
        if self.process.is_current() {
            self.is_woken.store(true, Ordering::SeqCst);
            if self.is_asleep.load(Ordering::SeqCst) {
                let _inbox = self.inbox.lock();
                self.arrival.notify_one();
            }
        }
    }

    /// # Errors
    /// [`Error::Forked`]
    pub(super) fn check_process(&self) -> Result<()> {
        if self.process.is_current() { Ok(()) } else { Err(Error::Forked) }
    }

    /// Checks that this thread may wait for the engine.
    ///
    /// # Errors
    /// [`Error::Forked`]; [`Error::Generation`] on the engine's own thread, which would wait for itself.
    pub(super) fn check_thread(&self) -> Result<()> {
        self.check_process()?;
        if self.is_own_thread() {
            let reason = "a logits processor cannot use its own model: the model waits for it".into();
            return Err(Error::Generation { reason });
        }
        Ok(())
    }

    fn is_own_thread(&self) -> bool {
        self.thread_id.get() == Some(&std::thread::current().id())
    }

    pub(super) fn set_metrics(&self, metrics: Metrics) {
        *self.metrics.lock() = metrics;
    }

    /// Whether the engine is being closed.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Relaxed)
    }

    /// Whether something has changed since the scheduler looked at its sequences.
    pub(super) fn has_news(&self) -> bool {
        self.has_submitted() || self.is_woken.load(Ordering::Relaxed)
    }

    /// Whether there are sequences that the scheduler has not seen.
    pub(super) fn has_submitted(&self) -> bool {
        self.has_submitted.load(Ordering::Relaxed)
    }

    /// The sequences submitted since the last call. If the scheduler is idle, waits until something changes.
    fn next(&self, scheduler: &Scheduler) -> Vec<Sequence> {
        if scheduler.is_idle() {
            if scheduler.has_running() {
                self.spin();
            }
            let times = [scheduler.next_deadline(), scheduler.next_reread()];
            self.sleep(times.into_iter().flatten().min());
        }
        self.is_woken.store(false, Ordering::SeqCst);
        let mut inbox = self.inbox.lock();
        self.has_submitted.store(false, Ordering::Relaxed);
        std::mem::take(&mut inbox.submitted)
    }

    /// Waits a little for a reader that has its token and will ask for the next: to sleep and to be woken
    /// would take longer.
    fn spin(&self) {
        let end = Instant::now() + SPIN;
        while !self.is_woken.load(Ordering::Relaxed) && Instant::now() < end {
            std::hint::spin_loop();
        }
    }

    /// Waits until something changes, or until `wake_at`.
    fn sleep(&self, wake_at: Option<Instant>) {
        let mut inbox = self.inbox.lock();
        self.is_asleep.store(true, Ordering::SeqCst);
        while !self.is_woken.load(Ordering::SeqCst) && inbox.submitted.is_empty() && !self.is_closed() {
            let Some(end) = wake_at else {
                inbox = self.arrival.wait(inbox);
                continue;
            };
            let is_late;
            (inbox, is_late) = self.arrival.wait_until(inbox, end);
            if is_late {
                break;
            }
        }
        self.is_asleep.store(false, Ordering::SeqCst);
    }

    /// Refuses further sequences. Returns those that were never seen.
    fn end(&self, ended: Ended) -> Vec<Sequence> {
        let mut inbox = self.inbox.lock();
        inbox.ended = Some(ended);
        std::mem::take(&mut inbox.submitted)
    }

    /// The work of the engine's thread.
    fn run(&self, mut scheduler: Scheduler) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            while !self.is_closed() {
                let submitted = self.next(&scheduler);
                scheduler.add(submitted);
                match reserve::refill() {
                    Ok(()) => scheduler.step(self),
                    Err(_) => scheduler.fail_all(&reserve::exhausted, self),
                }
            }
        }));
        let ended = match outcome {
            Ok(()) => Ended::Closed,
            Err(payload) => Ended::Panicked(panics::describe(payload.as_ref())),
        };
        scheduler.add(self.end(ended.clone()));
        self.set_metrics(Metrics::default());
        scheduler.abandon_all(&|| ended.error());
        // After a panic, freeing the model's memory may panic again.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(scheduler)));
    }
}

impl Engine {
    /// An engine that runs `model`.
    ///
    /// # Errors
    /// [`Error::Generation`] if its thread cannot be started.
    pub fn new(model: Box<dyn Model>, options: EngineOptions) -> Result<Self> {
        reserve::check_threads(1)?;
        let (vocab_size, context_length) = (model.vocab_size(), options.context_length);
        let scheduler = Scheduler::new(model, options);
        let shared = Arc::new(Shared {
            process: Process::current(),
            thread_id: OnceLock::new(),
            inbox: Mutex::default(),
            arrival: Condvar::new(),
            metrics: Mutex::new(scheduler.metrics()),
            is_closed: AtomicBool::new(false),
            has_submitted: AtomicBool::new(false),
            is_woken: AtomicBool::new(false),
            is_asleep: AtomicBool::new(false),
        });
        let thread = std::thread::Builder::new().name("candle-llama-engine".into()).spawn({
            let shared = Arc::clone(&shared);
            move || {
                shared.thread_id.get_or_init(|| std::thread::current().id());
                shared.run(scheduler);
            }
        });
        let thread = thread
            .map_err(|error| Error::Generation { reason: format!("a thread cannot be started: {error}") })?;
        let thread = Mutex::new(Some(thread));
        Ok(Engine { shared, thread, vocab_size, context_length, next_seq: AtomicU64::new(0) })
    }

    /// The length of a row of logits.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The maximum number of tokens of a sequence, prompt and output together.
    pub fn context_length(&self) -> usize {
        self.context_length
    }

    /// What the engine does and has done.
    ///
    /// # Errors
    /// Those of [`Engine::check_open`].
    pub fn metrics(&self) -> Result<Metrics> {
        self.check_open()?;
        Ok(*self.shared.metrics.lock())
    }

    /// Interrupts the running forward pass, ends all sequences with [`Error::Closed`], and drops the model.
    /// On the engine's own thread, it returns before that.
    pub fn close(&self) {
        if !self.shared.process.is_current() {
            return;
        }
        self.shared.is_closed.store(true, Ordering::Relaxed);
        self.shared.wake();
        if self.shared.is_own_thread() {
            return;
        }
        if let Some(thread) = self.thread.lock().take() {
            // The thread catches panics, so there is nothing to report.
            let _ = thread.join();
        }
    }

    /// Checks that the engine can run sequences.
    ///
    /// # Errors
    /// [`Error::Closed`] after [`Engine::close`]; [`Error::Forked`] in a forked process; [`Error::Internal`]
    /// after a panic; [`Error::Generation`] on the engine's own thread, which would wait for itself.
    pub fn check_open(&self) -> Result<()> {
        self.shared.check_thread()?;
        if self.shared.is_closed() {
            return Err(Ended::Closed.error());
        }
        self.shared.inbox.lock().ended.as_ref().map_or(Ok(()), |ended| Err(ended.error()))
    }

    /// Checks a prompt to continue.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an empty prompt or ids out of range; [`Error::ContextLength`] if
    /// the prompt leaves no room for a token and `on_overflow` does not truncate it.
    pub fn check_prompt(&self, prompt: &[u32], on_overflow: OnOverflow) -> Result<()> {
        self.check_tokens(prompt)?;
        let is_refused = on_overflow == OnOverflow::Error || self.context_length < 2;
        if prompt.len() >= self.context_length && is_refused {
            return Err(self.too_long(prompt.len()));
        }
        Ok(())
    }

    /// The part of a prompt that is used: its longest end that leaves room for one token, or for
    /// `min_new_tokens`, if `on_overflow` truncates it. So a longer prompt never keeps less than one that
    /// fits.
    pub fn used_tokens(&self, prompt_tokens: usize, params: &SamplingParams) -> usize {
        if params.on_overflow == OnOverflow::Error {
            return prompt_tokens;
        }
        let room = params.min_new_tokens.clamp(1, (self.context_length - 1).max(1));
        prompt_tokens.min(self.context_length - room)
    }

    /// A sequence that continues `prompt`, which is truncated as in [`Engine::used_tokens`]. Once it is
    /// submitted, `sink` receives the tokens. Its timeout counts from now on.
    ///
    /// # Errors
    /// Those of [`Engine::check_prompt`].
    pub fn generate(
        &self,
        mut prompt: Vec<u32>,
        params: SamplingParams,
        eos_token_ids: &[u32],
        mask: Option<Box<dyn TokenMask>>,
        sink: Box<dyn TokenSink>,
    ) -> Result<Sequence> {
        self.check_prompt(&prompt, params.on_overflow)?;
        prompt.drain(..prompt.len() - self.used_tokens(prompt.len(), &params));
        let eos_token_ids = if params.ignore_eos { Vec::new() } else { eos_token_ids.to_vec() };
        let sampler = Sampler::new(&params).with_eos_token_ids(&eos_token_ids).with_mask(mask);
        let (timeout, salt) = (params.timeout, Arc::from(params.cache_salt.as_str()));
        let task =
            Task::Generate(Box::new(Generate { params, sampler, eos_token_ids, is_turn: false, sink }));
        let mut sequence = self.sequence(prompt, task, salt);
        sequence.deadline = timeout.and_then(|timeout| sequence.requested.checked_add(timeout));
        Ok(sequence)
    }

    /// A sequence that has not been submitted.
    pub(super) fn sequence(&self, tokens: Vec<u32>, task: Task, salt: Arc<str>) -> Sequence {
        Sequence {
            seq: SeqId(self.next_seq.fetch_add(1, Ordering::Relaxed)),
            prompt_tokens: tokens.len(),
            stats: Stats { prompt_tokens: tokens.len(), ..Stats::default() },
            tokens,
            computed: 0,
            reserved: 0,
            has_begun: false,
            is_counted: false,
            salt,
            task,
            ticket: Ticket::new(&self.shared),
            requested: Instant::now(),
            deadline: None,
            last_pass: 0,
            is_paused: false,
        }
    }

    /// Hands sequences to the engine's thread, which begins them together. Returns at once.
    ///
    /// # Errors
    /// Those of [`Engine::check_open`]; [`Error::Generation`] if too many are waiting.
    pub fn submit(&self, sequences: Vec<Sequence>) -> Result<()> {
        self.check_open()?;
        let mut inbox = self.shared.inbox.lock();
        if let Some(ended) = &inbox.ended {
            return Err(ended.error());
        }
        if inbox.submitted.len() + sequences.len() + self.shared.metrics.lock().waiting > MAX_WAITING {
            let reason = format!("{MAX_WAITING} requests are waiting already");
            return Err(Error::Generation { reason });
        }
        inbox.submitted.extend(sequences);
        self.shared.has_submitted.store(true, Ordering::Relaxed);
        drop(inbox);
        self.shared.arrival.notify_one();
        Ok(())
    }

    pub(super) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::argument("prompt", "has no tokens"));
        }
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= self.vocab_size) {
            let reason = format!("{id} is not below vocab_size {}", self.vocab_size);
            return Err(Error::argument("token_ids", reason));
        }
        Ok(())
    }

    pub(super) fn too_long(&self, prompt_tokens: usize) -> Error {
        Error::ContextLength { prompt_tokens, context_length: self.context_length }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}
