"""`quantize`: blocks, files, and that a written model equals its source."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import candle_llama
import tiny
from candle_llama import CheckpointError, UnsupportedModelError, cli
from candle_llama.bench.numpy_llama import NumpyLlama
from candle_llama.bench.read_checkpoint import read_gguf_metadata
from candle_llama.bench.synthetic import write_synthetic
from quantizing import load, names_in

TYPES = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "f16", "bf16", "f32"]
# The types of a mixture's matrices, in a model of two layers: with rows of 256, and with shorter ones.
MIXTURES = {
    "q2_k": ({"Q2_K", "Q3_K", "Q6_K"}, {"Q4_0", "Q8_0"}),
    "q3_k_m": ({"Q3_K", "Q4_K", "Q5_K", "Q6_K"}, {"Q4_0", "Q5_0", "Q5_1", "Q8_0"}),
    "q4_k_s": ({"Q4_K", "Q5_K", "Q6_K"}, {"Q5_0", "Q5_1", "Q8_0"}),
    "q4_k_m": ({"Q4_K", "Q6_K"}, {"Q5_0", "Q8_0"}),
    "q5_k_s": ({"Q5_K", "Q6_K"}, {"Q5_1", "Q8_0"}),
    "q5_k_m": ({"Q5_K", "Q6_K"}, {"Q5_1", "Q8_0"}),
    "q6_k": ({"Q6_K"}, {"Q8_0"}),
}
TEXTS = [
    "",
    "a",
    " a",
    "Hello world, the thé 😀!\n\n  and 12345.67",
    "<|begin|>the<|end|> the",
    "\r\n\t\x00 x",
]
INEXPRESSIBLE = {
    "gelu": "hidden_act",
    "gelu-tanh": "hidden_act",
    "quick-gelu": "hidden_act",
    "dynamic-rope": "rope_type",
    "v5-dynamic-rope": "rope_type",
    "v5-yarn-rope-not-truncated": "truncate",
}


def random_ids(count: int = 90, vocab_size: int = tiny.VOCAB_SIZE) -> list[int]:
    return np.random.default_rng(1).integers(0, vocab_size, count).tolist()


# Blocks


def test_golden_blocks_are_what_the_script_writes() -> None:
    golden = Path(__file__).parent.parent / "crates/kernels/tests/golden/quantized.txt"
    script = runpy.run_path(str(golden.with_suffix(".py")))
    assert script["lines"]() == golden.read_text(encoding="ascii"), f"run {golden.with_suffix('.py')}"


@pytest.mark.parametrize("dtype", TYPES)
def test_the_file_holds_the_blocks_that_the_gguf_package_makes(tmp_path: Path, dtype: str) -> None:
    config = tiny.gguf_config(tie_word_embeddings=False, attention_bias=True, num_key_value_heads=2)
    tensors = tiny.tiny_tensors(config)
    path = tiny.write_checkpoint(tmp_path / "model", config)
    assert cli.main(["quantize", str(path), str(tmp_path / "out.gguf"), "--type", dtype.upper()]) == 0
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert set(stored) == {tiny.gguf_name(name) for name in tensors}
    for name, values in tensors.items():
        if "q_proj" in name:
            values = tiny.permute_rows(values, 4)
        elif "k_proj" in name:
            values = tiny.permute_rows(values, 2)
        kind = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else dtype.upper()]
        found = stored[tiny.gguf_name(name)]
        assert (found.tensor_type, found.shape.tolist()) == (kind, list(values.shape[::-1])), name
        assert found.data.tobytes() == gguf.quantize(values, kind).tobytes(), name


# A written model equals its source


@pytest.mark.parametrize("name", sorted(set(tiny.VARIANTS) - set(INEXPRESSIBLE)))
def test_float32_files_give_the_folder_s_logits_bit_for_bit(tmp_path: Path, name: str) -> None:
    config = tiny.VARIANTS[name]
    has_tokenizer = config["vocab_size"] == tiny.VOCAB_SIZE
    path = tiny.write_checkpoint(tmp_path / "model", config, tokenizer=has_tokenizer)
    report = candle_llama.quantize(path, tmp_path / "out.gguf", "f32", tokenizer=has_tokenizer)
    assert report.tensors.keys() == {"F32"}
    assert report.bytes == (tmp_path / "out.gguf").stat().st_size
    ids = random_ids(vocab_size=config["vocab_size"])
    with load(path) as folder, load(tmp_path / "out.gguf") as file:
        expected, got = folder.logits(ids), file.logits(ids)
        assert folder.load_report.lm_head == file.load_report.lm_head
        if has_tokenizer:
            for text in TEXTS:
                assert folder.tokenizer.encode(text) == file.tokenizer.encode(text)
    if "llama3" in name:
        # A float32 divisor may change the last bit of a blended frequency.
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    else:
        np.testing.assert_array_equal(got, expected)
    reference = NumpyLlama.load(tmp_path / "out.gguf").forward(ids)
    np.testing.assert_allclose(got, reference, atol=2e-4 * np.abs(reference).max(), rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_unchanged(tmp_path: Path, dtype: str) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.VARIANTS["mha-untied"], dtype=dtype, shards=2)
    short = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    candle_llama.quantize(path, tmp_path / "out.gguf", short)
    candle_llama.quantize(path, tmp_path / "wide.gguf", "f32")
    ids = random_ids()
    with load(path) as folder, load(tmp_path / "out.gguf") as file, load(tmp_path / "wide.gguf") as wide:
        np.testing.assert_array_equal(file.logits(ids), folder.logits(ids))
        np.testing.assert_array_equal(wide.logits(ids), folder.logits(ids))


@pytest.mark.parametrize("dtype", TYPES)
def test_quantised_files_equal_numpy(tmp_path: Path, dtype: str) -> None:
    config = tiny.gguf_config(rope_scaling=tiny.LLAMA3_ROPE, rope_theta=50000.0)
    path = tiny.write_checkpoint(tmp_path / "model", config, dtype="bfloat16")
    report = candle_llama.quantize(path, tmp_path / "out.gguf", dtype)
    assert report.tensors.keys() == {"F32", dtype.upper()}
    assert report.notes == []
    ids = random_ids(40)
    reference = NumpyLlama.load(tmp_path / "out.gguf").forward(ids)
    with load(tmp_path / "out.gguf") as llm:
        assert llm.load_report.lm_head == "tied"
        error = np.abs(llm.logits(ids) - reference).max()
    assert error <= 2e-4 * np.abs(reference).max()


@pytest.mark.parametrize("hidden_size", [256, 96])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures_equal_numpy_and_what_load_makes(tmp_path: Path, mixture: str, hidden_size: int) -> None:
    config = tiny.gguf_config(
        hidden_size=hidden_size, intermediate_size=2 * hidden_size, tie_word_embeddings=hidden_size == 256
    )
    folder = tiny.write_checkpoint(tmp_path / "model", config, dtype="bfloat16")
    report = candle_llama.quantize(folder, tmp_path / "out.gguf", mixture)
    wide, narrow = MIXTURES[mixture]
    types = {"F32"} | (wide if hidden_size == 256 else narrow)
    assert report.tensors.keys() == types
    wanted = {note.split(" of ")[1].split(";")[0] for note in report.notes}
    assert wanted == (set() if hidden_size == 256 else wide)
    number = read_gguf_metadata(tmp_path / "out.gguf")["general.file_type"]
    assert number == gguf.LlamaFileType[f"MOSTLY_{mixture.upper()}"]
    ids = random_ids(40)
    reference = NumpyLlama.load(tmp_path / "out.gguf").forward(ids)
    with load(tmp_path / "out.gguf") as written:
        expected = written.logits(ids)
        assert written.load_report.storage.keys() == types
    assert np.abs(expected - reference).max() <= 2e-4 * np.abs(reference).max()
    options: dict[str, Any] = {"device": "cpu", "engine": "cpu", "compute": "exact", "quantize": mixture}
    with candle_llama.load(folder, **options) as llm:
        assert llm.load_report.storage.keys() == types
        np.testing.assert_array_equal(llm.logits(ids), expected)
    assert candle_llama.estimate_memory(folder, **options).weights == llm.load_report.bytes


def test_a_mixture_stores_rows_that_are_no_whole_blocks_as_f16(tmp_path: Path) -> None:
    config = tiny.gguf_config(hidden_size=40, intermediate_size=512)
    path = tiny.write_checkpoint(tmp_path / "model", config)
    report = candle_llama.quantize(path, tmp_path / "out.gguf", "q4_k_m")
    assert {name: entry.count for name, entry in report.tensors.items()} == {
        "F16": 13,
        "F32": 5,
        "Q4_K": 1,
        "Q6_K": 1,
    }
    assert [note.split(",")[0] for note in report.notes] == [
        "11 tensors are stored as F16",
        "2 tensors are stored as F16",
    ]
    with candle_llama.load(path, device="cpu", quantize="q4_k_m", compute="exact") as llm:
        assert llm.load_report.storage.keys() == {"F32", "Q4_K", "Q6_K"}
        note = "13 matrices stay as they are stored, because their rows cannot be cut into whole blocks"
        assert [text.split(";")[0] for text in llm.load_report.notes] == [note]
    with candle_llama.load(tmp_path / "out.gguf", device="cpu", quantize="Q8_0") as llm:
        reasons = [text.split(", because ")[1].split(";")[0] for text in llm.load_report.notes]
        assert reasons == ["their rows cannot be cut into whole blocks", "they are quantised already"]


def test_rows_that_are_no_whole_blocks_become_f16(tmp_path: Path) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.gguf_config(hidden_size=40))
    report = candle_llama.quantize(path, tmp_path / "out.gguf", "q8_0")
    assert {name: entry.count for name, entry in report.tensors.items()} == {"F16": 13, "F32": 5, "Q8_0": 2}
    assert len(report.notes) == 1
    assert "13 tensors are stored as F16" in report.notes[0]
    reference = NumpyLlama.load(tmp_path / "out.gguf").forward(random_ids(20))
    with load(tmp_path / "out.gguf") as llm:
        assert np.abs(llm.logits(random_ids(20)) - reference).max() <= 2e-4 * np.abs(reference).max()


def test_the_head_is_written_if_it_is_used(tmp_path: Path) -> None:
    def names(folder: Path) -> set[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            candle_llama.quantize(folder, tmp_path / "out.gguf", "f16", force=True)
        return {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}

    tied, untied = tiny.tiny_config(), tiny.tiny_config(tie_word_embeddings=False)
    same = tiny.tiny_tensors(tied)
    same["lm_head.weight"] = same["model.embed_tokens.weight"]
    cases = [
        ("tied", tied, None, None, False),
        ("tied-equal", tied, None, same, False),
        ("tied-different", tied, True, None, True),
        ("untied-absent", untied, False, None, False),
        ("untied", untied, None, None, True),
    ]
    for name, config, lm_head, tensors, expected in cases:
        path = tiny.write_checkpoint(tmp_path / name, config, lm_head=lm_head, tensors=tensors)
        assert ("output.weight" in names(path)) is expected, name


def test_end_tokens_template_and_bos_are_kept(tmp_path: Path) -> None:
    path = tiny.write_checkpoint(tmp_path / "model")
    candle_llama.quantize(path, tmp_path / "out.gguf", "f32")
    messages = [{"role": "user", "content": "hi"}]
    with load(path) as folder, load(tmp_path / "out.gguf") as file:
        assert folder.tokenizer.apply_chat_template(messages) == file.tokenizer.apply_chat_template(messages)
        assert folder.tokenizer.bos_token_id == file.tokenizer.bos_token_id == tiny.BOS
        assert folder.tokenizer.eos_token_id == file.tokenizer.eos_token_id == tiny.EOS
        assert sorted(file.config.eos_token_id) == sorted([tiny.EOS, tiny.END_OF_TURN])
        for key in ("rms_norm_eps", "rope_theta", "max_position_embeddings", "head_dim", "vocab_size"):
            assert getattr(folder.config, key) == getattr(file.config, key), key


def test_a_gguf_file_is_copied_except_for_its_matrices(tmp_path: Path) -> None:
    config = tiny.gguf_config(num_key_value_heads=1, tie_word_embeddings=False, attention_bias=True)
    path = tiny.write_gguf(
        tmp_path / "in.gguf", config, rope_factors=np.linspace(1, 8, 8), add_bos=True, split_max_tensors=7
    )
    first = next(tmp_path.glob("in-00001-of-*.gguf")) if not path.exists() else path
    candle_llama.quantize(first, tmp_path / "out.gguf", "q8_0")
    before, after = gguf.GGUFReader(first), gguf.GGUFReader(tmp_path / "out.gguf")
    own = ("GGUF.", "split.", "general.file_type", "general.quantization_version")
    for key, field in before.fields.items():
        if not key.startswith(own):
            assert after.fields[key].contents() == field.contents(), key
    ids = random_ids(30)
    reference = NumpyLlama.load(tmp_path / "out.gguf").forward(ids)
    with load(tmp_path / "out.gguf") as llm, load(first) as original:
        assert np.abs(llm.logits(ids) - reference).max() <= 2e-4 * np.abs(reference).max()
        assert np.abs(llm.logits(ids) - original.logits(ids)).max() <= 0.05 * np.abs(reference).max()


def test_quantised_tensors_are_copied_dequantised_or_refused(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "in.gguf", matrix_type="Q8_0")
    for dtype in ("q4_0", "f16"):
        with pytest.raises(UnsupportedModelError, match="allow_requantize") as raised:
            candle_llama.quantize(path, tmp_path / "out.gguf", dtype)
        assert raised.value.key == "requantizing"
        assert names_in(tmp_path) == ["in.gguf"]
    ids = random_ids(30)
    with load(path) as original:
        expected = original.logits(ids)
        for dtype in ("q8_0", "f32"):
            candle_llama.quantize(path, tmp_path / f"{dtype}.gguf", dtype)
            with load(tmp_path / f"{dtype}.gguf") as llm:
                np.testing.assert_allclose(llm.logits(ids), expected, atol=1e-4, rtol=0)
    report = candle_llama.quantize(path, tmp_path / "q4_0.gguf", "q4_0", allow_requantize=True)
    assert report.tensors.keys() == {"F32", "Q4_0"}


# Refusals


@pytest.mark.parametrize(("name", "key"), INEXPRESSIBLE.items())
def test_a_config_that_gguf_has_no_key_for_is_refused_by_name(tmp_path: Path, name: str, key: str) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.VARIANTS[name])
    with pytest.raises(UnsupportedModelError, match="no key") as raised:
        candle_llama.quantize(path, tmp_path / "out.gguf", "f32")
    assert raised.value.key == key
    assert names_in(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("model.layers.1.mlp.down_proj.weight", np.nan, "q4_0"),
        ("model.layers.1.mlp.down_proj.weight", np.inf, "f32"),
        ("model.layers.0.self_attn.q_proj.weight", -np.inf, "q8_0"),
        ("model.layers.0.self_attn.k_proj.weight", 1e6, "f16"),
        ("model.layers.0.self_attn.q_proj.weight", 9e6, "q8_0"),
        ("model.norm.weight", np.nan, "q4_0"),
        ("model.embed_tokens.weight", np.nan, "q5_1"),
        ("model.embed_tokens.weight", np.nan, "q4_k_m"),
        ("model.layers.1.mlp.down_proj.weight", np.inf, "q3_k_m"),
        ("model.layers.0.mlp.up_proj.weight", 1e8, "q4_k_s"),
        ("model.layers.0.mlp.up_proj.weight", -1e38, "q2_k"),
    ],
)
def test_a_weight_that_cannot_be_stored_is_refused_by_name_and_place(
    tmp_path: Path, name: str, value: float, dtype: str
) -> None:
    config = tiny.gguf_config(hidden_size=256, intermediate_size=512)
    tensors = tiny.tiny_tensors(config)
    place = (3, 35) if tensors[name].ndim == 2 else (3,)
    tensors[name][place] = value
    path = tiny.write_checkpoint(tmp_path / "model", config, tensors=tensors)
    (tmp_path / "out.gguf").write_text("old")
    with pytest.raises(CheckpointError) as raised:
        candle_llama.quantize(path, tmp_path / "out.gguf", dtype, force=True)
    assert raised.value.tensor == name
    assert raised.value.got == pytest.approx(value, nan_ok=True)
    assert str(list(place)) in str(raised.value)
    assert (tmp_path / "out.gguf").read_text() == "old"
    assert names_in(tmp_path) == ["model", "out.gguf"]


def test_an_existing_file_is_replaced_only_with_force(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "out.gguf").write_text("old")
    with pytest.raises(FileExistsError, match="force") as raised:
        candle_llama.quantize(tiny, tmp_path / "out.gguf")
    assert raised.value.filename == str(tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "old"
    candle_llama.quantize(tiny, tmp_path / "out.gguf", force=True)
    candle_llama.quantize(tmp_path / "out.gguf", tmp_path / "out.gguf", "f32", force=True)
    assert names_in(tmp_path) == ["out.gguf"]
    load(tmp_path / "out.gguf").close()


def test_a_destination_that_cannot_be_written_is_refused_first(tmp_path: Path, tiny: Path) -> None:
    for destination, error in [
        (tmp_path, ValueError),
        (tmp_path / "none" / "out.gguf", FileNotFoundError),
        (Path(os.devnull), ValueError),
        ("..", ValueError),
    ]:
        with pytest.raises(error):
            candle_llama.quantize(tiny, destination, force=True)
    for arguments, message in [
        ((tiny, None), "destination must be a path, not NoneType"),
        ((tiny, tmp_path / "x.gguf", None), "dtype must be a str, not NoneType"),
    ]:
        with pytest.raises(TypeError, match=message):
            candle_llama.quantize(*arguments)
    with pytest.raises(TypeError, match="force must be a bool, not str"):
        candle_llama.quantize(tiny, tmp_path / "x.gguf", force="no")
    with pytest.raises(TypeError, match="strict must be a bool, not str"):
        candle_llama.load(tiny, strict="no")
    with pytest.raises(ValueError, match=r"destination: character \d+ is '\\ud800'"):
        candle_llama.quantize(tiny, tmp_path / "\ud800.gguf")
    with pytest.raises(ValueError, match=r"q8_0, q4_0"):
        candle_llama.quantize(tiny, tmp_path / "out.gguf", "q3_0")
    for threads in (0, -1, 10**6):
        with pytest.raises(ValueError, match="threads"):
            candle_llama.quantize(tiny, tmp_path / "out.gguf", threads=threads)
    with pytest.raises(FileNotFoundError):
        candle_llama.quantize(tmp_path / "model.gguf", tmp_path / "out.gguf")
    assert names_in(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_os_error(tmp_path: Path, tiny: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        candle_llama.quantize(tiny, tmp_path / "out.gguf")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs POSIX limits")
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, tiny: Path) -> None:
    code = (
        "import resource, signal, sys, candle_llama\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "candle_llama.quantize(sys.argv[1], sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(tiny), str(tmp_path / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "OSError" in done.stderr
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("dtype", ["q5_1", "q2_k"])
def test_threads_do_not_change_a_bit(tmp_path: Path, dtype: str) -> None:
    path = tiny.write_checkpoint(tmp_path / "model", tiny.gguf_config(hidden_size=2048, vocab_size=1000))
    files = []
    for threads in (1, 3, 100):
        candle_llama.quantize(path, tmp_path / "out.gguf", dtype, force=True, threads=threads)
        files.append((tmp_path / "out.gguf").read_bytes())
    assert files[0] == files[1] == files[2]


# The command


def test_json_is_one_object(tmp_path: Path, tiny: Path, command: Any) -> None:
    done = command("quantize", tiny, tmp_path / "out.gguf", "--type", "q8_0", "--json")
    assert done.returncode == 0
    assert done.stderr.startswith("candle-llama: 15 tensors are stored as F16")
    assert len(done.stderr.splitlines()) == 1
    printed = json.loads(done.stdout)
    assert printed["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert printed["seconds"] > 0
    assert printed["tensors"]["F32"]["count"] == 5
    assert printed["warnings"] == []
    done = command("quantize", tiny, tmp_path / "out.gguf")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert command("quantize", tiny, tmp_path / "out.gguf", "--force").returncode == 0
    for wrong in ((), (tiny,), (tiny, tmp_path / "out.gguf", "--type", "q9")):
        assert command("quantize", *wrong).returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_is_shown_in_a_terminal_and_then_removed(tmp_path: Path, tiny: Path) -> None:
    import pexpect

    arguments = ["-m", "candle_llama", "quantize", str(tiny), str(tmp_path / "out.gguf")]
    child = pexpect.spawn(sys.executable, arguments, encoding="utf-8", timeout=20)
    child.expect(r"\rquantize \[#{30}\] 100%\r +\r")
    child.expect("F16 +15 tensors")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


INTERRUPTED = """
import sys, candle_llama
print("begun", flush=True)
try:
    candle_llama.quantize(sys.argv[1], sys.argv[2], sys.argv[3], force=True)
    print("ended", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """270 MB of weights."""
    return write_synthetic("smollm2-135m", cache_dir=tmp_path_factory.mktemp("synthetic"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("dtype", ["q5_1", "q2_k"])
def test_ctrl_c_returns_within_200_ms_and_leaves_the_old_file(
    tmp_path: Path, large: Path, dtype: str
) -> None:
    (tmp_path / "out.gguf").write_text("old")
    delays: list[float] = []
    command = [sys.executable, "-c", INTERRUPTED, str(large), str(tmp_path / "out.gguf"), dtype]
    while not delays or (min(delays) > 0.2 and len(delays) < 3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "begun\n"
            # Wait until it is in the middle of the tensors.
            while not any(file.stat().st_size > 10**7 for file in tmp_path.glob(".candle-llama-*.tmp")):
                assert child.poll() is None
                time.sleep(0.001)
            sent = time.monotonic()
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "interrupted\n"
            delays.append(time.monotonic() - sent)
        assert child.returncode == 0
        assert names_in(tmp_path) == ["out.gguf"]
        assert (tmp_path / "out.gguf").read_text() == "old"
    assert min(delays) <= 0.2


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")
def test_memory_is_bounded_whatever_the_size(tmp_path: Path, large: Path) -> None:
    # The limit covers allocated memory; the system may drop pages of the mapped file at any time. The
    # tokenizer is left out, because its memory does not depend on the size of the weights.
    code = (
        "import resource, sys, candle_llama\n"
        "def data():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmData')) * 1024\n"
        "limit = data() + 100 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
        "report = candle_llama.quantize(sys.argv[1], sys.argv[2], 'f32', tokenizer=False, threads=2)\n"
        "print(report.bytes)\n"
    )
    command = [sys.executable, "-c", code, str(large), str(tmp_path / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500 * 10**6


NO_THREAD = """
import os, resource, sys
import candle_llama
os.chdir(sys.argv[1])
if os.getuid() == 0:
    os.setuid(65534)  # The limit does not apply to root.
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    candle_llama.quantize("model", "out.gguf", dtype="q8_0")
except candle_llama.DeviceError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of threads")
def test_without_a_spare_thread_the_device_is_to_blame(tmp_path):
    tiny.write_checkpoint(tmp_path / "model")
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o777)
    done = subprocess.run([sys.executable, "-c", NO_THREAD, str(tmp_path)], capture_output=True, text=True)
    assert "no further thread" in done.stdout, done.stderr
