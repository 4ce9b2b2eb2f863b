//! Byte-level BPE. GGUF stores the name of its pre-tokenizer, which says how text is cut.

use serde_json::Value as Json;
use tokenizers::models::bpe::BPE;

use super::{Kind, Vocabulary, as_json, inexpressible, library_tokens, merges};
use crate::checkpoint::gguf::{Array, Value};
use crate::error::Result;
use crate::tokenizer::gguf::{MERGES, MODEL, PRE};
use crate::tokenizer::pre_tokenizers::{self, Cut, GPT_2};

pub(super) fn from_library(tokenizer: &tokenizers::Tokenizer, model: &BPE) -> Result<Vocabulary> {
    if tokenizer.get_normalizer().is_some() {
        let normalizer = as_json(&tokenizer.get_normalizer())?;
        return Err(inexpressible("normalizer", &kind_of(&normalizer)));
    }
    if model.dropout.is_some_and(|dropout| dropout > 0.0) {
        return Err(inexpressible("model.dropout", "more than 0"));
    }
    if [&model.continuing_subword_prefix, &model.end_of_word_suffix]
        .into_iter()
        .flatten()
        .any(|affix| !affix.is_empty())
    {
        return Err(inexpressible("model", "prefixes or suffixes of subwords"));
    }
    let pre_tokenizer = as_json(&tokenizer.get_pre_tokenizer())?;
    let cuts = cuts(&pre_tokenizer)?;
    let name = pre_tokenizers::name_of(&cuts, model.ignore_merges).ok_or_else(|| {
        let merges = if model.ignore_merges { "with" } else { "without" };
        inexpressible("pre_tokenizer", &format!("{cuts:?} {merges} ignore_merges"))
    })?;
    let merges = merges(model)?;
    // A line holds both parts with a space between them. In the byte-level mapping no token contains a space.
    if let Some((left, right)) = merges.iter().find(|(left, right)| left.contains(' ') || right.contains(' '))
    {
        return Err(inexpressible("merges", &format!("a space in {left:?} or {right:?}")));
    }
    let lines = merges.into_iter().map(|(left, right)| format!("{left} {right}")).collect();
    Ok(Vocabulary {
        metadata: vec![
            (MODEL.into(), Value::String("gpt2".into())),
            (PRE.into(), Value::String(name.into())),
            (MERGES.into(), Value::Array(Array::String(lines))),
        ],
        has_scores: false,
        tokens: library_tokens(tokenizer, |_| Kind::Normal, |_| 0.0),
    })
}

/// The cuts of a pre-tokenizer. Its last step must be ByteLevel, which is not among them.
fn cuts(pre_tokenizer: &Json) -> Result<Vec<Cut<'_>>> {
    let steps = match pre_tokenizer.get("pretokenizers").and_then(Json::as_array) {
        Some(steps) => steps.as_slice(),
        None => std::slice::from_ref(pre_tokenizer),
    };
    let Some((last, first)) = steps.split_last() else {
        return Err(inexpressible("pre_tokenizer", "empty"));
    };
    let mut cuts = Vec::new();
    for step in first {
        cuts.push(cut(step).ok_or_else(|| inexpressible("pre_tokenizer", &kind_of(step)))?);
    }
    let flag = |key: &str| last.get(key).and_then(Json::as_bool).unwrap_or(true);
    if kind_of(last) != "ByteLevel" || flag("add_prefix_space") {
        return Err(inexpressible("pre_tokenizer", &format!("{last}")));
    }
    if flag("use_regex") {
        cuts.push(Cut::Matches(GPT_2));
    }
    Ok(cuts)
}

fn cut(step: &Json) -> Option<Cut<'_>> {
    let field = |key: &str| step.get(key);
    match step.get("type")?.as_str()? {
        "Digits" if field("individual_digits")?.as_bool()? => Some(Cut::Digits),
        "Split" if field("behavior")?.as_str()? == "Isolated" && !field("invert")?.as_bool()? => {
            Some(Cut::Matches(field("pattern")?.get("Regex")?.as_str()?))
        }
        _ => None,
    }
}

/// The type of a part, for messages.
fn kind_of(part: &Json) -> String {
    part.get("type").and_then(Json::as_str).unwrap_or("none").to_owned()
}
