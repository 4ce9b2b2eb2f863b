"""lm-eval's model "candle-llama", on a small task without a network."""

from typing import Any

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval")

from candle_llama.integrations.lm_eval import CandleLlama  # noqa: E402
from serving import running  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")


class Request:
    """What a task gives to a model."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def logprobs(llm: Any, ids: list[int]) -> np.ndarray:
    """The log-probabilities of a text's tokens but the first, from `logits`."""
    logits = llm.logits(ids[:-1]).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    rows = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return rows[np.arange(len(ids) - 1), ids[1:]]


@pytest.fixture
def model(demo_llm):
    return CandleLlama(demo_llm)


def test_choices_are_scored_as_their_logits_say(model, demo_llm):
    context = "The capital of France is"
    choices = [" Paris", " London", " a city in"]
    found = model.loglikelihood([Request(context, choice) for choice in choices], disable_tqdm=True)
    for choice, (value, is_greedy) in zip(choices, found, strict=True):
        ids = demo_llm.tokenizer.encode(context + choice)
        start = len(demo_llm.tokenizer.encode(context))
        assert value == pytest.approx(logprobs(demo_llm, ids)[start - 1 :].sum(), abs=1e-3)
        assert is_greedy == (choice == " Paris")
    assert found == [
        model.loglikelihood([Request(context, choice)], disable_tqdm=True)[0] for choice in choices
    ]


def test_whole_texts_are_scored_from_the_token_before_them(model, demo_llm):
    text = "Paris is the capital of France."
    (value,) = model.loglikelihood_rolling([Request(text)], disable_tqdm=True)
    ids = [model.prefix_token_id, *demo_llm.tokenizer.encode(text, add_special_tokens=False)]
    assert value == pytest.approx(logprobs(demo_llm, ids).sum(), abs=1e-3)


def test_a_context_without_text_and_one_that_is_too_long(model, demo_llm):
    (empty,) = model.loglikelihood([Request("", "Paris is")], disable_tqdm=True)
    assert empty[0] < 0
    pairs = [(None, [5] * (model.max_length + 100), [6, 7])]
    whole = [5] * (model.max_length - 1) + [6, 7]
    assert model._loglikelihood_tokens(pairs, disable_tqdm=True) == model._loglikelihood_tokens(
        [(None, whole[:-2], whole[-2:])], disable_tqdm=True
    )


def test_generation_ends_before_the_stop_text(model, demo_llm):
    given = {"until": ["."], "max_gen_toks": 20}
    texts = model.generate_until(
        [Request("The capital of France is", dict(given)), Request("One, two,", {"max_gen_toks": 4})], True
    )
    assert texts[0] == demo_llm.generate("The capital of France is", max_new_tokens=20, stop=".").text
    assert "." not in texts[0]
    assert "Paris" in texts[0]
    assert texts[1] == demo_llm.generate("One, two,", max_new_tokens=4).text


@pytest.fixture
def task(tmp_path):
    """A task of lm-eval whose data is a file."""
    data = tmp_path / "data.jsonl"
    data.write_text(
        '{"q": "The capital of France is", "choices": ["Paris", "a blue banana"], "gold": 0}\n'
        '{"q": "The opposite of hot is", "choices": ["green cheese", "cold"], "gold": 1}\n',
        encoding="utf-8",
    )
    return {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }


def accuracy(model: Any, task: dict[str, Any]) -> float:
    found = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, verbosity="ERROR")
    return found["results"]["capitals"]["acc,none"]


def test_a_task_runs_in_lm_eval_itself(model, task):
    assert accuracy(model, task) == 1.0


@pytest.fixture(scope="module", params=[1, 3], ids=["one by one", "batched"])
def remote(request, demo_llm):
    """lm-eval's own client of the server, which takes the tokenizer from it too."""
    pytest.importorskip("tenacity", reason="the client needs lm-eval[api]")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    with running(demo_llm, served_model_name="demo") as server:
        yield LocalCompletionsAPI(
            model="demo", base_url=server.url + "/v1/completions", batch_size=request.param, max_gen_toks=16
        )


def test_the_server_gives_lm_eval_the_figures_of_this_process(model, remote, task):
    assert remote.tokenizer_backend == "remote"
    requests = [
        Request(context, choice)
        for context in ("The capital of France is", "One, two, three, four and", "Wörter und 漢字:")
        for choice in (" Paris", " London, a city in England", " five 😀")
    ]
    expected = model.loglikelihood(requests, disable_tqdm=True)
    found = remote.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert accuracy(remote, task) == 1.0


def test_the_server_gives_lm_eval_the_texts_of_this_process(model, remote):
    contexts = ["The capital of France is", "One, two,", "Once upon a time"]
    requests = [Request(context, {"until": [".", "\n"], "max_gen_toks": 16}) for context in contexts]
    found = remote.generate_until(requests, disable_tqdm=True)
    assert found == model.generate_until(requests, True)
    assert "Paris" in found[0]


def test_load_options_are_for_a_source(demo_llm):
    with pytest.raises(TypeError, match="threads"):
        CandleLlama(demo_llm, threads=2)
