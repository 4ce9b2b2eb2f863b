"""Writes transformers_logits.json: transformers' logits of the tiny checkpoints of tiny.VARIANTS.

Needs torch and transformers. From the repository's root:

    PYTHONPATH=python:tests python tests/golden/transformers_logits.py

The weights are seeded, so the file holds only logits: some rows and columns of each variant. The bfloat16
checkpoint is computed in float32: its parameters are rounded, but the rotary frequencies are not, as in a
real checkpoint. The prompts are longer than the original context of the `dynamic` variants.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import tiny

PATH = Path(__file__).with_suffix(".json")
TOKENS = 70
ROWS = [0, 1, 17, 42, 69]
COLUMNS = [0, 3, 32, 65, 101, 130]


def prompt(config: dict[str, Any]) -> list[int]:
    """The seeded prompt."""
    return np.random.default_rng(7).integers(0, config["vocab_size"], TOKENS).tolist()


def checkpoints(folder: Path) -> dict[str, tuple[dict[str, Any], Path]]:
    """Every variant in float32, and one in bfloat16."""
    found = {
        name: (config, tiny.write_checkpoint(folder / name, config, tokenizer=False))
        for name, config in tiny.VARIANTS.items()
    }
    config = tiny.VARIANTS["llama3-rope"]
    path = tiny.write_checkpoint(folder / "bfloat16", config, dtype="bfloat16", tokenizer=False)
    return {**found, "bfloat16": (config, path)}


def main() -> None:
    import torch
    import transformers

    golden: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, path) in checkpoints(Path(folder)).items():
            model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
            with torch.no_grad():
                logits = model(torch.tensor([prompt(config)])).logits[0].numpy()
            golden[name] = {
                "largest": float(np.abs(logits).max()),
                "logits": [[round(float(logits[row, column]), 6) for column in COLUMNS] for row in ROWS],
            }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    PATH.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
