"""lm-eval's model `candle-llama`: runs its tasks in this process. Needs the extra `eval`.

Importing this module registers the model:

    import lm_eval
    from candle_llama.integrations.lm_eval import CandleLlama

    lm_eval.simple_evaluate(model=CandleLlama("model.gguf"), tasks=["hellaswag"])

All requests of a task are given to the engine together, so that they share forward passes, and choices that
share a context share its keys and values.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import auto  # type: ignore[import-untyped]

import candle_llama
from candle_llama import Llama, SamplingParams

_T = TypeVar("_T")
_R = TypeVar("_R")
_THREADS = 32
"""Requests that are scored at a time; the engine runs them together."""
_SAME = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")


@register_model("candle-llama")
class CandleLlama(TemplateLM):  # type: ignore[misc]
    """A model for lm-eval.

    Args:
        pretrained: A model that is loaded, or a source for `candle_llama.load`.
        max_gen_toks: New tokens at most, if the task does not say.
        batch_size: Ignored: the engine runs as many requests together as pays.
        max_batch_size: Ignored as well.
        device: Where to run; for a source only.
        **options: Load options, for a source only.

    Example:
        >>> from candle_llama.integrations.lm_eval import CandleLlama
        >>> model = CandleLlama("demo")
        >>> model.tok_decode(model.tok_encode("Hello"))
        'Hello'
    """

    def __init__(
        self,
        pretrained: str | Llama,
        max_gen_toks: int = 256,
        batch_size: object = None,
        max_batch_size: object = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if device is not None:
            options["device"] = device
        if isinstance(pretrained, Llama) and options:
            raise TypeError(f"{', '.join(options)}: load options are for a source, and the model is loaded")
        self.llm = pretrained if isinstance(pretrained, Llama) else candle_llama.load(pretrained, **options)
        self.max_gen_toks = int(max_gen_toks)

    @property
    def max_length(self) -> int:
        """Positions of the context."""
        return int(self.llm.config.context_length)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found = self.llm.tokenizer.eos_token_id
        return found if found is not None else next(iter(self.llm.config.eos_token_ids), 0)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        bos = self.llm.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """A name for caches of requests."""
        return str(self.llm._source).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encodes a text, with special tokens as the tokenizer's config says, unless it has BOS already."""
        ids = self.llm.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)
        if (
            add_special_tokens is None
            and len(ids) > 1
            and ids[0] == ids[1] == self.llm.tokenizer.bos_token_id
        ):
            return ids[1:]
        return ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decodes token ids."""
        return self.llm.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Returns the text of the chat template, for lm-eval's report."""
        return str(self.llm.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation."""
        rendered = self.llm.tokenizer.apply_chat_template(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(rendered)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        def score(request: tuple[Any, list[int], list[int]]) -> tuple[float, bool]:
            text, context, continuation = request
            # One more token than the context holds can be scored. lm-eval keeps the end, too.
            whole = (context + continuation)[-(self.max_length + 1) :]
            first = max(len(whole) - len(continuation), 1)
            found = self.llm.loglikelihood(whole[:first], whole[first:])
            result = found.sum, found.is_greedy
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, result)
            return result

        return _together(score, requests, "Running loglikelihood requests", disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Computes the log-likelihood of whole texts, in windows of the context's length."""

        def score(request: Any) -> float:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            result = sum(value for value, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
            return result

        return [
            score(request)
            for request in auto.tqdm(requests, "Running loglikelihood_rolling requests", disable=disable_tqdm)
        ]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts up to one of their stop texts."""
        prompts, params, stops = [], [], []
        for request in requests:
            context, given = request.args
            options = normalize_gen_kwargs(given, self.max_gen_toks)
            count = options["max_gen_toks"]
            if count >= self.max_length:
                raise ValueError(f"max_gen_toks is {count}, but the context holds {self.max_length} tokens")
            # lm-eval cuts the beginning of a context that leaves no room.
            prompts.append(self.tok_encode(context)[-(self.max_length - count) :])
            stop = [text for text in options.get("until") or [] if text]
            same = {name: options[name] for name in _SAME if options.get(name) is not None}
            temperature = options.get("temperature") or 0.0
            stops.append(stop)
            params.append(
                SamplingParams(max_new_tokens=count, temperature=temperature, stop=stop or None, **same)
            )
        outs = self.llm.generate(prompts, params, progress=not disable_tqdm)
        texts = []
        for request, stop, out in zip(requests, stops, outs, strict=True):
            text = postprocess_generated_text(out.text, stop, None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts


def _together(work: Callable[[_T], _R], items: Sequence[_T], title: str, disable_tqdm: bool) -> list[_R]:
    """Does the work for all items, several at a time; returns the results in their order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(auto.tqdm(pool.map(work, items), title, total=len(items), disable=disable_tqdm))
