"""Counts of tokens, as OpenAI reports them."""

import dataclasses
from typing import Any

from candle_llama.types import Stats


@dataclasses.dataclass(slots=True)
class Usage:
    """The tokens of a request.

    Attributes:
        prompt: Tokens of the prompts; a prompt with several answers counts once.
        cached: Tokens of the prompts that were in the prefix cache.
        completion: Tokens of all answers.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def add(self, stats: Stats, is_first: bool) -> None:
        """Adds an answer; the first one to its prompt counts the prompt."""
        self.completion += stats.completion_tokens
        if is_first:
            self.prompt += stats.prompt_tokens
            self.cached += stats.cached_tokens

    def form(self) -> dict[str, Any]:
        """Returns the form of chat completions and completions."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }
