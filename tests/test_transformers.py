"""The tiny checkpoints against logits computed by transformers; see tests/golden/transformers_logits.py."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import candle_llama
import tiny
from candle_llama.bench.numpy_llama import NumpyLlama

GOLDEN = Path(__file__).parent / "golden" / "transformers_logits.json"
SCRIPT = runpy.run_path(str(GOLDEN.with_suffix(".py")))
LOGITS: dict[str, Any] = {
    name: value
    for name, value in json.loads(GOLDEN.read_text(encoding="utf-8")).items()
    if isinstance(value, dict)
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[tiny.Config, Path]]:
    return SCRIPT["checkpoints"](tmp_path_factory.mktemp("transformers"))


def assert_golden(name: str, logits: np.ndarray[Any, Any]) -> None:
    golden = LOGITS[name]
    assert np.abs(logits).max() == pytest.approx(golden["largest"], rel=2e-4)
    chosen = logits[np.ix_(SCRIPT["ROWS"], SCRIPT["COLUMNS"])]
    np.testing.assert_allclose(chosen, golden["logits"], rtol=0, atol=2e-4 * golden["largest"])


def test_every_variant_has_its_logits() -> None:
    assert set(LOGITS) == {*tiny.VARIANTS, "bfloat16"}


@pytest.mark.parametrize("name", sorted(LOGITS))
def test_logits_equal_those_of_transformers(
    checkpoints: dict[str, tuple[tiny.Config, Path]], name: str
) -> None:
    config, path = checkpoints[name]
    ids = SCRIPT["prompt"](config)
    # First the reference of all other tests, in float64, so that only transformers rounds.
    assert_golden(name, NumpyLlama.load(path, np.float64).forward(ids))
    with candle_llama.load(path, device="cpu", compute="exact") as llm:
        assert_golden(name, llm.logits(ids))
