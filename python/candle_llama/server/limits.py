"""How much a request, and all requests together, may ask for."""

import contextlib
import dataclasses

from candle_llama.server.errors import ApiError, refused

_RETRY_SECONDS = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What clients may ask for.

    Attributes:
        max_body_bytes: Size of a request's body.
        max_prompt_tokens: Tokens of a prompt; None allows as many as the context holds.
        max_choices: Answers to one prompt (`n`).
        max_queue: Answers that run or wait, of all clients together.
    """

    max_body_bytes: int = 16 * 1024**2
    max_prompt_tokens: int | None = None
    max_choices: int = 128
    max_queue: int = 256

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name}: got {value!r}, expected a positive int")

    def check_prompt(self, tokens: int) -> None:
        """Refuses a prompt that is too long."""
        if self.max_prompt_tokens is not None and tokens > self.max_prompt_tokens:
            raise ApiError(
                400,
                f"the prompt has {tokens} tokens, this server accepts {self.max_prompt_tokens}",
                param="prompt",
                code="context_length_exceeded",
            )

    def check_choices(self, prompts: int, n: int) -> None:
        """Refuses a request with more answers than can ever be accepted."""
        if n > self.max_choices:
            raise refused("n", f"got {n}, this server accepts up to {self.max_choices}")
        if prompts * n > self.max_queue:
            raise refused(
                "prompt" if n == 1 else "n",
                f"the request asks for {prompts * n} answers, this server accepts {self.max_queue} at a time",
            )


class Queue:
    """Counts the answers that run or wait.

    Attributes:
        length: How many there are.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.length = 0

    def enter(self, answers: int) -> contextlib.ExitStack:
        """Takes places for a request; closing the result gives them back.

        Raises:
            ApiError: The queue is full.
        """
        if self.length + answers > self._limits.max_queue:
            raise ApiError(
                429,
                f"the queue is full: {self.length} answers run or wait, of at most {self._limits.max_queue}",
                headers={"Retry-After": str(_RETRY_SECONDS)},
            )
        self.length += answers
        places = contextlib.ExitStack()
        places.callback(self._leave, answers)
        return places

    def _leave(self, answers: int) -> None:
        self.length -= answers
