//! Says what a folder is that is not a Llama in Hugging Face's format, and what to do about it.

use std::path::Path;

use super::tied::EMBED_TOKENS;
use super::{Checkpoint, Format, TensorInfo};
use crate::error::{Error, Result, quoted};

/// Explains why a folder has no config.json, if its files tell what it is.
pub(crate) fn explain_missing_config(dir: &Path, error: Error) -> Error {
    let Error::NotFound { what, path } = error else { return error };
    let Ok(entries) = std::fs::read_dir(dir) else { return Error::NotFound { what, path } };
    let files: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let has = |name: &str| files.iter().any(|file| file == name);
    let explanation = if has("adapter_config.json") {
        "this is a LoRA adapter without its base model: merge it into the base model and save that".into()
    } else if has("params.json") {
        "params.json is of Meta's original release: convert it with transformers' \
         convert_llama_weights_to_hf.py, or take the transformers version of the checkpoint"
            .into()
    } else if has("snapshots") {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let id = name.strip_prefix("models--").map(|id| quoted(&id.replace("--", "/")));
        let id = id.unwrap_or("the repository's id".into());
        format!("this is a repository's folder in the hub's cache: pass {id}, or a folder in snapshots/")
    } else {
        return Error::NotFound { what, path };
    };
    Error::NotFound { what: format!("{what} ({explanation})"), path }
}

/// Refuses tensors that other tools save in place of a Llama's weights, with the name of what they are.
pub(crate) fn refuse_foreign_tensors(checkpoint: &Checkpoint) -> Result<()> {
    const WEIGHT: &str = "model.layers.0.self_attn.q_proj.weight";
    if checkpoint.format() != Format::Safetensors {
        return Ok(());
    }
    let infos = checkpoint.infos();
    let is_empty =
        |info: &&TensorInfo| info.shape.contains(&0) && [WEIGHT, EMBED_TOKENS].contains(&&*info.name);
    if let Some(empty) = infos.iter().find(is_empty) {
        let reason = "is empty: DeepSpeed ZeRO-3 saved it without gathering its parts; use its \
                      zero_to_fp32.py, or stage3_gather_16bit_weights_on_model_save";
        return Err(Error::malformed(checkpoint.path(), format!("tensor {} {reason}", quoted(&empty.name))));
    }
    if infos.iter().any(|info| info.name == WEIGHT && ["F32", "F16", "BF16"].contains(&&*info.dtype)) {
        return Ok(());
    }
    const MARKS: [(&str, &str); 5] = [
        (".base_layer.", "PEFT's names; merge the adapter with merge_and_unload(), then save_pretrained"),
        (".lora_A.", "a LoRA adapter without its base model; merge it into the base model and save that"),
        (".qweight", "GPTQ or AWQ weights; take a checkpoint that is not quantised, or a GGUF file"),
        (".absmax", "bitsandbytes weights; take a checkpoint that is not quantised, or a GGUF file"),
        (".scales", "weights that MLX quantised; take a checkpoint that is not quantised, or a GGUF file"),
    ];
    for (mark, meaning) in MARKS {
        if let Some(info) = infos.iter().find(|info| info.name.contains(mark)) {
            return Err(Error::unsupported(format!("tensor {}", quoted(&info.name)), meaning));
        }
    }
    Ok(())
}
