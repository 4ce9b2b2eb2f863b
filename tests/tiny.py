"""Tiny seeded Llama checkpoints, written the way the real ones are.

`write_checkpoint` makes a folder of config.json, safetensors and a byte-level tokenizer; `write_gguf` makes
the same model as one GGUF file. Both take a config dict from `tiny_config` and give the same weights for the
same seed, so a folder and a file can be compared. Sizes are odd where the format allows it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_llama.bench.storage_types import STORAGE_TYPES
from candle_llama.bench.synthetic import (
    byte_alphabet,
    byte_level_tokenizer,
    safetensors_header,
    to_bfloat16,
    write_json,
)

Array = NDArray[Any]
Config = dict[str, Any]

SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
MERGES = [
    *("o r", "w or", "wor l", "worl d", "Ġ world", "h e", "l l", "ll o", "he llo", "t h", "th e", "Ġ the"),
    *("i n", "in g", "a n", "an d", "Ġ and", "Ġ a", "o u", "Ġ w", "r e", "o n", "e r", "Ġ s", "a t", "e n"),
    *("Ġ c", "i s", "e s", "e d", "Ġ b", "Ġ f", "Ċ Ċ", "Ã ©", "ð Ł", "ðŁ ĺ", "ðŁĺ Ģ", "0 0"),
]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

LLAMA3_ROPE: Config = {
    # With these values a head of 10 to 16 dimensions has fast, blended and slow pairs.
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


# With these values a head of 10 to 16 dimensions has kept, blended and divided pairs.
YARN_ROPE: Config = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}


VOCABULARY = [*byte_alphabet(), *("".join(merge.split(" ")) for merge in MERGES), *SPECIAL_TOKENS]
TOKEN_IDS = {token: token_id for token_id, token in enumerate(VOCABULARY)}
VOCAB_SIZE = len(VOCABULARY)
BOS = TOKEN_IDS["<|begin|>"]
EOS = TOKEN_IDS["<|end|>"]
END_OF_TURN = TOKEN_IDS["<|im_end|>"]


def tiny_config(**changes: Any) -> Config:
    """config.json of a Llama of two layers, 40 wide, in the spelling of transformers 4; `None` removes a key.

    The default groups four heads of 10 over two key/value heads and ties the head to the embedding.
    """
    config: Config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
        **changes,
    }
    return {key: value for key, value in config.items() if value is not None or key not in changes}


def tiny_config_v5(rope: Config | None = None, **changes: Any) -> Config:
    """The same config in the spelling of transformers 5: `rope_parameters` and `dtype`."""
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **(rope or {})}
    return tiny_config(
        rope_theta=None,
        rope_scaling=None,
        torch_dtype=None,
        rope_parameters=parameters,
        dtype="float32",
        **changes,
    )


# Configs that all engines must compute alike. All but "odd-vocabulary" have the tokenizer's vocabulary.
VARIANTS: dict[str, Config] = {
    "gqa-tied": tiny_config(),
    "mha-untied": tiny_config(num_key_value_heads=4, tie_word_embeddings=False),
    "mha-implied": tiny_config(num_key_value_heads=None),
    "mqa": tiny_config(num_key_value_heads=1),
    "llama3-rope": tiny_config(rope_theta=50000.0, rope_scaling=LLAMA3_ROPE),
    "llama3-rope-older-key": tiny_config(
        rope_scaling={"type": "llama3", **{k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"}}
    ),
    "v5-default": tiny_config_v5({"rope_theta": 500000.0}),
    "v5-llama3-untied": tiny_config_v5({"rope_theta": 50000.0, **LLAMA3_ROPE}, tie_word_embeddings=False),
    "head-dim-same": tiny_config(head_dim=10),
    "head-dim-wider": tiny_config(head_dim=16),
    "odd-vocabulary": tiny_config(vocab_size=131, bos_token_id=1, eos_token_id=2),
    "attention-bias": tiny_config(attention_bias=True),
    "mlp-bias": tiny_config(mlp_bias=True, num_key_value_heads=4),
    "all-biases": tiny_config(attention_bias=True, mlp_bias=True, head_dim=12),
    "gelu": tiny_config(hidden_act="gelu"),
    "gelu-tanh": tiny_config(hidden_act="gelu_pytorch_tanh"),
    "quick-gelu": tiny_config(hidden_act="quick_gelu"),
    "linear-rope": tiny_config(rope_scaling={"type": "linear", "factor": 2.5}),
    "v5-linear-rope": tiny_config_v5({"rope_type": "linear", "factor": 2.5}),
    # Prompts of more than 16 tokens exceed the original context.
    "dynamic-rope": tiny_config(rope_scaling={"type": "dynamic", "factor": 8.0}, max_position_embeddings=16),
    "v5-dynamic-rope": tiny_config_v5({"rope_type": "dynamic", "factor": 8.0}, max_position_embeddings=16),
    "yarn-rope": tiny_config(rope_scaling=YARN_ROPE),
    "yarn-rope-defaults": tiny_config(
        rope_scaling={"type": "yarn", "factor": 16.0}, max_position_embeddings=512, head_dim=16
    ),
    "v5-yarn-rope-mscale": tiny_config_v5({**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.2}),
    "v5-yarn-rope-not-truncated": tiny_config_v5(
        {**YARN_ROPE, "truncate": False, "attention_factor": 1.3}, head_dim=16
    ),
    "odd-sizes": tiny_config(
        hidden_size=45, intermediate_size=77, num_attention_heads=3, num_key_value_heads=3, head_dim=14
    ),
    "one-layer-large-eps": tiny_config(num_hidden_layers=1, rms_norm_eps=1e-2),
}


def head_dim(config: Mapping[str, Any]) -> int:
    """Features per head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def tensor_shapes(config: Mapping[str, Any], lm_head: bool | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes by Hugging Face's names; `lm_head` None means: present unless the config ties it."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (heads * head_dim(config), hidden),
            prefix + "self_attn.k_proj.weight": (kv_heads * head_dim(config), hidden),
            prefix + "self_attn.v_proj.weight": (kv_heads * head_dim(config), hidden),
            prefix + "self_attn.o_proj.weight": (hidden, heads * head_dim(config)),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
        }
        for module, flag in (("self_attn", "attention_bias"), ("mlp", "mlp_bias")):
            if config.get(flag):
                shapes |= {
                    name.removesuffix("weight") + "bias": shape[:1]
                    for name, shape in shapes.items()
                    if name.startswith(prefix + module)
                }
    shapes["model.norm.weight"] = (hidden,)
    if lm_head if lm_head is not None else not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def tiny_tensors(config: Mapping[str, Any], seed: int = 0, lm_head: bool | None = None) -> dict[str, Array]:
    """Seeded float32 weights, scaled so that attention is not flat and logits spread over several units."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for name, shape in tensor_shapes(config, lm_head).items():
        values = generator.standard_normal(shape)
        if name.endswith("bias"):
            values *= 0.3
        elif len(shape) == 1:
            values = 1.0 + 0.2 * values
        elif "embed_tokens" in name:
            # Small compared with what the layers add: else a tied head would mostly repeat the last token.
            values *= 0.4
        else:
            values *= 1.6 / np.sqrt(shape[1])
        tensors[name] = values.astype(np.float32)
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, Array], dtype: str = "float32") -> None:
    """Writes one safetensors file of "float32", "float16" or "bfloat16"."""
    type_name, layout = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2"), "bfloat16": ("BF16", "<u2")}[
        dtype
    ]
    header = safetensors_header(
        {name: values.shape for name, values in tensors.items()}, type_name, np.dtype(layout).itemsize
    )
    encode = to_bfloat16 if dtype == "bfloat16" else np.asarray
    path.write_bytes(header + b"".join(encode(v).astype(layout).tobytes() for v in tensors.values()))


def tokenizer_json(add_bos: bool = True) -> Config:
    """A byte-level BPE tokenizer of `VOCABULARY` in the format of the tokenizers library."""
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}]
    begin = [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}]
    put_bos_first = {
        "type": "TemplateProcessing",
        "single": begin + sequence,
        "pair": begin + sequence + [{"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [BOS], "tokens": ["<|begin|>"]}},
    }
    return byte_level_tokenizer(
        {token: i for token, i in TOKEN_IDS.items() if token not in SPECIAL_TOKENS},
        {token: TOKEN_IDS[token] for token in SPECIAL_TOKENS},
        merges=[merge.split(" ") for merge in MERGES],
        post_processor=put_bos_first if add_bos else None,
    )


def write_tokenizer(folder: Path, add_bos: bool = True) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    write_json(folder / "tokenizer.json", tokenizer_json(add_bos))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin|>",
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
            "model_max_length": 1024,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    lm_head: bool | None = None,
    tokenizer: bool = True,
    add_bos: bool = True,
    tensors: Mapping[str, Array] | None = None,
) -> Path:
    """Writes a checkpoint folder.

    Args:
        folder: Created if missing.
        config: From `tiny_config`; its torch_dtype or dtype is replaced by `dtype`.
        seed: Seed of the weights.
        dtype: "float32", "float16" or "bfloat16".
        shards: Number of safetensors files; with more than one there is an index.
        lm_head: Whether lm_head.weight is in the file, whatever the config says; None: as the config says.
        tokenizer: Whether to write a tokenizer.
        add_bos: Whether the tokenizer puts <|begin|> before a text.
        tensors: Weights to write instead of the seeded ones.

    Returns:
        The folder.
    """
    config = dict(config or tiny_config())
    config["dtype" if "rope_parameters" in config else "torch_dtype"] = dtype
    tensors = tensors if tensors is not None else tiny_tensors(config, seed, lm_head)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": config["bos_token_id"], "eos_token_id": [config["eos_token_id"], END_OF_TURN]},
    )
    if tokenizer:
        write_tokenizer(folder, add_bos)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for shard in range(shards):
        file_name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        write_safetensors(folder / file_name, {name: tensors[name] for name in part}, dtype)
        weight_map |= dict.fromkeys(part, file_name)
    width = 4 if dtype == "float32" else 2
    total = width * sum(values.size for values in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    return folder


def gguf_config(**changes: Any) -> Config:
    """A config whose rows are whole quant blocks of 32, as the quantised types need."""
    return tiny_config(**{"hidden_size": 64, "intermediate_size": 96, **changes})


def permute_rows(values: Array, heads: int) -> Array:
    """Orders query or key rows as llama.cpp's converter does: the two halves of a head interleaved."""
    halves = values.reshape(heads, 2, len(values) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(values.shape)


GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    stem, _, suffix = name.rpartition(".")
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_PARTS[part]}.{suffix}"


def random_blocks(shape: tuple[int, ...], type_name: str) -> Array:
    """Random quant blocks of a type that the `gguf` package cannot write; the weights have the usual size."""
    block = STORAGE_TYPES[type_name].block
    count = shape[0] * shape[1] // STORAGE_TYPES[type_name].block_len
    generator = np.random.default_rng([*type_name.encode(), *shape])
    blocks = np.frombuffer(generator.bytes(count * block.itemsize), dtype=block).copy()
    for field in ("d", "dmin"):
        if field in (block.names or ()):
            blocks[field] = 1.0
    spread = STORAGE_TYPES[type_name].decode(blocks).std()
    for field in ("d", "dmin"):
        if field in (block.names or ()):
            blocks[field] = 1.6 / np.sqrt(shape[1]) / spread
    return blocks.view(np.uint8).reshape(shape[0], -1)


def write_gguf(
    path: Path,
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    matrix_type: str = "F32",
    embedding_type: str | None = None,
    lm_head: bool | None = None,
    rope_factors: Array | None = None,
    add_bos: bool = False,
    vocabulary_only: bool = False,
    leave_out: str | None = None,
    split_max_tensors: int = 0,
) -> Path:
    """Writes a GGUF file with the `gguf` package.

    Args:
        path: The file.
        config: From `gguf_config`.
        seed: Seed of the weights; the same seed gives the same weights as in `write_checkpoint`.
        matrix_type: One of ggml's types, such as "Q4_0"; norms are always F32. The K and IQ4 types hold
            random blocks, not the weights of `write_checkpoint`.
        embedding_type: The same for the embedding and the head; None: as `matrix_type`.
        lm_head: Whether output.weight is in the file; None: as the config says.
        rope_factors: Written as rope_freqs.weight, `(head_dim / 2,)`, as converters do for llama3.
        add_bos: The value of tokenizer.ggml.add_bos_token.
        vocabulary_only: Leave the tensors out.
        leave_out: Leave out tensors with this in their name.
        split_max_tensors: Write several files, `name-00001-of-00003.gguf` and so on; 0: one.

    Returns:
        The file.
    """
    import gguf

    config = dict(config or gguf_config())
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split_max_tensors)
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(head_dim(config))
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in VOCABULARY]
    )
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(END_OF_TURN)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHAT_TEMPLATE)

    tensors = {} if vocabulary_only else tiny_tensors(config, seed, lm_head)
    for name, values in tensors.items():
        type_name = "F32" if values.ndim == 1 else matrix_type
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            type_name = embedding_type or matrix_type
        elif "q_proj" in name:
            values = permute_rows(values, heads)
        elif "k_proj" in name:
            values = permute_rows(values, kv_heads)
        if leave_out is not None and leave_out in gguf_name(name):
            continue
        kind = gguf.GGMLQuantizationType[type_name]
        stored = (
            random_blocks(values.shape, type_name)
            if type_name.endswith("_K") or type_name.startswith("IQ4_")
            else gguf.quantize(values, kind)
        )
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
