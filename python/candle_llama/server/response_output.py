"""The items of a response's output, and the events that announce them."""

import secrets
from collections.abc import Iterable
from typing import Any

from candle_llama.server.tools import CallArguments, CallStart, Event, Text


class Output:
    """Collects an answer's text and calls as items.

    Attributes:
        items: All items so far; the last one may be incomplete.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._is_open = False
        # Line ends around calls are no message, unless text follows.
        self._space = ""
        self._number = -1

    def next_number(self) -> int:
        """Returns the sequence number of the next event."""
        self._number += 1
        return self._number

    def read(self, found: Iterable[Event], end: str | None) -> list[dict[str, Any]]:
        """Adds what was found in the answer, and returns the events.

        Args:
            found: Texts and calls.
            end: "completed" or "incomplete" if the answer ends here, which is the last item's status.
        """
        events: list[dict[str, Any]] = []
        for one in found:
            match one:
                case Text():
                    events += self._text(one.text)
                case CallStart():
                    events += [*self._close(), *self._open_call(one)]
                case CallArguments():
                    self.items[-1]["arguments"] += one.text
                    delta = {"type": "response.function_call_arguments.delta", "delta": one.text}
                    events.append({**delta, **self._place()})
        return events if end is None else events + self._close(end)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _part(self) -> dict[str, Any]:
        return {**self._place(), "content_index": 0}

    def _is_message(self) -> bool:
        return self._is_open and self.items[-1]["type"] == "message"

    def _text(self, text: str) -> list[dict[str, Any]]:
        events = []
        if not self._is_message():
            self._space += text
            if not self._space.strip():
                return []
            text, self._space = self._space, ""
            events = [*self._close(), *self._open_message()]
        self.items[-1]["content"][0]["text"] += text
        delta = {"type": "response.output_text.delta", "delta": text, "logprobs": []}
        return [*events, {**delta, **self._part()}]

    def _open_message(self) -> list[dict[str, Any]]:
        part = {"type": "output_text", "text": "", "annotations": []}
        item = {
            "id": "msg_" + secrets.token_hex(12),
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        added = self._open(item)
        self.items[-1] = {**item, "content": [part]}
        return [added, {"type": "response.content_part.added", "part": dict(part), **self._part()}]

    def _open_call(self, call: CallStart) -> list[dict[str, Any]]:
        item = {
            "id": "fc_" + secrets.token_hex(12),
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        return [self._open(item)]

    def _open(self, item: dict[str, Any]) -> dict[str, Any]:
        self._is_open = True
        self._space = ""
        self.items.append(item)
        place = {"output_index": len(self.items) - 1}
        return {"type": "response.output_item.added", "item": dict(item), **place}

    def _close(self, status: str = "completed") -> list[dict[str, Any]]:
        """Ends the item that is open."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        events: list[dict[str, Any]]
        if item["type"] == "message":
            (part,) = item["content"]
            text = {"type": "response.output_text.done", "text": part["text"], "logprobs": []}
            events = [
                {**text, **self._part()},
                {"type": "response.content_part.done", "part": part, **self._part()},
            ]
        else:
            done = {"type": "response.function_call_arguments.done", "name": item["name"]}
            events = [{**done, "arguments": item["arguments"], **self._place()}]
        place = {"output_index": len(self.items) - 1}
        return [*events, {"type": "response.output_item.done", "item": item, **place}]
