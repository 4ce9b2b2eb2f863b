//! Byte pair encoding by score, as SentencePiece does it for Llama 2. Among all pairs of neighbours that
//! together are a piece, the pair whose piece has the best score is merged, the leftmost one if scores are
//! equal. This repeats until no pair is left. Remaining text that is not a piece is encoded as byte tokens.
//!
//! The `tokenizers` library cannot express this exactly: it ranks merges, not the pieces they make, so
//! position does not decide between equal scores.
//!
//! Source: SentencePiece, `bpe_model.cc`; llama.cpp, `llama-vocab.cpp`.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::OnceLock;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, AddedVocabulary, NormalizerWrapper, OffsetReferential, OffsetType};

use super::bounds::Bounds;
use super::merging::{NONE, Pair, Symbols};
use super::{MAX_VOCAB_SIZE, catching};
use crate::sys::sync::get_or_make;

/// SentencePiece's character for a space.
pub(super) const SPACE: char = '▁';

/// Longer pieces are refused, because the cost of a lookup grows with the piece's length. The longest in use
/// has some hundred bytes.
const MAX_PIECE_BYTES: usize = 1024;

/// The type of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    /// Reads the number that files use: `SentencePiece.Type`, or `tokenizer.ggml.token_type`.
    pub(super) fn from_number(number: i64) -> Option<Self> {
        match number {
            1 => Some(Kind::Normal),
            2 => Some(Kind::Unknown),
            3 => Some(Kind::Control),
            4 => Some(Kind::UserDefined),
            5 => Some(Kind::Unused),
            6 => Some(Kind::Byte),
            _ => None,
        }
    }

    /// The number that [`Kind::from_number`] takes.
    pub(super) fn number(self) -> i32 {
        match self {
            Kind::Normal => 1,
            Kind::Unknown => 2,
            Kind::Control => 3,
            Kind::UserDefined => 4,
            Kind::Unused => 5,
            Kind::Byte => 6,
        }
    }

    /// Whether merging may produce this piece.
    fn is_text(self) -> bool {
        matches!(self, Kind::Normal | Kind::UserDefined | Kind::Unused)
    }
}

/// A token. Its id is its index in the vocabulary.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    /// The text in the file; empty for an id without a token.
    pub(super) text: String,
    pub(super) score: f32,
    pub(super) kind: Kind,
    /// How the token is found in the text before merging; None if it is not.
    pub(super) added: Option<AddedToken>,
}

impl Piece {
    /// Makes a piece. Control, unknown and user-defined pieces are found in the text before merging.
    pub(super) fn new(text: String, score: f32, kind: Kind) -> Self {
        let added = match kind {
            Kind::Control | Kind::Unknown => Some(AddedToken::from(text.as_str(), true)),
            Kind::UserDefined => Some(AddedToken::from(text.as_str(), false).normalized(false)),
            Kind::Normal | Kind::Unused | Kind::Byte => None,
        };
        Piece { text, score, kind, added }
    }

    /// Turns this piece into the added token `added`.
    pub(super) fn set_added(&mut self, added: AddedToken) {
        self.kind = if added.special { Kind::Control } else { Kind::UserDefined };
        self.text.clone_from(&added.content);
        self.added = Some(added);
    }
}

/// How text is prepared, and which tokens are put around it.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// Whether a space is put before a text.
    pub(super) add_space_prefix: bool,
    /// Whether a space is also put before text that follows a special token.
    pub(super) prefix_after_special: bool,
    /// Whether runs of spaces become one space, and spaces at both ends are removed.
    pub(super) remove_extra_whitespaces: bool,
    /// The token added before every text.
    pub(super) first: Option<u32>,
    /// The token added after every text.
    pub(super) last: Option<u32>,
}

/// A vocabulary of pieces with scores.
pub(super) struct SentencePiece {
    pieces: Vec<Piece>,
    /// The id of each text. If texts are equal, the first one counts.
    ids: HashMap<String, u32>,
    /// The token of each byte.
    bytes: Vec<Option<u32>>,
    unknown: Option<u32>,
    /// Finds special and user-defined tokens in text.
    added: AddedVocabulary,
    /// As `added`, without special tokens. It is made on first use.
    splitting: OnceLock<AddedVocabulary>,
    settings: Settings,
}

impl SentencePiece {
    /// Checks the vocabulary. Also returns warnings.
    pub(super) fn new(
        pieces: Vec<Piece>,
        settings: Settings,
    ) -> std::result::Result<(Self, Vec<String>), String> {
        if pieces.is_empty() || pieces.len() > MAX_VOCAB_SIZE {
            return Err(format!(
                "the vocabulary has {} pieces, expected 1 to {MAX_VOCAB_SIZE}",
                pieces.len()
            ));
        }
        let mut ids = HashMap::with_capacity(pieces.len());
        let mut special = Vocab::default();
        let mut added_tokens = Vec::new();
        let mut unknown = None;
        for (id, piece) in (0..).zip(&pieces) {
            if piece.score.is_nan() {
                return Err(format!("the score of piece {id} is not a number"));
            }
            if piece.text.len() > MAX_PIECE_BYTES {
                let bytes = piece.text.len();
                return Err(format!("piece {id} has {bytes} bytes, the limit is {MAX_PIECE_BYTES}"));
            }
            if piece.kind == Kind::Unknown {
                unknown = unknown.or(Some(id));
            }
            if piece.text.is_empty() || ids.contains_key(&piece.text) {
                continue;
            }
            ids.insert(piece.text.clone(), id);
            if let Some(token) = &piece.added {
                special.insert(piece.text.clone(), id);
                added_tokens.push(token.clone());
            }
        }
        let bytes: Vec<Option<u32>> =
            (0..=u8::MAX).map(|byte| ids.get(&format!("<0x{byte:02X}>")).copied()).collect();
        if unknown.is_none() && bytes.contains(&None) {
            return Err("the vocabulary has neither an unknown token nor one for every byte".into());
        }
        Bounds::OURS.check_added(added_tokens.iter().map(|token| token.content.as_str()))?;
        let added = catching(|| {
            let vocabulary = BPE::builder().vocab_and_merges(special, Vec::new()).build()?;
            let mut added = AddedVocabulary::new();
            added.add_tokens(added_tokens, &vocabulary, None::<&NormalizerWrapper>)?;
            Ok(added)
        })?;

        let mut warnings = Vec::new();
        let named = pieces.iter().filter(|piece| !piece.text.is_empty()).count();
        if ids.len() < named {
            warnings.push(format!(
                "{} pieces of the vocabulary have the same text as another",
                named - ids.len()
            ));
        }
        let mut scores =
            pieces.iter().filter(|piece| piece.kind == Kind::Normal && piece.text.chars().nth(1).is_some());
        if let Some(first) = scores.next()
            && scores.clone().next().is_some()
            && scores.all(|piece| piece.score == first.score)
        {
            warnings.push(
                "all pieces of the vocabulary have the same score; the token ids may not be the model's own"
                    .into(),
            );
        }
        let splitting = OnceLock::new();
        Ok((SentencePiece { pieces, ids, bytes, unknown, added, splitting, settings }, warnings))
    }

    /// The ids of `text`.
    pub(super) fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        split_special_tokens: bool,
    ) -> std::result::Result<Vec<u32>, String> {
        let mut ids = Vec::new();
        ids.extend(self.settings.first.filter(|_| add_special_tokens));
        let added = if split_special_tokens {
            get_or_make(&self.splitting, || {
                let mut added = self.added.clone();
                added.set_encode_special_tokens(true);
                added
            })
        } else {
            &self.added
        };
        let parts = catching(|| Ok(added.extract_and_normalize(None::<&NormalizerWrapper>, text)))?;
        let mut prefix = self.settings.add_space_prefix;
        for (part, _, tokens) in parts.get_splits(OffsetReferential::Original, OffsetType::None) {
            match tokens {
                Some(tokens) => {
                    ids.extend(tokens.iter().map(|token| token.id));
                    prefix = self.settings.add_space_prefix && self.settings.prefix_after_special;
                }
                None => {
                    self.merge(&self.prepare(part, prefix), &mut ids)?;
                    prefix = false;
                }
            }
        }
        ids.extend(self.settings.last.filter(|_| add_special_tokens));
        Ok(ids)
    }

    /// Replaces spaces by `▁` and adds the prefix.
    fn prepare(&self, text: &str, prefix: bool) -> String {
        let mut prepared = String::with_capacity(text.len() + SPACE.len_utf8());
        if self.settings.remove_extra_whitespaces {
            for word in text.split(' ').filter(|word| !word.is_empty()) {
                if prefix || !prepared.is_empty() {
                    prepared.push(SPACE);
                }
                prepared.push_str(word);
            }
            prepared.truncate(prepared.trim_end_matches(SPACE).len());
            return prepared;
        }
        if prefix && !text.is_empty() {
            prepared.push(SPACE);
        }
        prepared.extend(text.chars().map(|character| if character == ' ' { SPACE } else { character }));
        prepared
    }

    /// The piece with this text, if merging may produce it.
    fn piece(&self, text: &str) -> Option<(u32, &Piece)> {
        let id = *self.ids.get(text)?;
        let piece = self.pieces.get(id as usize)?;
        piece.kind.is_text().then_some((id, piece))
    }

    fn merge(&self, text: &str, ids: &mut Vec<u32>) -> std::result::Result<(), String> {
        // Positions have 32 bits, because a long text has one symbol per byte.
        if u32::try_from(text.len()).is_err() {
            return Err(format!("a text of {} bytes is too long", text.len()));
        }
        let mut symbols = Symbols::new(text);
        let mut queue = BinaryHeap::with_capacity(symbols.list.len());
        let offer = |symbols: &Symbols<'_>, queue: &mut BinaryHeap<Pair>, left: u32| {
            let Some((joined, bytes)) = symbols.joined(left) else { return };
            if bytes as usize <= MAX_PIECE_BYTES
                && let Some((_, piece)) = self.piece(joined)
            {
                // Adding zero turns -0 into 0.
                queue.push(Pair { score: piece.score + 0.0, left: Reverse(left), bytes });
            }
        };
        for left in 0..symbols.list.len() as u32 {
            offer(&symbols, &mut queue, left);
        }
        while let Some(Pair { left: Reverse(left), bytes, .. }) = queue.pop() {
            // Either neighbour may have been merged with another symbol since.
            if symbols.joined(left).is_none_or(|(_, now)| now != bytes) {
                continue;
            }
            let before = symbols.merge(left);
            if before != NONE {
                offer(&symbols, &mut queue, before);
            }
            offer(&symbols, &mut queue, left);
        }

        let mut is_unknown = false;
        for symbol in symbols.texts() {
            let was_unknown = std::mem::take(&mut is_unknown);
            if let Some((id, _)) = self.piece(symbol) {
                ids.push(id);
                continue;
            }
            let spelt: Option<Vec<u32>> =
                symbol.bytes().map(|byte| *self.bytes.get(usize::from(byte))?).collect();
            match spelt {
                Some(spelt) => ids.extend(spelt),
                None => {
                    // A run of unknown characters is one token.
                    is_unknown = true;
                    ids.extend(self.unknown.filter(|_| !was_unknown));
                }
            }
        }
        Ok(())
    }

    pub(super) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn token_to_id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    pub(super) fn id_to_token(&self, id: u32) -> Option<String> {
        self.pieces.get(id as usize).map(|piece| piece.text.clone()).filter(|text| !text.is_empty())
    }

    /// Whether decoding may skip the token.
    pub(super) fn is_special(&self, id: u32) -> bool {
        self.pieces.get(id as usize).and_then(|piece| piece.added.as_ref()).is_some_and(|token| token.special)
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The most bytes of a text that one token stands for; None if there is no such limit.
    pub(super) fn longest_token(&self) -> Option<usize> {
        let takes_spaces = |piece: &Piece| piece.added.as_ref().is_some_and(|a| a.lstrip || a.rstrip);
        if self.settings.remove_extra_whitespaces
            || self.bytes.contains(&None)
            || self.pieces.iter().any(takes_spaces)
        {
            return None;
        }
        self.pieces.iter().map(|piece| piece.text.len()).max()
    }

    /// Whether decoded text begins with a space that encoding added.
    pub(super) fn adds_space_prefix(&self) -> bool {
        self.settings.add_space_prefix
    }
}
