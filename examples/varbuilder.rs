//! Candle's own Llama on our `VarBuilder`, which loads GGUF files and checkpoints without `lm_head.weight`.
//! Run: cargo run --release --example varbuilder -- MODEL [PROMPT], MODEL being a folder or a .gguf file
#![allow(clippy::print_stdout)]

use std::{error::Error, path::PathBuf, sync::Arc};

use candle_core::{D, DType, Device, Tensor};
use candle_llama::checkpoint::{Checkpoint, tied};
use candle_llama::{config::LlamaConfig, model::candle::stock_config, tokenizer::Tokenizer};
use candle_transformers::models::llama::{Cache, Llama};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = PathBuf::from(arguments.next().ok_or("usage: varbuilder MODEL [PROMPT]")?);
    let prompt = arguments.next().unwrap_or_else(|| "The capital of France is".into());

    let checkpoint = Arc::new(Checkpoint::open(&path)?);
    let config = match checkpoint.metadata() {
        Some(gguf) => LlamaConfig::from_gguf(gguf, Some(&checkpoint))?,
        None => LlamaConfig::from_folder(&path)?,
    };
    let head = tied::choose_head(&checkpoint, config.tie_word_embeddings, false)?;
    println!("lm_head: {:?}, because {}", head.lm_head, head.reason);

    let (dtype, device) = (DType::F32, Device::Cpu);
    let stock = stock_config(&config, config.context_length().min(4096), false)?;
    let llama = Llama::load(tied::var_builder(checkpoint, &head, dtype, &device), &stock)?;
    let mut cache = Cache::new(true, dtype, &stock, &device)?;
    let tokenizer = Tokenizer::open(&path)?;
    let mut ids = tokenizer.encode(&prompt, true, false)?;
    let (mut read, end) = (0, ids.len() + 16);
    while ids.len() < end && ids.last().is_some_and(|id| !config.eos_token_ids.contains(id)) {
        let tokens = Tensor::new(&ids[read..], &device)?.unsqueeze(0)?;
        let logits = llama.forward(&tokens, read, &mut cache)?;
        read = ids.len();
        ids.push(logits.argmax(D::Minus1)?.to_vec1::<u32>()?[0]);
    }
    println!("{}", tokenizer.decode(&ids, true)?);
    Ok(())
}
