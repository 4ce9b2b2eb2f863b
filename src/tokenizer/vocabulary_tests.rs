//! Tests vocabularies of GGUF files, valid and broken, and the merging of SentencePiece's.

use proptest::prelude::*;

use super::sentence_piece::{Kind, Piece, SentencePiece, Settings};
use super::tests::check_stream;
use super::*;

/// A GGUF file without tensors.
#[derive(Clone, Default)]
pub(super) struct Gguf {
    count: u64,
    bytes: Vec<u8>,
}

impl Gguf {
    fn string_bytes(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn value(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.count += 1;
        self.bytes.extend(Self::string_bytes(key));
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend(value);
        self
    }

    pub(super) fn string(self, key: &str, text: &str) -> Self {
        self.value(key, 8, &Self::string_bytes(text))
    }

    fn u32(self, key: &str, number: u32) -> Self {
        self.value(key, 4, &number.to_le_bytes())
    }

    fn bool(self, key: &str, flag: bool) -> Self {
        self.value(key, 7, &[u8::from(flag)])
    }

    fn array(self, key: &str, kind: u32, items: &[Vec<u8>]) -> Self {
        let head = [&kind.to_le_bytes()[..], &(items.len() as u64).to_le_bytes()].concat();
        self.value(key, 9, &[head, items.concat()].concat())
    }

    fn strings<S: AsRef<str>>(self, key: &str, items: &[S]) -> Self {
        let items: Vec<Vec<u8>> = items.iter().map(|item| Self::string_bytes(item.as_ref())).collect();
        self.array(key, 8, &items)
    }

    fn file(&self) -> Vec<u8> {
        let head = [b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0", &self.count.to_le_bytes()[..]].concat();
        [head, self.bytes.clone()].concat()
    }

    pub(super) fn open(&self) -> Result<Tokenizer> {
        open(&self.file())
    }
}

fn open(bytes: &[u8]) -> Result<Tokenizer> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    Tokenizer::open(file.path())
}

const TEXTS: [&str; 12] = ["▁", "a", "b", "é", "ab", "▁a", "▁ab", "aba", "▁▁", "日", "ba", "▁b"];

/// Llama 2's layout: unknown, BOS, EOS, bytes, then pieces by falling score.
pub(super) fn pieces() -> Vec<Piece> {
    let specials = [("<unk>", Kind::Unknown), ("<s>", Kind::Control), ("</s>", Kind::Control)];
    let specials = specials.map(|(text, kind)| Piece::new(text.into(), 0.0, kind));
    let bytes = (0..=255).map(|byte: u8| Piece::new(format!("<0x{byte:02X}>"), 0.0, Kind::Byte));
    let texts = (0i16..).zip(TEXTS);
    let texts = texts.map(|(rank, text)| Piece::new(text.into(), f32::from(-rank), Kind::Normal));
    let added = [Piece::new("<tool>".into(), 0.0, Kind::UserDefined)];
    specials.into_iter().chain(bytes).chain(texts).chain(added).collect()
}

pub(super) fn sentence_piece_gguf(pieces: &[Piece]) -> Gguf {
    let scores: Vec<Vec<u8>> = pieces.iter().map(|piece| piece.score.to_le_bytes().to_vec()).collect();
    let types: Vec<Vec<u8>> =
        pieces.iter().map(|piece| (piece.kind as i32 + 1).to_le_bytes().to_vec()).collect();
    let texts: Vec<&str> = pieces.iter().map(|piece| piece.text.as_str()).collect();
    Gguf::default()
        .string("tokenizer.ggml.model", "llama")
        .strings("tokenizer.ggml.tokens", &texts)
        .array("tokenizer.ggml.scores", 6, &scores)
        .array("tokenizer.ggml.token_type", 5, &types)
}

fn byte_level_gguf(pre: Option<&str>) -> Gguf {
    let mut tokens: Vec<String> = (0..=255).map(|byte| byte_level::spell(&[byte])).collect();
    tokens.extend(["he", "ll", "hell", "<|s|>"].map(str::to_owned));
    let types: Vec<Vec<u8>> =
        tokens.iter().map(|token| if token == "<|s|>" { 3i32 } else { 1 }.to_le_bytes().to_vec()).collect();
    let file = Gguf::default()
        .string("tokenizer.ggml.model", "gpt2")
        .strings("tokenizer.ggml.tokens", &tokens)
        .array("tokenizer.ggml.token_type", 5, &types)
        .strings("tokenizer.ggml.merges", &["h e", "l l", "he ll"])
        .u32("tokenizer.ggml.bos_token_id", 259);
    match pre {
        Some(pre) => file.string("tokenizer.ggml.pre", pre),
        None => file,
    }
}

pub(super) fn tokens(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let ids = tokenizer.encode(text, true, false).unwrap();
    ids.into_iter().map(|id| tokenizer.id_to_token(id).unwrap()).collect()
}

#[test]
fn harmless_faults_are_warnings() {
    let file = sentence_piece_gguf(&pieces()).u32("tokenizer.ggml.bos_token_id", 272);
    let tokenizer = file.open().unwrap();
    let warning = "tokenizer.ggml.bos_token_id is 272 and is ignored: the vocabulary has 272 tokens";
    assert_eq!(tokenizer.warnings(), [warning]);
    assert_eq!(tokenizer.bos_token_id(), Some(1));

    let types: Vec<Vec<u8>> = vec![1i32.to_le_bytes().to_vec(); 2];
    let file = Gguf::default()
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "gpt-2")
        .strings("tokenizer.ggml.tokens", &["a", "b"])
        .array("tokenizer.ggml.token_type", 5, &types)
        .u32("tokenizer.ggml.eom_token_id", 2)
        .u32("tokenizer.ggml.eot_token_id", u32::MAX)
        .strings("tokenizer.ggml.merges", &["a b", "ab"]);
    let warnings = file.open().unwrap().warnings().to_vec();
    assert_eq!(warnings.len(), 2);
    assert!(warnings[0].contains("eom_token_id is 2 and is ignored"), "{warnings:?}");
    assert!(warnings[1].contains("2 of tokenizer.ggml.merges are ignored"), "{warnings:?}");
}

#[test]
fn pieces_are_merged_by_score_and_then_from_the_left() {
    let tokenizer = sentence_piece_gguf(&pieces()).open().unwrap();
    assert_eq!(tokenizer.kind(), "gguf llama");
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id()), (Some(1), Some(2)));
    // "ab" has a better score than "▁a", so "▁ab" is made of "▁" and "ab".
    assert_eq!(tokens(&tokenizer, "abab"), ["<s>", "▁ab", "ab"]);
    assert_eq!(tokens(&tokenizer, "b aba"), ["<s>", "▁b", "▁ab", "a"]);
    assert_eq!(tokens(&tokenizer, "bba"), ["<s>", "▁b", "ba"]);
    assert_eq!(tokens(&tokenizer, "é😀"), ["<s>", "▁", "é", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]);
    assert_eq!(tokens(&tokenizer, ""), ["<s>"]);
    // Text after a special token gets a space of its own, and only special tokens can be split.
    assert_eq!(tokens(&tokenizer, "a</s>a<tool>a"), ["<s>", "▁a", "</s>", "▁a", "<tool>", "▁a"]);
    let split = tokenizer.encode("</s><tool>", false, true).unwrap();
    assert!(!split.contains(&2));
    assert_eq!(tokenizer.id_to_token(*split.last().unwrap()).unwrap(), "<tool>");
}

#[test]
fn settings_of_the_file_are_kept() {
    let file = sentence_piece_gguf(&pieces())
        .bool("tokenizer.ggml.add_space_prefix", false)
        .bool("tokenizer.ggml.add_bos_token", false)
        .bool("tokenizer.ggml.add_eos_token", true);
    let tokenizer = file.open().unwrap();
    assert_eq!(tokens(&tokenizer, "a"), ["a", "</s>"]);
    assert_eq!(tokenizer.decode(&tokenizer.encode(" a", false, false).unwrap(), true).unwrap(), " a");
    let file = sentence_piece_gguf(&pieces()).bool("tokenizer.ggml.remove_extra_whitespaces", true);
    assert_eq!(tokens(&file.open().unwrap(), "  a   b "), ["<s>", "▁a", "▁b"]);
}

#[test]
fn characters_among_broken_bytes_are_kept() {
    let tokenizer = Arc::new(sentence_piece_gguf(&pieces()).open().unwrap());
    let byte = |byte: u8| tokenizer.token_to_id(&format!("<0x{byte:02X}>")).unwrap();
    let ids: Vec<u32> = [0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xC3, 0xA9, 0xE2, 0x82].map(byte).into();
    assert_eq!(check_stream(&tokenizer, &ids, true), "😀\u{FFFD}é\u{FFFD}");
    let mut stream = tokenizer.decode_stream(true);
    let pushed: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pushed, ["", "", "", "😀", "", "\u{FFFD}", "é", "", ""]);
}

#[test]
fn end_of_generation_tokens_are_special_whatever_their_type() {
    for text in ["<|im_end|>", "<|end_of_text|>", "<end_of_turn>", "<EOT>", "<｜end▁of▁sentence｜>"] {
        for kind in [Kind::Normal, Kind::UserDefined, Kind::Unused, Kind::Control] {
            let mut pieces = pieces();
            pieces.push(Piece::new(text.into(), 0.0, kind));
            let id = pieces.len() as u32 - 1;
            let tokenizer = sentence_piece_gguf(&pieces).open().unwrap();
            assert_eq!(tokenizer.extra_eos_token_ids(), [id], "{text}");
            assert_eq!(tokenizer.decode(&[id], true).unwrap(), "");
            assert_eq!(tokenizer.encode(text, false, false).unwrap(), [id]);
        }
    }
}

#[test]
fn pre_tokenizers_are_taken_by_name_or_refused() {
    for name in pre_tokenizers::names() {
        let tokenizer = byte_level_gguf(Some(name)).open().unwrap();
        assert_eq!(tokenizer.warnings().len(), usize::from(name == pre_tokenizers::DEFAULT), "{name}");
        for text in ["hello 12345, we'LL 日本\r\n  x\t", "٣٤ \u{3000}é«»...", ""] {
            let ids = tokenizer.encode(text, false, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text, "{name}");
        }
    }
    let absent = byte_level_gguf(None).open().unwrap();
    assert_eq!((absent.kind(), absent.warnings().len()), ("gguf bpe default", 1));
    let error = byte_level_gguf(Some("gemma4")).open().unwrap_err().to_string();
    for said in ["tokenizer.ggml.pre", "gemma4", "tokenizer.json", "llama-bpe"] {
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn digits_are_cut_as_the_name_says() {
    let pieces = |name: &str, text: &str| {
        let pre = pre_tokenizers::by_name(name).unwrap().unwrap().pre_tokenizer;
        let mut cut = tokenizers::PreTokenizedString::from(text);
        tokenizers::PreTokenizer::pre_tokenize(&pre, &mut cut).unwrap();
        let splits = cut.get_splits(tokenizers::OffsetReferential::Original, tokenizers::OffsetType::None);
        splits.into_iter().map(|(piece, _, _)| piece.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(pieces("gpt-2", "a 1234"), ["a", "Ġ1234"]);
    assert_eq!(pieces("smollm", "a 1234"), ["a", "Ġ", "1", "2", "3", "4"]);
    assert_eq!(pieces("llama-bpe", "a 1234"), ["a", "Ġ", "123", "4"]);
    assert_eq!(pieces("tekken", "aB 1234"), ["a", "B", "Ġ", "1", "2", "3", "4"]);
    assert_eq!(pieces("deepseek-llm", "ab 1234\n"), ["ab", "Ġ", "1234", "Ċ"]);
    assert_eq!(pieces("default", "a+1234"), ["a", "+", "123", "4"]);
}

#[test]
fn texts_are_cut_as_the_name_says() {
    // The pieces are those of another engine of regular expressions, Python's `regex`.
    let text = "Hi wORLD's  12345 x=1;\n\n  日本ね 한국 e\u{301}a. 'LL !ab\t(c)   ";
    let expected = [
        (
            "minicpm5",
            "Hi¦ wORLD¦'s¦  ¦123¦45¦ x¦=¦1¦;\n\n¦ ¦ 日本ね¦ 한국¦ e¦\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "glm4",
            "Hi¦ wORLD¦'s¦ ¦ ¦123¦45¦ x¦=¦1¦;\n\n¦ ¦ 日本ね¦ 한국¦ e¦\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "chatglm-bpe",
            "Hi¦ wORLD¦'s¦ ¦ ¦123¦45¦ x¦=¦1¦;\n\n¦ ¦ 日本ね¦ 한국¦ e¦\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "gpt-4o",
            "Hi¦ w¦ORLD's¦ ¦ ¦123¦45¦ x¦=¦1¦;\n\n¦ ¦ 日本ね¦ 한국¦ e\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "granite-embed-multi-97m",
            "Hi¦ w¦ORLD's¦ ¦ ¦123¦45¦ x¦=¦1¦;\n\n¦ ¦ 日本ね¦ 한국¦ e\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "tiny_aya",
            "Hi¦ w¦ORLD's¦  ¦12¦345¦ x¦=¦1¦;\n\n¦ ¦ 日本ね¦ 한국¦ e\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "deepseek-v3",
            "Hi¦ wORLD¦'s¦  ¦123¦45¦ x¦=¦1¦;\n\n¦  ¦日本ね¦ 한국¦ e\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "spark2_5",
            "Hi¦ wORLD¦'s¦  ¦1¦2¦3¦4¦5¦ x¦=¦1¦;¦\n¦\n¦  ¦日本ね¦ 한국¦ e\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "afmoe",
            "Hi¦ wORLD¦'s¦  ¦12¦345¦ x¦=¦1¦;\n\n¦  ¦日本ね¦ ¦한국¦ e\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "youtu",
            "Hi¦ w¦ORLD's¦ ¦ ¦1¦2¦3¦4¦5¦ x¦=¦1¦;\n\n¦  ¦日本ね¦ ¦한국¦ e\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "falcon",
            "Hi¦ wORLD¦'¦s¦ ¦ ¦123¦45¦ x¦=¦1¦;¦\n\n ¦ 日本ね¦ 한국¦ e¦\u{301}¦a¦.¦ ¦'¦LL¦ ¦!¦ab¦\t¦(¦c¦)¦   ",
        ),
        (
            "jais-2",
            "Hi¦ wORLD¦'s¦ ¦ ¦123¦45¦ x¦=¦1¦;\n\n¦ ¦ 日本ね¦ 한국¦ e¦\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦  ¦ ",
        ),
        (
            "qwen35",
            "Hi¦ wORLD¦'s¦ ¦ ¦1¦2¦3¦4¦5¦ x¦=¦1¦;\n\n¦ ¦ 日本ね¦ 한국¦ e\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        ("bloom", "Hi¦ wORLD's¦ ¦ 12345¦ x=1;¦\n\n ¦ 日本ね¦ 한국¦ e\u{301}a¦.¦ 'LL¦ !¦ab¦\t(¦c¦)   "),
        (
            "exaone-moe",
            "Hi wORLD¦'s¦ ¦ ¦1¦2¦3¦4¦5¦ x¦=¦1¦;\n¦\n¦ ¦ 日本ね 한국 e\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "chameleon",
            "Hi¦ wORLD¦'¦s¦  ¦1¦2¦3¦4¦5¦ x¦=¦1¦;¦\n¦\n¦  ¦日本ね¦ 한국¦ e¦\u{301}¦a¦.¦ ¦'¦LL¦ ¦!¦ab¦\t¦(¦c¦)¦  ¦ ",
        ),
        ("superbpe", "Hi wORLD's  ¦12¦345¦ x=¦1¦;\n\n  日本ね 한국 e\u{301}a. 'LL !ab\t(c)   "),
        (
            "bailingmoe",
            "Hi¦ wORLD¦'s¦ ¦ ¦1¦2¦3¦4¦5¦ x¦=¦1¦;\n\n¦ ¦ 日本ね¦ 한국¦ e¦\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "ufakzeka",
            "Hi¦ wORLD¦'s¦ ¦ ¦1¦2¦3¦4¦5¦ x¦=¦1¦;\n\n¦ ¦ 日本ね¦ 한국¦ e¦\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "laguna",
            "Hi¦ wORLD¦'s¦ ¦ ¦1¦2¦3¦4¦5¦ x¦=¦1¦;¦\n\n¦ ¦ 日本ね¦ 한국¦ e¦\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
        (
            "kimi-k2",
            "Hi¦ w¦ORLD's¦ ¦ ¦123¦45¦ x¦=¦1¦;\n\n¦ ¦ ¦日本¦ね¦ 한국¦ e\u{301}a¦.¦ '¦LL¦ !¦ab¦\t¦(c¦)¦   ",
        ),
    ];
    for (name, pieces) in expected {
        let pre = pre_tokenizers::by_name(name).unwrap().unwrap().pre_tokenizer;
        let mut cut = tokenizers::PreTokenizedString::from(text);
        tokenizers::PreTokenizer::pre_tokenize(&pre, &mut cut).unwrap();
        let splits = cut.get_splits(tokenizers::OffsetReferential::Original, tokenizers::OffsetType::Byte);
        let found: Vec<&str> = splits.into_iter().map(|(_, (start, end), _)| &text[start..end]).collect();
        assert_eq!(found.join("¦"), pieces, "{name}");
    }
}

#[test]
fn old_llama_3_files_are_recognised() {
    let mut tokens: Vec<String> = (0..=255).map(|byte| byte_level::spell(&[byte])).collect();
    tokens.extend((256..128_000).map(|id| format!("<{id}>")));
    tokens.push("<|begin_of_text|>".into());
    let file = Gguf::default()
        .string("tokenizer.ggml.model", "gpt2")
        .strings("tokenizer.ggml.tokens", &tokens)
        .strings::<&str>("tokenizer.ggml.merges", &[])
        .u32("tokenizer.ggml.bos_token_id", 128_000);
    let tokenizer = file.open().unwrap();
    assert_eq!(tokenizer.kind(), "gguf bpe llama-bpe");
    assert!(tokenizer.warnings()[0].contains("Llama 3's"), "{:?}", tokenizer.warnings());
}

#[test]
fn broken_vocabularies_are_refused() {
    let scored = |score: f32| {
        let mut pieces = pieces();
        pieces[5].score = score;
        sentence_piece_gguf(&pieces)
    };
    let long = || {
        let mut pieces = pieces();
        pieces[260].text = "a".repeat(2000);
        sentence_piece_gguf(&pieces)
    };
    let only = |texts: &[&str]| {
        let pieces: Vec<Piece> =
            texts.iter().map(|text| Piece::new((*text).to_owned(), 0.0, Kind::Normal)).collect();
        sentence_piece_gguf(&pieces)
    };
    let crowded = || {
        let mut pieces = pieces();
        pieces.extend((0..=MAX_ADDED_TOKENS).map(|i| Piece::new(i.to_string(), 0.0, Kind::Control)));
        sentence_piece_gguf(&pieces)
    };
    for (file, reason) in [
        (crowded(), "the limit is 262144"),
        (scored(f32::NAN), "not a number"),
        (long(), "2000 bytes"),
        (only(&["a", "b"]), "neither an unknown token"),
        (only(&[]), "0 tokens"),
        (byte_level_gguf(None).bool("tokenizer.ggml.add_eos_token", true), "eos_token_id is missing"),
    ] {
        let error = file.open().unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
    let other = Gguf::default().string("tokenizer.ggml.model", "t5").open().unwrap_err();
    assert!(matches!(other, Error::Unsupported { .. }), "{other}");
    // Odd but harmless.
    let mut odd = pieces();
    odd[259] = odd[260].clone();
    odd.push(Piece::new(String::new(), f32::NEG_INFINITY, Kind::Control));
    let tokenizer = sentence_piece_gguf(&odd).open().unwrap();
    assert_eq!(tokenizer.warnings().len(), 1, "{:?}", tokenizer.warnings());
    assert_eq!(tokenizer.id_to_token(odd.len() as u32 - 1), None);
}

// --- Properties ---

/// The same algorithm, directly from its description: look at all pairs, merge the best.
fn slowly(pieces: &[Piece], text: &str) -> Vec<String> {
    let mut symbols: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let score = |pair: &[String]| {
            let joined = pair.concat();
            pieces
                .iter()
                .find(|piece| piece.text == joined && piece.kind == Kind::Normal)
                .map(|piece| piece.score)
        };
        let pairs = symbols.windows(2).enumerate().filter_map(|(at, pair)| Some((at, score(pair)?)));
        // If scores are equal, the first pair counts.
        let Some((at, _)) = pairs.reduce(|best, next| if next.1 > best.1 { next } else { best }) else {
            return symbols;
        };
        let right = symbols.remove(at + 1);
        symbols[at].push_str(&right);
    }
}

fn encode(pieces: &[Piece], text: &str) -> Vec<String> {
    let settings = Settings {
        add_space_prefix: false,
        prefix_after_special: true,
        remove_extra_whitespaces: false,
        first: None,
        last: None,
    };
    let (vocabulary, _) = SentencePiece::new(pieces.to_vec(), settings).unwrap();
    let ids = vocabulary.encode(text, true, false).unwrap();
    ids.into_iter().map(|id| vocabulary.id_to_token(id).unwrap()).collect()
}

proptest! {
    /// Small alphabets and few different scores, so that pairs overlap and scores are equal.
    #[test]
    fn merging_follows_its_description(
        words in prop::collection::btree_map("[ab]{2,5}", -3i8..=0, 0..30), text in "[ab]{0,40}",
    ) {
        let mut pieces = vec![Piece::new("<unk>".into(), 0.0, Kind::Unknown)];
        pieces.extend(["a", "b"].map(|letter| Piece::new(letter.into(), 0.0, Kind::Normal)));
        let piece = |(word, score): (&String, &i8)| {
            Piece::new(word.clone(), f32::from(*score), Kind::Normal)
        };
        pieces.extend(words.iter().map(piece));
        prop_assert_eq!(encode(&pieces, &text), slowly(&pieces, &text));
    }

    #[test]
    fn text_survives(text in "[ab é日😀<]{0,40}|.{0,40}") {
        // ▁ itself means a space.
        prop_assume!(!text.contains('▁'));
        let tokenizer = Arc::new(sentence_piece_gguf(&pieces()).open().unwrap());
        let ids = tokenizer.encode(&text, true, true).unwrap();
        prop_assert_eq!(check_stream(&tokenizer, &ids, true), text);
    }

    #[test]
    fn streams_equal_the_whole(
        ids in prop::collection::vec(prop_oneof![0u32..272, 257u32..272, Just(198), Just(172)], 0..60),
        skip in any::<bool>(), prefix in any::<bool>(),
    ) {
        let file = sentence_piece_gguf(&pieces()).bool("tokenizer.ggml.add_space_prefix", prefix);
        check_stream(&Arc::new(file.open().unwrap()), &ids, skip);
    }

    /// Changes bytes at random in vocabularies of both kinds. The result is an error or a tokenizer, never a
    /// panic.
    #[test]
    fn mutated_files_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        is_byte_level in any::<bool>(),
    ) {
        let file =
            if is_byte_level { byte_level_gguf(Some("llama-bpe")) } else { sentence_piece_gguf(&pieces()) };
        let mut bytes = file.file();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(tokenizer) = open(&bytes)
            && let Ok(ids) = tokenizer.encode("ab é </s> hello", true, false)
        {
            tokenizer.decode(&ids, false).unwrap();
        }
    }
}
