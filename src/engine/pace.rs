//! How many tokens of prompts the model processes at a time, so that running sequences do not wait long for
//! their next tokens.

use std::time::Duration;

/// Maximum rows of prompts in a pass. More are not faster.
const MAX_ROWS: usize = 512;
/// Maximum rows of prompts in a pass that pauses for decoding sequences. Other prompts wait for its end.
const MAX_PAUSED_ROWS: usize = 256;
/// A pass with prompts may take this many times as long as one without.
const SLOWDOWN: f64 = 3.0;
/// A pass over prompts pauses for decoding sequences after this many times as long as theirs take at most. So
/// they get a token within 3.6 times that, which leaves something for what takes longer than predicted.
const SLICE: f64 = 2.6;
/// The same if their readers wait only for the end: prompts should not take much longer than alone.
const LONG_SLICE: f64 = 8.0;
/// The stages of a pass that pauses should be shorter than this many times a pass of decoding sequences. The
/// MLP takes longer than the average stage.
const STAGE: f64 = 0.7;
/// The weight of the newest measurement in an average.
const NEWEST: f64 = 0.2;

/// What a pace has to know of a model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Granularity {
    /// The fewest rows in a pass that are not much slower per row than more.
    pub(super) min_rows: usize,
    /// The model processes a multiple of so many rows at a time.
    pub(super) rows_together: usize,
    /// The stages between which a pass can pause.
    pub(super) stages: usize,
}

/// Measures passes, and predicts how long they take.
#[derive(Debug)]
pub(super) struct Pace {
    model: Granularity,
    /// Seconds of a pass that decodes so many sequences: entry i is for up to 2^i. 0 is unknown.
    decode: [f64; 12],
    /// Seconds per row of a prompt, in passes that also decode or are as short; 0 is unknown.
    per_row: f64,
    /// Seconds per row of a pass that can pause; 0 is unknown.
    per_paused_row: f64,
}

impl Pace {
    pub(super) fn new(model: Granularity) -> Self {
        let min_rows = model.min_rows.clamp(1, MAX_ROWS);
        let model = Granularity { min_rows, rows_together: model.rows_together.max(1), ..model };
        Pace { model, decode: [0.0; 12], per_row: 0.0, per_paused_row: 0.0 }
    }

    /// Records a pass over `decoding` sequences and `rows` rows of prompts.
    pub(super) fn record(&mut self, decoding: usize, rows: usize, took: Duration) {
        let seconds = took.as_secs_f64();
        if rows == 0 {
            average(&mut self.decode[bucket(decoding)], seconds);
        } else if decoding + rows >= self.model.min_rows {
            average(&mut self.per_row, seconds / rows as f64);
        }
    }

    /// Records a pass over `rows` rows of prompts that could pause, and took so long without the pauses.
    pub(super) fn record_paused(&mut self, rows: usize, took: Duration) {
        if rows >= self.model.min_rows {
            average(&mut self.per_paused_row, took.as_secs_f64() / rows as f64);
        }
    }

    /// Maximum rows of prompts in a pass that nobody else waits for.
    pub(super) fn most_rows(&self) -> usize {
        MAX_ROWS
    }

    /// Maximum rows of prompts in a pass for which `decoding` sequences, or a short prompt, wait.
    pub(super) fn rows_beside(&self, decoding: usize) -> usize {
        let rows = match self.decode_seconds(decoding) {
            Some(step) if self.per_row > 0.0 => (SLOWDOWN * step / self.per_row) as usize,
            _ => 0,
        };
        let Granularity { min_rows, rows_together, .. } = self.model;
        let all = (rows + decoding).clamp(min_rows.max(decoding + rows_together), MAX_ROWS + decoding);
        all / rows_together * rows_together - decoding
    }

    /// Maximum rows in a pass that pauses for `decoding` sequences.
    pub(super) fn paused_rows(&self, decoding: usize) -> usize {
        let rows = match self.decode_seconds(decoding) {
            Some(step) if self.per_paused_row > 0.0 => {
                (STAGE * step * self.model.stages as f64 / self.per_paused_row) as usize
            }
            _ => MAX_PAUSED_ROWS,
        };
        let Granularity { min_rows, rows_together, .. } = self.model;
        rows.clamp(min_rows, MAX_PAUSED_ROWS.max(min_rows)).next_multiple_of(rows_together)
    }

    /// After how long a pass pauses for `decoding` sequences, or for a short prompt. `is_urgent`: whether a
    /// reader waits for the next token.
    pub(super) fn slice(&self, decoding: usize, is_urgent: bool) -> Duration {
        let factor = if is_urgent { SLICE } else { LONG_SLICE };
        let short_prompt = self.model.min_rows as f64 * self.per_row;
        Duration::from_secs_f64(self.decode_seconds(decoding).map_or(short_prompt, |step| factor * step))
    }

    /// Seconds of a pass that decodes so many sequences, or of one that decodes fewer.
    fn decode_seconds(&self, decoding: usize) -> Option<f64> {
        self.decode[..=bucket(decoding)].iter().rev().copied().find(|&seconds| seconds > 0.0)
    }
}

fn bucket(decoding: usize) -> usize {
    (decoding.max(1).next_power_of_two().trailing_zeros() as usize).min(11)
}

fn average(known: &mut f64, newest: f64) {
    *known = if *known == 0.0 { newest } else { *known + NEWEST * (newest - *known) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(min_rows: usize, rows_together: usize) -> Pace {
        Pace::new(Granularity { min_rows, rows_together, stages: 20 })
    }

    #[test]
    fn prompts_get_the_rows_that_slow_a_pass_down() {
        let mut pace = pace(16, 1);
        assert_eq!(pace.rows_beside(1), 15, "nothing is known yet");
        pace.record(1, 0, Duration::from_millis(10));
        pace.record(0, 100, Duration::from_millis(100));
        let expected = (SLOWDOWN * 10.0) as usize;
        assert_eq!(pace.rows_beside(1), expected);
        assert_eq!(pace.rows_beside(8), expected, "a pass over 8 sequences takes at least as long");
        pace.record(8, 0, Duration::from_millis(20));
        assert_eq!(pace.rows_beside(8), (SLOWDOWN * 20.0) as usize);
        assert_eq!(pace.rows_beside(0), expected);
        for _ in 0..100 {
            pace.record(1, 0, Duration::from_secs(1));
        }
        assert_eq!(pace.rows_beside(1), MAX_ROWS);
        for _ in 0..100 {
            pace.record(1, 0, Duration::from_micros(1));
        }
        assert_eq!(pace.rows_beside(1), 15);
    }

    #[test]
    fn a_pass_that_pauses_has_short_stages_and_short_slices() {
        let mut pace = pace(16, 6);
        assert_eq!((pace.paused_rows(1), pace.slice(1, true)), (258, Duration::ZERO), "nothing is known yet");
        pace.record(0, 100, Duration::from_millis(100));
        assert_eq!(pace.slice(0, true), Duration::from_millis(16), "as long as a short prompt");
        pace.record(1, 0, Duration::from_millis(10));
        assert_eq!(pace.slice(0, true), Duration::from_millis(26));
        assert_eq!(pace.slice(8, true), Duration::from_millis(26), "more sequences take at least as long");
        assert_eq!(pace.slice(1, false), Duration::from_millis(80));
        pace.record_paused(100, Duration::from_millis(200));
        // 72 rows take 144 ms, and one of 20 stages 7.2 ms.
        assert_eq!(pace.paused_rows(1), 72, "a stage takes 0.7 times as long as a token");
        pace.record(8, 0, Duration::from_secs(1));
        assert_eq!(pace.paused_rows(8), 258);
    }

    #[test]
    fn a_pass_has_a_multiple_of_the_rows_that_are_processed_together() {
        let mut pace = pace(24, 6);
        assert_eq!((pace.rows_beside(1), pace.rows_beside(8), pace.rows_beside(32)), (23, 16, 4));
        pace.record(1, 0, Duration::from_millis(10));
        pace.record(0, 100, Duration::from_millis(100));
        for decoding in [1, 2, 5, 8, 32] {
            assert_eq!((pace.rows_beside(decoding) + decoding) % 6, 0, "{decoding}");
        }
    }

    #[test]
    fn passes_of_few_rows_do_not_count_as_the_speed_of_prompts() {
        let mut pace = pace(16, 1);
        pace.record(1, 0, Duration::from_millis(10));
        pace.record(1, 32, Duration::from_millis(32));
        let before = pace.rows_beside(1);
        pace.record(1, 1, Duration::from_millis(10));
        assert_eq!(pace.rows_beside(1), before);
    }
}
