"""The functions of chat templates: Jinja's own, and those that transformers adds."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2.sandbox import safe_range
from jinja2.utils import Cycler, Joiner, Namespace, generate_lorem_ipsum

from candle_llama.chat_template.budget import ExceededError
from candle_llama.chat_template.jinja.values import number, weigh, weigh_text

_MAX_WORDS = 200
_MAX_TIME_FORMAT = 1000


def raise_exception(message: Any) -> None:
    """Ends the rendering with an error of the template's own.

    Raises:
        jinja2.TemplateError: Always.
    """
    weigh_text(message)
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    """The local time, as `datetime.strftime` writes it."""
    if isinstance(format, str) and len(format) > _MAX_TIME_FORMAT:
        raise ExceededError(f"a format of the time has more than {_MAX_TIME_FORMAT} characters")
    return datetime.now().strftime(format)


def _held(*args: Any, **kwargs: Any) -> None:
    weigh(args)
    weigh(kwargs)


def _words(*args: Any, **kwargs: Any) -> None:
    # How many paragraphs, and how many words in each.
    if any(number(value) > _MAX_WORDS for value in (*args, *kwargs.values())):
        raise ExceededError(f"it makes more than {_MAX_WORDS} words or paragraphs")


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "cycler": (Cycler, _held),
    "dict": (dict, _held),
    "joiner": (Joiner, _held),
    "lipsum": (generate_lorem_ipsum, _words),
    "namespace": (Namespace, _held),
    "raise_exception": (raise_exception, _held),
    "range": (safe_range, _held),
    "strftime_now": (strftime_now, _held),
}
"""The functions of chat templates, each with a rule that is called before it."""
