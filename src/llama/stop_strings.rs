//! Finds stop strings in text that arrives in pieces. Holds back text that may be the start of one.

/// The stop strings of one sequence.
#[derive(Clone, Debug)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    /// Whether the stop string itself belongs to the text.
    include: bool,
    /// Text held back because it may be the start of a stop string.
    held: String,
}

/// The result of [`StopStrings::push`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Passed {
    /// Text that is no part of a stop string and can be shown.
    pub(super) text: String,
    /// The stop string that was found. Nothing must be pushed after it.
    pub(super) stop: Option<String>,
}

impl StopStrings {
    pub(super) fn new(stops: Vec<String>, include: bool) -> Self {
        StopStrings { stops, include, held: String::new() }
    }

    /// Adds the next piece of text.
    pub(super) fn push(&mut self, text: &str) -> Passed {
        self.held.push_str(text);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)))
            .min_by_key(|(at, stop)| (*at, std::cmp::Reverse(stop.len())));
        if let Some((at, stop)) = first {
            let stop = stop.clone();
            let end = if self.include { at + stop.len() } else { at };
            let mut text = std::mem::take(&mut self.held);
            text.truncate(end);
            return Passed { text, stop: Some(stop) };
        }
        let certain = self.held.len() - self.uncertain();
        let rest = self.held.split_off(certain);
        Passed { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// Returns the text held back, at the end of the text.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The length of the longest suffix of `held` that is a prefix of a stop string.
    fn uncertain(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        let ends = self.held.char_indices().map(|(at, _)| at).filter(|&at| at >= from);
        ends.map(|at| &self.held[at..])
            .find(|end| self.stops.iter().any(|stop| stop.starts_with(end)))
            .map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Pushes the pieces up to a stop string; returns the whole text and the stop string.
    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<String>) {
        let mut strings = StopStrings::new(stops.iter().map(|s| s.to_string()).collect(), include);
        let mut all = String::new();
        for piece in pieces {
            let passed = strings.push(piece);
            all += &passed.text;
            if passed.stop.is_some() {
                return (all, passed.stop);
            }
        }
        (all + &strings.finish(), None)
    }

    #[test]
    fn a_stop_string_split_over_pieces_never_leaks() {
        assert_eq!(run(&["</s>"], false, &["a<", "/", "s", ">b"]), ("a".into(), Some("</s>".into())));
        assert_eq!(run(&["</s>"], true, &["a<", "/", "s", ">b"]), ("a</s>".into(), Some("</s>".into())));
        assert_eq!(run(&["</s>"], false, &["a<", "/", "x"]), ("a</x".into(), None));
        assert_eq!(run(&["</s>"], false, &["a<", "/"]), ("a</".into(), None));
        assert_eq!(run(&["aab"], false, &["aa", "ab"]), ("a".into(), Some("aab".into())));
        assert_eq!(run(&["né", "é!"], false, &["n", "è", "é", "!"]), ("nè".into(), Some("é!".into())));
    }

    #[test]
    fn the_earliest_stop_string_wins_then_the_longest() {
        assert_eq!(run(&["c", "b"], false, &["abc"]), ("a".into(), Some("b".into())));
        assert_eq!(run(&["b", "bc"], false, &["abc"]), ("a".into(), Some("bc".into())));
    }

    proptest! {
        #[test]
        fn pieces_joined_are_the_text_up_to_the_stop(
            text in "[abé😀\n]{0,24}",
            stop in "[abé😀\n]{1,4}",
            include: bool,
            cuts in proptest::collection::vec(0usize..25, 0..6),
        ) {
            let mut bounds: Vec<usize> = cuts.into_iter().filter(|&at| text.is_char_boundary(at)).collect();
            bounds.extend([0, text.len()]);
            bounds.sort_unstable();
            let pieces: Vec<&str> = bounds.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let (all, found) = run(&[&stop], include, &pieces);
            let end = text.find(&stop).map_or(text.len(), |at| if include { at + stop.len() } else { at });
            prop_assert_eq!(all, &text[..end]);
            prop_assert_eq!(found.is_some(), text.contains(&stop));
        }
    }
}
