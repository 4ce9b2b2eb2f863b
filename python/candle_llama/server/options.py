"""Translates requests' fields to the engine's sampling parameters."""

from typing import Any

from candle_llama.server import errors
from candle_llama.server.schema import Sampling

_SAME = (
    *(
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
    ),
    *("stop", "stop_token_ids", "ignore_eos", "cache_salt"),
)
_MAX_STOPS = 64


def sampling(body: Sampling, max_new_tokens: int, logprobs: int | None) -> dict[str, Any]:
    """Returns the sampling parameters; what the request leaves out takes the model's default."""
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if body.min_tokens:
        given["min_new_tokens"] = body.min_tokens
    if isinstance(body.stop, list) and len(body.stop) > _MAX_STOPS:
        raise errors.refused("stop", f"got {len(body.stop)} texts, this server accepts {_MAX_STOPS}")
    # Clients leave these empty rather than out.
    for name in ("stop", "stop_token_ids", "cache_salt"):
        if not given.get(name, True):
            del given[name]
    if body.logit_bias:
        given["logit_bias"] = _bias(body.logit_bias)
    if logprobs is not None:
        given["logprobs"] = logprobs
    return {**given, "max_new_tokens": max_new_tokens}


def for_answers(body: Sampling, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the parameters of each of `n` answers: with a seed, the seeds are seed, seed + 1 and so on."""
    n = body.n or 1
    if body.seed is None:
        return [given] * n
    if not -(2**63) <= body.seed < 2**63:
        raise errors.refused("seed", "expected an integer of 64 bits")
    # OpenAI's seeds are signed, the engine's are not.
    return [{**given, "seed": (body.seed + index) % 2**64} for index in range(n)]


def _bias(given: dict[str, float]) -> dict[int, float]:
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) < 11):
            raise errors.refused("logit_bias", f"{errors.shown(key)!r} is no token id")
    return {int(key): value for key, value in given.items()}
