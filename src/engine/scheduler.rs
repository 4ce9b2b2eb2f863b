//! The sequences, and which of their tokens the next forward pass processes.
//!
//! A step is a pass over the newest token of every running sequence and over short prompts, then a slice of a
//! pass over long prompts, which pauses before the others wait long ([`Pace`]). If the model cannot pause,
//! one pass has all: the newest tokens, and as many tokens of prompts as do not delay them much. Sequences
//! begin in the order of their requests. If the KV cache is full, the youngest sequence loses its blocks and
//! is computed again later, with the same result.

use super::engine::{EngineOptions, Shared};
use super::metrics::Metrics;
use super::output::Flow;
use super::pace::{Granularity, Pace};
use super::rereads::Rereads;
use super::sequence::{Ending, FinishReason, Sequence, Task, blocks};
use crate::error::{Error, Result};
use crate::kernels::KV_BLOCK_POSITIONS;
use crate::model::{Cancel, Logits, Model, Rows, SeqId, Span};
use crate::sys::reserve;
use std::cmp::Reverse;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// A pass is given up for a sequence that was stopped so long ago, although the others lose its work.
const MAX_STOP_DELAY: Duration = Duration::from_millis(100);
/// A prompt that ends within so many passes beside decoding sequences is short.
const SHORT_PASSES: usize = 2;
/// How many waiting sequences are compared with the running ones, to begin those that share no prompt.
const MAX_LOOK_AHEAD: usize = 64;

/// The sequences of one model.
pub(super) struct Scheduler {
    model: Box<dyn Model>,
    context_length: usize,
    max_num_seqs: usize,
    /// Those that wait for their turn, oldest first: new ones, and those that lost their blocks.
    waiting: Vec<Sequence>,
    /// Those that take part in passes, oldest first.
    running: Vec<Sequence>,
    /// Those whose readers are slow. They keep their blocks until others need them.
    paused: Vec<Sequence>,
    pace: Pace,
    /// The pass that pauses now.
    prefill: Option<Prefill>,
    /// Whether the last step processed prompts beside that pass. The next one does not.
    ran_beside: bool,
    /// The number of the pass that runs next.
    pass: u64,
    /// Those that have ended, whose readers do not know it yet.
    ended: Vec<(Sequence, Ending)>,
    rereads: Rereads,
    totals: Metrics,
}

/// The part of a sequence that a pass processes.
#[derive(Clone, Copy)]
struct Part {
    /// The sequence's index among the running ones.
    index: usize,
    /// Maximum tokens.
    tokens: usize,
}

/// What the next step processes.
struct Choice {
    /// The newest tokens of the sequences that decode, then prompts.
    parts: Vec<Part>,
    /// Prompts of a pass that can pause.
    prefill: Vec<Part>,
}

/// A pass over prompts that can pause.
struct Prefill {
    /// The sequences, and the maximum tokens of each.
    parts: Vec<(SeqId, usize)>,
    /// How long its slices took.
    took: Duration,
    /// How long its last two stages took, the last one second. They alternate.
    last: [Duration; 2],
}

impl Scheduler {
    pub(super) fn new(model: Box<dyn Model>, options: EngineOptions) -> Self {
        let EngineOptions { context_length, max_num_seqs } = options;
        Scheduler {
            max_num_seqs: max_num_seqs.unwrap_or_else(|| model.max_num_seqs()).max(1),
            pace: Pace::new(Granularity {
                min_rows: model.min_rows(),
                rows_together: model.rows_together(),
                stages: model.stages(),
            }),
            model,
            context_length,
            waiting: Vec::new(),
            running: Vec::new(),
            paused: Vec::new(),
            prefill: None,
            ran_beside: false,
            pass: 1,
            ended: Vec::new(),
            rereads: Rereads::default(),
            totals: Metrics::default(),
        }
    }

    /// Takes new sequences, which are younger than all known ones.
    pub(super) fn add(&mut self, submitted: Vec<Sequence>) {
        self.waiting.extend(submitted);
        // Threads take their numbers before they submit.
        self.waiting.sort_by_key(|sequence| sequence.seq);
    }

    /// Whether nobody waits for a sequence, so that there is nothing to do until one is submitted, awaited,
    /// resumed or stopped.
    pub(super) fn is_idle(&self) -> bool {
        !self.waiting.iter().chain(&self.running).any(|sequence| sequence.ticket.is_awaited())
    }

    /// Whether a reader will probably wait again soon.
    pub(super) fn has_running(&self) -> bool {
        !self.running.is_empty()
    }

    /// When the next sequence times out.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let all = self.waiting.iter().chain(&self.running).chain(&self.paused);
        all.filter_map(|sequence| sequence.deadline).min()
    }

    /// When to read an answer again if there is nothing else to do; None if there is none.
    pub(super) fn next_reread(&self) -> Option<Instant> {
        self.rereads.due()
    }

    /// Counts, and the state of the KV cache.
    pub(super) fn metrics(&self) -> Metrics {
        let kv = self.model.kv_blocks();
        Metrics {
            running: self.running.len(),
            waiting: self.waiting.len() + self.paused.len(),
            blocks_used: kv.total - kv.free,
            blocks_free: if kv.total == usize::MAX { 0 } else { kv.free },
            blocks_cached: kv.cached,
            ..self.totals
        }
    }

    /// Ends all sequences with an error, and forgets the answers that are to be read again.
    pub(super) fn fail_all(&mut self, error: &dyn Fn() -> Error, shared: &Shared) {
        self.rereads = Rereads::default();
        for sequence in self.take_all() {
            self.end(sequence, Ending::Failed(error()));
        }
        self.deliver(&[], shared);
    }

    /// Ends all sequences with an error, without the model, which may have panicked.
    pub(super) fn abandon_all(&mut self, error: &dyn Fn() -> Error) {
        let known = std::mem::take(&mut self.ended);
        let unknown = self.take_all().map(|sequence| (sequence, Ending::Failed(error())));
        for (sequence, ending) in known.into_iter().chain(unknown.collect::<Vec<_>>()) {
            sequence.end(ending);
        }
    }

    fn take_all(&mut self) -> impl Iterator<Item = Sequence> + use<> {
        let queues = [&mut self.running, &mut self.paused, &mut self.waiting];
        queues.map(std::mem::take).into_iter().flatten()
    }

    /// Ends what is stopped, begins what has its turn, and runs one pass and a slice of another.
    pub(super) fn step(&mut self, shared: &Shared) {
        let started = Instant::now();
        self.end_stopped(started);
        self.resume();
        if self.is_idle() {
            self.reread(shared, started);
            self.deliver(&[], shared);
            return;
        }
        self.begin();
        let Choice { parts, prefill } = self.choose_with_room();
        if !prefill.is_empty() {
            self.begin_prefill(&prefill);
        }
        self.ran_beside = parts.iter().any(|part| !self.running[part.index].decodes());
        self.run_parts(&parts, shared, started);
        if !self.ran_beside {
            self.run_prefill(shared);
        }
    }

    /// Runs a pass, and tells the readers.
    fn run_parts(&mut self, parts: &[Part], shared: &Shared, started: Instant) {
        let seqs: Vec<SeqId> = parts.iter().map(|part| self.running[part.index].seq).collect();
        if !parts.is_empty() {
            match self.forward(parts, shared) {
                Ok(logits) => {
                    let (decoding, rows) = self.take(parts, logits, started);
                    self.pace.record(decoding, rows, started.elapsed());
                }
                Err(error) => self.end_failed(parts, error, shared),
            }
            self.pass += 1;
            self.totals.busy += started.elapsed();
        }
        self.deliver(&seqs, shared);
    }

    /// Begins a pass over prompts that can pause.
    fn begin_prefill(&mut self, parts: &[Part]) {
        for part in parts {
            let sequence = &mut self.running[part.index];
            sequence.reserved = sequence.computed + sequence.span(part.tokens).tokens.len();
        }
        let parts = parts.iter().map(|part| (self.running[part.index].seq, part.tokens)).collect();
        self.prefill = Some(Prefill { parts, took: Duration::ZERO, last: [Duration::ZERO; 2] });
    }

    /// Runs a slice of the pass that can pause, or its rest if nobody waits. Tells the readers when it is
    /// through.
    fn run_prefill(&mut self, shared: &Shared) {
        if self.prefill.is_none() {
            return;
        }
        let decoding = self.running.iter().filter(|sequence| sequence.decodes()).count();
        let is_urgent = self.has_urgent(decoding);
        let Some(mut prefill) = self.prefill.take() else { return };
        let parts: Vec<Part> = prefill
            .parts
            .iter()
            .filter_map(|&(seq, tokens)| {
                let index = self.running.binary_search_by_key(&seq, |sequence| sequence.seq).ok()?;
                Some(Part { index, tokens })
            })
            .collect();
        let slice = (decoding > 0 || is_urgent).then(|| self.pace.slice(decoding, is_urgent));
        let started = Instant::now();
        let mut last = started;
        let Prefill { last: times, .. } = &mut prefill;
        let mut pauses = || {
            let now = Instant::now();
            *times = [times[1], now - last];
            last = now;
            match slice {
                Some(slice) if now - started + times[0] > slice => true,
                // A new one may be short. Streams wake the engine all the time.
                Some(_) if is_urgent => shared.has_submitted(),
                _ => shared.has_news(),
            }
        };
        let result =
            self.run(&parts, shared, |model, spans, cancel| model.forward_until(spans, &mut pauses, cancel));
        let began = started.checked_sub(prefill.took).unwrap_or(started);
        prefill.took += started.elapsed();
        self.totals.busy += started.elapsed();
        let Some(result) = result.transpose() else {
            self.prefill = Some(prefill);
            return;
        };
        for part in &parts {
            self.running[part.index].reserved = 0;
        }
        let seqs: Vec<SeqId> = prefill.parts.iter().map(|(seq, _)| *seq).collect();
        match result {
            Ok(logits) => {
                let (_, rows) = self.take(&parts, logits, began);
                self.pace.record_paused(rows, prefill.took);
            }
            Err(error) => self.end_failed(&parts, error, shared),
        }
        self.pass += 1;
        self.deliver(&seqs, shared);
    }

    /// Whether a reader waits for the next token of a sequence that is not in the pass that pauses: a stream,
    /// or a short prompt.
    fn has_urgent(&self, decoding: usize) -> bool {
        let short = SHORT_PASSES * self.pace.rows_beside(decoding);
        self.running.iter().any(|sequence| match sequence.decodes() {
            true => sequence.is_streamed(),
            false => sequence.pending() <= short && !self.is_in_prefill(sequence.seq),
        })
    }

    fn is_in_prefill(&self, seq: SeqId) -> bool {
        self.prefill.iter().flat_map(|prefill| &prefill.parts).any(|(other, _)| *other == seq)
    }

    /// Ends what made a pass fail.
    fn end_failed(&mut self, parts: &[Part], error: Error, shared: &Shared) {
        match error {
            Error::Cancelled => {}
            error if parts.len() == 1 => self.end_at(parts[0].index, Ending::Failed(error)),
            // One of the sequences may be the reason, so each runs alone.
            _ => self.forward_alone(parts, shared),
        }
    }

    /// Reads a part of a finished answer again, until there is other work.
    fn reread(&mut self, shared: &Shared, started: Instant) {
        let should_stop = || shared.is_closed() || shared.has_news() || reserve::is_exhausted();
        let flag = AtomicBool::new(false);
        self.rereads.step(self.model.as_mut(), &Cancel::with_poll(&flag, &should_stop));
        self.totals.busy += started.elapsed();
    }

    /// Tells the readers of what `seqs` made and of what has ended. Blocks are free and metrics are true by
    /// then.
    fn deliver(&mut self, seqs: &[SeqId], shared: &Shared) {
        shared.set_metrics(self.metrics());
        let alive = self.running.iter_mut().chain(&mut self.paused);
        for sequence in alive.filter(|sequence| seqs.contains(&sequence.seq)) {
            if let Task::Generate(generate) = &mut sequence.task {
                generate.sink.deliver();
            }
        }
        for (sequence, ending) in self.ended.drain(..) {
            sequence.end(ending);
        }
    }

    /// Ends the sequences that their callers have cancelled, and those whose deadline has passed.
    fn end_stopped(&mut self, now: Instant) {
        let queues = [&mut self.running, &mut self.paused, &mut self.waiting];
        let stopped = queues.map(|queue| {
            queue.extract_if(.., |sequence| sequence.stop_reason(now).is_some()).collect::<Vec<_>>()
        });
        for sequence in stopped.into_iter().flatten() {
            let reason = sequence.stop_reason(now).unwrap_or(FinishReason::Cancelled);
            self.end(sequence, Ending::Stopped(reason));
        }
    }

    /// Moves paused sequences whose readers have caught up to those that wait.
    fn resume(&mut self) {
        let resumed = self.paused.extract_if(.., |sequence| sequence.ticket.takes_resume());
        self.waiting.extend(resumed);
        self.waiting.sort_by_key(|sequence| sequence.seq);
    }

    /// Begins the sequences that wait, oldest first, as long as there is room for them.
    fn begin(&mut self) {
        while self.running.len() < self.max_num_seqs
            && let Some(index) = self.next_to_begin()
        {
            if !self.waiting[index].has_begun && !self.make_room_to_hold() {
                break;
            }
            let tokens = self.waiting[index].tokens.len();
            let total = self.model.kv_blocks().total;
            let has_room = blocks(tokens) <= total && self.make_room_to_begin(index, total);
            if !has_room && blocks(tokens) <= total && !self.running.is_empty() {
                break;
            }
            let mut sequence = self.waiting.remove(index);
            if !has_room {
                self.end(sequence, Ending::Failed(no_room(tokens, total)));
                continue;
            }
            if !sequence.has_begun {
                sequence.has_begun = true;
                sequence.computed = self.model.begin(sequence.seq, &sequence.beginning());
                if sequence.last_pass == 0 {
                    let cached = sequence.computed;
                    let before = std::mem::replace(&mut sequence.stats.cached_tokens, cached);
                    let totals = &mut self.totals;
                    // It may have begun before, and lost its blocks before its first pass.
                    if !std::mem::replace(&mut sequence.is_counted, true) {
                        totals.tokens_in += sequence.prompt_tokens as u64;
                    }
                    totals.prefix_hits = totals.prefix_hits + u64::from(cached > 0) - u64::from(before > 0);
                    totals.tokens_cached = totals.tokens_cached + cached as u64 - before as u64;
                }
            }
            let at = self.running.partition_point(|other| other.seq < sequence.seq);
            self.running.insert(at, sequence);
        }
    }

    /// The oldest waiting sequence whose keys and values are not being computed for another one.
    fn next_to_begin(&self) -> Option<usize> {
        self.waiting
            .iter()
            .take(MAX_LOOK_AHEAD)
            .position(|sequence| sequence.has_begun || !self.shares_running_prompt(sequence))
    }

    /// Makes room for one more sequence with keys and values, which those that do not run lose for that.
    fn make_room_to_hold(&mut self) -> bool {
        let all = self.running.iter().chain(&self.paused).chain(&self.waiting);
        let held = all.filter(|sequence| sequence.has_begun).count();
        held < self.model.max_held_seqs() || self.preempt_idle()
    }

    /// Makes room for a waiting sequence's tokens and one more, beside what the running ones need. Sequences
    /// that do not run lose their blocks for that.
    fn make_room_to_begin(&mut self, index: usize, total: usize) -> bool {
        loop {
            let sequence = &self.waiting[index];
            let own = blocks(sequence.tokens.len() + 1).min(total) - blocks(sequence.computed);
            if self.growth() + own <= self.model.kv_blocks().free {
                return true;
            }
            if !self.preempt_idle() {
                return false;
            }
        }
    }

    /// KV blocks that the running sequences need for the tokens that they have.
    fn growth(&self) -> usize {
        self.running.iter().map(|sequence| sequence.growth(sequence.pending() + 1)).sum()
    }

    /// Whether a running sequence is computing keys and values that `sequence` could share later.
    fn shares_running_prompt(&self, sequence: &Sequence) -> bool {
        if !self.model.shares_prefixes() {
            return false;
        }
        self.running.iter().any(|other| {
            if other.computed >= other.prompt_tokens || other.salt != sequence.salt {
                return false;
            }
            let most = sequence.reusable().min(other.prompt_tokens) / KV_BLOCK_POSITIONS * KV_BLOCK_POSITIONS;
            // Cheaper than comparing all tokens, and right for most prompts that differ.
            let next = other.computed + KV_BLOCK_POSITIONS;
            next <= most && other.tokens[..next] == sequence.tokens[..next]
        })
    }

    /// Chooses what the next step processes, and takes the blocks of younger sequences until it has room.
    fn choose_with_room(&mut self) -> Choice {
        loop {
            let choice = self.choose();
            let parts = choice.parts.iter().chain(&choice.prefill);
            let wanted: usize = parts.map(|part| self.running[part.index].growth(part.tokens)).sum();
            let kv = self.model.kv_blocks();
            if wanted <= kv.free {
                return choice;
            }
            if self.preempt_idle() {
                continue;
            }
            if self.running.len() == 1 {
                let tokens = self.running[0].tokens.len();
                self.end_at(0, Ending::Failed(no_room(tokens, kv.total)));
            } else if let Some(mut youngest) = self.running.pop() {
                self.leave_prefill(youngest.seq);
                preempt(self.model.as_mut(), &mut youngest, &mut self.totals);
                let at = self.waiting.partition_point(|other| other.seq < youngest.seq);
                self.waiting.insert(at, youngest);
            }
        }
    }

    /// Takes the blocks of the youngest sequence that holds some and does not run. Returns false if there is
    /// none.
    fn preempt_idle(&mut self) -> bool {
        let idle = self.paused.iter_mut().chain(&mut self.waiting);
        let youngest = idle.filter(|sequence| sequence.has_begun).max_by_key(|sequence| sequence.seq);
        let Some(sequence) = youngest else { return false };
        preempt(self.model.as_mut(), sequence, &mut self.totals);
        true
    }

    /// What the next step processes.
    fn choose(&self) -> Choice {
        let width = self.model.max_spans();
        let indices = 0..self.running.len();
        let indices = indices.filter(|&index| !self.is_in_prefill(self.running[index].seq));
        let (mut decoding, mut filling): (Vec<usize>, Vec<usize>) =
            indices.partition(|&index| self.running[index].decodes());
        if decoding.len() + filling.len() > width {
            // Those that have waited longest come first.
            let mut all: Vec<usize> = decoding.into_iter().chain(filling).collect();
            all.sort_by_key(|&index| self.running[index].last_pass);
            all.truncate(width);
            (decoding, filling) = all.into_iter().partition(|&index| self.running[index].decodes());
        }
        let beside = self.pace.rows_beside(decoding.len());
        let mut parts: Vec<Part> = decoding.iter().map(|&index| Part { index, tokens: 1 }).collect();
        if self.model.stages() == 1 {
            let is_short = |&&index: &&usize| self.running[index].pending() <= beside;
            let short = filling.iter().filter(is_short).count();
            let is_awaited = !decoding.is_empty() || (1..filling.len()).contains(&short);
            parts.extend(self.prompts(&filling, if is_awaited { beside } else { self.pace.most_rows() }));
            return Choice { parts, prefill: Vec::new() };
        }
        let is_short = |&index: &usize| self.running[index].pending() <= SHORT_PASSES * beside;
        let (mut short, mut long): (Vec<usize>, Vec<usize>) = filling.into_iter().partition(is_short);
        if decoding.is_empty() && long.is_empty() && self.prefill.is_none() {
            // Nobody waits for short prompts, so that as many as possible share a pass.
            std::mem::swap(&mut short, &mut long);
        }
        let mut prefill = Vec::new();
        let gives_way = self.ran_beside && (self.prefill.is_some() || !long.is_empty());
        if !short.is_empty() && !gives_way {
            parts.extend(self.prompts(&short, beside));
        } else if self.prefill.is_none() && !long.is_empty() {
            let is_streamed = |&index: &usize| self.running[index].is_streamed();
            let is_urgent = !short.is_empty() || decoding.iter().any(is_streamed);
            let rows = if is_urgent { self.pace.paused_rows(decoding.len()) } else { self.pace.most_rows() };
            prefill = self.prompts(&long, rows);
            if is_urgent {
                // No pause interrupts the output head.
                for part in prefill.iter_mut().filter(|part| self.wants_all_rows(part)) {
                    part.tokens = part.tokens.min(beside);
                }
            }
        }
        Choice { parts, prefill }
    }

    /// The parts of a pass with `budget` rows for prompts.
    fn prompts(&self, indices: &[usize], budget: usize) -> Vec<Part> {
        let left: Vec<usize> = indices.iter().map(|&index| self.running[index].pending()).collect();
        let shares = indices.iter().zip(share(budget, &left)).filter(|(_, tokens)| *tokens > 0);
        let mut parts: Vec<Part> = shares.map(|(&index, tokens)| Part { index, tokens }).collect();
        // The length of a prompt decides which kernels compute it. In this order, prompts that use the same
        // kernels go through the layers together.
        parts.sort_by_key(|part| self.running[part.index].prompt_tokens);
        parts
    }

    fn wants_all_rows(&self, part: &Part) -> bool {
        self.running[part.index].span(part.tokens).rows == Rows::All
    }

    /// Runs the model. Gives up if all sequences of the pass are stopped, or if one is for long.
    fn forward(&mut self, parts: &[Part], shared: &Shared) -> Result<Logits> {
        self.run(parts, shared, |model, spans, cancel| model.forward(spans, cancel))
    }

    /// Calls `forward` with the spans of a pass.
    fn run<T>(
        &mut self,
        parts: &[Part],
        shared: &Shared,
        forward: impl FnOnce(&mut dyn Model, &[Span], &Cancel) -> Result<T>,
    ) -> Result<T> {
        let Scheduler { model, running, .. } = self;
        let spans: Vec<Span> = parts.iter().map(|part| running[part.index].span(part.tokens)).collect();
        let first_stopped = std::cell::Cell::new(None);
        let should_stop = || {
            if shared.is_closed() || reserve::is_exhausted() {
                return true;
            }
            let now = Instant::now();
            let is_stopped = |part: &&Part| running[part.index].stop_reason(now).is_some();
            let stopped = parts.iter().filter(is_stopped).count();
            if stopped > 0 && first_stopped.get().is_none() {
                first_stopped.set(Some(now));
            }
            stopped == parts.len() || first_stopped.get().is_some_and(|first| now - first >= MAX_STOP_DELAY)
        };
        let flag = AtomicBool::new(false);
        match forward(model.as_mut(), &spans, &Cancel::with_poll(&flag, &should_stop)) {
            Err(Error::Cancelled) if reserve::is_exhausted() => Err(reserve::exhausted()),
            result => result,
        }
    }

    /// Runs each part in a pass of its own. Those that fail end with their error.
    fn forward_alone(&mut self, parts: &[Part], shared: &Shared) {
        let mut failed = Vec::new();
        for part in parts {
            let started = Instant::now();
            match self.forward(&[*part], shared) {
                Ok(mut logits) => self.take_rows(&[*part], &mut logits, started, &mut failed),
                Err(Error::Cancelled) => {}
                Err(error) => failed.push((part.index, Ending::Failed(error))),
            }
        }
        self.end_all(failed);
    }

    /// Hands the logits of a pass to its sequences. Returns how many decoded, and the rows of prompts.
    fn take(&mut self, parts: &[Part], mut logits: Logits, started: Instant) -> (usize, usize) {
        let decoding = parts.iter().filter(|part| self.running[part.index].decodes()).count();
        let lens = parts.iter().map(|part| self.running[part.index].span(part.tokens).tokens.len());
        let rows = lens.sum::<usize>() - decoding;
        let mut ended = Vec::new();
        self.take_rows(parts, &mut logits, started, &mut ended);
        self.model.reclaim(logits);
        self.end_all(ended);
        (decoding, rows)
    }

    /// Records that parts were processed, and hands over their logits. Notes in `ended` which sequences that
    /// ends.
    fn take_rows(
        &mut self,
        parts: &[Part],
        logits: &mut Logits,
        started: Instant,
        ended: &mut Vec<(usize, Ending)>,
    ) {
        let mut steps = Vec::with_capacity(parts.len());
        let mut values = logits.values.as_mut_slice();
        for part in parts {
            let sequence = &mut self.running[part.index];
            let span = sequence.span(part.tokens);
            let (len, rows, wanted) = (span.tokens.len(), span.rows, span.wanted());
            let (own, later) = std::mem::take(&mut values).split_at_mut(wanted * logits.vocab_size);
            values = later;
            sequence.last_pass = self.pass;
            sequence.computed += len;
            let Sequence { tokens, prompt_tokens, task, .. } = sequence;
            steps.push(match task {
                Task::Generate(generate) if rows == Rows::Last => {
                    generate.sample(own, tokens, *prompt_tokens, self.context_length).map(Some)
                }
                Task::Rows { sink, .. } if rows == Rows::All => sink.rows(own).map(|()| None),
                _ => Ok(None),
            });
        }
        // A token is ready when all sequences of the pass have theirs.
        let now = Instant::now();
        for (part, step) in parts.iter().zip(steps) {
            let sequence = &mut self.running[part.index];
            let stats = &mut sequence.stats;
            let is_first = stats.time_to_first_token.is_none();
            *if is_first { &mut stats.prefill } else { &mut stats.decode } += now - started;
            if let Ok(Some(_)) = step {
                self.totals.tokens_out += 1;
                stats.completion_tokens += 1;
                stats.time_to_first_token.get_or_insert(now - sequence.requested);
            }
            match sequence.take(step) {
                Ok(Flow::Continue) => {}
                Ok(Flow::Pause) => sequence.is_paused = true,
                Ok(Flow::Stop) => ended.push((part.index, Ending::Complete)),
                Err(error) => ended.push((part.index, Ending::Failed(error))),
            }
        }
    }

    /// Ends running sequences, and pauses those whose readers are slow.
    fn end_all(&mut self, mut ended: Vec<(usize, Ending)>) {
        ended.sort_by_key(|(index, _)| Reverse(*index));
        for (index, ending) in ended {
            self.end_at(index, ending);
        }
        let paused = self.running.extract_if(.., |sequence| std::mem::take(&mut sequence.is_paused));
        self.paused.extend(paused);
    }

    fn end_at(&mut self, index: usize, ending: Ending) {
        let sequence = self.running.remove(index);
        self.end(sequence, ending);
    }

    /// Takes a sequence out of the pass that pauses. The model does so too when it frees the sequence.
    fn leave_prefill(&mut self, seq: SeqId) {
        if let Some(prefill) = &mut self.prefill {
            prefill.parts.retain(|(other, _)| *other != seq);
        }
        self.prefill.take_if(|prefill| prefill.parts.is_empty());
    }

    /// Frees a sequence's blocks. Its reader is told later.
    fn end(&mut self, sequence: Sequence, ending: Ending) {
        self.leave_prefill(sequence.seq);
        if sequence.has_begun {
            self.model.free(sequence.seq);
        }
        let is_turn = matches!(&sequence.task, Task::Generate(generate) if generate.is_turn);
        if is_turn && matches!(ending, Ending::Complete) && self.model.shares_prefixes() {
            self.rereads.add(&sequence);
        }
        self.totals.ended += 1;
        self.ended.push((sequence, ending));
    }
}

/// Takes a sequence's blocks. It is computed again when it has its turn.
fn preempt(model: &mut dyn Model, sequence: &mut Sequence, totals: &mut Metrics) {
    model.free(sequence.seq);
    (sequence.has_begun, sequence.computed, sequence.reserved) = (false, 0, 0);
    totals.preemptions += 1;
}

fn no_room(tokens: usize, blocks: usize) -> Error {
    Error::Generation {
        reason: format!(
            "no room for the keys and values of {tokens} tokens: the KV cache has {blocks} blocks of \
             {KV_BLOCK_POSITIONS}; load with a larger kv_cache_bytes"
        ),
    }
}

/// Divides `budget` rows among prompts, oldest first, of which so many tokens are left. The oldest gets at
/// least half, and the shortest of the others come first.
fn share(budget: usize, left: &[usize]) -> Vec<usize> {
    let mut shares = vec![0; left.len()];
    let Some(oldest) = left.first() else { return shares };
    let half = budget.div_ceil(2).min(*oldest);
    let mut rest = budget - half;
    let mut by_length: Vec<usize> = (1..left.len()).collect();
    by_length.sort_by_key(|&index| left[index]);
    for index in by_length {
        shares[index] = rest.min(left[index]);
        rest -= shares[index];
    }
    shares[0] = (half + rest).min(*oldest);
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_prompt_gets_half_and_then_the_shortest_come_first() {
        assert!(share(32, &[]).is_empty());
        assert_eq!(share(32, &[1000]), [32]);
        assert_eq!(share(32, &[10]), [10]);
        assert_eq!(share(32, &[1000, 20]), [16, 16]);
        assert_eq!(share(40, &[1000, 20]), [20, 20]);
        assert_eq!(share(64, &[1000, 20]), [44, 20]);
        assert_eq!(share(64, &[1000, 500, 20, 500]), [32, 12, 20, 0]);
        assert_eq!(share(64, &[10, 500, 20]), [10, 34, 20]);
        assert_eq!(share(1, &[10, 5]), [1, 0]);
    }
}
