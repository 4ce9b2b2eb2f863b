//! Reads Llama 3's tokenizer.model, the file of the original release. Each of its 128,000 lines has a token's
//! bytes in base64 and its rank. The 256 special tokens that follow are not in the file.
//!
//! Source: Llama 3's own tokenizer; transformers' converter for turning ranks into merges, so that the ids
//! are those of Llama 3's tokenizer.json.

use std::collections::HashMap;

use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::pre_tokenizers::{self, LLAMA_3};
use super::{byte_level, catching};

pub(super) const BOS: &str = "<|begin_of_text|>";
pub(super) const EOS: &str = "<|end_of_text|>";
/// Further tokens that end a turn.
pub(super) const END_OF_TURN: [&str; 2] = ["<|eom_id|>", "<|eot_id|>"];

/// The number of tokens in Llama 3's file. Llama 4's file has the same format but more tokens, and its text
/// is cut differently.
const RANKS: usize = 128_000;
const SPECIAL_TOKENS: usize = 256;
/// The largest file. Llama 3's has 2.2 MB.
const MAX_BYTES: usize = 4 << 20;
/// The longest token. Finding a token's merges takes time quadratic in its length. The longest in use has 128
/// bytes.
const MAX_TOKEN_BYTES: usize = 512;

/// Makes a tokenizer from the file's content, without a post-processor.
pub(super) fn read(bytes: &[u8]) -> std::result::Result<tokenizers::Tokenizer, String> {
    let ranks = ranks(bytes)?;
    let mut vocab = Vocab::default();
    for (token, rank) in &ranks {
        vocab.insert(byte_level::spell(token), *rank);
    }
    let Some(pre) = pre_tokenizers::by_name(LLAMA_3)? else {
        return Err(format!("there is no pre-tokenizer {LLAMA_3}"));
    };
    catching(|| {
        let bpe = BPE::builder()
            .vocab_and_merges(vocab, merges(&ranks))
            .ignore_merges(pre.ignore_merges)
            .build()?;
        let mut tokenizer = tokenizers::Tokenizer::new(bpe);
        tokenizer.with_pre_tokenizer(Some(pre.pre_tokenizer));
        tokenizer.with_decoder(Some(ByteLevel::new(true, true, true)));
        tokenizer.add_tokens(special_tokens().map(|token| AddedToken::from(token, true)))?;
        Ok(tokenizer)
    })
}

/// The rank of each token. Every number below [`RANKS`] is the rank of exactly one token.
fn ranks(bytes: &[u8]) -> std::result::Result<HashMap<Vec<u8>, u32>, String> {
    if bytes.len() > MAX_BYTES {
        return Err(format!("is longer than {MAX_BYTES} bytes"));
    }
    let mut ranks = HashMap::new();
    let mut seen = vec![false; RANKS];
    let lines = bytes.split(|&byte| byte == b'\n').zip(1..).filter(|(line, _)| !line.is_empty());
    for (line, number) in lines {
        let mut fields = line.splitn(2, |&byte| byte == b' ');
        let token = fields.next().and_then(decode_base64);
        let rank: Option<usize> = fields.next().and_then(|rank| std::str::from_utf8(rank).ok()?.parse().ok());
        let (Some(token), Some(rank)) = (token, rank) else {
            return Err(format!("line {number} is not a token in base64 and its rank"));
        };
        if token.is_empty() || token.len() > MAX_TOKEN_BYTES {
            let bytes = token.len();
            return Err(format!(
                "line {number} has a token of {bytes} bytes, expected 1 to {MAX_TOKEN_BYTES}"
            ));
        }
        match seen.get_mut(rank) {
            Some(seen) if !*seen => *seen = true,
            Some(_) => return Err(format!("line {number} has rank {rank} again")),
            None => {
                return Err(format!(
                    "line {number} has rank {rank}; the {RANKS} tokens of Llama 3 are supported"
                ));
            }
        }
        if ranks.insert(token, rank as u32).is_some() {
            return Err(format!("line {number} has a token again"));
        }
    }
    if ranks.len() < RANKS {
        return Err(format!("has {} tokens; the {RANKS} of Llama 3 are supported", ranks.len()));
    }
    Ok(ranks)
}

/// Every way to make a token from two others, in the order in which merges are tried.
fn merges(ranks: &HashMap<Vec<u8>, u32>) -> Vec<(String, String)> {
    let mut merges = Vec::new();
    for (token, &rank) in ranks {
        for at in 1..token.len() {
            let (left, right) = token.split_at(at);
            if let (Some(&first), Some(&second)) = (ranks.get(left), ranks.get(right)) {
                merges.push(((rank, first, second), left, right));
            }
        }
    }
    merges.sort_unstable_by_key(|&(order, _, _)| order);
    merges.into_iter().map(|(_, left, right)| (byte_level::spell(left), byte_level::spell(right))).collect()
}

/// The special tokens, by Llama 3.1's names. Those that Llama 3 had are the same.
fn special_tokens() -> impl Iterator<Item = String> {
    let named = [
        (0, BOS),
        (1, EOS),
        (4, "<|finetune_right_pad_id|>"),
        (6, "<|start_header_id|>"),
        (7, "<|end_header_id|>"),
        (8, "<|eom_id|>"),
        (9, "<|eot_id|>"),
        (10, "<|python_tag|>"),
    ];
    let mut reserved = 0..;
    (0..SPECIAL_TOKENS).map(move |at| match named.iter().find(|(place, _)| *place == at) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("<|reserved_special_token_{}|>", reserved.next().unwrap_or(at)),
    })
}

/// Decodes base64, padded or not; None if the text is not base64.
fn decode_base64(text: &[u8]) -> Option<Vec<u8>> {
    let text = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    let mut bytes = Vec::with_capacity(text.len());
    for group in text.chunks(4) {
        let mut bits = 0u32;
        for &digit in group {
            let value = match digit {
                b'A'..=b'Z' => digit - b'A',
                b'a'..=b'z' => digit - b'a' + 26,
                b'0'..=b'9' => digit - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        // The last group gives only as many bytes as it has whole.
        match *group {
            [_, _, _, _] => bytes.extend_from_slice(bits.to_be_bytes().get(1..)?),
            [_, _, _] => bytes.extend_from_slice((bits >> 2).to_be_bytes().get(2..)?),
            [_, _] => bytes.push((bits >> 4) as u8),
            _ => return None,
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_decoded() {
        for (text, bytes) in [
            ("", &b""[..]),
            ("IQ==", b"!"),
            ("IQ", b"!"),
            ("aGk=", b"hi"),
            ("aGV5", b"hey"),
            ("/+8A", b"\xFF\xEF\0"),
        ] {
            assert_eq!(decode_base64(text.as_bytes()).as_deref(), Some(bytes), "{text}");
        }
        for text in ["A", "AAAAA", "a b=", "é", "IQ=x"] {
            assert_eq!(decode_base64(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn the_special_tokens_are_llama_3s() {
        let tokens: Vec<String> = special_tokens().collect();
        assert_eq!(tokens.len(), SPECIAL_TOKENS);
        assert_eq!(tokens[2], "<|reserved_special_token_0|>");
        assert_eq!(tokens[5], "<|reserved_special_token_2|>");
        assert_eq!(tokens[9], "<|eot_id|>");
        assert_eq!(tokens[255], "<|reserved_special_token_247|>");
    }

    #[test]
    fn files_other_than_llama_3s_are_refused() {
        for (text, reason) in [
            ("IQ== 0\nIg== 1\n", "has 2 tokens"),
            ("IQ== 128000\n", "rank 128000"),
            ("IQ== 0\nIg== 0\n", "rank 0 again"),
            ("IQ== 0\nIQ== 1\n", "a token again"),
            ("IQ== -1\n", "line 1"),
            ("IQ==0\n", "line 1"),
            (" 0\n", "a token of 0 bytes"),
        ] {
            let error = read(text.as_bytes()).unwrap_err();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
    }
}
