//! Pre-tokenizers, which cut text before merging, by their names in GGUF files (`tokenizer.ggml.pre`).
//!
//! Any name that is not in the table is refused: a wrong pre-tokenizer gives wrong ids without any error.
//!
//! Some of llama.cpp's names are missing, because their vocabularies do not spell bytes (gemma4,
//! granite-embed-multi-311m, sarvam-moe, whitespace) or their texts end in a separator (jina-v1-en,
//! jina-v2-code, roberta-bpe).
//!
//! Source: llama.cpp, `llama-vocab.cpp` and `unicode.cpp`, for the names. The expressions are those of the
//! models' own tokenizer.json files.

use tokenizers::SplitDelimiterBehavior;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};

use super::catching;

/// A pre-tokenizer and the settings that belong to it.
pub(super) struct PreTokenizer {
    pub(super) pre_tokenizer: PreTokenizerWrapper,
    /// Whether a piece that is itself a token is used whole, without applying merges.
    pub(super) ignore_merges: bool,
    /// Whether BOS is added if the file does not say.
    pub(super) add_bos_token: bool,
}

/// One step of cutting. Matches become pieces of their own; the text between them goes to the next step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Cut<'a> {
    Matches(&'a str),
    /// Every digit becomes a piece of its own.
    Digits,
}

struct Row {
    names: &'static [&'static str],
    cuts: &'static [Cut<'static>],
    ignore_merges: bool,
    add_bos_token: bool,
}

/// Llama 3's pre-tokenizer, which other tokenizers share.
pub(super) const LLAMA_3: &str = "llama-bpe";
/// The pre-tokenizer of files that name none.
pub(super) const DEFAULT: &str = "default";

pub(super) const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const ROWS: &[Row] = &[
    Row {
        // Llama 3, Falcon 3 and H1, Pixtral, Midm 2.0, LFM 2, Jina 5 nano.
        names: &[
            LLAMA_3,
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        cuts: &[Cut::Matches(LLAMA_3_EXPRESSION)],
        ignore_merges: true,
        add_bos_token: true,
    },
    Row {
        names: &["smaug-bpe", "dbrx"],
        cuts: &[Cut::Matches(LLAMA_3_EXPRESSION)],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        // SmolLM; Granite Code ("refact"); StarCoder 2's vocabulary; Minerva.
        names: &[
            "smollm",
            "refact",
            "starcoder",
            "minerva-7b",
            "command-r",
            "codeshell",
            "exaone",
            "mellum2",
        ],
        cuts: &[Cut::Digits, Cut::Matches(GPT_2)],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &[
            "gpt-2",
            "phi-2",
            "gigachat",
            "a.x-4.0",
            "exaone4",
            "mellum",
            "trillion",
            "granite-docling",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "modern-bert",
            "mpt",
            "olmo",
            "jais",
        ],
        cuts: &[Cut::Matches(GPT_2)],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        // Mistral Nemo.
        names: &["tekken"],
        cuts: &[Cut::Matches(concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ))],
        ignore_merges: true,
        add_bos_token: true,
    },
    Row {
        // Qwen 2 and models with its vocabulary; Megrez.
        names: &[
            "megrez",
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        cuts: &[Cut::Matches(QWEN_2)],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["seed-coder"],
        cuts: &[Cut::Matches(concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+",
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        ))],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["viking"],
        cuts: &[Cut::Matches(BLOOM), Cut::Digits],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["deepseek-llm"],
        cuts: &[
            Cut::Matches(r"[\r\n]"),
            Cut::Matches(DEEPSEEK_LETTERS),
            Cut::Matches("\\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}]+"),
            Cut::Matches(r"\s+$"),
            Cut::Matches(HAN_AND_HANGUL),
            Cut::Matches(r"\p{N}+"),
        ],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["deepseek-coder"],
        cuts: &[
            Cut::Matches(r"[\r\n]"),
            Cut::Matches(r"\s?\p{L}+"),
            Cut::Matches(r"\s?\p{P}+"),
            Cut::Matches(HAN_AND_HANGUL),
            Cut::Digits,
        ],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["minicpm5"],
        cuts: &[
            Cut::Matches(THREE_DIGITS),
            Cut::Matches(concat!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*",
                r"|\s*[\r\n]+|\s+(?!\S)|\s+",
            )),
        ],
        ignore_merges: true,
        add_bos_token: false,
    },
    Row {
        names: &["glm4", "glm5"],
        cuts: &[Cut::Matches(LLAMA_3_EXPRESSION)],
        ignore_merges: true,
        add_bos_token: false,
    },
    Row {
        names: &["chatglm-bpe"],
        cuts: &[Cut::Matches(LLAMA_3_EXPRESSION)],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        // GPT-4o, Llama 4, MiniMax M2.
        names: &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        cuts: &[Cut::Matches(GPT_4O)],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["granite-embed-multi-97m"],
        cuts: &[Cut::Matches(GPT_4O)],
        ignore_merges: true,
        add_bos_token: false,
    },
    Row {
        names: &["tiny_aya", "cohere2moe"],
        cuts: &[Cut::Matches(r"\d{1,3}(?=(?:\d{3})*\b)"), Cut::Matches(GPT_4O)],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        cuts: &[Cut::Matches(THREE_DIGITS), Cut::Matches(HAN_AND_KANA), Cut::Matches(DEEPSEEK_3)],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["spark2_5"],
        cuts: &[
            Cut::Matches(THREE_DIGITS),
            Cut::Matches(HAN_AND_KANA),
            Cut::Matches(concat!(
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
                r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+",
            )),
            Cut::Digits,
        ],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        // Trinity. Digits are grouped in threes from the right.
        names: &["afmoe"],
        cuts: &[
            Cut::Matches(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"),
            Cut::Matches(concat!(
                "[\u{4E00}-\u{9FFF}\u{3400}-\u{4DBF}\u{F900}-\u{FAFF}\u{3040}-\u{309F}\u{30A0}-\u{30FF}",
                "\u{FF65}-\u{FF9F}\u{2F00}-\u{2FDF}\u{E40}-\u{E7F}\u{E80}-\u{EFF}\u{1780}-\u{17FF}",
                "\u{1000}-\u{109F}\u{AA60}-\u{AA7F}\u{A9E0}-\u{A9FF}\u{AC00}-\u{D7AF}\u{1100}-\u{11FF}]+",
            )),
            Cut::Matches(DEEPSEEK_3),
        ],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["youtu"],
        cuts: &[
            Cut::Matches(concat!(
                "[\u{AC00}-\u{D7A3}\u{3131}-\u{318E}]+|[\u{FF01}\u{2026}\u{201C}\u{201D}\u{2018}\u{2019}",
                "\u{2014}\u{FF1A}\u{FF1B}\u{FF0C}\u{3001}-\u{303F}\u{FE30}-\u{FE4F}]+|[\u{3105}-\u{312F}]+",
                "|[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+",
            )),
            Cut::Matches(concat!(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            )),
        ],
        ignore_merges: true,
        add_bos_token: false,
    },
    Row {
        names: &["falcon"],
        cuts: &[Cut::Matches(r"[\p{P}\$\+<=>\^~\|`]+"), Cut::Matches(GPT_2), Cut::Matches("[0-9][0-9][0-9]")],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["jais-2"],
        cuts: &[Cut::Matches(concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)",
            r"|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}",
        ))],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["qwen35"],
        cuts: &[Cut::Matches(concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}",
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ))],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["poro-chat", "bloom", "gpt3-finnish"],
        cuts: &[Cut::Matches(BLOOM)],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["exaone-moe"],
        cuts: &[Cut::Matches(concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ))],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["chameleon"],
        cuts: &[
            Cut::Matches("<sentinel:[0-9]+>"),
            Cut::Matches("(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"),
            Cut::Matches(r"([\t\n]|    |  )"),
            Cut::Digits,
            Cut::Matches(r"[\p{P}!-/:-@\[-`{-~]"),
            Cut::Matches(GPT_2),
        ],
        ignore_merges: false,
        add_bos_token: true,
    },
    Row {
        // Pieces may span several words: numbers alone are cut, in threes from the right.
        names: &["superbpe"],
        cuts: &[Cut::Matches(r"\p{N}+"), Cut::Matches(r"(?=(\d{3})+(?!\d))")],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        // Ling.
        names: &["bailingmoe", "bailingmoe2", "llada-moe"],
        cuts: &[Cut::Matches(concat!(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*",
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        ))],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        // As qwen2, without English contractions: Turkish writes suffixes after an apostrophe.
        names: &["ufakzeka"],
        cuts: &[Cut::Matches(
            r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["laguna"],
        cuts: &[Cut::Matches(r"[^\n]+|[\n]+"), Cut::Matches(QWEN_2)],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        names: &["kimi-k2"],
        cuts: &[Cut::Matches(concat!(
            r"\p{Han}+",
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*",
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+",
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ))],
        ignore_merges: false,
        add_bos_token: false,
    },
    Row {
        // llama.cpp's rule for files that name none. It belongs to no model, but users of such files know its
        // results.
        names: &[DEFAULT],
        cuts: &[
            Cut::Matches(r"[\p{P}\$\+<=>\^~\|]+"),
            Cut::Matches(GPT_2),
            Cut::Matches(r"\p{N}+"),
            Cut::Matches("[0-9][0-9][0-9]"),
        ],
        ignore_merges: false,
        add_bos_token: false,
    },
];

const LLAMA_3_EXPRESSION: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);

const QWEN_2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);

const GPT_4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

const DEEPSEEK_3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

const BLOOM: &str = " ?[^(\\s|.,!?\u{2026}\u{3002}\u{FF0C}\u{3001}\u{964}\u{6D4}\u{60C})]+";

const THREE_DIGITS: &str = r"\p{N}{1,3}";

const HAN_AND_KANA: &str = "[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+";

const HAN_AND_HANGUL: &str = "[\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}]+";

/// The letters of scripts with two cases, in an older version of Unicode.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[",
    "A-Za-z\u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}",
    "\u{295}-\u{2AF}\u{370}-\u{373}\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\u{38C}",
    "\u{38E}-\u{3A1}\u{3A3}-\u{3F5}\u{3F7}-\u{481}\u{48A}-\u{52F}\u{531}-\u{556}\u{10A0}-\u{10C5}",
    "\u{13A0}-\u{13F5}\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\u{1D00}-\u{1D2B}",
    "\u{1D6B}-\u{1D77}\u{1D79}-\u{1D9A}\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\u{1F20}-\u{1F45}",
    "\u{1F48}-\u{1F4D}\u{1F50}-\u{1F57}\u{1F59}\u{1F5B}\u{1F5D}\u{1F5F}-\u{1F7D}\u{1F80}-\u{1FB4}",
    "\u{1FB6}-\u{1FBC}\u{1FBE}\u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}\u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}",
    "\u{1FE0}-\u{1FEC}\u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\u{2102}\u{2107}\u{210A}-\u{2113}\u{2115}",
    "\u{2119}-\u{211D}\u{2124}\u{2126}\u{2128}\u{212A}-\u{212D}\u{212F}-\u{2134}\u{2139}",
    "\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}\u{2183}\u{2184}\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}",
    "\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\u{A640}-\u{A66D}\u{A680}-\u{A69B}\u{A722}-\u{A76F}",
    "\u{A771}-\u{A787}\u{A78B}-\u{A78E}\u{AB70}-\u{ABBF}\u{FB00}-\u{FB06}\u{FB13}-\u{FB17}",
    "\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}\u{10400}-\u{1044F}\u{104B0}-\u{104D3}\u{104D8}-\u{104FB}",
    "\u{10C80}-\u{10CB2}\u{10CC0}-\u{10CF2}\u{118A0}-\u{118DF}\u{1E900}-\u{1E943}",
    "]+",
);

/// The names of all pre-tokenizers.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    ROWS.iter().flat_map(|row| row.names).copied()
}

/// The name of the pre-tokenizer with these cuts; None if there is none.
pub(super) fn name_of(cuts: &[Cut<'_>], ignore_merges: bool) -> Option<&'static str> {
    let named = ROWS.iter().find(|row| row.cuts == cuts && row.ignore_merges == ignore_merges);
    named.and_then(|row| row.names.first().copied())
}

/// Whether a pre-tokenizer of the table uses this expression.
pub(super) fn is_known_expression(expression: &str) -> bool {
    let known = |cut: &Cut<'_>| *cut == Cut::Matches(expression);
    ROWS.iter().any(|row| row.cuts.iter().any(known))
}

/// The pre-tokenizer called `name`; None if there is none.
pub(super) fn by_name(name: &str) -> std::result::Result<Option<PreTokenizer>, String> {
    let Some(row) = ROWS.iter().find(|row| row.names.contains(&name)) else { return Ok(None) };
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for cut in row.cuts {
        steps.push(match *cut {
            Cut::Digits => Digits::new(true).into(),
            Cut::Matches(expression) => catching(|| {
                let pattern = SplitPattern::Regex(expression.to_owned());
                Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            })?
            .into(),
        });
    }
    // ByteLevel comes last: it replaces bytes by characters.
    steps.push(ByteLevel::new(false, true, false).into());
    Ok(Some(PreTokenizer {
        pre_tokenizer: Sequence::new(steps).into(),
        ignore_merges: row.ignore_merges,
        add_bos_token: row.add_bos_token,
    }))
}
