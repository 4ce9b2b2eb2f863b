"""The Llama model in plain NumPy: the reference of the tests, and an engine of the benchmark.

Start reading at `NumpyLlama.forward`. Nothing here uses the Rust core, so that an error in the core cannot
be an error here too. Weights are `(out_features, in_features)`, activations `(tokens, features)`.

Sources: the paper "LLaMA: Open and Efficient Foundation Language Models"; Hugging Face's `modeling_llama.py`
for names and the rotary convention (the two halves of a head are rotated, not neighbouring pairs).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from candle_llama.bench.numpy_rope import attention_factor, inv_freq
from candle_llama.bench.read_checkpoint import read_checkpoint

__all__ = ["NumpyLlama"]

Array = NDArray[Any]

# Rows of a prompt that are computed at once. This bounds the attention scores, which are rows x positions.
CHUNK_ROWS = 512


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Scales rows of `x` `(tokens, features)` to unit root mean square, then by `weight` `(features,)`."""
    mean_square: Array = np.mean(x * x, axis=-1, keepdims=True)
    normed: Array = x / np.sqrt(mean_square + eps) * weight
    return normed


def sigmoid(x: Array) -> Array:
    """The logistic function, computed by tanh, which cannot overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def erf(x: Array) -> Array:
    """The error function; NumPy has none for arrays."""
    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype))


def gelu_tanh(x: Array) -> Array:
    """GELU with the tanh approximation of the normal distribution."""
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


# `hidden_act` by transformers' names.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
}


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs `(i, i + head_dim / 2)` of `x` `(tokens, heads, head_dim)`.

    `cos` and `sin` are `(tokens, 1, head_dim / 2)`.
    """
    left, right = np.split(x, 2, axis=-1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def softmax(scores: Array) -> Array:
    """Softmax over the last axis."""
    shares: Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return shares


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias`."""

    weight: Array  # (out_features, in_features)
    bias: Array | float  # (out_features,), or 0

    def __call__(self, x: Array) -> Array:
        return np.asarray(x @ self.weight.T + self.bias, dtype=x.dtype)


@dataclass(frozen=True)
class Layer:
    """The weights of one decoder layer; norms are `(hidden_size,)`."""

    input_norm: Array
    q_proj: Linear  # hidden_size -> heads * head_dim
    k_proj: Linear  # hidden_size -> kv_heads * head_dim
    v_proj: Linear  # hidden_size -> kv_heads * head_dim
    o_proj: Linear  # heads * head_dim -> hidden_size
    post_attention_norm: Array
    gate_proj: Linear  # hidden_size -> intermediate_size
    up_proj: Linear  # hidden_size -> intermediate_size
    down_proj: Linear  # intermediate_size -> hidden_size


class NumpyLlama:
    """A Llama with a key/value cache for one sequence.

    Args:
        config: config.json as a dict, of transformers 4 or 5.
        tensors: Weights by Hugging Face's names, and `rope_freqs.weight` where a GGUF file has it.
            Without `lm_head.weight` the embedding is the output head.
        dtype: The type of all arithmetic, float32 or float64.

    Raises:
        ValueError: If this model does not support the config.
        KeyError: If a tensor is missing.

    Example:
        >>> model = NumpyLlama.load("my-llama")  # doctest: +SKIP
        >>> model.generate([1, 2, 3], max_new_tokens=8)  # doctest: +SKIP
    """

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, Array], dtype: DTypeLike = np.float32
    ) -> None:
        activation = config.get("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act={activation!r} is not supported by the NumPy model")
        self.activation = ACTIVATIONS[activation]
        self.config = dict(config)
        self.dtype = np.dtype(dtype)
        self.num_heads: int = config["num_attention_heads"]
        self.num_kv_heads: int = config.get("num_key_value_heads") or self.num_heads
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.eps: float = config.get("rms_norm_eps", 1e-6)

        def get(name: str) -> Array:
            return np.asarray(tensors[name], dtype=self.dtype)

        def linear(name: str) -> Linear:
            bias = f"{name}.bias"
            # The tensors decide, as a checkpoint has biases if and only if its config says so.
            return Linear(get(f"{name}.weight"), get(bias) if bias in tensors else 0.0)

        self.embed_tokens = get("model.embed_tokens.weight")  # (vocab_size, hidden_size)
        self.norm = get("model.norm.weight")
        self.lm_head = get("lm_head.weight") if "lm_head.weight" in tensors else self.embed_tokens
        self.layers = [
            Layer(
                input_norm=get(f"{prefix}.input_layernorm.weight"),
                q_proj=linear(f"{prefix}.self_attn.q_proj"),
                k_proj=linear(f"{prefix}.self_attn.k_proj"),
                v_proj=linear(f"{prefix}.self_attn.v_proj"),
                o_proj=linear(f"{prefix}.self_attn.o_proj"),
                post_attention_norm=get(f"{prefix}.post_attention_layernorm.weight"),
                gate_proj=linear(f"{prefix}.mlp.gate_proj"),
                up_proj=linear(f"{prefix}.mlp.up_proj"),
                down_proj=linear(f"{prefix}.mlp.down_proj"),
            )
            for prefix in (f"model.layers.{i}" for i in range(config["num_hidden_layers"]))
        ]
        self.rope_freqs = np.asarray(tensors.get("rope_freqs.weight", 1.0), dtype=np.float32)
        self.attention_factor = attention_factor(config)
        self._begin(prompt_tokens=0)
        self.reset()

    @classmethod
    def load(cls, path: str | Path, dtype: DTypeLike = np.float32) -> Self:
        """Reads a checkpoint folder or a GGUF file; every weight becomes `dtype`."""
        config, tensors = read_checkpoint(path, dtype)
        return cls(config, tensors, dtype)

    def reset(self) -> None:
        """Clears the KV cache."""
        self.length = 0
        # (2, layers, kv_heads, capacity, head_dim): keys, then values.
        self.cache = np.empty((2, len(self.layers), self.num_kv_heads, 0, self.head_dim), dtype=self.dtype)

    def forward(self, token_ids: Sequence[int], start: int = 0, last_only: bool = False) -> Array:
        """Computes the logits of `token_ids` at positions `start`, `start + 1`, ...

        The tokens attend to the cached positions before `start`, and are added to the cache. Cached
        positions from `start` on are discarded.

        Args:
            token_ids: At least one token of the vocabulary.
            start: Position of the first one, at most the number of cached positions.
            last_only: Return only the last row, without computing the output head of the others.

        Returns:
            Logits `(tokens, vocab_size)`, or `(1, vocab_size)`.

        Raises:
            ValueError: If there is no token, or `start` leaves a gap.
            IndexError: If a token is outside the vocabulary.
        """
        tokens = np.asarray(token_ids, dtype=np.int64)
        if tokens.ndim != 1 or tokens.size == 0:
            raise ValueError("token_ids must be a flat, non-empty sequence")
        if not 0 <= start <= self.length:
            raise ValueError(f"start is {start}, but {self.length} positions are cached")
        if tokens.min() < 0 or tokens.max() >= len(self.embed_tokens):
            raise IndexError(f"a token is outside the vocabulary of {len(self.embed_tokens)}")
        if start == 0:
            self._begin(tokens.size)
        self.length = start
        self._reserve(start + tokens.size)
        chunks = [self._decoder(tokens[i : i + CHUNK_ROWS]) for i in range(0, tokens.size, CHUNK_ROWS)]
        x = chunks[-1][-1:] if last_only else np.concatenate(chunks)
        return rms_norm(x, self.norm, self.eps) @ self.lm_head.T

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Continues a prompt greedily by exactly `max_new_tokens` tokens, end-of-sequence tokens included."""
        output: list[int] = []
        pending = list(prompt_ids)
        position = 0
        while len(output) < max_new_tokens:
            logits = self.forward(pending, start=position, last_only=True)
            position += len(pending)
            pending = [int(logits[0].argmax())]
            output += pending
        return output

    def _begin(self, prompt_tokens: int) -> None:
        """Sets the rotary frequencies, which may depend on the prompt's length."""
        frequencies = inv_freq(self.config, self.head_dim, prompt_tokens)
        self.inv_freq = (frequencies / self.rope_freqs).astype(self.dtype)

    def _reserve(self, positions: int) -> None:
        """Makes room in the cache. Its capacity doubles, so that most tokens need no copy of the cache."""
        capacity = self.cache.shape[3]
        if positions > capacity:
            grown = np.empty(
                (*self.cache.shape[:3], max(positions, 2 * capacity), self.head_dim), dtype=self.dtype
            )
            grown[:, :, :, : self.length] = self.cache[:, :, :, : self.length]
            self.cache = grown

    def _decoder(self, tokens: Array) -> Array:
        """Runs all layers on the next `tokens`; returns `(tokens, hidden_size)` before the last norm."""
        x = self.embed_tokens[tokens]
        positions = np.arange(self.length, self.length + tokens.size, dtype=self.dtype)
        angles = positions[:, None, None] * self.inv_freq  # (tokens, 1, head_dim / 2)
        cos, sin = np.cos(angles) * self.attention_factor, np.sin(angles) * self.attention_factor
        for index, layer in enumerate(self.layers):
            x = x + self._attention(index, layer, rms_norm(x, layer.input_norm, self.eps), cos, sin)
            h = rms_norm(x, layer.post_attention_norm, self.eps)
            x = x + layer.down_proj(self.activation(layer.gate_proj(h)) * layer.up_proj(h))
        self.length += tokens.size
        return x

    def _attention(self, index: int, layer: Layer, x: Array, cos: Array, sin: Array) -> Array:
        """Causal attention of `x` `(tokens, hidden_size)` to the cache and to itself; returns x's shape."""
        tokens = len(x)
        total = self.length + tokens
        q = rotate(layer.q_proj(x).reshape(tokens, self.num_heads, self.head_dim), cos, sin)
        k = rotate(layer.k_proj(x).reshape(tokens, self.num_kv_heads, self.head_dim), cos, sin)
        v = layer.v_proj(x).reshape(tokens, self.num_kv_heads, self.head_dim)
        keys, values = self.cache[:, index]  # each (kv_heads, capacity, head_dim)
        keys[:, self.length : total] = k.swapaxes(0, 1)
        values[:, self.length : total] = v.swapaxes(0, 1)

        # Query heads that share a key/value head become rows of one product:
        # (kv_heads, group * tokens, head_dim) x (kv_heads, head_dim, total).
        group = self.num_heads // self.num_kv_heads
        rows = q.swapaxes(0, 1).reshape(self.num_kv_heads, group * tokens, self.head_dim)
        scores = rows @ keys[:, :total].swapaxes(1, 2) / math.sqrt(self.head_dim)
        scores = scores.reshape(self.num_kv_heads, group, tokens, total)
        future = np.arange(total) > np.arange(self.length, total)[:, None]  # (tokens, total)
        scores[:, :, future] = -np.inf
        weights = softmax(scores).reshape(self.num_kv_heads, group * tokens, total)
        mixed = (weights @ values[:, :total]).reshape(self.num_heads, tokens, self.head_dim)
        by_token = mixed.swapaxes(0, 1).reshape(tokens, self.num_heads * self.head_dim)
        return layer.o_proj(by_token)
