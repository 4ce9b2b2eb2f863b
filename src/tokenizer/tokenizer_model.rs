//! Reads SentencePiece's own file, tokenizer.model: a protocol buffer, parsed by hand and with bounds.
//!
//! Source: SentencePiece, `sentencepiece_model.proto`, for the fields' numbers and defaults.

use super::MAX_VOCAB_SIZE;
use super::sentence_piece::{Kind, Piece};

/// The content of a tokenizer.model.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) pieces: Vec<Piece>,
    pub(super) add_dummy_prefix: bool,
    pub(super) remove_extra_whitespaces: bool,
    pub(super) bos_id: Option<u32>,
    pub(super) eos_id: Option<u32>,
    trainer: Trainer,
}

/// The trainer's settings that change how text is cut.
#[derive(Debug)]
struct Trainer {
    model_type: u64,
    treat_whitespace_as_suffix: bool,
}

/// The reason to refuse a file.
#[derive(Debug)]
pub(super) enum Refusal {
    Malformed(String),
    /// Key and value.
    Unsupported(&'static str, String),
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        Refusal::Malformed(reason)
    }
}

type Result<T, E = String> = std::result::Result<T, E>;

impl Model {
    /// Reads the content of a file.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, Refusal> {
        let mut model = Model {
            pieces: Vec::new(),
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            bos_id: Some(1),
            eos_id: Some(2),
            trainer: Trainer { model_type: 1, treat_whitespace_as_suffix: false },
        };
        for field in Fields(bytes) {
            match field? {
                (1, Field::Bytes(piece)) => {
                    if model.pieces.len() == MAX_VOCAB_SIZE {
                        return Err(format!("has more than {MAX_VOCAB_SIZE} pieces").into());
                    }
                    model.pieces.push(read_piece(piece)?);
                }
                (2, Field::Bytes(trainer)) => model.read_trainer(trainer)?,
                (3, Field::Bytes(normalizer)) => model.read_normalizer(normalizer)?,
                (5, Field::Bytes(denormalizer)) => refuse_charsmap("denormalizer_spec", denormalizer)?,
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err("has no pieces".to_owned().into());
        }
        let other = match model.trainer.model_type {
            2 => None,
            1 => Some("unigram"),
            3 => Some("word"),
            4 => Some("char"),
            _ => Some("of an unknown type"),
        };
        if let Some(other) = other {
            return Err(Refusal::Unsupported(
                "trainer_spec.model_type",
                format!("{other}; BPE is supported"),
            ));
        }
        // Both types change how text is cut. Llama's own vocabularies do not use them.
        let odd = [(Kind::UserDefined, "user-defined"), (Kind::Unused, "unused")];
        for (kind, name) in odd {
            if let Some(piece) = model.pieces.iter().find(|piece| piece.kind == kind) {
                return Err(Refusal::Unsupported("pieces.type", format!("{name}, of {:?}", piece.text)));
            }
        }
        if model.trainer.treat_whitespace_as_suffix {
            return Err(Refusal::Unsupported("trainer_spec.treat_whitespace_as_suffix", "true".into()));
        }
        Ok(model)
    }

    fn read_trainer(&mut self, bytes: &[u8]) -> Result<()> {
        for field in Fields(bytes) {
            match field? {
                (3, Field::Varint(number)) => self.trainer.model_type = number,
                (24, Field::Varint(flag)) => self.trainer.treat_whitespace_as_suffix = flag != 0,
                // Negative numbers, which are huge as unsigned ones, mean none.
                (41, Field::Varint(id)) => self.bos_id = u32::try_from(id).ok(),
                (42, Field::Varint(id)) => self.eos_id = u32::try_from(id).ok(),
                _ => {}
            }
        }
        Ok(())
    }

    fn read_normalizer(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        refuse_charsmap("normalizer_spec", bytes)?;
        for field in Fields(bytes) {
            match field? {
                (3, Field::Varint(flag)) => self.add_dummy_prefix = flag != 0,
                (4, Field::Varint(flag)) => self.remove_extra_whitespaces = flag != 0,
                (5, Field::Varint(0)) => {
                    return Err(Refusal::Unsupported("normalizer_spec.escape_whitespaces", "false".into()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Refuses a normalizer that replaces characters. Llama's normalizers replace none.
fn refuse_charsmap(spec: &str, bytes: &[u8]) -> Result<(), Refusal> {
    let mut name = String::new();
    let mut has_charsmap = false;
    for field in Fields(bytes) {
        match field? {
            (1, Field::Bytes(bytes)) => name = String::from_utf8_lossy(bytes).into_owned(),
            (2, Field::Bytes(charsmap)) => has_charsmap = !charsmap.is_empty(),
            _ => {}
        }
    }
    if has_charsmap {
        return Err(Refusal::Unsupported("precompiled_charsmap", format!("{name:?} of {spec}")));
    }
    Ok(())
}

fn read_piece(bytes: &[u8]) -> Result<Piece> {
    let (mut text, mut score, mut kind) = (String::new(), 0.0, Kind::Normal);
    for field in Fields(bytes) {
        match field? {
            (1, Field::Bytes(bytes)) => {
                let valid = std::str::from_utf8(bytes).map_err(|_| "a piece is not UTF-8".to_owned())?;
                text = valid.to_owned();
            }
            (2, Field::Fixed32(bits)) => score = f32::from_bits(bits),
            (3, Field::Varint(number)) => {
                kind = i64::try_from(number)
                    .ok()
                    .and_then(Kind::from_number)
                    .ok_or_else(|| format!("a piece has type {number}"))?;
            }
            _ => {}
        }
    }
    Ok(Piece::new(text, score, kind))
}

/// A field's value, by its wire type.
#[derive(Debug, PartialEq)]
enum Field<'a> {
    Varint(u64),
    Fixed64,
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// Iterates over the fields of a message: their numbers and values.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Result<u64> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or("ends in the middle of a number")?;
            self.0 = rest;
            number |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err("has a number of more than 64 bits".into())
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8]> {
        let split = usize::try_from(length).ok().and_then(|length| self.0.split_at_checked(length));
        let (taken, rest) =
            split.ok_or_else(|| format!("has a field of {length} bytes where {} are left", self.0.len()))?;
        self.0 = rest;
        Ok(taken)
    }

    fn field(&mut self) -> Result<(u64, Field<'a>)> {
        let tag = self.varint()?;
        let field = match tag & 7 {
            0 => Field::Varint(self.varint()?),
            1 => self.take(8).map(|_| Field::Fixed64)?,
            2 => {
                let length = self.varint()?;
                Field::Bytes(self.take(length)?)
            }
            5 => {
                let bytes = self.take(4)?.try_into().map_err(|_| "has a short number".to_owned())?;
                Field::Fixed32(u32::from_le_bytes(bytes))
            }
            other => return Err(format!("has a field of wire type {other}")),
        };
        Ok((tag >> 3, field))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Field<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}
