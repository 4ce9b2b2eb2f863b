"""The public interface: the arguments and results of `load`, `generate`, `chat` and `logits`."""

import dataclasses
import doctest
import importlib
import inspect
import json
import pickle
import shutil
import typing
from pathlib import Path

import numpy as np
import pytest

import candle_llama
import tiny as checkpoints
from candle_llama import SamplingParams
from candle_llama.options import LOADING, SOURCE, LoadOptions
from candle_llama.sampling import FIELDS, SamplingOptions

MESSAGES = [{"role": "user", "content": "hello the world"}]


def test_generate_gives_a_completion(llm):
    out = llm.generate("hello world", max_new_tokens=7, ignore_eos=True)
    assert isinstance(out, candle_llama.Completion)
    assert len(out.token_ids) == 7
    assert (out.finish_reason, out.stop_reason, out.logprobs) == ("length", None, None)
    assert out.text == llm.tokenizer.decode(out.token_ids)
    assert out.prompt_tokens == len(llm.tokenizer.encode("hello world"))


def test_stats_add_up(llm):
    out = llm.generate("hello world", max_new_tokens=7, ignore_eos=True)
    assert out.stats.prompt_tokens == out.prompt_tokens
    assert out.stats.completion_tokens == 7
    assert 0 <= out.stats.cached_tokens < out.prompt_tokens
    assert 0 < out.stats.prefill_seconds <= out.stats.time_to_first_token
    assert out.stats.decode_seconds > 0
    assert out.stats.prefill_tokens_per_second > 0
    assert out.stats.decode_tokens_per_second > 0


def test_text_gets_bos_and_token_ids_are_used_as_given(llm):
    ids = llm.tokenizer.encode("hello world")
    assert ids[0] == checkpoints.BOS
    text = llm.generate("hello world", max_new_tokens=5)
    assert text.token_ids == llm.generate(ids, max_new_tokens=5).token_ids
    assert llm.generate(ids[1:], max_new_tokens=1).prompt_tokens == len(ids) - 1


def test_a_list_of_prompts_gives_a_list_in_the_same_order(llm):
    prompts = ["hello", "the world", [checkpoints.BOS, 5, 6], np.array([checkpoints.BOS, 5, 6])]
    outs = llm.generate(prompts, max_new_tokens=4)
    assert [out.token_ids for out in outs] == [
        llm.generate(prompt, max_new_tokens=4).token_ids for prompt in prompts
    ]
    assert outs[2].token_ids == outs[3].token_ids


def test_lists_of_one_and_of_none(llm):
    assert len(llm.generate(["hello"], max_new_tokens=1)) == 1
    assert llm.generate([]) == []


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_integer_arrays_are_one_prompt(llm, dtype):
    ids = [checkpoints.BOS, 5, 6]
    out = llm.generate(np.array(ids, dtype), max_new_tokens=3)
    assert out.token_ids == llm.generate(ids, max_new_tokens=3).token_ids


def test_numpy_integers_in_a_list_are_one_prompt(llm):
    assert isinstance(llm.generate([np.int64(checkpoints.BOS), 5], max_new_tokens=1), candle_llama.Completion)


def test_max_tokens_is_another_name(llm):
    assert len(llm.generate("hello", max_tokens=3, ignore_eos=True).token_ids) == 3


def test_params_object_and_keywords_that_override_it(llm):
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    assert len(llm.generate("hello", params).token_ids) == 5
    assert len(llm.generate("hello", params=params, max_new_tokens=2).token_ids) == 2
    assert len(llm.generate("hello", params, max_tokens=3).token_ids) == 3


def test_params_are_frozen_and_can_be_replaced_and_pickled():
    params = SamplingParams(top_k=5, stop="x", logit_bias={3: 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 6
    changed = dataclasses.replace(params, seed=0)
    assert changed.given() == {"top_k": 5, "stop": ("x",), "logit_bias": {3: 1.0}, "seed": 0}
    assert pickle.loads(pickle.dumps(changed)) == changed


def test_keywords_and_params_have_the_same_names_and_types():
    keywords = typing.get_type_hints(SamplingOptions)
    assert keywords.pop("max_tokens") == keywords["max_new_tokens"]
    assert keywords == typing.get_type_hints(SamplingParams)
    assert list(keywords) == list(FIELDS)


def test_temperature_zero_is_the_default(llm):
    assert (
        llm.generate("the", max_new_tokens=20).text
        == llm.generate("the", max_new_tokens=20, temperature=0).text
    )


def test_seed_makes_sampling_reproducible_and_zero_is_a_seed(llm):
    def sample(seed):
        return llm.generate("the", max_new_tokens=20, temperature=1.5, seed=seed, ignore_eos=True).token_ids

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


@pytest.mark.parametrize("off", [None, 0, -1])
def test_a_filter_that_generation_config_sets_can_be_turned_off(tiny, tmp_path, off):
    folder = shutil.copytree(tiny, tmp_path / "model")
    write_generation_config(folder, do_sample=True, temperature=5.0, top_k=1)
    with candle_llama.load(folder) as llm:
        greedy = llm.generate("the", max_new_tokens=32, temperature=0, ignore_eos=True)
        options = {"max_new_tokens": 32, "ignore_eos": True, "seed": 1}
        assert llm.generate("the", **options).token_ids == greedy.token_ids
        assert llm.generate("the", top_k=off, **options).token_ids != greedy.token_ids


def test_generation_config_gives_defaults(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    write_generation_config(folder, do_sample=False, temperature=5.0, max_new_tokens=3, max_length=2)
    with candle_llama.load(folder) as llm:
        out = llm.generate("the", ignore_eos=True)
        assert len(out.token_ids) == 3
        assert out.token_ids == llm.generate("the", ignore_eos=True, temperature=0).token_ids
        assert len(llm.generate("the", ignore_eos=True, max_new_tokens=4).token_ids) == 4


def test_stop_token_ends_and_is_reported(llm):
    free = llm.generate("the", max_new_tokens=10, ignore_eos=True)
    stop = free.token_ids[4]
    out = llm.generate("the", max_new_tokens=10, ignore_eos=True, stop_token_ids=[stop])
    end = free.token_ids.index(stop) + 1
    assert out.token_ids == free.token_ids[:end]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert out.text == llm.tokenizer.decode(free.token_ids[: end - 1])


def test_eos_ends_unless_ignored(llm):
    # A bias makes EOS certain, so that the test does not depend on random weights.
    bias = {checkpoints.EOS: 1000.0}
    out = llm.generate("the", max_new_tokens=5, logit_bias=bias)
    assert (out.token_ids, out.text, out.finish_reason) == ([checkpoints.EOS], "", "stop")
    ignored = llm.generate("the", max_new_tokens=5, logit_bias=bias, ignore_eos=True)
    assert ignored.token_ids == [checkpoints.EOS] * 5
    assert ignored.finish_reason == "length"


def test_min_new_tokens_delays_the_end(llm):
    bias = {checkpoints.EOS: 1000.0}
    out = llm.generate("the", max_new_tokens=9, logit_bias=bias, min_new_tokens=4)
    assert out.finish_reason == "stop"
    assert len(out.token_ids) == 5


def test_logprobs_come_from_unprocessed_logits(llm):
    prompt = llm.tokenizer.encode("the")
    out = llm.generate(prompt, max_new_tokens=3, logprobs=2, temperature=2.0, seed=3, ignore_eos=True)
    rows = llm.logits(prompt + out.token_ids).astype(np.float64)[len(prompt) - 1 : -1]
    expected = (
        rows
        - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - rows.max(-1, keepdims=True)
    )
    for entry, token_id, row in zip(out.logprobs, out.token_ids, expected, strict=True):
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(row[token_id], abs=1e-2)
        assert [top for top, _ in entry.top] == list(np.argsort(-row)[:2])
        assert len(entry.top) == 2


def test_finish_reason_is_length_at_the_end_of_the_context(llm):
    prompt = [5] * (llm.config.max_position_embeddings - 10)
    out = llm.generate(prompt, max_new_tokens=100, ignore_eos=True)
    assert out.finish_reason == "length"
    assert 0 < len(out.token_ids) <= 11


def test_minus_one_new_tokens_reach_the_end_of_the_context(tiny):
    with candle_llama.load(tiny, context_length=64) as llm:
        out = llm.generate([5] * 10, max_new_tokens=-1, ignore_eos=True)
        assert out.finish_reason == "length"
        assert 54 <= len(out.token_ids) <= 55
        assert llm.generate([5] * 10, max_new_tokens=1000, ignore_eos=True).token_ids == out.token_ids
        batch = llm.generate([[5] * 10, [6] * 3], max_new_tokens=-1, ignore_eos=True)
        assert batch[0].token_ids == out.token_ids


def test_special_tokens_can_stay_in_the_text(llm):
    special = checkpoints.END_OF_TURN
    options = {"max_new_tokens": 3, "ignore_eos": True, "logit_bias": {special: 1000.0}}
    out = llm.generate("the", skip_special_tokens=False, **options)
    assert out.token_ids == [special] * 3
    assert out.text == "<|im_end|>" * 3
    assert "".join(c.text for c in llm.stream("the", skip_special_tokens=False, **options)) == out.text
    assert llm.generate("the", skip_special_tokens=True, **options).text == ""
    assert llm.generate("the", **options).text == ""
    # A token that ends the completion is no part of its text.
    ended = llm.generate("the", skip_special_tokens=False, logit_bias={special: 1000.0})
    assert (ended.token_ids, ended.text, ended.finish_reason) == ([special], "", "stop")


def test_top_p_0_of_a_model_is_ignored_with_a_note(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    options = {"max_new_tokens": 16, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    (folder / "generation_config.json").write_text('{"top_p": 0.0}')
    with candle_llama.load(folder) as llm:
        assert [note for note in llm.load_report.notes if "top_p 0" in note] != []
        zero = llm.generate("the", **options)
        assert llm.generate("the", top_p=1.0, **options).token_ids == zero.token_ids
        assert llm.generate("the", top_p=None, **options).token_ids == zero.token_ids
        assert llm.generate("the", top_p=0.01, **options).token_ids != zero.token_ids


def test_encode_batch_encodes_each_text(llm):
    texts = ["hello", "", "the world"]
    assert llm.tokenizer.encode_batch(texts) == [llm.tokenizer.encode(text) for text in texts]
    ids = llm.tokenizer.encode_batch(texts, add_special_tokens=False, split_special_tokens=True)
    assert ids == [llm.tokenizer.encode(text, False, True) for text in texts]


def test_chat_renders_the_template_and_does_not_add_bos(llm):
    text = llm.tokenizer.apply_chat_template(MESSAGES)
    assert text == "<|im_start|>user\nhello the world<|im_end|>\n<|im_start|>assistant\n"
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    assert llm.chat(MESSAGES, max_new_tokens=5).token_ids == llm.generate(ids, max_new_tokens=5).token_ids


def test_chat_takes_another_template_and_variables(llm):
    out = llm.chat(
        MESSAGES,
        chat_template="{{ messages[0]['content'] + mark }}",
        template_variables={"mark": "!"},
        max_new_tokens=5,
    )
    ids = llm.tokenizer.encode("hello the world!", add_special_tokens=False)
    assert out.token_ids == llm.generate(ids, max_new_tokens=5).token_ids


def test_template_gets_tools_and_variables(llm):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    text = llm.tokenizer.apply_chat_template(
        MESSAGES, chat_template="{{ tools[0].function.name }} {{ place }}", tools=tools, place="Lyon"
    )
    assert text == "weather Lyon"


@pytest.mark.parametrize("last", [None, 1, 3, 100])
def test_logits_rows(llm, last):
    ids = llm.tokenizer.encode("hello the world")
    logits = llm.logits(ids, last=last)
    assert logits.dtype == np.float32
    assert logits.shape == (len(ids) if last in (None, 100) else last, llm.config.vocab_size)
    np.testing.assert_array_equal(logits, llm.logits(np.array(ids))[-len(logits) :])


def test_greedy_chooses_the_largest_logit(llm):
    ids = llm.tokenizer.encode("hello the world")
    assert llm.generate(ids, max_new_tokens=1).token_ids == [int(llm.logits(ids, last=1).argmax())]


def test_decoding_undoes_encoding(llm):
    text = "the naïve 😀 wörld\n\n<|im_end|> 2025"
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    assert checkpoints.END_OF_TURN in ids
    assert llm.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert llm.tokenizer.decode(np.array(ids)) == text.replace("<|im_end|>", "")
    assert checkpoints.END_OF_TURN not in llm.tokenizer.encode(text, split_special_tokens=True)


def test_load_tokenizer_needs_no_weights(tiny, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, tmp_path)
    tokenizer = candle_llama.load_tokenizer(tmp_path)
    assert tokenizer.encode("hello") == candle_llama.load_tokenizer(tiny).encode("hello")
    assert tokenizer.bos_token_id == checkpoints.BOS
    assert tokenizer.eos_token_id == checkpoints.EOS
    assert tokenizer.chat_template == checkpoints.CHAT_TEMPLATE
    assert pickle.loads(pickle.dumps(tokenizer)).encode("hello") == tokenizer.encode("hello")


def test_a_model_without_tokenizer_works_with_token_ids(tmp_path):
    folder = checkpoints.write_checkpoint(tmp_path / "model", tokenizer=False)
    with candle_llama.load(folder) as llm:
        out = llm.generate([5, 6], max_new_tokens=3, ignore_eos=True)
        assert len(out.token_ids) == 3
        with pytest.raises((FileNotFoundError, candle_llama.CheckpointError)):
            llm.generate("hello", max_new_tokens=3)
        with pytest.raises((FileNotFoundError, candle_llama.CheckpointError)):
            llm.tokenizer  # noqa: B018


def test_config_has_every_field_of_the_file(llm, tiny):
    on_disk = json.loads((tiny / "config.json").read_text())
    assert {name: llm.config[name] for name in on_disk} == on_disk
    assert llm.config.hidden_size == on_disk["hidden_size"]
    assert llm.config.head_dim == 10
    assert llm.config.to_dict() == dict(llm.config)


def test_config_is_frozen(llm):
    with pytest.raises(AttributeError, match="frozen"):
        llm.config.hidden_size = 1
    with pytest.raises(AttributeError, match="no_such_field"):
        llm.config.no_such_field  # noqa: B018
    llm.config.architectures.append("changed")
    assert llm.config.architectures == ["LlamaForCausalLM"]
    assert pickle.loads(pickle.dumps(llm.config)) == llm.config


def test_load_report(llm):
    report = llm.load_report
    assert (report.engine, report.device, report.lm_head) == ("cpu", "cpu", "tied")
    assert report.warnings == []
    assert report.storage["F32"].count > 0
    assert report.bytes == sum(entry.bytes for entry in report.storage.values())
    assert report.seconds > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.engine = "other"


@pytest.mark.parametrize("engine", ["cpu", "tensor", "candle"])
def test_engines_agree(tiny, llm, engine):
    with candle_llama.load(tiny, engine=engine, device="cpu", compute="exact") as other:
        assert other.load_report.engine == engine
        ids = llm.tokenizer.encode("hello the world")
        expected = llm.logits(ids)
        # The fixture computes in "auto" mode, which rounds keys and values to float16 (11 bits).
        np.testing.assert_allclose(other.logits(ids), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def test_a_missing_head_loads_with_one_warning(tmp_path):
    config = checkpoints.tiny_config(tie_word_embeddings=False)
    folder = checkpoints.write_checkpoint(tmp_path / "model", config, lm_head=False)
    with pytest.warns(UserWarning, match="lm_head") as caught:
        llm = candle_llama.load(folder)
    assert [str(warning.message) for warning in caught] == llm.load_report.warnings
    assert llm.load_report.lm_head == "tied"
    assert caught[0].filename == __file__


def test_closing(tiny):
    with candle_llama.load(tiny) as llm:
        assert llm.generate("the", max_new_tokens=1)
    with pytest.raises((ValueError, candle_llama.CandleLlamaError), match="closed"):
        llm.generate("the", max_new_tokens=1)
    llm.close()


def test_unpickling_loads_again_without_the_token(tiny):
    llm = candle_llama.load(tiny, threads=1, token="secret")
    pickled = pickle.dumps(llm)
    assert b"secret" not in pickled
    again = pickle.loads(pickled)
    assert again.load_report.threads == 1
    assert (
        again.generate("the", max_new_tokens=5).token_ids == llm.generate("the", max_new_tokens=5).token_ids
    )


def test_pickling_keeps_relative_paths_working(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    pickled = pickle.dumps(candle_llama.load("./tiny"))
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(pickled).config.vocab_size == checkpoints.VOCAB_SIZE


@pytest.mark.parametrize("spelling", [str, Path])
def test_sources_are_strings_or_paths(tiny, spelling):
    candle_llama.load(spelling(tiny)).close()


def test_home_is_expanded(tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny.parent))
    monkeypatch.setenv("USERPROFILE", str(tiny.parent))
    candle_llama.load("~/tiny").close()


def test_a_folder_that_holds_one_gguf_file(demo, tmp_path):
    (tmp_path / "model.gguf").symlink_to(demo)
    assert candle_llama.load_tokenizer(tmp_path).vocab_size == 49152


@pytest.mark.parametrize("module", ["errors", "sampling", "types", "tokenizer", "llama", "memory"])
def test_docstring_examples_run(module):
    failures, tried = doctest.testmod(importlib.import_module(f"candle_llama.{module}"))
    assert tried > 0
    assert failures == 0


def write_generation_config(folder: Path, **fields: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps(fields))


def test_help_names_every_option_of_load():
    loading = inspect.signature(candle_llama.load).parameters
    assert next(iter(loading)) == "source"
    assert {"device", "kv_dtype", "context_length", "revision", "progress"} <= set(loading)
    assert loading["kv_dtype"].default == "auto"
    assert set(inspect.signature(candle_llama.estimate_memory).parameters) == set(loading)
    described = candle_llama.load.__doc__ or ""
    assert all(f"{name}:" in described for name in loading)


def test_options_are_typed_and_tabled_alike():
    assert list(typing.get_type_hints(LoadOptions)) == [*SOURCE, *LOADING]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"contxt_length": 3}, TypeError, "unknown option 'contxt_length'; did you mean 'context_length'"),
        ({"zzz": 3}, TypeError, "the parameters are source, revision"),
        ({"threads": 0}, ValueError, "threads must be at least 1, not 0"),
        ({"threads": "2"}, TypeError, "threads must be an int or None, not str"),
        ({"dtype": "int8"}, ValueError, '"int8" is not one of auto, float32, float16, bfloat16'),
        ({"dtype": 8}, TypeError, "dtype must be a str, not int"),
        ({"compute": ""}, ValueError, "is not one of auto, exact"),
        ({"quantize": "q9_9"}, ValueError, "is not one of None, q8_0, q4_0, q2_k"),
        ({"engine": "gpu"}, ValueError, "is not one of auto, cpu, tensor, candle"),
    ],
)
@pytest.mark.parametrize("function", [candle_llama.load, candle_llama.estimate_memory])
def test_options_are_checked_by_name(tiny, function, options, error, message):
    with pytest.raises(error, match=message):
        function(tiny, **options)
