"""Checkpoints as training and conversion tools leave them: odd, but with everything that a Llama needs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import candle_llama
import tiny as checkpoints

IDS = [5, 77, 130, 12]
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def logits(path: Path, **options: Any) -> tuple[np.ndarray, list[str]]:
    """The logits of `IDS`, and the notes."""
    with candle_llama.load(path, strict=True, compute="exact", **options) as llm:
        return llm.logits(IDS), llm.load_report.notes


def tied() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config = checkpoints.tiny_config(tie_word_embeddings=True)
    return config, checkpoints.tiny_tensors(config)


@pytest.mark.parametrize("engine", ["cpu", "tensor", "candle"])
def test_a_tied_head_that_lost_its_embedding_is_the_embedding(tmp_path: Path, engine: str) -> None:
    config, tensors = tied()
    expected, _ = logits(checkpoints.write_checkpoint(tmp_path / "usual", config), engine=engine)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    odd = checkpoints.write_checkpoint(tmp_path / "odd", config, tensors=tensors)
    got, notes = logits(odd, engine=engine)
    assert np.array_equal(got, expected)
    assert any("lm_head.weight is the embedding" in note for note in notes)


def test_quantize_and_estimate_memory_know_a_tied_head_without_embedding(tmp_path: Path) -> None:
    config, tensors = tied()
    usual = checkpoints.write_checkpoint(tmp_path / "usual", config)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    odd = checkpoints.write_checkpoint(tmp_path / "odd", config, tensors=tensors)
    assert candle_llama.estimate_memory(odd) == candle_llama.estimate_memory(usual)
    for path in (usual, odd):
        candle_llama.quantize(path, path.with_suffix(".gguf"), dtype="f32")
    files = [path.with_suffix(".gguf").read_bytes() for path in (usual, odd)]
    assert len(files[0]) == len(files[1])
    assert np.array_equal(*(logits(path.with_suffix(".gguf"))[0] for path in (usual, odd)))


def context(folder: Path, **changes: Any) -> int:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with candle_llama.load(folder, strict=True) as llm:
        return llm.config.context_length


def test_linear_rope_extends_the_context_to_max_sequence_length(tmp_path: Path) -> None:
    # vicuna-7b-v1.5-16k has 4096, 16384 and 4.
    scaling = {"type": "linear", "factor": 4.0}
    config = checkpoints.tiny_config(max_position_embeddings=64, rope_scaling=scaling)
    folder = checkpoints.write_checkpoint(tmp_path / "model", config)
    assert context(folder) == 64
    assert context(folder, max_sequence_length=256) == 256
    candle_llama.quantize(folder, tmp_path / "model.gguf", "f32")
    with candle_llama.load(tmp_path / "model.gguf", strict=True) as llm:
        assert llm.config.context_length == 256
    assert context(folder, max_sequence_length=1000) == 256
    assert context(folder, max_sequence_length=32) == 64
    assert context(folder, max_sequence_length=256, rope_scaling=None) == 64


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_negative_bos_is_none(tmp_path: Path, file: str) -> None:
    path = checkpoints.write_checkpoint(tmp_path / "model") / file
    given = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**given, "bos_token_id": -1}))
    assert logits(path.parent)[0].shape == (4, checkpoints.VOCAB_SIZE)


def test_attention_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "model", checkpoints.tiny_config(is_causal=False))
    with pytest.raises(candle_llama.UnsupportedModelError, match="is_causal: false, only true"):
        candle_llama.load(folder)
    checkpoints.write_checkpoint(folder, checkpoints.tiny_config(is_causal=True))
    assert logits(folder)[1] == []


def test_an_adapter_beside_its_model_is_a_note(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    assert [note for note in logits(folder)[1] if "adapter_config.json is ignored" in note]


@pytest.mark.parametrize("flag", [False, None])
def test_an_untied_model_without_embedding_is_refused(tmp_path: Path, flag: bool | None) -> None:
    config = checkpoints.tiny_config(tie_word_embeddings=False)
    tensors = checkpoints.tiny_tensors(config)
    del tensors[EMBEDDING]
    if flag is None:
        del config["tie_word_embeddings"]
    odd = checkpoints.write_checkpoint(tmp_path / "odd", config, tensors=tensors)
    with pytest.raises(candle_llama.CheckpointError, match=r"embed_tokens.weight` is missing"):
        candle_llama.load(odd)


RENAMES: dict[str, Callable[[str], str]] = {
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "without model.": lambda name: name.removeprefix("model."),
    "compiled layers": lambda name: name.replace("model.layers.0.", "model.layers.0._orig_mod."),
}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_a_prefix_of_all_names_is_a_note(tmp_path: Path, rename: Callable[[str], str], tie: bool) -> None:
    config = checkpoints.tiny_config(tie_word_embeddings=tie)
    expected, _ = logits(checkpoints.write_checkpoint(tmp_path / "usual", config))
    tensors = {rename(name): tensor for name, tensor in checkpoints.tiny_tensors(config).items()}
    odd = checkpoints.write_checkpoint(tmp_path / "odd", config, tensors=tensors)
    got, notes = logits(odd)
    assert np.array_equal(got, expected)
    assert any("tensors have other names than usual" in note for note in notes)


def test_a_prefix_of_some_names_is_refused(tmp_path: Path) -> None:
    tensors = checkpoints.tiny_tensors(checkpoints.tiny_config())
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors["other." + name] = tensors.pop(name)
    odd = checkpoints.write_checkpoint(tmp_path / "odd", tensors=tensors)
    with pytest.raises(candle_llama.CheckpointError, match=r"q_proj\.weight` is missing"):
        candle_llama.load(odd)


def test_an_index_may_name_a_tied_head_that_no_shard_has(tmp_path: Path) -> None:
    config, _ = tied()
    odd = checkpoints.write_checkpoint(tmp_path / "odd", config, shards=2)
    expected, _ = logits(odd)
    index = odd / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][HEAD] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    assert np.array_equal(logits(odd)[0], expected)
    (odd / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(candle_llama.CheckpointError, match="which has no such tensor"):
        candle_llama.load(odd)


@pytest.mark.parametrize(
    "change",
    [
        {"max_position_embeddings": 1024.0},
        {"eos_token_id": -1, "pad_token_id": -1},
        {"eos_token_id": [checkpoints.EOS, -1]},
    ],
)
def test_odd_numbers_in_the_config(tmp_path: Path, llm: candle_llama.Llama, change: dict[str, Any]) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "odd", checkpoints.tiny_config(**change))
    options: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": change.get("eos_token_id")}))
    with candle_llama.load(folder) as odd:
        assert odd.config.max_position_embeddings == 1024
        assert checkpoints.EOS in odd.config.eos_token_ids
        assert odd.generate("hello", **options).token_ids == llm.generate("hello", **options).token_ids


def test_a_left_over_quantization_config_is_a_warning(tmp_path: Path) -> None:
    quantization = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    expected, _ = logits(checkpoints.write_checkpoint(tmp_path / "usual"))
    odd = checkpoints.write_checkpoint(tmp_path / "odd", checkpoints.tiny_config() | quantization)
    with pytest.warns(UserWarning, match=r'quantization_config \("bitsandbytes"\) is ignored'):
        llm = candle_llama.load(odd, compute="exact")
    with llm:
        assert np.array_equal(llm.logits(IDS), expected)
    long = {"quantization_config": {"quant_method": "q" * 100_000}}
    odd = checkpoints.write_checkpoint(tmp_path / "long", checkpoints.tiny_config() | long)
    with pytest.warns(UserWarning, match="is ignored") as caught, candle_llama.load(odd):
        assert len(str(caught[0].message)) < 300
    tensors = checkpoints.tiny_tensors(checkpoints.tiny_config())
    tensors["model.layers.0.self_attn.q_proj.qweight"] = np.zeros((2, 2), np.float32)
    odd = checkpoints.write_checkpoint(
        tmp_path / "other", checkpoints.tiny_config() | quantization, tensors=tensors
    )
    with pytest.raises(candle_llama.UnsupportedModelError, match="quantization_config"):
        candle_llama.load(odd)


FOLDERS: dict[str, tuple[list[str], str]] = {
    "a LoRA adapter": (
        ["adapter_config.json", "adapter_model.safetensors"],
        "LoRA adapter without its base model: merge",
    ),
    "Meta's release": (
        ["consolidated.00.pth", "params.json", "tokenizer.model"],
        "Meta's original release: convert it with",
    ),
    "a hub cache's repository": (["refs/main", "snapshots/0123abc/config.json"], 'pass "org/name"'),
}


@pytest.mark.parametrize(("files", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_is_no_llama_is_named(tmp_path: Path, files: list[str], message: str) -> None:
    folder = tmp_path / "models--org--name"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=message):
        candle_llama.load(folder)


def quantised_by_mlx(name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    if tensor.ndim == 1:
        return {name: tensor}
    packed = np.zeros((tensor.shape[0], tensor.shape[1] // 8), np.float32)
    return {name.replace("weight", "packed"): packed, name.replace("weight", "scales"): packed[:, :1]}


Q_PROJ = "model.layers.0.self_attn.q_proj."
FOREIGN: dict[str, tuple[Callable[[str, np.ndarray], dict[str, np.ndarray]], str]] = {
    "PEFT": (
        lambda name, tensor: {
            "base_model.model." + name.replace("q_proj.", "q_proj.base_layer."): tensor,
        },
        "PEFT's names; merge the adapter",
    ),
    "GPTQ": (lambda name, tensor: {name.replace("q_proj.weight", "q_proj.qweight"): tensor}, "GPTQ or AWQ"),
    "MLX": (quantised_by_mlx, "MLX"),
    "ZeRO-3": (
        lambda name, tensor: {name: tensor[:0] if name.startswith(Q_PROJ) else tensor},
        "is empty: DeepSpeed ZeRO-3 saved it",
    ),
}


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN)
def test_tensors_of_other_tools_are_named(
    tmp_path: Path, change: Callable[[str, np.ndarray], dict[str, np.ndarray]], message: str
) -> None:
    tensors = checkpoints.tiny_tensors(checkpoints.tiny_config())
    foreign = {name: tensor for pair in tensors.items() for name, tensor in change(*pair).items()}
    path = checkpoints.write_checkpoint(tmp_path / "it", tensors=foreign)
    with pytest.raises(candle_llama.CandleLlamaError, match=message):
        candle_llama.load(path)


@pytest.mark.parametrize("kind", ["adapter", "imatrix", "mmproj"])
def test_a_gguf_file_that_is_no_model_is_named(tmp_path: Path, kind: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "it.gguf", "llama")
    writer.add_type(kind)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((8, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(candle_llama.UnsupportedModelError, match=f'general.type: "{kind}"'):
        candle_llama.load(tmp_path / "it.gguf")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_git_lfs_pointer_is_named_whatever_the_file(tmp_path: Path, name: str) -> None:
    path = checkpoints.write_checkpoint(tmp_path / "it")
    (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(candle_llama.CheckpointError, match="is a Git LFS pointer"):
        candle_llama.load(path).tokenizer.encode("a")
