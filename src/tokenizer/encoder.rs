//! The two encoders: the `tokenizers` library, and our own for SentencePiece vocabularies.

use std::sync::OnceLock;

use super::catching;
use super::decode_stream::Decoder;
use super::sentence_piece::SentencePiece;

/// An encoder with its vocabulary.
pub(super) enum Encoder {
    Library(Box<Library>),
    SentencePiece(Box<SentencePiece>),
}

/// A tokenizer of the `tokenizers` library.
pub(super) struct Library {
    tokenizer: tokenizers::Tokenizer,
    /// The same tokenizer, but it encodes special tokens in the text as plain text. It is made on first use,
    /// because it holds a second copy of the vocabulary.
    splitting: OnceLock<tokenizers::Tokenizer>,
}

impl From<tokenizers::Tokenizer> for Encoder {
    fn from(tokenizer: tokenizers::Tokenizer) -> Self {
        Encoder::Library(Box::new(Library { tokenizer, splitting: OnceLock::new() }))
    }
}

impl From<SentencePiece> for Encoder {
    fn from(vocabulary: SentencePiece) -> Self {
        Encoder::SentencePiece(Box::new(vocabulary))
    }
}

impl Library {
    pub(super) fn tokenizer(&self) -> &tokenizers::Tokenizer {
        &self.tokenizer
    }

    fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        split_special_tokens: bool,
    ) -> std::result::Result<Vec<u32>, String> {
        let tokenizer = if split_special_tokens {
            self.splitting.get_or_init(|| {
                let mut tokenizer = self.tokenizer.clone();
                tokenizer.set_encode_special_tokens(true);
                tokenizer
            })
        } else {
            &self.tokenizer
        };
        catching(|| tokenizer.encode_fast(text, add_special_tokens))
            .map(|encoding| encoding.get_ids().to_vec())
    }
}

impl Encoder {
    pub(super) fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        split_special_tokens: bool,
    ) -> std::result::Result<Vec<u32>, String> {
        match self {
            Encoder::Library(library) => library.encode(text, add_special_tokens, split_special_tokens),
            Encoder::SentencePiece(pieces) => pieces.encode(text, add_special_tokens, split_special_tokens),
        }
    }

    pub(super) fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Encoder::Library(library) => library.tokenizer.token_to_id(token),
            Encoder::SentencePiece(pieces) => pieces.token_to_id(token),
        }
    }

    pub(super) fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Encoder::Library(library) => library.tokenizer.id_to_token(id),
            Encoder::SentencePiece(pieces) => pieces.id_to_token(id),
        }
    }

    /// Whether decoding may skip the token `id`, whose text is `token`.
    pub(super) fn is_special(&self, id: u32, token: &str) -> bool {
        match self {
            Encoder::Library(library) => library.tokenizer.get_added_vocabulary().is_special_token(token),
            Encoder::SentencePiece(pieces) => pieces.is_special(id),
        }
    }

    /// One more than the largest id.
    pub(super) fn vocab_size(&self) -> usize {
        match self {
            Encoder::Library(library) => {
                let largest = library.tokenizer.get_vocab(true).into_values().max();
                largest.map_or(0, |id| id as usize + 1)
            }
            Encoder::SentencePiece(pieces) => pieces.vocab_size(),
        }
    }

    pub(super) fn decoder(&self) -> Decoder {
        match self {
            Encoder::Library(library) => Decoder::new(library.tokenizer.get_decoder()),
            Encoder::SentencePiece(pieces) => Decoder::sentence_piece(pieces.adds_space_prefix()),
        }
    }

    #[cfg(test)]
    pub(super) fn library(&self) -> Option<&tokenizers::Tokenizer> {
        match self {
            Encoder::Library(library) => Some(&library.tokenizer),
            Encoder::SentencePiece(_) => None,
        }
    }
}
