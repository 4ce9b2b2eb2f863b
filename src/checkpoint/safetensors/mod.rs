//! Reads safetensors: one file, or shards listed in `model.safetensors.index.json`.
//!
//! This file decides which files of a folder to read; `header.rs` reads one of them.

mod header;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use header::read_file;

use crate::checkpoint::MAX_TENSORS;
use crate::checkpoint::json::Object;
use crate::checkpoint::tensor::Stored;
use crate::error::{Error, Result, quoted};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Reads the headers of all safetensors files of a checkpoint folder. Also returns the tensors that the index
/// names and no shard has, each with the error for it. Training tools copy the base model's index, which may
/// name a tied head, or parts that a Llama does not have.
pub(crate) fn open_folder(dir: &Path) -> Result<(BTreeMap<String, Stored>, BTreeMap<String, Error>)> {
    // As in transformers, the single file takes precedence over an index beside it.
    if exists(&dir.join(SINGLE))? {
        return Ok((read_file(&dir.join(SINGLE))?, BTreeMap::new()));
    }
    if exists(&dir.join(INDEX))? {
        return read_shards(dir);
    }
    Ok((read_file(&only_file(dir)?)?, BTreeMap::new()))
}

fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(|source| Error::io(path, source))
}

/// The only `*.safetensors` file of a folder that has neither of the usual names. Otherwise an error that
/// says what the folder holds instead.
fn only_file(dir: &Path) -> Result<PathBuf> {
    let mut names = Vec::new();
    let entries = std::fs::read_dir(dir).map_err(|source| Error::io(dir, source))?;
    for entry in entries {
        let entry = entry.map_err(|source| Error::io(dir, source))?;
        // Names that are not Unicode are skipped: none of the files we look for has one.
        names.extend(entry.file_name().into_string().ok());
    }
    names.sort();
    let with = |extension: &str| -> Vec<&str> {
        names.iter().map(String::as_str).filter(|name| name.ends_with(extension)).collect()
    };
    match *with(".safetensors").as_slice() {
        ["adapter_model.safetensors"] => Err(Error::unsupported(
            "adapter_model.safetensors",
            "a LoRA adapter without its base model; merge it into the base model and save that",
        )),
        ["consolidated.safetensors"] => Err(Error::unsupported(
            "consolidated.safetensors",
            "the original release's tensor names; take the transformers version of the checkpoint",
        )),
        [one] => Ok(dir.join(one)),
        [] => Err(without_safetensors(dir, &names)),
        ref several => {
            let some = several.iter().take(8).copied().collect::<Vec<_>>().join(", ");
            let reason = format!("has neither {SINGLE} nor {INDEX}, but {} files: {some}", several.len());
            Err(Error::malformed(dir, reason))
        }
    }
}

fn without_safetensors(dir: &Path, names: &[String]) -> Error {
    if let Some(pickle) = names.iter().find(|name| is_pickle(name)) {
        return refuse_pickle(pickle);
    }
    let what = match names.iter().find(|name| name.ends_with(".gguf")) {
        Some(gguf) => format!("{SINGLE} (the folder has {gguf}: give the path of that file)"),
        None => format!("{SINGLE} or {INDEX}"),
    };
    Error::NotFound { what, path: dir.into() }
}

/// Whether a file's name says that it holds weights as a pickle. Files such as `training_args.bin` are
/// pickles too, but hold no weights.
pub(crate) fn is_pickle(name: &str) -> bool {
    [".pth", ".pt"].iter().any(|extension| name.ends_with(extension))
        || (name.ends_with(".bin") && name.starts_with("pytorch_model"))
}

/// Makes the error that refuses a pickle and says how to convert it. Reading a pickle can run any code.
pub(crate) fn refuse_pickle(name: &str) -> Error {
    let convert = if name.starts_with("consolidated") {
        "convert it with transformers' convert_llama_weights_to_hf.py, which writes safetensors"
    } else {
        "convert it where you trust it: AutoModelForCausalLM.from_pretrained(folder)\
         .save_pretrained(new_folder) in transformers writes safetensors"
    };
    Error::unsupported(name, format!("a pickle, which can run code when it is read; {convert}"))
}

fn read_shards(dir: &Path) -> Result<(BTreeMap<String, Stored>, BTreeMap<String, Error>)> {
    let path = dir.join(INDEX);
    let index = Object::read(&path)?;
    let weight_map =
        index.object("weight_map")?.ok_or_else(|| Error::malformed(&path, "has no weight_map"))?;
    let mut shards: BTreeMap<&str, BTreeMap<String, Stored>> = BTreeMap::new();
    let mut tensors = BTreeMap::new();
    let mut absent = BTreeMap::new();
    let mut found = 0_u64;
    for tensor in weight_map.map().keys() {
        let shard = weight_map.string(tensor)?.unwrap_or_default();
        if !shards.contains_key(shard) {
            if !is_plain_file_name(shard) {
                let reason = format!("is {}, not a plain file name", quoted(shard));
                return Err(weight_map.malformed(tensor, reason));
            }
            let stored = read_shard(dir, shard)?;
            found = found.saturating_add(stored.len() as u64);
            if found > MAX_TENSORS {
                let reason = format!("its shards have more than {MAX_TENSORS} tensors");
                return Err(Error::malformed(path, reason));
            }
            shards.insert(shard, stored);
        }
        let found = shards.get_mut(shard).and_then(|stored| stored.remove(tensor));
        let error =
            || weight_map.malformed(tensor, format!("says {}, which has no such tensor", quoted(shard)));
        match found {
            Some(stored) => drop(tensors.insert(tensor.clone(), stored)),
            None => drop(absent.insert(tensor.clone(), error())),
        }
    }
    // Tensors that the index does not list are loaded too, as in transformers: a head must not get lost.
    for (shard, rest) in shards {
        for (name, stored) in rest {
            if weight_map.map().contains_key(&name) {
                continue; // the index chose the copy in another shard
            }
            if tensors.contains_key(&name) {
                let reason = format!("tensor {} is in two shards and not in the index", quoted(&name));
                return Err(Error::malformed(dir.join(shard), reason));
            }
            tensors.insert(name, stored);
        }
    }
    Ok((tensors, absent))
}

fn read_shard(dir: &Path, shard: &str) -> Result<BTreeMap<String, Stored>> {
    let path = dir.join(shard);
    // The shard may be a link to any place: links are the user's own. Only names come from elsewhere.
    read_file(&path).map_err(|error| match error {
        Error::NotFound { path, .. } => Error::NotFound { what: format!("shard listed in {INDEX}"), path },
        other => other,
    })
}

/// Whether a name can only refer to a file in the same folder, on every system.
fn is_plain_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':', '\0'])
}
