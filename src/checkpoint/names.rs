//! Translates tensor names between GGUF's and Hugging Face's spellings.
//!
//! Source: llama.cpp, `gguf-py/gguf/tensor_mapping.py`.

use std::collections::HashSet;

use crate::error::quoted;

/// Names outside the decoder layers: GGUF's, then Hugging Face's, without the final `.weight` or `.bias`.
const OUTER: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Names inside a decoder layer, after `blk.{i}.` in GGUF and `model.layers.{i}.` in Hugging Face's spelling.
const LAYER: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The end of the name of a buffer that older versions of transformers saved. It only repeats what the config
/// says.
pub(crate) const INV_FREQ: &str = ".rotary_emb.inv_freq";

/// Longer names are refused: they only waste memory and fill messages. ggml's limit is 64.
const MAX_NAME_BYTES: usize = 1024;

/// Parts that wrappers of PyTorch put into names: `torch.compile`, FSDP and activation checkpointing.
const WRAPPERS: [&str; 3] = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."];

/// Hugging Face's spelling of the names of a whole folder, in the same order, if they differ from it only by
/// wrappers' parts, by a prefix that all share, or by the lack of "model.". None if the names need no change,
/// or if a changed name is not one of a Llama's, or would occur twice.
pub(super) fn without_prefix(names: &[&str]) -> Option<Vec<String>> {
    const ANCHOR: &str = "layers.0.input_layernorm.weight";
    let unwrapped =
        |name: &str| WRAPPERS.iter().fold(name.to_owned(), |name, wrapper| name.replace(wrapper, ""));
    let unwrapped_names: Vec<String> = names.iter().map(|name| unwrapped(name)).collect();
    let anchor = unwrapped_names.iter().find(|name| name.ends_with(ANCHOR))?;
    let inner = anchor.strip_suffix(ANCHOR).filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))?;
    let outer = inner.strip_suffix("model.").unwrap_or(inner);
    if inner == "model." && unwrapped_names == names {
        return None;
    }
    let plain = |name: &String| match name.strip_prefix(inner) {
        Some(rest) if !rest.starts_with("lm_head.") => format!("model.{rest}"),
        _ => name.strip_prefix(outer).unwrap_or(name).to_owned(),
    };
    let plain: Vec<String> = unwrapped_names.iter().map(plain).collect();
    let known = |name: &String| hf_to_gguf(name).is_some() || name.ends_with(INV_FREQ);
    let unique = plain.iter().collect::<HashSet<_>>().len() == plain.len();
    (unique && plain.iter().all(known)).then_some(plain)
}

/// The reason to refuse a name that a file gives to a tensor or a key; None if it is fine.
pub(super) fn unfit_name(name: &str) -> Option<String> {
    if name.len() > MAX_NAME_BYTES {
        return Some(format!("of {} bytes, the limit is {MAX_NAME_BYTES}", name.len()));
    }
    name.contains(char::is_control).then(|| format!("with a control character: {}", quoted(name)))
}

/// Hugging Face's spelling of a GGUF tensor name. None for names without a counterpart, such as
/// `rope_freqs.weight`.
pub fn gguf_to_hf(name: &str) -> Option<String> {
    translate(name, ("blk.", "model.layers."), |(gguf, hf)| (gguf, hf))
}

/// GGUF's spelling of a Hugging Face tensor name. None for names without a counterpart.
pub fn hf_to_gguf(name: &str) -> Option<String> {
    translate(name, ("model.layers.", "blk."), |(gguf, hf)| (hf, gguf))
}

type Pair = (&'static str, &'static str);

/// `direct` orders a pair of the tables as (from, to).
fn translate(name: &str, layers: Pair, direct: fn(Pair) -> Pair) -> Option<String> {
    let (stem, suffix) = name.rsplit_once('.')?;
    if suffix != "weight" && suffix != "bias" {
        return None;
    }
    let find = |table: &[Pair], stem: &str| {
        table.iter().map(|&pair| direct(pair)).find(|(from, _)| *from == stem).map(|(_, to)| to)
    };
    if let Some(to) = find(&OUTER, stem) {
        return Some(format!("{to}.{suffix}"));
    }
    let (index, stem) = stem.strip_prefix(layers.0)?.split_once('.')?;
    // Each number has only one accepted spelling, so that two tensors cannot get the same name.
    if index.parse::<u32>().ok()?.to_string() != index {
        return None;
    }
    let to = find(&LAYER, stem)?;
    Some(format!("{}{index}.{to}.{suffix}", layers.1))
}

/// Tells whether llama.cpp's converter reorders the rows of this tensor (Hugging Face's spelling), and
/// whether it does so by the attention heads or by the key-value heads.
pub(crate) fn permuted_by(name: &str) -> Option<PermutedBy> {
    let (stem, _) = name.rsplit_once('.')?;
    if !stem.starts_with("model.layers.") {
        return None;
    }
    match stem.rsplit_once('.')?.1 {
        "q_proj" => Some(PermutedBy::AttentionHeads),
        "k_proj" => Some(PermutedBy::KeyValueHeads),
        _ => None,
    }
}

/// See [`permuted_by`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum PermutedBy {
    AttentionHeads,
    KeyValueHeads,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_goes_there_and_back() {
        let outer = OUTER.iter().map(|(gguf, hf)| ((*gguf).to_owned(), (*hf).to_owned()));
        let layer =
            LAYER.iter().map(|(gguf, hf)| (format!("blk.12.{gguf}"), format!("model.layers.12.{hf}")));
        for (gguf, hf) in outer.chain(layer) {
            for suffix in ["weight", "bias"] {
                let (gguf, hf) = (format!("{gguf}.{suffix}"), format!("{hf}.{suffix}"));
                assert_eq!(gguf_to_hf(&gguf).as_ref(), Some(&hf));
                assert_eq!(hf_to_gguf(&hf).as_ref(), Some(&gguf));
            }
        }
    }

    #[test]
    fn unknown_names_have_no_counterpart() {
        for name in [
            "rope_freqs.weight",
            "blk.0.attn_q",
            "blk.00.attn_q.weight",
            "blk.+1.attn_q.weight",
            "blk..attn_q.weight",
            "blk.0.ffn_gate_exps.weight",
            "output.scale",
            "",
        ] {
            assert_eq!(gguf_to_hf(name), None, "{name}");
        }
        assert_eq!(hf_to_gguf("model.layers.0.self_attn.rotary_emb.inv_freq"), None);
    }

    #[test]
    fn prefixes_of_all_names_are_removed() {
        let usual = [
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.norm.weight",
        ];
        let plain = |names: &[String]| {
            without_prefix(&names.iter().map(String::as_str).collect::<Vec<_>>()).unwrap_or_default()
        };
        assert_eq!(without_prefix(&usual), None);
        for prefix in ["base_model.model.", "_orig_mod.", "module.", "module._orig_mod.", "model."] {
            assert_eq!(plain(&usual.map(|name| format!("{prefix}{name}"))), usual, "{prefix}");
        }
        // Without "model.", also under a prefix, and with wrappers around single layers.
        assert_eq!(plain(&usual.map(|name| name.replace("model.", ""))), usual);
        assert_eq!(plain(&usual.map(|name| name.replace("model.", "module."))), usual);
        assert_eq!(plain(&usual.map(|name| format!("module.{}", name.replace("model.", "")))), usual);
        for wrapper in WRAPPERS {
            assert_eq!(plain(&usual.map(|name| name.replace("s.0.", &format!("s.0.{wrapper}")))), usual);
        }
        // A prefix of only some names, an unknown name, and names that would be equal.
        let some = usual.map(|name| name.replace("model.layers", "x.model.layers"));
        assert_eq!(plain(&some), usual);
        for extra in
            ["x.other.weight", "x.model.layers.0.self_attn.q_proj.lora_A.weight", "model.norm.weight"]
        {
            let mut names = usual.map(|name| format!("x.{name}")).to_vec();
            names.push(extra.into());
            assert_eq!(plain(&names), [] as [&str; 0], "{extra}");
        }
    }

    #[test]
    fn only_query_and_key_projections_are_permuted() {
        let layer = |name| permuted_by(&format!("model.layers.3.self_attn.{name}"));
        assert_eq!(layer("q_proj.weight"), Some(PermutedBy::AttentionHeads));
        assert_eq!(layer("q_proj.bias"), Some(PermutedBy::AttentionHeads));
        assert_eq!(layer("k_proj.weight"), Some(PermutedBy::KeyValueHeads));
        assert_eq!(layer("v_proj.weight"), None);
        assert_eq!(layer("o_proj.weight"), None);
        assert_eq!(permuted_by("model.norm.weight"), None);
    }
}
