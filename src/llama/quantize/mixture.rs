//! The types that a GGUF file gives to its matrices: one for all, or one of llama.cpp's mixtures.
//!
//! A mixture stores most matrices in one type, and those in which errors cost most in a larger one. Rows that
//! are no multiple of 256 get a type with blocks of 32 instead. The choices are those of llama.cpp in
//! llama-cpp-python 0.3.36 for the Llama architecture without experts, without an importance matrix.
//!
//! Source: llama.cpp, `llama-quant.cpp` (`llama_tensor_get_type_impl`, `tensor_type_fallback`) and `llama.h`
//! (`enum llama_ftype`).

use crate::checkpoint::tied::{EMBED_TOKENS, LM_HEAD, LmHead};
use crate::config::LlamaConfig;
use crate::kernels::WeightType;

/// A kind of file; the names are llama.cpp's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)] // llama.cpp's spelling
pub(in crate::llama) enum FileType {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2_K,
    Q3_K_M,
    Q4_K_S,
    Q4_K_M,
    Q5_K_S,
    Q5_K_M,
    Q6_K,
}

impl FileType {
    pub(super) const ALL: [FileType; 15] = {
        use FileType::*;
        [Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K_M, Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K, F16, BF16, F32]
    };

    /// The name in lower case, llama.cpp's number, and the type of most matrices.
    const fn facts(self) -> (&'static str, u32, WeightType) {
        match self {
            FileType::F32 => ("f32", 0, WeightType::F32),
            FileType::F16 => ("f16", 1, WeightType::F16),
            FileType::BF16 => ("bf16", 32, WeightType::BF16),
            FileType::Q8_0 => ("q8_0", 7, WeightType::Q8_0),
            FileType::Q4_0 => ("q4_0", 2, WeightType::Q4_0),
            FileType::Q4_1 => ("q4_1", 3, WeightType::Q4_1),
            FileType::Q5_0 => ("q5_0", 8, WeightType::Q5_0),
            FileType::Q5_1 => ("q5_1", 9, WeightType::Q5_1),
            FileType::Q2_K => ("q2_k", 10, WeightType::Q2_K),
            FileType::Q3_K_M => ("q3_k_m", 12, WeightType::Q3_K),
            FileType::Q4_K_S => ("q4_k_s", 14, WeightType::Q4_K),
            FileType::Q4_K_M => ("q4_k_m", 15, WeightType::Q4_K),
            FileType::Q5_K_S => ("q5_k_s", 16, WeightType::Q5_K),
            FileType::Q5_K_M => ("q5_k_m", 17, WeightType::Q5_K),
            FileType::Q6_K => ("q6_k", 18, WeightType::Q6_K),
        }
    }

    pub(super) const fn name(self) -> &'static str {
        self.facts().0
    }

    /// The value of `general.file_type`.
    pub(super) const fn number(self) -> u32 {
        self.facts().1
    }

    const fn base(self) -> WeightType {
        self.facts().2
    }

    /// Whether the types follow llama.cpp's rules. Otherwise all matrices have the same type.
    pub(super) const fn is_mixture(self) -> bool {
        self.base().block_len() > 32
    }
}

/// The type of a matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choice {
    /// The type that the mixture wants.
    pub(super) wanted: WeightType,
    /// The same, or another one if a row is not a whole number of blocks.
    pub(super) dtype: WeightType,
}

/// Chooses the types of a model's matrices.
pub(super) struct Mixture {
    file_type: FileType,
    layers: usize,
    heads_per_kv_head: usize,
    /// Whether the head is the embedding.
    is_tied: bool,
}

impl Mixture {
    pub(super) fn new(file_type: FileType, config: &LlamaConfig, lm_head: LmHead) -> Self {
        Mixture {
            file_type,
            layers: config.num_hidden_layers,
            heads_per_kv_head: config.num_attention_heads / config.num_key_value_heads.max(1),
            is_tied: lm_head == LmHead::Tied,
        }
    }

    /// The type of a matrix (Hugging Face's name) with `cols` columns.
    pub(super) fn choose(&self, name: &str, cols: usize) -> Choice {
        let wanted = if self.file_type.is_mixture() { self.wanted(name) } else { self.file_type.base() };
        let fits = |dtype: &WeightType| dtype.bytes_for(cols).is_some();
        let smaller = [wanted, with_blocks_of_32(wanted)].into_iter().find(fits);
        Choice { wanted, dtype: smaller.unwrap_or(WeightType::F16) }
    }

    fn wanted(&self, name: &str) -> WeightType {
        let base = self.file_type.base();
        match name {
            LM_HEAD => return WeightType::Q6_K,
            EMBED_TOKENS if self.is_tied => return WeightType::Q6_K,
            _ => {}
        }
        match layer_and_part(name) {
            Some((layer, "self_attn.v_proj.weight")) => self.value_projection(layer),
            Some((_, "self_attn.o_proj.weight")) => match self.file_type {
                FileType::Q2_K => WeightType::Q3_K,
                FileType::Q3_K_M => WeightType::Q4_K,
                _ => base,
            },
            Some((layer, "mlp.down_proj.weight")) => self.down_projection(layer),
            _ => base,
        }
    }

    fn value_projection(&self, layer: usize) -> WeightType {
        let wanted = match self.file_type {
            FileType::Q2_K if self.heads_per_kv_head >= 4 => WeightType::Q4_K,
            FileType::Q2_K => WeightType::Q3_K,
            FileType::Q3_K_M if layer < 2 => WeightType::Q5_K,
            FileType::Q3_K_M => WeightType::Q4_K,
            FileType::Q4_K_S if layer < 4 => WeightType::Q5_K,
            FileType::Q4_K_M | FileType::Q5_K_M if self.gets_more_bits(layer) => WeightType::Q6_K,
            other => other.base(),
        };
        // Llama 2 and 3 with 70B: a value projection is an eighth of a query projection.
        let is_70b = self.layers == 80 && self.heads_per_kv_head > 1;
        if is_70b && matches!(wanted, WeightType::Q3_K | WeightType::Q4_K) {
            WeightType::Q5_K
        } else {
            wanted
        }
    }

    fn down_projection(&self, layer: usize) -> WeightType {
        match self.file_type {
            FileType::Q2_K => WeightType::Q3_K,
            FileType::Q3_K_M if layer < self.layers / 16 => WeightType::Q5_K,
            FileType::Q3_K_M => WeightType::Q4_K,
            FileType::Q4_K_S if layer < self.layers / 8 => WeightType::Q5_K,
            FileType::Q4_K_M | FileType::Q5_K_M if self.gets_more_bits(layer) => WeightType::Q6_K,
            other => other.base(),
        }
    }

    /// The first and the last eighth of the layers, and every third one between them.
    fn gets_more_bits(&self, layer: usize) -> bool {
        let eighth = self.layers / 8;
        layer < eighth || layer >= 7 * self.layers / 8 || (layer - eighth) % 3 == 2
    }
}

/// The type that llama.cpp takes for rows that are no whole number of blocks of 256.
fn with_blocks_of_32(dtype: WeightType) -> WeightType {
    match dtype {
        WeightType::Q2_K | WeightType::Q3_K => WeightType::Q4_0,
        WeightType::Q4_K => WeightType::Q5_0,
        WeightType::Q5_K => WeightType::Q5_1,
        WeightType::Q6_K => WeightType::Q8_0,
        other => other,
    }
}

fn layer_and_part(name: &str) -> Option<(usize, &str)> {
    let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, part))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mixture(file_type: FileType, layers: usize, heads_per_kv_head: usize) -> Mixture {
        Mixture { file_type, layers, heads_per_kv_head, is_tied: false }
    }

    /// The digits of the types that `part` of each layer gets, in rows of 256.
    fn bits(mixture: &Mixture, part: &str) -> String {
        let digit = |layer| {
            let choice = mixture.choose(&format!("model.layers.{layer}.{part}.weight"), 256);
            assert_eq!(choice.dtype, choice.wanted);
            choice.dtype.name()[1..2].to_owned()
        };
        (0..mixture.layers).map(digit).collect()
    }

    #[test]
    fn layers_get_the_types_that_llama_cpp_chooses() {
        // Value, output and down projections, and the other ones.
        let expected = [
            (FileType::Q2_K, ["4".repeat(17), "3".repeat(17), "3".repeat(17), "2".repeat(17)]),
            (
                FileType::Q3_K_M,
                ["55444444444444444".into(), "4".repeat(17), "54444444444444444".into(), "3".repeat(17)],
            ),
            (
                FileType::Q4_K_S,
                ["55554444444444444".into(), "4".repeat(17), "55444444444444444".into(), "4".repeat(17)],
            ),
            (
                FileType::Q4_K_M,
                ["66446446446446666".into(), "4".repeat(17), "66446446446446666".into(), "4".repeat(17)],
            ),
            (FileType::Q5_K_S, ["5".repeat(17), "5".repeat(17), "5".repeat(17), "5".repeat(17)]),
            (
                FileType::Q5_K_M,
                ["66556556556556666".into(), "5".repeat(17), "66556556556556666".into(), "5".repeat(17)],
            ),
            (FileType::Q6_K, ["6".repeat(17), "6".repeat(17), "6".repeat(17), "6".repeat(17)]),
        ];
        for (file_type, [value, output, down, other]) in expected {
            let mixture = mixture(file_type, 17, 4);
            assert_eq!(bits(&mixture, "self_attn.v_proj"), value, "{file_type:?}");
            assert_eq!(bits(&mixture, "self_attn.o_proj"), output, "{file_type:?}");
            assert_eq!(bits(&mixture, "mlp.down_proj"), down, "{file_type:?}");
            for part in ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"] {
                assert_eq!(bits(&mixture, part), other, "{file_type:?} {part}");
            }
            assert_eq!(mixture.choose(LM_HEAD, 256).dtype, WeightType::Q6_K);
            assert_eq!(mixture.choose(EMBED_TOKENS, 256).dtype, file_type.base());
            let tied = Mixture { is_tied: true, ..mixture };
            assert_eq!(tied.choose(EMBED_TOKENS, 256).dtype, WeightType::Q6_K);
        }
        assert_eq!(bits(&mixture(FileType::Q2_K, 2, 3), "self_attn.v_proj"), "33");
        // 70B, and 65B, which has as many key-value heads as heads.
        assert_eq!(bits(&mixture(FileType::Q2_K, 80, 8), "self_attn.v_proj"), "5".repeat(80));
        assert_eq!(bits(&mixture(FileType::Q2_K, 80, 1), "self_attn.v_proj"), "3".repeat(80));
    }

    #[test]
    fn rows_that_are_no_whole_blocks_get_smaller_blocks_or_f16() {
        let value = "model.layers.0.self_attn.v_proj.weight";
        let gate = "model.layers.0.mlp.gate_proj.weight";
        let expected = [
            (FileType::Q2_K, gate, WeightType::Q4_0),
            (FileType::Q3_K_M, gate, WeightType::Q4_0),
            (FileType::Q4_K_M, gate, WeightType::Q5_0),
            (FileType::Q5_K_M, gate, WeightType::Q5_1),
            (FileType::Q5_K_M, value, WeightType::Q8_0),
            (FileType::Q4_K_M, LM_HEAD, WeightType::Q8_0),
            (FileType::Q4_0, gate, WeightType::Q4_0),
        ];
        for (file_type, name, dtype) in expected {
            let mixture = mixture(file_type, 8, 4);
            assert_eq!(mixture.choose(name, 96).dtype, dtype, "{file_type:?} {name}");
            assert_eq!(mixture.choose(name, 40).dtype, WeightType::F16, "{file_type:?} {name}");
        }
    }

    #[test]
    fn file_types_have_one_name_and_number_each() {
        for (index, file_type) in FileType::ALL.into_iter().enumerate() {
            let others = &FileType::ALL[..index];
            assert!(others.iter().all(|other| other.name() != file_type.name()), "{file_type:?}");
            assert!(others.iter().all(|other| other.number() != file_type.number()), "{file_type:?}");
            assert!(format!("{file_type:?}").eq_ignore_ascii_case(file_type.name()));
        }
    }
}
