//! Finds stop strings in text that arrives in pieces, and lets no part of one slip out.

/// The stop strings of one sequence.
#[derive(Clone, Debug)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    /// Whether the stop string itself belongs to the text.
    include: bool,
    /// What may be the beginning of a stop string.
    held: String,
}

/// What a piece of text led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Passed {
    /// Text that is certain.
    pub(super) text: String,
    /// The stop string that was found; nothing comes after it.
    pub(super) stop: Option<String>,
}

impl StopStrings {
    pub(super) fn new(stops: Vec<String>, include: bool) -> Self {
        StopStrings { stops, include, held: String::new() }
    }

    /// Takes the next piece of text.
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

    /// What was held back, when no more text comes.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The length of the longest end of `held` that begins a stop string.
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

    /// Pushes the pieces up to a stop; gives all text and the stop.
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
    fn the_first_of_several_wins_and_at_one_place_the_longest() {
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
