//! How many tokens of prompts a forward pass may have, so that running sequences do not wait long for their
//! next tokens.

use std::time::Duration;

/// Maximum rows of prompts in a pass. More are not faster.
const MAX_ROWS: usize = 512;
/// A pass with prompts may take this many times as long as one without.
const SLOWDOWN: f64 = 3.0;
/// The weight of the newest measurement in an average.
const NEWEST: f64 = 0.2;

/// Measures passes, and predicts how long they take.
#[derive(Debug)]
pub(super) struct Pace {
    /// The fewest rows that are worth a pass.
    min_rows: usize,
    /// The model processes a multiple of so many rows at a time.
    step: usize,
    /// Seconds of a pass that decodes so many sequences: entry i is for up to 2^i. 0 is unknown.
    decode: [f64; 12],
    /// Seconds per row of a prompt, in passes that also decode or are as short; 0 is unknown.
    per_row: f64,
}

impl Pace {
    /// Of a model for which passes of `min_rows` rows are not much slower per row than longer ones, and which
    /// processes a multiple of `step` rows at a time.
    pub(super) fn new(min_rows: usize, step: usize) -> Self {
        Pace { min_rows: min_rows.clamp(1, MAX_ROWS), step: step.max(1), decode: [0.0; 12], per_row: 0.0 }
    }

    /// Records a pass over `decoding` sequences and `rows` rows of prompts.
    pub(super) fn record(&mut self, decoding: usize, rows: usize, took: Duration) {
        let seconds = took.as_secs_f64();
        if rows == 0 {
            average(&mut self.decode[bucket(decoding)], seconds);
        } else if decoding + rows >= self.min_rows {
            average(&mut self.per_row, seconds / rows as f64);
        }
    }

    /// Maximum rows of prompts in a pass that nobody else waits for.
    pub(super) fn most_rows(&self) -> usize {
        MAX_ROWS
    }

    /// Maximum rows of prompts in a pass for which `decoding` sequences, or a short prompt, wait.
    pub(super) fn rows_beside(&self, decoding: usize) -> usize {
        let known = self.decode[..=bucket(decoding.max(1))].iter().rev().find(|&&seconds| seconds > 0.0);
        let rows = match known {
            Some(&step) if self.per_row > 0.0 => (SLOWDOWN * step / self.per_row) as usize,
            _ => 0,
        };
        let all = (rows + decoding).clamp(self.min_rows.max(decoding + self.step), MAX_ROWS + decoding);
        all / self.step * self.step - decoding
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

    #[test]
    fn prompts_get_the_rows_that_slow_a_pass_down() {
        let mut pace = Pace::new(16, 1);
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
    fn a_pass_has_a_multiple_of_the_rows_that_are_processed_together() {
        let mut pace = Pace::new(24, 6);
        assert_eq!((pace.rows_beside(1), pace.rows_beside(8), pace.rows_beside(32)), (23, 16, 4));
        pace.record(1, 0, Duration::from_millis(10));
        pace.record(0, 100, Duration::from_millis(100));
        for decoding in [1, 2, 5, 8, 32] {
            assert_eq!((pace.rows_beside(decoding) + decoding) % 6, 0, "{decoding}");
        }
    }

    #[test]
    fn passes_of_few_rows_do_not_count_as_the_speed_of_prompts() {
        let mut pace = Pace::new(16, 1);
        pace.record(1, 0, Duration::from_millis(10));
        pace.record(1, 32, Duration::from_millis(32));
        let before = pace.rows_beside(1);
        pace.record(1, 1, Duration::from_millis(10));
        assert_eq!(pace.rows_beside(1), before);
    }
}
