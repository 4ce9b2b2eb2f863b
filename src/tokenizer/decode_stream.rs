//! Decodes ids to text, all at once or one by one. Both run the same steps, so a stream's text is the text of
//! the whole.
//!
//! The decoders of Llama tokenizers are streamed: byte-level (Llama 3, SmolLM), the SentencePiece sequence
//! Replace, ByteFallback, Fuse, Strip (Llama 2), Metaspace, and none. Any other decoder works too, but its
//! text comes only at the end.

use std::sync::Arc;

use tokenizers::Decoder as _;
use tokenizers::DecoderWrapper;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;

use super::sentence_piece::SPACE;
use super::{Tokenizer, byte_level, catching};
use crate::error::{Error, Result};

/// Decodes ids as they arrive.
///
/// Guarantee: for every sequence of ids, the strings that [`DecodeStream::push`] returns, followed by the
/// string that [`DecodeStream::finish`] returns, equal [`Tokenizer::decode`] of the whole sequence. Text is
/// returned as soon as it is certain: never half a character, never a U+FFFD that a later byte would turn
/// into a character.
pub struct DecodeStream {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    state: State,
}

impl DecodeStream {
    pub(super) fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        let state = tokenizer.decoder.start();
        DecodeStream { tokenizer, skip_special_tokens, state }
    }

    /// Makes the ids that follow a continuation of `prompt`: a space at the beginning of their text is kept,
    /// unless nothing visible precedes it. The text is then what follows the prompt's in
    /// [`Tokenizer::decode`] of both.
    pub fn continuing(mut self, prompt: &[u32]) -> Self {
        let decoder = &self.tokenizer.decoder;
        for &id in prompt {
            let Some(token) = self.tokenizer.visible_token(id, self.skip_special_tokens) else { continue };
            if decoder.begins_text(&mut self.state, token) {
                break;
            }
        }
        self
    }

    /// Keeps a space at the beginning of the text: the text then has the bytes of [`Tokenizer::token_bytes`].
    pub fn verbatim(mut self) -> Self {
        (self.state.strip_start, self.state.is_first) = (0, false);
        self
    }

    /// Takes the next id and returns the text that is now certain, which may be empty. An id that the
    /// tokenizer does not know adds nothing, because a model's vocabulary may be padded.
    ///
    /// # Errors
    /// [`Error::Text`] if the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let mut text = String::new();
        if let Some(token) = self.tokenizer.visible_token(id, self.skip_special_tokens) {
            self.tokenizer.decoder.push(&mut self.state, token, &mut text)?;
        }
        Ok(text)
    }

    /// Ends the sequence and returns the text that was held back. A later push starts a new sequence.
    ///
    /// # Errors
    /// [`Error::Text`] if the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<String> {
        let mut text = String::new();
        self.tokenizer.decoder.finish(&mut self.state, &mut text)?;
        Ok(text)
    }
}

/// How a tokenizer's tokens become text.
pub(super) enum Decoder {
    /// Tokens spell bytes.
    ByteLevel,
    /// Tokens are pieces of text, changed one by one and then joined.
    Pieces(Pieces),
    /// Spaces are written as `replacement`. If `drops_first`, the first token loses the space that was put
    /// before the text.
    Metaspace { replacement: char, drops_first: bool },
    /// No decoder: tokens are words.
    Words,
    /// A decoder whose text may depend on everything that follows.
    Whole(DecoderWrapper),
}

/// The steps of a SentencePiece-like decoder.
pub(super) struct Pieces {
    /// Applied to each token alone.
    each: Vec<DecoderWrapper>,
    /// Whether tokens like `<0x0A>` are bytes.
    byte_fallback: bool,
    /// Whether these are the pieces of a SentencePiece vocabulary, not the decoder of a tokenizer.json. Then
    /// `▁` is a space, and valid characters inside a run of bytes that is not UTF-8 are kept. The
    /// `tokenizers` library drops them, so we do the same where we must match it.
    sentence_piece: bool,
    /// Applied to the joined text.
    strip: Option<Strip>,
}

struct Strip {
    content: char,
    start: usize,
    stop: usize,
}

/// A decoder's state between tokens.
pub(super) struct State {
    /// Byte-level: the incomplete character at the end. Pieces: the run of byte tokens at the end.
    bytes: Vec<u8>,
    /// The number of characters that may still be stripped from the start.
    strip_start: usize,
    /// The number of characters at the end that Strip removes if nothing follows. They all are the character
    /// that Strip removes.
    held: usize,
    /// All tokens so far, for a decoder that needs the whole.
    tokens: Vec<String>,
    is_first: bool,
}

impl Decoder {
    /// Sorts a tokenizer's decoder into the kinds that can be streamed.
    pub(super) fn new(decoder: Option<&DecoderWrapper>) -> Self {
        let Some(decoder) = decoder else { return Decoder::Words };
        let mut steps = Vec::new();
        flatten(decoder, &mut steps);
        match steps.as_slice() {
            [DecoderWrapper::ByteLevel(_)] | [DecoderWrapper::ByteLevel(_), DecoderWrapper::Fuse(_)] => {
                return Decoder::ByteLevel;
            }
            [DecoderWrapper::Metaspace(metaspace)] => {
                return Decoder::Metaspace {
                    replacement: metaspace.get_replacement(),
                    drops_first: metaspace.prepend_scheme != PrependScheme::Never,
                };
            }
            _ => {}
        }
        Pieces::new(&steps).map_or_else(|| Decoder::Whole(decoder.clone()), Decoder::Pieces)
    }

    /// The decoder of a SentencePiece vocabulary.
    pub(super) fn sentence_piece(strips_space: bool) -> Self {
        Decoder::Pieces(Pieces {
            each: Vec::new(),
            byte_fallback: true,
            sentence_piece: true,
            strip: strips_space.then_some(Strip { content: ' ', start: 1, stop: 0 }),
        })
    }

    /// A warning for the user about this decoder.
    pub(super) fn warning(&self) -> Option<String> {
        match self {
            Decoder::Whole(_) => {
                Some("this tokenizer's decoder cannot be streamed: text comes when generation ends".into())
            }
            _ => None,
        }
    }

    pub(super) fn start(&self) -> State {
        let strip_start = match self {
            Decoder::Pieces(Pieces { strip: Some(strip), .. }) => strip.start,
            _ => 0,
        };
        State { bytes: Vec::new(), strip_start, held: 0, tokens: Vec::new(), is_first: true }
    }

    /// Takes a token of a prompt. Returns whether the beginning of the prompt's text is now decided, so that
    /// no later token is treated as the first.
    fn begins_text(&self, state: &mut State, token: String) -> bool {
        state.is_first = false;
        if let Decoder::Pieces(pieces) = self {
            // A byte token counts as text: what it is a part of comes before everything that follows.
            let is_text = pieces.push(state, token, &mut String::new()).is_ok() && !state.bytes.is_empty();
            state.bytes.clear();
            state.held = 0;
            state.strip_start = if is_text { 0 } else { state.strip_start };
        }
        state.strip_start == 0
    }

    /// Takes a token and appends the text that is now certain to `text`.
    pub(super) fn push(&self, state: &mut State, token: String, text: &mut String) -> Result<()> {
        let is_first = std::mem::replace(&mut state.is_first, false);
        match self {
            Decoder::ByteLevel => {
                byte_level::push_bytes(&token, &mut state.bytes);
                push_complete(&mut state.bytes, text);
            }
            Decoder::Pieces(pieces) => pieces.push(state, token, text)?,
            &Decoder::Metaspace { replacement, drops_first } => {
                let space = if is_first && drops_first { "" } else { " " };
                text.push_str(&token.replace(replacement, space));
            }
            Decoder::Words => {
                if !is_first {
                    text.push(' ');
                }
                text.push_str(&token);
            }
            Decoder::Whole(_) => state.tokens.push(token),
        }
        Ok(())
    }

    /// The bytes that a token adds inside a text; None if that depends on other tokens.
    pub(super) fn bytes(&self, token: String) -> Result<Option<Vec<u8>>> {
        Ok(match self {
            Decoder::ByteLevel => {
                let mut bytes = Vec::new();
                byte_level::push_bytes(&token, &mut bytes);
                Some(bytes)
            }
            Decoder::Pieces(pieces) => {
                let piece = pieces.piece(token)?;
                let byte = fallback_byte(&piece).filter(|_| pieces.byte_fallback);
                Some(byte.map_or_else(|| piece.into_bytes(), |byte| vec![byte]))
            }
            Decoder::Metaspace { replacement, .. } => Some(token.replace(*replacement, " ").into_bytes()),
            Decoder::Words | Decoder::Whole(_) => None,
        })
    }

    /// Ends the sequence: appends the text that was held back to `text` and resets `state`.
    pub(super) fn finish(&self, state: &mut State, text: &mut String) -> Result<()> {
        let mut ended = std::mem::replace(state, self.start());
        match self {
            Decoder::ByteLevel => text.push_str(&String::from_utf8_lossy(&ended.bytes)),
            Decoder::Pieces(pieces) => {
                let mut rest = String::new();
                pieces.flush_run(&mut ended.bytes, &mut rest);
                pieces.strip(&mut ended, &rest, text);
                // The characters still held are those that Strip removes from the end.
            }
            Decoder::Words | Decoder::Metaspace { .. } => {}
            Decoder::Whole(decoder) => {
                if !ended.tokens.is_empty() {
                    text.push_str(&catching(|| decoder.decode(ended.tokens)).map_err(decoder_failed)?);
                }
            }
        }
        Ok(())
    }
}

impl Pieces {
    /// Recognises the sequence Replace*, ByteFallback?, (Fuse, Strip?)?
    fn new(steps: &[&DecoderWrapper]) -> Option<Self> {
        let mut steps = steps.iter().copied().peekable();
        let mut each = Vec::new();
        while let Some(step) = steps.next_if(|step| matches!(step, DecoderWrapper::Replace(_))) {
            each.push(step.clone());
        }
        let byte_fallback = steps.next_if(|step| matches!(step, DecoderWrapper::ByteFallback(_))).is_some();
        let mut strip = None;
        if steps.next_if(|step| matches!(step, DecoderWrapper::Fuse(_))).is_some()
            && let Some(DecoderWrapper::Strip(step)) = steps.peek()
        {
            strip = Some(Strip { content: step.content, start: step.start, stop: step.stop });
            steps.next();
        }
        steps.next().is_none().then_some(Pieces { each, byte_fallback, sentence_piece: false, strip })
    }

    /// The text of a token, or the name of a byte.
    fn piece(&self, token: String) -> Result<String> {
        let mut pieces = vec![token];
        for step in &self.each {
            pieces = catching(|| step.decode_chain(pieces)).map_err(decoder_failed)?;
        }
        let piece = pieces.concat();
        Ok(if self.sentence_piece { piece.replace(SPACE, " ") } else { piece })
    }

    fn push(&self, state: &mut State, token: String, text: &mut String) -> Result<()> {
        let piece = self.piece(token)?;
        if self.byte_fallback
            && let Some(byte) = fallback_byte(&piece)
        {
            state.bytes.push(byte);
            if self.sentence_piece {
                let mut certain = String::new();
                push_complete(&mut state.bytes, &mut certain);
                self.strip(state, &certain, text);
            }
            return Ok(());
        }
        let mut certain = String::new();
        self.flush_run(&mut state.bytes, &mut certain);
        certain.push_str(&piece);
        self.strip(state, &certain, text);
        Ok(())
    }

    /// Ends a run of byte tokens. In the `tokenizers` library a run that is not UTF-8 gives one U+FFFD per
    /// byte, so a run cannot be passed on before its end.
    fn flush_run(&self, run: &mut Vec<u8>, text: &mut String) {
        match std::str::from_utf8(run) {
            Ok(valid) => text.push_str(valid),
            Err(_) if self.sentence_piece => text.push_str(&String::from_utf8_lossy(run)),
            Err(_) => text.extend(run.iter().map(|_| char::REPLACEMENT_CHARACTER)),
        }
        run.clear();
    }

    /// Appends `piece` to `text`, without the characters that Strip removes.
    fn strip(&self, state: &mut State, piece: &str, text: &mut String) {
        let Some(strip) = &self.strip else {
            text.push_str(piece);
            return;
        };
        for character in piece.chars() {
            if state.strip_start > 0 {
                if character == strip.content {
                    state.strip_start -= 1;
                    continue;
                }
                state.strip_start = 0;
            }
            if character != strip.content {
                text.extend(std::iter::repeat_n(strip.content, std::mem::take(&mut state.held)));
                text.push(character);
            } else if state.held < strip.stop {
                state.held += 1;
            } else {
                // More characters than Strip can remove, so one of them is certain.
                text.push(character);
            }
        }
    }
}

fn decoder_failed(reason: String) -> Error {
    Error::Text { reason: format!("the tokenizer's decoder failed: {reason}") }
}

fn flatten<'a>(decoder: &'a DecoderWrapper, steps: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => {
            for step in sequence.get_decoders() {
                flatten(step, steps);
            }
        }
        step => steps.push(step),
    }
}

/// The byte of a token like `<0x0A>`, parsed as in `tokenizers`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Moves everything but an incomplete character at the end from `bytes` to `text`. Invalid UTF-8 becomes
/// U+FFFD exactly as in [`String::from_utf8_lossy`].
fn push_complete(bytes: &mut Vec<u8>, text: &mut String) {
    let mut rest = bytes.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                match error.error_len() {
                    Some(length) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        rest = after.split_at(length).1;
                    }
                    None => {
                        let incomplete = after.len();
                        bytes.drain(..bytes.len() - incomplete);
                        return;
                    }
                }
            }
        }
    }
}
