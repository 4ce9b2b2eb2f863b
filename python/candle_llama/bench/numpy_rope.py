"""Rotary frequencies for the NumPy model, of every type that Llama checkpoints use.

Written from the papers, independently of the Rust core, so that comparing both shows an error in either.

Sources: Su et al., "RoFormer", arXiv 2104.09864; Peng et al., "YaRN", arXiv 2309.00071; transformers'
`modeling_rope_utils.py` for the names of the parameters and their defaults.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["attention_factor", "inv_freq", "rope_parameters"]

Array = NDArray[Any]


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary parameters from either spelling, with `rope_theta` and `rope_type` filled in.

    transformers 5 writes `rope_parameters`; transformers 4 writes `rope_theta` and `rope_scaling`, whose
    kind is `rope_type` or, in older files, `type`.
    """
    parameters = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    return parameters


def inv_freq(config: Mapping[str, Any], head_dim: int, prompt_tokens: int = 0) -> Array:
    """Returns the angle per position of each rotated pair, `(head_dim / 2,)` float32.

    The result is float32 whatever the model's type, because checkpoints are trained with these values.

    Args:
        config: config.json as a dict.
        head_dim: Width of a head.
        prompt_tokens: Length of the prompt, which `dynamic` frequencies depend on.

    Raises:
        ValueError: If the rotary type is not known.
    """
    parameters = rope_parameters(config)
    theta, kind = parameters["rope_theta"], parameters["rope_type"]
    pairs = np.arange(head_dim // 2)
    if kind == "dynamic":
        context = config["max_position_embeddings"]
        factor = parameters["factor"]
        grown = factor * max(prompt_tokens, context) / context - (factor - 1)
        theta *= grown ** (head_dim / (head_dim - 2))
    plain = np.float32(1.0) / np.float32(theta) ** (2 * pairs.astype(np.float32) / np.float32(head_dim))
    if kind in ("default", "dynamic"):
        return plain
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"rope_type {kind!r} is not supported by the NumPy model")
    slow = plain / np.float32(parameters["factor"])
    if kind == "linear":
        return slow
    # Both types count the turns of a pair within the original context. Fast pairs keep their frequency,
    # slow pairs get theirs divided by `factor`, and pairs in between get a blend of both.
    context = parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
    if kind == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        turns = context * plain.astype(np.float64) / (2 * math.pi)
        keep = np.clip((turns - low) / (high - low), 0, 1)
    else:
        first = _pair_with_turns(parameters.get("beta_fast") or 32, context, theta, head_dim)
        last = _pair_with_turns(parameters.get("beta_slow") or 1, context, theta, head_dim)
        if parameters.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        keep = 1 - np.clip((pairs - first) / max(last - first, 0.001), 0, 1)
    blended: Array = ((1 - keep) * slow + keep * plain).astype(np.float32)
    return blended


def attention_factor(config: Mapping[str, Any]) -> float:
    """Returns the factor of all cosines and sines: 1 except for YaRN."""
    parameters = rope_parameters(config)
    if parameters["rope_type"] != "yarn":
        return 1.0
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def growth(mscale: float) -> float:
        return 1.0 + 0.1 * mscale * math.log(max(parameters["factor"], 1.0))

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return growth(parameters["mscale"]) / growth(parameters["mscale_all_dim"])
    return growth(1.0)


def _pair_with_turns(turns: float, context: float, theta: float, head_dim: int) -> float:
    """Returns the index, as a fraction, of the pair that makes `turns` turns within the context."""
    return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
