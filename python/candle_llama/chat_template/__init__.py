"""Renders a model's chat template as transformers renders it: with Jinja, in a sandbox.

A template comes with a model, so it is not trusted. It sees plain data alone (`plain`). What it makes, how
long it runs and how deep it nests are bounded (`budget`). `forms` finds how it expects messages. `jinja` runs
it, and is imported when a template is first rendered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from candle_llama.chat_template.budget import BUDGET, MAX_BYTES, Budget, ExceededError, size
from candle_llama.chat_template.plain import plain, with_reasoning
from candle_llama.options import check_text

if TYPE_CHECKING:
    from types import TracebackType

    from jinja2 import Template

__all__ = ["ChatTemplate", "plain", "with_reasoning"]

# A template may put all it has into the message of an error.
_MAX_REASON = 2000


class ChatTemplate:
    """A compiled template.

    Args:
        name: Its name in the model, or None for one that the caller passes.
        source: Its text.

    Attributes:
        names: The names of the variables that it reads.

    Raises:
        ValueError: It does not compile.
    """

    def __init__(self, name: str | None, source: str) -> None:
        from candle_llama.chat_template.jinja import compile_template

        self._name = name
        token = BUDGET.set(Budget())
        try:
            self._template, self.names = compile_template(source)
        except MemoryError as error:
            raise MemoryError("the system has no memory left to compile the chat template") from _bare(error)
        except Exception as error:
            raise self._failed(error, None) from _bare(error)
        finally:
            BUDGET.reset(token)

    def render(self, variables: dict[str, Any]) -> str:
        """Renders the template.

        Args:
            variables: What it sees; plain data.

        Raises:
            ValueError: The template raises, or exceeds what a rendering may use.
        MemoryError: The system has no memory left.
        """
        template = self._template
        token = BUDGET.set(Budget())
        try:
            return _run(template, variables)
        except MemoryError as error:
            raise MemoryError("the system has no memory left to render the chat template") from _bare(error)
        except Exception as error:
            raise self._failed(error, _line(template, error.__traceback__)) from _bare(error)
        finally:
            BUDGET.reset(token)

    def _failed(self, error: Exception, line: int | None) -> ValueError:
        where = "chat template" if self._name is None else f"chat template {self._name!r}"
        if not isinstance(error, SyntaxError):  # Python's is in the program, not in the template.
            line = getattr(error, "lineno", None) or line
        if line is not None:
            where += f", line {line}"
        reason = f"{where}: {_reason(error)}"
        return ValueError(reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}…")


def _run(template: Template, variables: dict[str, Any]) -> str:
    parts, length = [], 0
    for part in template.root_render_func(template.new_context(variables)):
        length += size(part) if isinstance(part, str) else 0  # What else a call block gives, join refuses.
        if length > MAX_BYTES:
            raise ExceededError(f"the prompt has more than {MAX_BYTES} bytes")
        parts.append(part)
    text = "".join(parts)
    if not text.isascii():
        check_text(text, "the rendered text")
    return text


def _line(template: Template, traceback: TracebackType | None) -> int | None:
    """The line of the template at which an error was raised: the innermost, in a macro."""
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == template.filename:
            line = template.get_corresponding_lineno(traceback.tb_lineno)
        traceback = traceback.tb_next
    return line


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, ExceededError):
        return f"the template does too much: {error}"
    if isinstance(error, KeyError):
        # Its text is the key's, which may be anything.
        return f"KeyError: {error.args[0]!r}" if isinstance(error.args[0], str) else "KeyError"
    if isinstance(error, SyntaxError):
        return error.msg
    # A template's syntax error names the line a second time in its text.
    return getattr(error, "message", None) or str(error) or type(error).__name__


def _bare(error: Exception) -> Exception:
    """The error without the frames that it came through, which hold what the template has made."""
    error.__context__ = None
    return error.with_traceback(None)
