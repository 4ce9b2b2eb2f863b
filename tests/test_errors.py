"""Bad files and arguments raise typed errors with details, and the model stays usable."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import candle_llama
import tiny as checkpoints
from candle_llama import CheckpointError, ContextLengthError, DeviceError, UnsupportedModelError, errors


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny, tmp_path / "model")


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def changed_tensors(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    tensors = checkpoints.tiny_tensors(checkpoints.tiny_config()) | changes
    return {name: values for name, values in tensors.items() if values is not None}


# Files


@pytest.mark.parametrize(
    "source", ["./no-such-folder", "/no/such/file.gguf", "missing.gguf", Path("missing")]
)
def test_missing_paths(source):
    with pytest.raises(FileNotFoundError) as caught:
        candle_llama.load(source)
    assert caught.value.filename == str(Path(source))


@pytest.mark.parametrize("source", ["mistyped", "no/such/folder", "", "a b/c", "org/name:file.bin"])
def test_an_unknown_source_is_answered_with_the_forms_of_sources(source):
    with pytest.raises(FileNotFoundError, match="hub id"):
        candle_llama.load(source)


@pytest.mark.parametrize("source", [None, 3, b"bytes", ["list"]])
def test_sources_of_the_wrong_type(source):
    with pytest.raises(TypeError, match="a model"):
        candle_llama.load(source)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(model, name):
    (model / name).unlink()
    with pytest.raises(FileNotFoundError):
        candle_llama.load(model)


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        candle_llama.load(tmp_path)


def test_pickled_weights_are_refused_with_advice(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises((CheckpointError, UnsupportedModelError), match="safetensors"):
        candle_llama.load(model)


def test_a_missing_tensor(model):
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoints.write_safetensors(model / "model.safetensors", changed_tensors(**{name: None}))
    with pytest.raises(CheckpointError) as caught:
        candle_llama.load(model)
    assert caught.value.tensor == name
    assert name in str(caught.value)


def test_a_misshaped_tensor(model):
    name = "model.norm.weight"
    checkpoints.write_safetensors(
        model / "model.safetensors", changed_tensors(**{name: np.ones(7, np.float32)})
    )
    with pytest.raises(CheckpointError) as caught:
        candle_llama.load(model)
    assert caught.value.tensor == name
    assert (list(caught.value.got), list(caught.value.expected)) == ([7], [40])


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors(model, keep):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError):
        candle_llama.load(model)


@pytest.mark.parametrize("length", [2**63, 2**40, 2**32, 3])
def test_a_wrong_header_length(model, length):
    path = model / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError):
        candle_llama.load(model)


@pytest.mark.parametrize("keep", [0, 3, 24, 5000, 2_000_000])
def test_truncated_gguf(demo, tmp_path, keep):
    path = tmp_path / "model.gguf"
    with demo.open("rb") as file:
        path.write_bytes(file.read(keep))
    with pytest.raises(CheckpointError):
        candle_llama.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"hidden_size": "large"}'])
def test_an_invalid_config(model, text):
    (model / "config.json").write_text(text)
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        candle_llama.load(model)


def test_several_gguf_files_in_a_folder(demo, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).symlink_to(demo)
    with pytest.raises(CheckpointError, match="name one of them"):
        candle_llama.load(tmp_path)


# Models


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
        {"rope_scaling": {"rope_type": "surprise", "factor": 2.0}},
        {"hidden_act": "surprise"},
    ],
)
def test_unsupported_models_are_refused_by_key(model, changes):
    change_config(model, **changes)
    with pytest.raises(UnsupportedModelError) as caught:
        candle_llama.load(model)
    assert caught.value.key
    assert str(caught.value.key) in str(caught.value)


def test_strict_refuses_what_would_warn(tmp_path):
    config = checkpoints.tiny_config(tie_word_embeddings=False)
    folder = checkpoints.write_checkpoint(tmp_path / "model", config, lm_head=False)
    with pytest.raises(CheckpointError, match="strict"):
        candle_llama.load(folder, strict=True)


@pytest.mark.parametrize("device", ["cuda:99", "tpu"])
def test_devices_that_do_not_exist(tiny, device):
    with pytest.raises(DeviceError) as caught:
        candle_llama.load(tiny, device=device)
    assert caught.value.device == device


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 0},
        {"threads": -1},
        {"context_length": 0},
        {"context_length": -5},
        {"dtype": "int3"},
        {"compute": "sloppy"},
        {"engine": "steam"},
    ],
)
def test_load_options_out_of_range(tiny, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        candle_llama.load(tiny, **options)


@pytest.mark.parametrize(
    "options", [{"threads": 1.5}, {"threads": "two"}, {"context_length": True}, {"device": 3}, {"unknown": 1}]
)
def test_load_options_of_the_wrong_type(tiny, options):
    with pytest.raises(TypeError):
        candle_llama.load(tiny, **options)


# Prompts and parameters


@pytest.mark.parametrize(
    "prompt", [np.array([], np.int64), [[]], [-1], [2**32], [2**70], [10**6], ["a", [10**6]]]
)
def test_prompts_out_of_range(llm, prompt):
    with pytest.raises(ValueError, match=r"prompt|token"):
        llm.generate(prompt, max_new_tokens=1)
    assert llm.generate("the", max_new_tokens=1).token_ids


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        3,
        3.5,
        b"bytes",
        [1, "a"],
        ["a", None],
        [1.5],
        [True],
        np.zeros(3),
        np.zeros((2, 2), np.int64),
        {"a": 1},
    ],
)
def test_prompts_of_the_wrong_type(llm, prompt):
    with pytest.raises(TypeError, match="prompt"):
        llm.generate(prompt, max_new_tokens=1)


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_a_prompt_beyond_the_context(llm, call):
    with pytest.raises(ContextLengthError) as caught:  # noqa: PT012  a stream may refuse at its first chunk
        result = getattr(llm, call)([5] * 2000, max_new_tokens=1)
        next(iter(result))
    assert (caught.value.prompt_tokens, caught.value.context_length) == (2000, 1024)
    assert llm.generate("the", max_new_tokens=1).token_ids


def test_a_prompt_beyond_the_context_can_lose_its_beginning(llm):
    with pytest.warns(UserWarning, match="first 1477 of 2500 tokens were cut"):
        long = llm.generate(
            [7] * 1500 + [5] * 1000, max_new_tokens=3, on_overflow="truncate_left", ignore_eos=True
        )
    assert 0 < long.prompt_tokens <= 1024
    assert len(long.token_ids) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 10**400},
        {"top_k": -2},
        {"top_p": 1.5},
        {"top_p": -0.5},
        {"top_p": 0},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"max_new_tokens": -2},
        {"max_new_tokens": 2**200},
        {"min_new_tokens": -1},
        {"seed": -1},
        {"seed": 2**64},
        {"logprobs": -1},
        {"timeout": -1.0},
        {"timeout": float("nan")},
        {"stop": ""},
        {"stop_token_ids": [10**6]},
        {"stop_token_ids": [-1]},
        {"logit_bias": {10**6: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: float("nan")}},
        {"on_overflow": "shrug"},
    ],
    ids=str,
)
def test_parameters_out_of_range(llm, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        llm.generate("the", **options)
    assert llm.generate("the", max_new_tokens=1).token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": 1.5},
        {"max_new_tokens": "many"},
        {"max_new_tokens": True},
        {"logprobs": True},
        {"stop": 3},
        {"stop": [3]},
        {"stop_token_ids": 3},
        {"stop_token_ids": ["a"]},
        {"logit_bias": [1.0]},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {1: "a"}},
        {"ignore_eos": 1},
        {"include_stop_str": "yes"},
        {"skip_special_tokens": 1},
        {"on_overflow": 1},
    ],
    ids=str,
)
def test_parameters_of_the_wrong_type(llm, options):
    name = next(iter(options))
    with pytest.raises(TypeError, match=name):
        llm.generate("the", **options)
    with pytest.raises(TypeError, match=name):
        candle_llama.SamplingParams(**options)


def test_unknown_parameters_get_a_suggestion(llm):
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        llm.generate("the", temprature=0.5)
    with pytest.raises(TypeError, match="the parameters are"):
        llm.generate("the", zzz=1)


def test_both_names_of_one_parameter(llm):
    with pytest.raises(TypeError, match="max_tokens"):
        llm.generate("the", max_tokens=1, max_new_tokens=1)


def test_params_of_the_wrong_type(llm):
    with pytest.raises(TypeError, match="SamplingParams"):
        llm.generate("the", {"temperature": 0})


# Habits from other packages


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda llm: candle_llama.Llama("m.gguf"), r"candle_llama\.load\("),
        (lambda llm: candle_llama.Llama(model_path="m.gguf"), r"candle_llama\.load\("),
        (lambda llm: candle_llama.Tokenizer("m"), r"candle_llama\.load_tokenizer\("),
        (lambda llm: llm.generate([{"role": "user", "content": "hi"}]), r"prompt\[0\] .* llm\.chat\("),
        (lambda llm: llm.stream({"role": "user", "content": "hi"}), r"llm\.stream_chat\("),
        (lambda llm: llm.score([Pydantic(role="user", content="hi")]), r"llm\.chat\("),
        (lambda llm: llm.generate({"input_ids": [1, 2]}), "pass its .input_ids."),
        (lambda llm: llm.generate(b"the"), r"prompt\.decode\(\)"),
        (lambda llm: llm.generate("the", stream=True), r"llm\.stream\("),
        (lambda llm: llm.generate("the", do_sample=True), "temperature=0 is greedy"),
        (lambda llm: llm.generate("the", repeat_penalty=1.1), "repetition_penalty"),
        (lambda llm: llm.tokenizer.encode(["a"]), "text must be a str, not list; encode_batch"),
        (lambda llm: llm.tokenizer.encode(3), "text must be a str, not int"),
        (lambda llm: llm.tokenizer.encode_batch("a"), "encode takes one text"),
        (lambda llm: llm.generate(np.array([[1, 2]])), "one-dimensional integer array, not 2-dimensional"),
        (lambda llm: llm.generate(np.array([1.0])), "one-dimensional integer array"),
        (lambda llm: llm.generate(OnGpu()), r"cannot be read as an array.*Tensor\.cpu\(\)"),
    ],
)
def test_a_habit_from_another_package_gets_the_way_here(llm, call, said):
    with pytest.raises(TypeError, match=said) as raised:
        call(llm)
    assert "\n" not in str(raised.value)


class Pydantic:
    """What an object of pydantic shows."""

    def __init__(self, **fields):
        vars(self).update(fields)

    def model_dump(self, exclude_none=False):
        return {key: value for key, value in vars(self).items() if value is not None or not exclude_none}


class Tensor:
    """What a tensor on the CPU shows."""

    dtype, ndim = object(), 1

    def __array__(self, dtype=None, copy=None):
        return np.array([65, 66, 67])


class OnGpu(Tensor):
    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")


def test_whatever_numpy_can_read_is_a_prompt(llm):
    expected = llm.generate([65, 66, 67], max_new_tokens=4)
    assert llm.generate(Tensor(), max_new_tokens=4).token_ids == expected.token_ids
    assert llm.generate([Tensor(), Tensor()], max_new_tokens=4)[1].token_ids == expected.token_ids
    assert llm.tokenizer.decode(Tensor()) == llm.tokenizer.decode([65, 66, 67])
    assert llm.score(Tensor()).token_ids == [65, 66, 67]


def test_seed_minus_1_is_named(llm):
    with pytest.raises(ValueError, match="leave it out, or give None"):
        llm.generate("the", seed=-1)


@pytest.mark.parametrize("number", [0, 2**63, 2**200, 2**20000], ids=["0", "63", "200", "20000"])
def test_counts_of_any_size_have_a_message_that_is_true(llm, number):
    said = "at least 1, not 0" if number == 0 else r"less than 2\*\*63"
    with pytest.raises(ValueError, match=f"threads must be {said}"):
        candle_llama.load("demo", threads=number)
    with pytest.raises(ValueError, match=f"last must be {said}"):
        llm.logits([1], last=number)


@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed", "temperature", "logprobs"])
def test_parameters_of_any_size_are_refused(llm, name):
    # Python refuses to format such a number.
    with pytest.raises(ValueError, match=f"{name}.* an int of 20001 bits"):
        llm.generate("the", **{name: 2**20000})


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not expand ~name in the same way")
def test_a_home_folder_of_an_unknown_user_is_named():
    calls = (
        candle_llama.load,
        candle_llama.load_tokenizer,
        candle_llama.estimate_memory,
        lambda path: candle_llama.quantize("demo", path, "q8_0"),
    )
    for call in calls:
        with pytest.raises(FileNotFoundError, match="no home folder is known for '~nosuchuser'"):
            call("~nosuchuser/model.gguf")


@pytest.mark.parametrize("name", ["./" + "a" * 300, "a" * 5000 + ".gguf"], ids=["name", "path"])
def test_a_name_longer_than_the_file_system_allows(name):
    with pytest.raises(FileNotFoundError, match="File name too long"):
        candle_llama.load(name)


def test_a_hub_id_that_is_too_long():
    with pytest.raises(FileNotFoundError, match="no such model: Repo id"):
        candle_llama.load("org/" + "a" * 300, local_files_only=True)


def test_token_ids_of_any_size_are_refused(llm):
    with pytest.raises(ValueError, match="20001 bits is no token id"):
        llm.generate([2**20000])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda llm, text: llm.generate(text), "prompt"),
        (lambda llm, text: llm.generate(["a", text]), r"prompt\[1\]"),
        (lambda llm, text: llm.stream(text), "prompt"),
        (lambda llm, text: llm.score(text), "prompt"),
        (lambda llm, text: llm.loglikelihood("a", text), "continuation"),
        (lambda llm, text: llm.tokenizer.encode(text), "text"),
        (lambda llm, text: llm.tokenizer.encode_batch([text]), "text"),
        (lambda llm, text: llm.generate("a", stop=["b", text]), r"stop\[1\]"),
        (lambda llm, text: candle_llama.SamplingParams(stop=text), "stop"),
        (lambda llm, text: candle_llama.SamplingParams(on_overflow=text), "on_overflow"),
        (lambda llm, text: llm.chat([{"role": "user", "content": text}]), r"messages\[0\]"),
        (
            lambda llm, text: llm.chat([{"role": "user", "content": [{"type": "text", "text": text}]}]),
            r"messages\[0\]",
        ),
        (lambda llm, text: candle_llama.load("demo", device=text), "device"),
        (lambda llm, text: candle_llama.load("demo", dtype=text), "dtype"),
        (lambda llm, text: llm.chat([{"role": text, "content": "a"}]), "rendered text"),
        (lambda llm, text: llm.chat([{"role": "user", "content": "a"}], chat_template=text), "chat_template"),
    ],
)
def test_unpaired_surrogates_have_one_clear_message(llm, call, said):
    with pytest.raises(ValueError, match=rf"{said}: character \d+ is '\\ud800', an unpaired") as raised:
        call(llm, "é{}\ud800")
    assert "PyPrompt" not in str(raised.value)
    assert "\n" not in str(raised.value)


# Chat, logits, tokenizer


@pytest.mark.parametrize(
    "messages", ["hello", {"role": "user"}, [["user", "hello"]], [{"content": "hello"}], ["hi"], None]
)
def test_messages_of_the_wrong_type(llm, messages):
    with pytest.raises(TypeError, match="role"):
        llm.chat(messages)


def test_messages_without_usable_content(llm):
    with pytest.raises(ValueError, match="empty"):
        llm.chat([])
    with pytest.raises(TypeError, match="content"):
        llm.chat([{"role": "user", "content": 3}])
    with pytest.raises(ValueError, match="image_url"):
        llm.chat([{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize("template", ["{{ broken", "{{ raise_exception('no such role') }}"])
def test_templates_that_fail(llm, template):
    with pytest.raises((candle_llama.CandleLlamaError, ValueError)):
        llm.chat([{"role": "user", "content": "hi"}], chat_template=template)


def test_a_template_that_never_ends(llm):
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc")
    endless = loops + "{% endfor %}" * 3
    with pytest.raises((candle_llama.CandleLlamaError, ValueError)):
        llm.chat([{"role": "user", "content": "hi"}], chat_template=endless)


def test_a_model_without_template(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    with (
        candle_llama.load(folder) as llm,
        pytest.raises((candle_llama.CandleLlamaError, ValueError), match="template"),
    ):
        llm.chat([{"role": "user", "content": "hi"}])


def test_logits_arguments(llm):
    with pytest.raises(TypeError, match="encode"):
        llm.logits("text")
    with pytest.raises(ValueError, match="token"):
        llm.logits([])
    with pytest.raises(ValueError, match="token"):
        llm.logits([10**6])
    with pytest.raises(ValueError, match="last"):
        llm.logits([5], last=0)
    with pytest.raises(TypeError, match="last"):
        llm.logits([5], last=1.5)
    with pytest.raises(ContextLengthError):
        llm.logits([5] * 2000)


def test_logits_beyond_two_gib_are_refused_before_they_are_computed(llm):
    rows = 2 * 1024**3 // (4 * llm.config.vocab_size) + 1
    with pytest.raises(ValueError, match="2 GiB"):
        llm.logits(np.full(rows, 5))


def test_decoding_invalid_ids(llm):
    with pytest.raises(ValueError, match="ids"):
        llm.tokenizer.decode([10**6])
    with pytest.raises(ValueError, match="ids"):
        llm.tokenizer.decode([-1])
    with pytest.raises(TypeError, match="ids"):
        llm.tokenizer.decode("text")


# The classes themselves


@pytest.mark.parametrize(
    "cls",
    [
        errors.CheckpointError,
        errors.UnsupportedModelError,
        errors.ContextLengthError,
        errors.DeviceError,
        errors.GenerationError,
        errors.InternalError,
    ],
)
def test_errors_keep_their_attributes_and_can_be_pickled(cls):
    error = pickle.loads(pickle.dumps(cls("it broke", hint="mend it", path="there")))
    assert isinstance(error, errors.CandleLlamaError)
    assert (str(error), error.hint, error.path) == ("it broke; mend it", "mend it", "there")
    assert "\n" not in str(error)


def test_attributes_that_do_not_apply_are_none():
    error = errors.CheckpointError("it broke")
    assert (error.path, error.tensor, error.got, error.expected, error.limit, error.hint) == (None,) * 6


def test_a_tokenizer_with_more_ids_than_the_model_is_a_warning(tmp_path):
    config = checkpoints.tiny_config(vocab_size=checkpoints.VOCAB_SIZE - 3)
    path = checkpoints.write_checkpoint(tmp_path / "model", config)
    with pytest.warns(UserWarning, match=f"ids up to {checkpoints.VOCAB_SIZE - 1}"):
        model = candle_llama.load(path)
    with pytest.raises(ValueError, match="vocab_size"):
        model.generate("<|im_end|>")
    with pytest.raises(CheckpointError, match="ids up to"):
        candle_llama.load(path, strict=True)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_of_a_folder_is_told_to_be_one(tiny, name):
    with pytest.raises(candle_llama.CheckpointError, match=f"{name} is one file of a model.*pass its folder"):
        candle_llama.load(tiny / name)
