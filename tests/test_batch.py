"""Several prompts in one call: each result equals that of the prompt alone."""

import time
from pathlib import Path
from typing import Any

import pytest

import candle_llama
import tiny as checkpoints

PROMPTS = [
    "hello",
    "the world and",
    [checkpoints.BOS, 5, 6],
    "a",
    "wording " * 60,
    # All lengths that are computed differently; together they are too many tokens for one forward pass.
    [7] * 16,
    [8] * 17,
    [9] * 128,
    [5, 9] * 200,
    "and",
    "the",
    "he",
    "in",
    "s",
    "é",
]


def facts(out: candle_llama.Completion) -> tuple[Any, ...]:
    return out.text, out.token_ids, out.finish_reason, out.stop_reason, out.logprobs, out.prompt_tokens


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 7, "top_p": 0.9},
        {"temperature": 0, "logprobs": 2, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 1, "stop": ["a", "e"], "min_new_tokens": 3},
        {"temperature": 1.0, "seed": 3, "ignore_eos": True},
    ],
)
@pytest.mark.parametrize("compute", ["auto", "exact"])
def test_results_equal_those_of_each_prompt_alone(tiny: Path, compute: str, options: dict[str, Any]) -> None:
    with candle_llama.load(tiny, device="cpu", compute=compute) as llm:
        expected = [facts(llm.generate(prompt, max_new_tokens=24, **options)) for prompt in PROMPTS]
        assert [facts(out) for out in llm.generate(PROMPTS, max_new_tokens=24, **options)] == expected


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_results_equal_those_alone_for_every_type_of_weights(tmp_path: Path, type_name: str) -> None:
    path = checkpoints.write_gguf(tmp_path / "model.gguf", matrix_type=type_name)
    options = {"max_new_tokens": 16, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    with candle_llama.load(path, device="cpu") as llm:
        expected = [facts(llm.generate(prompt, **options)) for prompt in PROMPTS]
        for count in (2, 3, 5, len(PROMPTS)):
            assert [facts(out) for out in llm.generate(PROMPTS[:count], **options)] == expected[:count]


def test_the_candle_engine_takes_lists_too(tiny: Path) -> None:
    with candle_llama.load(tiny, device="cpu", engine="candle") as llm:
        expected = [facts(llm.generate(prompt, max_new_tokens=5)) for prompt in PROMPTS[:3]]
        assert [facts(out) for out in llm.generate(PROMPTS[:3], max_new_tokens=5)] == expected


def test_a_bad_prompt_is_refused_before_any_work(demo_llm: candle_llama.Llama) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match="vocab_size"):
        demo_llm.generate(["Once upon a time", [10**6]], max_new_tokens=3000, ignore_eos=True)
    with pytest.raises(candle_llama.ContextLengthError):
        demo_llm.generate(["Once upon a time", [5] * 100_000], max_new_tokens=3000, ignore_eos=True)
    assert time.monotonic() - started < 2


def test_each_prompt_has_its_own_timeout(demo_llm: candle_llama.Llama) -> None:
    outs = demo_llm.generate(["Once upon", "A B"], max_new_tokens=8000, timeout=0.5, ignore_eos=True)
    assert [out.finish_reason for out in outs] == ["timeout", "timeout"]
    assert all(out.token_ids for out in outs)


def test_prompts_beyond_the_largest_batch_run_later(tiny: Path) -> None:
    with candle_llama.load(tiny, device="cpu") as llm:
        expected = [llm.generate(prompt, max_new_tokens=9).token_ids for prompt in PROMPTS]
        many = [out.token_ids for out in llm.generate(PROMPTS * 9, max_new_tokens=9)]
        assert many == expected * 9


def test_32_prompts_share_every_forward_pass(tiny: Path) -> None:
    with candle_llama.load(tiny, device="cpu") as llm:
        outs = llm.generate([[5 + i, 6, 7] for i in range(33)], max_new_tokens=64, ignore_eos=True)
    # The time of a forward pass is added, to the nanosecond, to every sequence that takes part in it.
    # The sums of 63 passes are equal only if all passes were shared.
    decode_seconds = [out.stats.decode_seconds for out in outs]
    assert len(set(decode_seconds[:32])) == 1
    assert decode_seconds[32] != decode_seconds[0]
