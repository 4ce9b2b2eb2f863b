"""The shapes of well-known Llamas, as their config.json has them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SHAPES", "Shape"]

LLAMA3_SPECIAL_TOKENS = {
    128000: "<|begin_of_text|>",
    128001: "<|end_of_text|>",
    128008: "<|eom_id|>",
    128009: "<|eot_id|>",
}


@dataclass(frozen=True)
class Shape:
    """A model's shape, as its config.json has it."""

    name: str
    aliases: tuple[str, ...]
    config: Mapping[str, Any]
    special_tokens: Mapping[int, str] = field(default_factory=lambda: LLAMA3_SPECIAL_TOKENS)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by Hugging Face's names, in the order in which they are computed."""
        c = self.config
        hidden, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        head_dim = c.get("head_dim", hidden // heads)
        query, key = heads * head_dim, c["num_key_value_heads"] * head_dim
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
        for i in range(c["num_hidden_layers"]):
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (hidden,)
        if not c["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (c["vocab_size"], hidden)
        return shapes

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.tensors().values())


def _config(**fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **fields,
    }


def _llama3_config(rope_factor: float, **fields: Any) -> dict[str, Any]:
    return _config(
        bos_token_id=128000,
        eos_token_id=128001,
        max_position_embeddings=131072,
        num_key_value_heads=8,
        rope_scaling={
            "factor": rope_factor,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        rope_theta=500000.0,
        vocab_size=128256,
        **fields,
    )


SHAPES = (
    Shape(
        "llama-3.2-1b",
        ("1b",),
        _llama3_config(
            32.0,
            head_dim=64,
            hidden_size=2048,
            intermediate_size=8192,
            num_attention_heads=32,
            num_hidden_layers=16,
            tie_word_embeddings=True,
        ),
    ),
    Shape(
        "llama-3.2-3b",
        ("3b",),
        _llama3_config(
            32.0,
            head_dim=128,
            hidden_size=3072,
            intermediate_size=8192,
            num_attention_heads=24,
            num_hidden_layers=28,
            tie_word_embeddings=True,
        ),
    ),
    Shape(
        "llama-3.1-8b",
        ("8b",),
        _llama3_config(
            8.0,
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_hidden_layers=32,
            tie_word_embeddings=False,
        ),
    ),
    Shape(
        "smollm2-135m",
        (),
        _config(
            bos_token_id=1,
            eos_token_id=2,
            hidden_size=576,
            intermediate_size=1536,
            max_position_embeddings=8192,
            num_attention_heads=9,
            num_hidden_layers=30,
            num_key_value_heads=3,
            pad_token_id=2,
            rope_scaling=None,
            rope_theta=100000,
            tie_word_embeddings=True,
            vocab_size=49152,
        ),
        {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"},
    ),
)
