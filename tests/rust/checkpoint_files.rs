//! Writes tiny seeded checkpoints, valid and invalid ones.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

/// A tensor to write.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Entry {
    pub(crate) fn f32(name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.into(), dtype: Dtype::F32, shape: shape.into(), bytes }
    }

    pub(crate) fn bf16(name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect();
        Self { name: name.into(), dtype: Dtype::BF16, shape: shape.into(), bytes }
    }
}

/// Writes a well-formed safetensors file.
pub(crate) fn write_safetensors(path: &Path, entries: &[Entry]) {
    let views = entries
        .iter()
        .map(|entry| (&entry.name, TensorView::new(entry.dtype, entry.shape.clone(), &entry.bytes).unwrap()));
    serialize_to_file(views, None, path).unwrap();
}

/// A safetensors file with this header, which may be invalid.
pub(crate) fn raw_safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Numbers between -1 and 1, the same for the same seed.
pub(crate) fn seeded(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// The shape of the tiny Llama that the tests write.
pub(crate) const VOCAB: usize = 48;
pub(crate) const HIDDEN: usize = 32;
pub(crate) const INTERMEDIATE: usize = 64;
pub(crate) const LAYERS: usize = 2;
pub(crate) const HEADS: usize = 4;
pub(crate) const KV_HEADS: usize = 2;
pub(crate) const HEAD_DIM: usize = HIDDEN / HEADS;

/// Hugging Face's names, shapes and seeded values of a tiny Llama without `lm_head.weight`.
pub(crate) fn llama_weights() -> Vec<(String, Vec<usize>, Vec<f32>)> {
    llama_weights_with(HIDDEN, INTERMEDIATE, HEAD_DIM)
}

/// As [`llama_weights`], with other sizes.
pub(crate) fn llama_weights_with(
    hidden: usize,
    intermediate: usize,
    head_dim: usize,
) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, hidden])];
    for layer in 0..LAYERS {
        let inside = [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![HEADS * head_dim, hidden]),
            ("self_attn.k_proj", vec![KV_HEADS * head_dim, hidden]),
            ("self_attn.v_proj", vec![KV_HEADS * head_dim, hidden]),
            ("self_attn.o_proj", vec![hidden, HEADS * head_dim]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![intermediate, hidden]),
            ("mlp.up_proj", vec![intermediate, hidden]),
            ("mlp.down_proj", vec![hidden, intermediate]),
        ];
        shapes.extend(
            inside.into_iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)),
        );
    }
    shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
    let with_values = |(seed, (name, shape)): (usize, (String, Vec<usize>))| {
        let values = seeded(seed as u64 + 1, shape.iter().product());
        // Norms are around 1, as in trained models.
        let offset = if shape.len() == 1 { 1.0 } else { 0.0 };
        (name, shape, values.iter().map(|value| value * 0.3 + offset).collect())
    };
    shapes.into_iter().enumerate().map(with_values).collect()
}

/// config.json of the tiny Llama.
pub(crate) fn llama_config() -> serde_json::Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 64,
        "tie_word_embeddings": true,
    })
}

/// A byte-level vocabulary of the tiny Llama: two control tokens, letters, digits, and four merges.
pub(crate) fn vocabulary() -> Vec<String> {
    let letters = ('a'..='z').chain('0'..='9').chain("Ġ!?.,A".chars()).map(String::from);
    let merged = MERGES.iter().map(|merge| merge.replace(' ', ""));
    CONTROL_TOKENS.iter().map(|token| (*token).to_owned()).chain(letters).chain(merged).collect()
}

pub(crate) const CONTROL_TOKENS: [&str; 2] = ["<|begin|>", "<|end|>"];
pub(crate) const MERGES: [&str; 4] = ["h e", "l l", "l o", "Ġ a"];

/// Writes a GGUF file piece by piece, a valid or an invalid one.
#[derive(Clone)]
pub(crate) struct Gguf {
    pub(crate) version: u32,
    pub(crate) alignment: usize,
    values: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: Vec<u8>,
}

impl Gguf {
    /// No metadata and no tensors.
    pub(crate) fn empty() -> Self {
        Self { version: 3, alignment: 32, values: vec![], tensors: vec![], data: vec![] }
    }

    /// The metadata of the tiny Llama.
    pub(crate) fn llama() -> Self {
        Self::empty()
            .string("general.architecture", "llama")
            .u32("llama.vocab_size", VOCAB as u32)
            .u32("llama.context_length", 128)
            .u32("llama.embedding_length", HIDDEN as u32)
            .u32("llama.feed_forward_length", INTERMEDIATE as u32)
            .u32("llama.block_count", LAYERS as u32)
            .u32("llama.attention.head_count", HEADS as u32)
            .u32("llama.attention.head_count_kv", KV_HEADS as u32)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    }

    /// The metadata and tokenizer of the tiny Llama, without its tensors.
    pub(crate) fn llama_with_tokenizer() -> Self {
        let tokens = vocabulary();
        let kinds: Vec<u32> =
            tokens.iter().map(|token| if CONTROL_TOKENS.contains(&token.as_str()) { 3 } else { 1 }).collect();
        Self::llama()
            .string("tokenizer.ggml.model", "gpt2")
            .string("tokenizer.ggml.pre", "smollm")
            .strings("tokenizer.ggml.tokens", &tokens.iter().map(String::as_str).collect::<Vec<_>>())
            .array("tokenizer.ggml.token_type", 5, kinds.len() as u64, bytemuck::cast_slice(&kinds))
            .strings("tokenizer.ggml.merges", &MERGES)
            .u32("tokenizer.ggml.bos_token_id", 0)
            .u32("tokenizer.ggml.eos_token_id", 1)
    }

    /// Some of the tiny Llama's tensors. Query and key rows are not permuted, so the file is another model
    /// of the same shape.
    pub(crate) fn weights(self, weights: &[(String, Vec<usize>, Vec<f32>)]) -> Self {
        weights.iter().fold(self, |file, (name, shape, values)| {
            let name = candle_llama::checkpoint::names::hf_to_gguf(name).unwrap();
            file.tensor(&name, shape, 0, bytemuck::cast_slice(values))
        })
    }

    /// The same without one metadata value.
    pub(crate) fn without(mut self, key: &str) -> Self {
        let key = string(key);
        self.values.retain(|value| !value.starts_with(&key));
        self
    }

    /// A metadata value. `kind` is GGUF's number of its type.
    pub(crate) fn value(mut self, key: &str, kind: u32, bytes: &[u8]) -> Self {
        self.values.push([&string(key), &kind.to_le_bytes()[..], bytes].concat());
        self
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.value(key, 4, &value.to_le_bytes())
    }

    pub(crate) fn f32(self, key: &str, value: f32) -> Self {
        self.value(key, 6, &value.to_le_bytes())
    }

    pub(crate) fn string(self, key: &str, value: &str) -> Self {
        self.value(key, 8, &string(value))
    }

    pub(crate) fn array(self, key: &str, kind: u32, count: u64, bytes: &[u8]) -> Self {
        self.value(key, 9, &[&kind.to_le_bytes()[..], &count.to_le_bytes(), bytes].concat())
    }

    pub(crate) fn u32s(self, key: &str, values: &[u32]) -> Self {
        self.array(key, 4, values.len() as u64, bytemuck::cast_slice(values))
    }

    pub(crate) fn strings(self, key: &str, values: &[&str]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| string(value)).collect();
        self.array(key, 8, values.len() as u64, &bytes)
    }

    /// A tensor at the next aligned offset. `shape` is in Hugging Face's order.
    pub(crate) fn tensor(mut self, name: &str, shape: &[usize], kind: u32, bytes: &[u8]) -> Self {
        self.data.resize(self.data.len().next_multiple_of(self.alignment), 0);
        let offset = self.data.len() as u64;
        self.data.extend(bytes);
        self.tensor_at(name, shape, kind, offset)
    }

    /// A tensor whose entry gives this offset for its data.
    pub(crate) fn tensor_at(mut self, name: &str, shape: &[usize], kind: u32, offset: u64) -> Self {
        let dims = shape.iter().rev().flat_map(|&dim| (dim as u64).to_le_bytes());
        let mut entry = string(name);
        entry.extend((shape.len() as u32).to_le_bytes());
        entry.extend(dims);
        entry.extend(kind.to_le_bytes());
        entry.extend(offset.to_le_bytes());
        self.tensors.push(entry);
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.values.len() as u64).to_le_bytes());
        bytes.extend(self.values.concat());
        bytes.extend(self.tensors.concat());
        if !self.tensors.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
            bytes.extend(&self.data);
        }
        bytes
    }
}

/// A string as GGUF writes it.
pub(crate) fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}
