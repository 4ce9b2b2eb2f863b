//! The tokenizer as a whole: files in, ids and text out.

use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::*;

/// A byte-level BPE tokenizer.json with BOS, EOS and a few merges.
fn byte_level_json() -> Value {
    let mut vocab = Map::new();
    let mut alphabet: Vec<char> = byte_level::alphabet().collect();
    alphabet.sort_unstable();
    for character in alphabet {
        vocab.insert(character.to_string(), json!(vocab.len()));
    }
    let merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ã", "©"), ("ð", "Ł")];
    for (left, right) in merges {
        vocab.insert(format!("{left}{right}"), json!(vocab.len()));
    }
    json!({
        "version": "1.0", "padding": null, "normalizer": null,
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [
            {"id": vocab.len(), "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
             "normalized": false, "special": true},
            {"id": vocab.len() + 1, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
             "normalized": false, "special": true},
            {"id": vocab.len() + 2, "content": "<tool é>", "single_word": false, "lstrip": false,
             "rstrip": false, "normalized": false, "special": false},
        ],
        "pre_tokenizer":
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": false,
                  "vocab": vocab, "merges": merges.map(|(l, r)| format!("{l} {r}"))},
    })
}

/// A SentencePiece-like tokenizer.json, like Llama 2's.
fn sentencepiece_json() -> Value {
    let mut vocab = Map::new();
    for special in ["<unk>", "<s>", "</s>"] {
        vocab.insert(special.into(), json!(vocab.len()));
    }
    for byte in 0..=255u8 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(vocab.len()));
    }
    for piece in ["▁", "a", "b", "c", "▁▁", "▁a", "é", "ab", "▁ab", "日", " ", "  "] {
        vocab.insert(piece.into(), json!(vocab.len()));
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single":
                [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                  "vocab": vocab, "merges": ["▁ ▁", "▁ a", "a b", "▁ ab", "▁a b"]},
    })
}

fn folder(files: &[(&str, &Value)]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for (name, content) in files {
        let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

fn open(files: &[(&str, &Value)]) -> Result<Tokenizer> {
    Tokenizer::open(folder(files).path())
}

fn byte_level() -> Tokenizer {
    open(&[("tokenizer.json", &byte_level_json())]).unwrap()
}

fn with_decoder(decoder: Value) -> Tokenizer {
    let mut file = sentencepiece_json();
    file["decoder"] = decoder;
    open(&[("tokenizer.json", &file)]).unwrap()
}

#[test]
fn truncation_and_padding_in_the_file_are_ignored() {
    let ids = byte_level().encode("hello world, hello", true, false).unwrap();
    assert_eq!(byte_level().decode(&ids, true).unwrap(), "hello world, hello");
    assert!(ids.len() > 3);
}

#[test]
fn special_tokens_are_recognised_unless_split() {
    let tokenizer = byte_level();
    let eos = tokenizer.token_to_id("</s>").unwrap();
    assert_eq!(tokenizer.encode("hello</s>", true, false).unwrap(), [260 - 1, eos]);
    let split = tokenizer.encode("hello</s>", true, true).unwrap();
    assert!(!split.contains(&eos));
    assert_eq!(tokenizer.decode(&split, true).unwrap(), "hello</s>");
    assert_eq!(tokenizer.decode(&[eos, 259], true).unwrap(), "hello");
    assert_eq!(tokenizer.decode(&[eos, 259], false).unwrap(), "</s>hello");
}

#[test]
fn ids_outside_the_vocabulary_are_refused_by_decode_and_skipped_by_streams() {
    let tokenizer = Arc::new(byte_level());
    let beyond = tokenizer.vocab_size() as u32;
    let error = tokenizer.decode(&[beyond], true).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
    assert_eq!(tokenizer.decode_stream(true).push(beyond).unwrap(), "");
    assert_eq!(tokenizer.id_to_token(beyond), None);
}

#[test]
fn bos_follows_the_post_processor() {
    let tokenizer = open(&[("tokenizer.json", &sentencepiece_json())]).unwrap();
    assert_eq!(tokenizer.encode("ab", true, false).unwrap()[0], 1);
    assert_ne!(tokenizer.encode("ab", false, false).unwrap()[0], 1);
    assert_ne!(byte_level().encode("hello", true, false).unwrap()[0], 263);
}

#[test]
fn llama_tokenizer_class_rebuilds_the_post_processor() {
    let file = sentencepiece_json();
    let ids = |config: Value| {
        let tokenizer = open(&[("tokenizer.json", &file), ("tokenizer_config.json", &config)])?;
        tokenizer.encode("ab", true, false)
    };
    let plain = ids(json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})).unwrap();
    assert_eq!((plain[0], *plain.last().unwrap() == 2), (1, false), "the post-processor decides");
    let said = ids(json!({"eos_token": "</s>", "add_bos_token": false, "add_eos_token": true})).unwrap();
    assert_eq!((said[0] == 1, *said.last().unwrap()), (false, 2), "the config overrides it");
    let unnamed = ids(json!({"add_bos_token": true})).unwrap();
    assert_ne!(unnamed[0], 1, "there is no BOS to add");
    let off = ids(json!({"tokenizer_class": "LlamaTokenizer", "add_bos_token": false})).unwrap();
    assert_ne!(off[0], 1);
    let both = ids(json!({
        "tokenizer_class": "LlamaTokenizerFast", "add_eos_token": true,
        "bos_token": {"content": "<s>"}, "eos_token": "</s>",
    }))
    .unwrap();
    assert_eq!((both[0], *both.last().unwrap()), (1, 2));
    let null = ids(json!({"tokenizer_class": "LlamaTokenizer", "bos_token": null}));
    assert!(matches!(null, Err(Error::Malformed { .. })), "{null:?}");
}

#[test]
fn special_tokens_come_from_config_and_map() {
    let file = byte_level_json();
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "<s>"}});
    let map = json!({"eos_token": {"content": "</s>"}});
    let tokenizer = open(&[
        ("tokenizer.json", &file),
        ("tokenizer_config.json", &config),
        ("special_tokens_map.json", &map),
    ])
    .unwrap();
    let id = |token: &str| tokenizer.token_to_id(token);
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id()), (id("<s>"), id("</s>")));
    // With added_tokens_decoder the map is not read, and added_tokens_decoder's tokens are added.
    let config = json!({
        "eos_token": "<s>",
        "added_tokens_decoder": {"300": {"content": "<|new|>", "special": true}},
    });
    let tokenizer = open(&[
        ("tokenizer.json", &file),
        ("tokenizer_config.json", &config),
        ("special_tokens_map.json", &map),
    ])
    .unwrap();
    assert_eq!(tokenizer.eos_token_id(), tokenizer.token_to_id("<s>"));
    let new = tokenizer.token_to_id("<|new|>").unwrap();
    assert_eq!(tokenizer.encode("<|new|>", false, false).unwrap(), [new]);
    assert_eq!(tokenizer.decode(&[new], true).unwrap(), "");
}

#[test]
fn chat_templates_are_found_newest_first() {
    let file = byte_level_json();
    let legacy = json!({"chat_template": [
        {"name": "default", "template": "legacy"}, {"name": "tool_use", "template": "legacy tools"},
        {"name": "rag", "template": "legacy rag"}]});
    let jinja = json!("jinja");
    let choose = |tokenizer: &Tokenizer, given, has_tools| {
        let (name, text) = tokenizer.choose_chat_template(given, has_tools).unwrap();
        (name.map(str::to_owned), text.to_owned())
    };
    let named = |name: &str, text: &str| (Some(name.to_owned()), text.to_owned());
    let tokenizer = open(&[("tokenizer.json", &file), ("tokenizer_config.json", &legacy)]).unwrap();
    assert_eq!(tokenizer.chat_template(), Some("legacy"));
    assert_eq!(choose(&tokenizer, None, true), named("tool_use", "legacy tools"));
    assert_eq!(choose(&tokenizer, Some("rag"), true), named("rag", "legacy rag"));
    assert_eq!(choose(&tokenizer, Some("{{ x }}"), true), (None, "{{ x }}".to_owned()));
    let tokenizer = open(&[
        ("tokenizer.json", &file),
        ("tokenizer_config.json", &legacy),
        ("chat_template.json", &json!({"chat_template": "processor"})),
    ])
    .unwrap();
    assert_eq!(choose(&tokenizer, None, true), named("default", "processor"));
    let tokenizer = open(&[
        ("tokenizer.json", &file),
        ("tokenizer_config.json", &legacy),
        ("chat_template.jinja", &jinja),
        ("additional_chat_templates/tool_use.jinja", &json!("jinja tools")),
    ])
    .unwrap();
    assert_eq!(choose(&tokenizer, None, false), named("default", "jinja"));
    assert_eq!(choose(&tokenizer, None, true), named("tool_use", "jinja tools"));
    let tokenizer = byte_level();
    let error = tokenizer.choose_chat_template(None, false).unwrap_err();
    assert!(error.to_string().contains("pass chat_template="), "{error}");
}

#[test]
fn broken_files_give_typed_errors() {
    assert!(matches!(Tokenizer::open(&PathBuf::from("/nowhere")), Err(Error::NotFound { .. })));
    assert!(matches!(open(&[]), Err(Error::NotFound { what, .. }) if what == "tokenizer.json"));
    assert!(matches!(open(&[("tokenizer.model", &json!("x"))]), Err(Error::Malformed { .. })));
    let mut prefixed = byte_level_json();
    prefixed["model"]["continuing_subword_prefix"] = json!("é");
    assert!(matches!(open(&[("tokenizer.json", &prefixed)]), Err(Error::Malformed { .. })));
    let good = byte_level_json();
    let text = good.to_string();
    for cut in [0, 1, 200, text.len() / 2, text.len() - 1] {
        let cut = (cut..).find(|&at| text.is_char_boundary(at)).unwrap();
        let error = open(&[("tokenizer.json", &json!(text[..cut]))]);
        assert!(matches!(error, Err(Error::Malformed { .. })), "cut at {cut}: {error:?}");
    }
    // The library panics on a merge that makes a token longer than any other.
    let mut long = good.clone();
    long["model"]["merges"] = json!(["hello hello"]);
    for broken in [json!("[]"), json!({}), json!("\u{0}"), long] {
        let error = open(&[("tokenizer.json", &broken)]);
        assert!(matches!(error, Err(Error::Malformed { .. })), "{error:?}");
    }
    let mut huge = good.clone();
    huge["model"]["vocab"]["huge"] = json!(u32::MAX);
    assert!(matches!(open(&[("tokenizer.json", &huge)]), Err(Error::Malformed { .. })));
    for config in [
        json!("{"),
        json!([1]),
        json!({"bos_token": 1}),
        json!({"added_tokens_decoder": {"x": "y"}}),
        json!({"chat_template": 3}),
        json!({"tokenizer_class": "LlamaTokenizer", "add_bos_token": "yes"}),
    ] {
        let error = open(&[("tokenizer.json", &good), ("tokenizer_config.json", &config)]);
        assert!(matches!(error, Err(Error::Malformed { .. })), "{config}: {error:?}");
    }
}

/// Checks the guarantee of [`DecodeStream`] for one sequence and returns the text.
pub(super) fn check_stream(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip_special_tokens: bool) -> String {
    let whole = tokenizer.decode(ids, skip_special_tokens).unwrap();
    let mut stream = tokenizer.decode_stream(skip_special_tokens);
    let mut text = String::new();
    for &id in ids {
        text.push_str(&stream.push(id).unwrap());
        assert!(whole.starts_with(&text), "{text:?} is not the start of {whole:?}");
    }
    text.push_str(&stream.finish().unwrap());
    assert_eq!(text, whole);
    if let Some(library) = tokenizer.parts.encoder.library_tokenizer() {
        let decoded = library.decode(ids, skip_special_tokens).unwrap();
        assert_eq!(whole, decoded, "differs from the library's decode");
    }
    whole
}

#[test]
fn half_characters_are_held_back() {
    let tokenizer = Arc::new(byte_level());
    let byte = |byte: u8| {
        let character = byte_level::alphabet().find(|&c| byte_level::byte(c) == Some(byte)).unwrap();
        tokenizer.token_to_id(&character.to_string()).unwrap()
    };
    let mut stream = tokenizer.decode_stream(true);
    // U+1F600 in four tokens, then two bytes that never become a character.
    let pushed: Vec<String> =
        [0xF0, 0x9F, 0x98, 0x80, 0xE2, 0x82].iter().map(|&b| stream.push(byte(b)).unwrap()).collect();
    assert_eq!(pushed, ["", "", "", "😀", "", ""]);
    assert_eq!(stream.push(byte(b'a')).unwrap(), "\u{FFFD}a");
    stream.push(byte(0xC3)).unwrap();
    assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
    assert_eq!(stream.push(byte(b'b')).unwrap(), "b", "a finished stream starts anew");
}

#[test]
fn sentencepiece_streams_keep_their_spaces() {
    let tokenizer = Arc::new(open(&[("tokenizer.json", &sentencepiece_json())]).unwrap());
    let ids = tokenizer.encode("ab ab  a é日😀", true, false).unwrap();
    assert_eq!(check_stream(&tokenizer, &ids, true), "ab ab  a é日😀");
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let mut stream = tokenizer.decode_stream(true);
    assert_eq!(stream.push(id("▁a")).unwrap(), "a");
    assert_eq!(stream.push(id("▁a")).unwrap(), " a");
    assert_eq!(stream.push(id("<0xC3>")).unwrap(), "");
    assert_eq!(stream.push(id("<0xA9>")).unwrap(), "");
    assert_eq!(stream.push(id("▁")).unwrap(), "é ");
}

#[test]
fn other_decoders_give_their_text_too() {
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 1});
    for (decoder, streams) in [
        (json!(null), true),
        (json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}), true),
        (json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": true}), true),
        (json!({"type": "ByteFallback"}), true),
        (
            json!({"type": "Sequence", "decoders": [&replace, {"type": "ByteFallback"}, {"type": "Fuse"}]}),
            true,
        ),
        (json!({"type": "BPEDecoder", "suffix": "a"}), false),
        (json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, &replace]}), false),
    ] {
        let tokenizer = Arc::new(with_decoder(decoder.clone()));
        assert_eq!(tokenizer.warnings().is_empty(), streams, "{decoder}");
        let ids = tokenizer.encode("ab a  b é日 ", true, false).unwrap();
        for skip_special_tokens in [true, false] {
            check_stream(&tokenizer, &ids, skip_special_tokens);
            assert_eq!(check_stream(&tokenizer, &[], skip_special_tokens), "");
        }
    }
    // Strip at the end: characters that may be stripped are held until something follows.
    let tokenizer =
        Arc::new(with_decoder(json!({"type": "Sequence", "decoders": [replace, {"type": "Fuse"}, strip]})));
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let mut stream = tokenizer.decode_stream(true);
    let pushed: Vec<String> =
        ["▁a", "▁", "b", "▁▁"].iter().map(|token| stream.push(id(token)).unwrap()).collect();
    assert_eq!(pushed, ["a", "", " b", " "]);
    assert_eq!(stream.finish().unwrap(), "");
    check_stream(&tokenizer, &[id("▁a"), id("▁"), id("b"), id("▁▁")], true);
}

proptest! {
    #[test]
    fn byte_level_streams_equal_the_whole(
        ids in prop::collection::vec(0u32..266, 0..60), skip in any::<bool>(),
    ) {
        check_stream(&Arc::new(byte_level()), &ids, skip);
    }

    #[test]
    fn byte_level_text_survives(text in any::<String>()) {
        let tokenizer = Arc::new(byte_level());
        let ids = tokenizer.encode(&text, false, true).unwrap();
        prop_assert_eq!(check_stream(&tokenizer, &ids, false), text);
    }

    #[test]
    fn sentencepiece_streams_equal_the_whole(
        ids in prop::collection::vec(prop_oneof![0u32..271, 259u32..271, Just(198), Just(172)], 0..60),
        skip in any::<bool>(),
    ) {
        check_stream(&Arc::new(open(&[("tokenizer.json", &sentencepiece_json())]).unwrap()), &ids, skip);
    }

    #[test]
    fn sentencepiece_text_survives(text in "[abcé日😀 ]{0,40}|.{0,40}") {
        // ▁ itself means a space, and <0x41> a byte.
        prop_assume!(!text.contains(['▁', '<']));
        let tokenizer = Arc::new(open(&[("tokenizer.json", &sentencepiece_json())]).unwrap());
        let ids = tokenizer.encode(&text, true, false).unwrap();
        prop_assert_eq!(check_stream(&tokenizer, &ids, true), text);
    }

    /// Bytes changed at random anywhere in the file: an error or a tokenizer, never a panic.
    #[test]
    fn mutated_files_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = sentencepiece_json().to_string().into_bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let dir = TempDir::new().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), &bytes).unwrap();
        if let Ok(tokenizer) = Tokenizer::open(dir.path())
            && let Ok(ids) = tokenizer.encode("ab é </s>", true, false) {
                let _ = tokenizer.decode(&ids, false);
            }
    }
}
