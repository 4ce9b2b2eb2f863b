//! The sequences, and which of their tokens the next forward pass processes.
//!
//! A pass holds the newest token of every running sequence and, beside them, some tokens of prompts: as many
//! as do not delay the others much ([`Pace`]). Sequences begin in the order of their requests. If the KV
//! cache is full, the youngest sequence loses its blocks and is computed again later, with the same result.

use super::engine::{EngineOptions, Shared};
use super::metrics::Metrics;
use super::output::Flow;
use super::pace::Pace;
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
    /// Rows that the oldest prompt has lent to shorter ones: see [`share`].
    lent: usize,
    /// The number of the pass that runs next.
    pass: u64,
    /// Whether the last pass was given up for new sequences. The next one is not.
    gave_way: bool,
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

impl Scheduler {
    pub(super) fn new(model: Box<dyn Model>, options: EngineOptions) -> Self {
        let EngineOptions { context_length, max_num_seqs } = options;
        Scheduler {
            max_num_seqs: max_num_seqs.unwrap_or_else(|| model.max_num_seqs()).max(1),
            pace: Pace::new(model.min_rows(), model.rows_together()),
            model,
            context_length,
            waiting: Vec::new(),
            running: Vec::new(),
            paused: Vec::new(),
            lent: 0,
            pass: 1,
            gave_way: false,
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

    /// Ends what is stopped, begins what has its turn, and runs one forward pass.
    pub(super) fn step(&mut self, shared: &Shared) {
        let started = Instant::now();
        self.end_stopped(started);
        self.resume();
        let mut parts = Vec::new();
        if self.is_idle() {
            self.reread(shared, started);
        } else {
            self.begin();
            parts = self.choose_with_room();
        }
        let seqs: Vec<SeqId> = parts.iter().map(|part| self.running[part.index].seq).collect();
        if !parts.is_empty() {
            match self.forward(&parts, shared) {
                Ok(logits) => self.take(&parts, logits, started),
                Err(Error::Cancelled) => {}
                Err(error) if parts.len() == 1 => self.end_at(parts[0].index, Ending::Failed(error)),
                // One of the sequences may be the reason, so each runs alone.
                Err(_) => self.forward_alone(&parts, shared),
            }
            self.pass += 1;
            self.totals.busy += started.elapsed();
        }
        self.deliver(&seqs, shared);
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
                    sequence.stats.cached_tokens = sequence.computed;
                    self.totals.prefix_hits += u64::from(sequence.computed > 0);
                    self.totals.tokens_cached += sequence.computed as u64;
                    self.totals.tokens_in += sequence.prompt_tokens as u64;
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

    /// Chooses the parts of the next pass, and takes the blocks of younger sequences until it has room.
    fn choose_with_room(&mut self) -> Vec<Part> {
        loop {
            let mut lent = self.lent;
            let parts = self.choose(&mut lent);
            let wanted: usize = parts.iter().map(|part| self.running[part.index].growth(part.tokens)).sum();
            let kv = self.model.kv_blocks();
            if wanted <= kv.free {
                self.lent = lent;
                return parts;
            }
            if self.preempt_idle() {
                continue;
            }
            if self.running.len() == 1 {
                let tokens = self.running[0].tokens.len();
                self.end_at(0, Ending::Failed(no_room(tokens, kv.total)));
            } else if let Some(mut youngest) = self.running.pop() {
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

    /// The parts of the next pass: the newest tokens of the sequences that decode, then prompts. `lent` is
    /// that of [`share`].
    fn choose(&self, lent: &mut usize) -> Vec<Part> {
        let width = self.model.max_spans();
        let indices = 0..self.running.len();
        let (mut decoding, mut filling): (Vec<usize>, Vec<usize>) =
            indices.partition(|&index| self.running[index].decodes());
        if decoding.len() + filling.len() > width {
            // Those that have waited longest come first.
            let mut all: Vec<usize> = decoding.into_iter().chain(filling).collect();
            all.sort_by_key(|&index| self.running[index].last_pass);
            all.truncate(width);
            (decoding, filling) = all.into_iter().partition(|&index| self.running[index].decodes());
        }
        let left: Vec<usize> = filling.iter().map(|&index| self.running[index].pending()).collect();
        let beside = self.pace.rows_beside(decoding.len());
        let (short, long) = (left.iter().any(|&left| left <= beside), left.iter().any(|&left| left > beside));
        let is_awaited = !decoding.is_empty() || short && long;
        let budget = if is_awaited { beside } else { self.pace.most_rows() };
        let mut parts: Vec<Part> = decoding.iter().map(|&index| Part { index, tokens: 1 }).collect();
        let shares = filling.into_iter().zip(share(budget, &left, lent)).filter(|(_, tokens)| *tokens > 0);
        let mut prompts: Vec<Part> = shares.map(|(index, tokens)| Part { index, tokens }).collect();
        // The length of a prompt decides which kernels compute it. In this order, prompts that use the same
        // kernels go through the layers together.
        prompts.sort_by_key(|part| self.running[part.index].prompt_tokens);
        parts.extend(prompts);
        parts
    }

    /// Runs the model. Gives up if all sequences of the pass are stopped, and in some cases before that.
    fn forward(&mut self, parts: &[Part], shared: &Shared) -> Result<Logits> {
        let Scheduler { model, running, pace, gave_way, .. } = self;
        let spans: Vec<Span> = parts.iter().map(|part| running[part.index].span(part.tokens)).collect();
        let rows: usize = spans.iter().map(|span| span.tokens.len()).sum();
        let may_give_way = !*gave_way
            && model.max_spans() > 1
            && rows > 2 * pace.rows_beside(0)
            && !parts.iter().any(|part| running[part.index].decodes());
        *gave_way = false;
        let first_stopped = std::cell::Cell::new(None);
        let gives_way = std::cell::Cell::new(false);
        let should_stop = || {
            if shared.is_closed() || reserve::is_exhausted() {
                return true;
            }
            if may_give_way && shared.has_submitted() {
                gives_way.set(true);
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
        let result = model.forward(&spans, &Cancel::with_poll(&flag, &should_stop));
        *gave_way = gives_way.get();
        match result {
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

    /// Hands the logits of a pass to its sequences.
    fn take(&mut self, parts: &[Part], mut logits: Logits, started: Instant) {
        let decoding = parts.iter().filter(|part| self.running[part.index].decodes()).count();
        let lens = parts.iter().map(|part| self.running[part.index].span(part.tokens).tokens.len());
        let rows = lens.sum::<usize>() - decoding;
        let mut ended = Vec::new();
        self.take_rows(parts, &mut logits, started, &mut ended);
        self.model.reclaim(logits);
        self.pace.record(decoding, rows, started.elapsed());
        self.end_all(ended);
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

    /// Frees a sequence's blocks. Its reader is told later.
    fn end(&mut self, sequence: Sequence, ending: Ending) {
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
    (sequence.has_begun, sequence.computed) = (false, 0);
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
///
/// - `lent`: rows of that half that the oldest has left to others. It lends rows, a whole pass at most, to
///   those that can end within two passes, so that they need not wait for a third. It gets them back when no
///   others need them.
fn share(budget: usize, left: &[usize], lent: &mut usize) -> Vec<usize> {
    let mut shares = vec![0; left.len()];
    let Some((oldest, others)) = left.split_first() else { return shares };
    let half = budget.div_ceil(2).min(*oldest);
    let wanted: usize = others.iter().filter(|&&left| left <= 2 * budget).sum();
    let loan = wanted.saturating_sub(budget - half).min(half).min(budget.saturating_sub(*lent));
    let mut rest = budget - (half - loan);
    let mut by_length: Vec<usize> = (1..left.len()).collect();
    by_length.sort_by_key(|&index| left[index]);
    for index in by_length {
        shares[index] = rest.min(left[index]);
        rest -= shares[index];
    }
    shares[0] = (half - loan + rest).min(*oldest);
    *lent = (*lent + half).saturating_sub(shares[0]);
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_prompt_gets_half_and_then_the_shortest_come_first() {
        let share = |budget, left: &[usize]| share(budget, left, &mut 1000);
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

    #[test]
    fn the_oldest_prompt_lends_rows_to_short_ones_and_gets_them_back() {
        let mut lent = 0;
        assert_eq!(share(23, &[1000, 20], &mut lent), [3, 20]);
        assert_eq!(lent, 9);
        assert_eq!(share(23, &[997], &mut lent), [23]);
        assert_eq!(lent, 0);
        assert_eq!(share(11, &[1000, 20], &mut lent), [0, 11]);
        assert_eq!(share(11, &[1000, 9], &mut lent), [2, 9]);
        assert_eq!(lent, 10);
        // One that is long itself gets no more than the other half.
        assert_eq!(share(64, &[1000, 500], &mut 0), [32, 32]);
        // An oldest one that ends leaves the rest to the others.
        assert_eq!(share(64, &[5, 500], &mut lent), [5, 59]);
        // There is always a short one: only one pass is lost.
        let got: usize = (0..100).map(|_| share(23, &[1000, 20], &mut lent)[0]).sum();
        assert!(got >= 99 * 11, "{got}");
    }
}
