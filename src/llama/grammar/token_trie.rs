//! The bytes of the tokenizer's tokens, as llguidance wants them.

use crate::tokenizer::Tokenizer;
use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use std::sync::Arc;

/// A longer token is never allowed: llguidance's trie is at most 1024 deep.
const MAX_TOKEN_BYTES: usize = 1000;
/// The most bytes of all tokens: llguidance's trie has at most 2^22 nodes.
const MAX_TRIE_BYTES: usize = 1 << 22;

struct Tokens(TokTrie);

impl TokenizerEnv for Tokens {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, text: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(text)
    }

    /// The model chooses how a text that the grammar forces is tokenised.
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// All tokens that a text can have. Special tokens and those that end a text are not among them. The end of a
/// text is a token of its own, which no tokenizer has: the id after the last one.
pub(super) fn build(tokenizer: &Tokenizer, eos_token_ids: &[u32]) -> std::result::Result<TokEnv, String> {
    let end = u32::try_from(tokenizer.vocab_size()).map_err(|error| error.to_string())?;
    let mut words = Vec::with_capacity(tokenizer.vocab_size() + 1);
    for id in 0..end {
        let bytes = tokenizer.token_bytes(id).map_err(|error| error.to_string())?;
        let bytes = bytes.ok_or("its decoder does not give each token bytes of its own")?;
        // No text has a byte of 0xFF, with which llguidance marks special tokens.
        let is_text = bytes.len() <= MAX_TOKEN_BYTES && !bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER);
        words.push(if is_text && !eos_token_ids.contains(&id) { bytes } else { Vec::new() });
    }
    let bytes: usize = words.iter().map(Vec::len).sum();
    if bytes > MAX_TRIE_BYTES {
        return Err(format!("its tokens have {bytes} bytes, the limit is {MAX_TRIE_BYTES}"));
    }
    words.push(Vec::new());
    Ok(Arc::new(Tokens(TokTrie::from(&TokRxInfo::new(end + 1, end), &words))))
}
