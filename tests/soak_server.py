"""Soaks the server: many clients for minutes, each answer compared with that of the model itself.

    python tests/soak_server.py --minutes 10

Clients send chats and completions of random lengths, half of them streamed; some disconnect, some send bad
requests. It fails at a wrong or lost answer, a status 5xx, KV blocks that are held at the end, or memory that
has grown since the first quarter.
"""

import argparse
import contextlib
import dataclasses
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

import candle_llama
from serving import CHAT, is_idle, running, until

COMPLETIONS = "/v1/completions"
BAD: Sequence[tuple[str, Any]] = (
    (CHAT, {"messages": []}),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "temperature": -1}),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 2**31 - 1}),
    (COMPLETIONS, {"prompt": [5] * 100_000}),
    (COMPLETIONS, {"prompt": "a", "regex": "("}),
    (COMPLETIONS, {"prompt": "a", "mood": 1}),
)
# Growth of memory that is no leak: allocators keep some, and the prefix cache fills.
MOST_GROWTH = 0.05


@dataclasses.dataclass
class Case:
    """A request, and the answer of the model itself."""

    path: str
    body: dict[str, Any]
    text: str
    reason: str


def cases(llm: candle_llama.Llama, count: int) -> list[Case]:
    """Makes requests of random lengths, greedy or with a seed, and computes their answers alone."""
    rng = random.Random(1)
    words = llm.tokenizer.decode(llm.tokenizer.encode(__doc__ or "")).split()
    made = []
    for index in range(count):
        # Some share their beginnings, for the prefix cache.
        prompt = " ".join(words[:20] * rng.randrange(3) + rng.choices(words, k=rng.choice([1, 8, 60, 300])))
        given: dict[str, Any] = {"temperature": rng.choice([0, 1.0]), "max_tokens": rng.randrange(1, 80)}
        if given["temperature"]:
            given["seed"] = index
        if index % 2:
            turns = [{"role": "user", "content": prompt}]
            out = llm.chat(turns, **given)
            made.append(Case(CHAT, {"messages": turns, **given}, out.text, out.finish_reason))
        else:
            out = llm.generate(prompt, **given)
            made.append(Case(COMPLETIONS, {"prompt": prompt, **given}, out.text, out.finish_reason))
    return made


class Clients:
    """What all clients share: the requests, the counts, and what went wrong."""

    def __init__(self, url: str, requests: list[Case], end: float) -> None:
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self._url, self._requests, self._end = url, requests, end
        self._lock = threading.Lock()

    def run(self, seed: int) -> None:
        """Is one client, until the time is over."""
        rng = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while time.monotonic() < self._end:
                what = "an error"
                try:
                    kind = rng.choices(
                        ("whole", "stream", "leave", "leave a stream", "bad"), (8, 8, 2, 2, 2)
                    )[0]
                    what = self._one(kind, client, rng)
                except Exception as error:
                    self._problem(f"{kind}: {error!r}")
                with self._lock:
                    self.counts[what] += 1

    def _problem(self, text: str) -> None:
        with self._lock:
            self.problems.append(text[:500])

    def _one(self, kind: str, client: httpx.Client, rng: random.Random) -> str:
        case = rng.choice(self._requests)
        if kind == "bad":
            path, body = rng.choice(BAD)
            status = client.post(path, json=body).status_code
            if status != 400:
                self._problem(f"{body!r:.100} is status {status}")
        elif kind == "whole":
            self._compare(case, client.post(case.path, json=case.body))
        elif kind == "leave":
            # Its own connection, which the timeout closes.
            timeout = rng.random() / 5
            with (
                contextlib.suppress(httpx.TimeoutException),
                httpx.Client(base_url=self._url, timeout=timeout) as hasty,
            ):
                hasty.post(case.path, json=case.body)
        else:
            body = {**case.body, "stream": True}
            with client.stream("POST", case.path, json=body) as answer:
                if kind == "leave a stream":
                    next(answer.iter_lines(), None)
                else:
                    answer.read()
                    self._compare(case, answer)
        return kind

    def _compare(self, case: Case, answer: httpx.Response) -> None:
        if answer.status_code != 200:
            self._problem(f"status {answer.status_code}: {answer.text}")
            return
        events = [answer.text]
        if answer.headers["content-type"].startswith("text/event-stream"):
            events = re.findall(r"^data: (\{.*)$", answer.text, re.MULTILINE)
            if not answer.text.endswith("data: [DONE]\n\n"):
                self._problem("a stream has no end")
        text, reason = "", None
        for event in events:
            (choice,) = json.loads(event)["choices"]
            part = choice.get("delta") or choice.get("message") or {}
            text += choice.get("text") or part.get("content") or ""
            reason = choice["finish_reason"] or reason
        if (text, reason) != (case.text, case.reason):
            self._problem(f"{case.body!r:.200}: got {text!r} ({reason}), not {case.text!r} ({case.reason})")


def rss() -> int:
    """Bytes of memory that this process uses."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024


def main() -> int:
    """Runs the soak; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    with candle_llama.load(options.model) as llm:
        requests = cases(llm, 200)
        with running(llm) as server, server.client() as client:
            begin = time.monotonic()
            clients = Clients(server.url, requests, begin + 60 * options.minutes)
            threads = [threading.Thread(target=clients.run, args=(seed,)) for seed in range(options.clients)]
            for thread in threads:
                thread.start()
            time.sleep(60 * options.minutes / 4)
            memory = [rss()]
            for thread in threads:
                thread.join()
            until(lambda: is_idle(llm) and server.state.queue.length == 0)
            memory.append(rss())
            metrics = client.get("/metrics").text
    print(
        f"{time.monotonic() - begin:.0f} s, {sum(clients.counts.values())} requests: {dict(clients.counts)}"
    )
    print(f"memory: {memory[0] / 2**20:.0f} MiB after a quarter, {memory[1] / 2**20:.0f} MiB at the end")
    problems = clients.problems
    problems += re.findall(r'^candle_llama:http_requests_total\{.*status="5.*$', metrics, re.MULTILINE)
    held = re.findall(r"^candle_llama:kv_blocks_used\{.*\} (\S+)$", metrics, re.MULTILINE)
    if held != ["0.0"]:
        problems.append(f"KV blocks held at the end: {held}")
    if memory[1] > memory[0] * (1 + MOST_GROWTH):
        problems.append("memory has grown")
    print(f"{len(problems)} problems", *problems[:20], sep="\n  ")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
