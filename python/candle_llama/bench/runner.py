"""Measures engines fairly: each in a fresh process, all with the same tokens and threads, in turn.

In each round, every engine processes one prompt and continues it. Each round begins with another engine, so
that heat, other programs and changes of the processor's clock affect all engines alike. Each round has
another prompt, so that no engine gains from its cache.
"""

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from candle_llama import _core
from candle_llama.bench import worker as worker_module
from candle_llama.bench.engines import ENGINES, OPPONENTS
from candle_llama.bench.result import BenchResult, EngineResult, Run, Spread
from candle_llama.bench.roofline import BUFFER_BYTES, Peaks, Roofline, Work, peaks_from
from candle_llama.bench.subject import Subject

# New tokens of the warm-up: enough to have run every step of decoding.
WARM_UP_TOKENS = 4
# Memory of an engine besides the weights: its libraries, activations, the KV cache.
OVERHEAD_BYTES = 1 << 30
# Additional positions of the context, for engines that round its length or compute ahead.
CONTEXT_MARGIN = 16
# Seconds of pause between two engines: libraries keep threads spinning for a while after their work.
SETTLE_SECONDS = 0.3

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
    "CANDLE_NUM_THREADS",
)


class EngineFailedError(Exception):
    """An engine's process reported an error or ended."""


class WorkerProcess:
    """A fresh process that holds one engine; see `worker`."""

    def __init__(self, engine: str, threads: int) -> None:
        """Starts the process.

        Args:
            engine: A name of `ENGINES`.
            threads: Size of every thread pool that reads an environment variable.
        """
        self.engine = engine
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        environment = {
            **os.environ,
            **dict.fromkeys(THREAD_VARIABLES, str(threads)),
            # The worker can import whatever this process can.
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", worker_module.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            env=environment,
            encoding="utf-8",
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Raises:
            EngineFailedError: If the answer is an error, or the process ends.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineFailedError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailedError(" ".join(answer["error"].split()))
        return answer

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self.process.kill()
        self.process.communicate()
        self.stderr.close()

    def _last_words(self) -> str:
        code = self.process.wait()
        self.stderr.seek(0)
        lines = self.stderr.read().decode("utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        return f"its process ended by signal {-code}: {last}" if code < 0 else f"its process ended: {last}"


@dataclass
class Contestant:
    """An engine that takes part, and its results so far."""

    engine: str
    load_request: dict[str, Any]
    warm_up_request: dict[str, Any]
    worker: WorkerProcess | None = None
    loads: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    peak_memory: int | None = None
    failed: str | None = None

    def start(self) -> None:
        """Starts the process, loads the checkpoint, and runs the warm-up."""
        self.worker = WorkerProcess(self.engine, self.load_request["threads"])
        self.loads.append(self._ask(self.load_request))
        self._ask(self.warm_up_request)

    def run(self, prompt: list[int], new_tokens: int) -> None:
        """Measures one prompt."""
        answer = self._ask({"do": "run", "prompt": prompt, "new_tokens": new_tokens})
        if len(answer["token_ids"]) != new_tokens:
            raise EngineFailedError(f"gave {len(answer['token_ids'])} new tokens, not {new_tokens}")
        self.answers.append(answer)

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self.worker is not None:
            self.worker.close()
        self.worker = None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.worker is not None
        answer = self.worker.ask(request)
        if answer["peak_memory"] is not None:
            self.peak_memory = max(self.peak_memory or 0, answer["peak_memory"])
        return answer


class PeaksProbe(Contestant):
    """Measures the machine's peaks, in turn with the engines."""

    def start(self) -> None:
        """Starts the process."""
        self.worker = WorkerProcess(self.engine, self.load_request["threads"])

    def run(self, prompt: list[int], new_tokens: int) -> None:
        """Measures the peaks once; the prompt is not used."""
        self.answers.append(self._ask(self.load_request))


def run_bench(
    path: str | os.PathLike[str],
    *,
    against: Sequence[str] = OPPONENTS,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    runs: int = 3,
    threads: int | None = None,
    seed: int = 0,
    roofline: bool = False,
    note: Callable[[str], None] | None = None,
) -> BenchResult:
    """Compares the default engine, `cpu`, with others on one checkpoint.

    Every engine loads the checkpoint in a fresh process and processes one prompt to warm up. Then, in each
    round, every engine processes the same seeded prompt of ordinary tokens and continues it greedily, beyond
    end-of-sequence tokens. If the engines do not fit into memory together, they take turns and load again in
    every round.

    Args:
        path: A folder or a .gguf file.
        against: Names of `engines.OPPONENTS`.
        prompt_tokens: Length of the prompts.
        new_tokens: Tokens to generate.
        runs: Number of rounds.
        threads: Threads of every engine; None uses as many as CPU affinity and cgroup quota allow.
        seed: Seed of the prompts.
        roofline: Whether to measure also the machine's peak memory bandwidth and arithmetic, in each round.
        note: Called with a line about every step.

    Returns:
        One result per engine, `cpu` first. If an engine is not installed, cannot read the checkpoint, does
        not fit into memory, or fails, its result holds the reason.

    Raises:
        FileNotFoundError: If a file of the checkpoint is missing.
        ValueError: If a number is not positive, an engine unknown, or the context too short; with `roofline`
            also if a tensor's type is not known.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("runs", runs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if unknown := [name for name in against if name not in OPPONENTS]:
        raise ValueError(f"unknown engine {unknown[0]!r}: choose from {', '.join(OPPONENTS)}")
    tell = note or (lambda line: None)
    subject = Subject.open(Path(path))
    if prompt_tokens + new_tokens > subject.context_length:
        raise ValueError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens exceed the model's context "
            f"of {subject.context_length}"
        )
    doctor = _core.doctor()
    threads = threads or int(doctor["threads"])
    names = tuple(dict.fromkeys(["cpu", *against]))
    available = int(doctor["memory_available"])
    skipped = {name: reason for name in names if (reason := _reason_to_skip(name, subject, available))}
    load_request = {
        "do": "load",
        "path": str(subject.path.absolute()),
        "threads": threads,
        "context_length": min(subject.context_length, prompt_tokens + new_tokens + CONTEXT_MARGIN),
    }
    warm_up_request = {
        "do": "run",
        "prompt": subject.prompt(prompt_tokens, (seed, runs)),
        "new_tokens": min(new_tokens, WARM_UP_TOKENS),
    }
    contestants = [
        Contestant(name, {**load_request, "engine": name}, warm_up_request)
        for name in names
        if name not in skipped
    ]
    needed = sum(ENGINES[c.engine].memory_needed(subject) + OVERHEAD_BYTES for c in contestants)
    work = Work.of(subject.tensors) if roofline else None
    buffer_bytes = min(BUFFER_BYTES, available // 4)
    peaks_request = {"do": "peaks", "threads": threads, "buffer_bytes": buffer_bytes}
    probe = PeaksProbe("peaks", peaks_request, {})
    probes = [probe] if work else []
    together = needed + len(probes) * buffer_bytes <= available
    subject.warm_page_cache()
    prompts = [subject.prompt(prompt_tokens, (seed, turn)) for turn in range(runs)]
    try:
        _take_turns([*contestants, *probes], prompts, new_tokens, together, tell)
    finally:
        for contestant in (*contestants, probe):
            contestant.stop()
    results = {c.engine: _result(c, contestants, subject, prompt_tokens, new_tokens) for c in contestants}
    results |= {name: EngineResult(name, skipped=reason) for name, reason in skipped.items()}
    engines = [results[name] for name in names]
    measured = None
    if work:
        engines, measured = _beside_peaks(engines, work, probe, prompt_tokens)
    return BenchResult(
        model=subject.path.name,
        parameters=subject.parameters,
        checkpoint_bytes=subject.checkpoint_bytes,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=runs,
        threads=threads,
        seed=seed,
        together=together,
        machine={
            **doctor,
            "platform": platform.platform(),
            "python": platform.python_version(),
        },
        engines=tuple(engines),
        roofline=measured,
    )


def _reason_to_skip(name: str, subject: Subject, available: int) -> str | None:
    engine = ENGINES[name]
    if reason := engine.reason_to_skip(subject):
        return reason
    needed = engine.memory_needed(subject) + OVERHEAD_BYTES
    if needed > available:
        return f"needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"
    return None


def _take_turns(
    contestants: list[Contestant],
    prompts: list[list[int]],
    new_tokens: int,
    together: bool,
    tell: Callable[[str], None],
) -> None:
    """Runs all rounds; with `together`, the same processes run through all of them."""
    if together:
        for contestant in contestants:
            tell(f"{contestant.engine}: load and warm up")
            with _noting_failure(contestant):
                contestant.start()
    for turn, prompt in enumerate(prompts):
        first = turn % max(len(contestants), 1)
        for contestant in contestants[first:] + contestants[:first]:
            if contestant.failed:
                continue
            tell(f"{contestant.engine}: run {turn + 1} of {len(prompts)}")
            with _noting_failure(contestant):
                if not together:
                    contestant.start()
                time.sleep(SETTLE_SECONDS)
                contestant.run(prompt, new_tokens)
            if not together:
                contestant.stop()


@contextlib.contextmanager
def _noting_failure(contestant: Contestant) -> Iterator[None]:
    try:
        yield
    except EngineFailedError as error:
        contestant.failed = str(error)
        contestant.stop()


def _result(
    contestant: Contestant,
    contestants: list[Contestant],
    subject: Subject,
    prompt_tokens: int,
    new_tokens: int,
) -> EngineResult:
    if contestant.failed:
        return EngineResult(contestant.engine, failed=contestant.failed)
    reference = next(c for c in contestants if not c.failed)
    runs = tuple(
        _run(answer, other["token_ids"], prompt_tokens, new_tokens)
        for answer, other in zip(contestant.answers, reference.answers, strict=True)
    )
    load = contestant.loads[0]
    decode = [run.decode_tokens_per_second for run in runs if run.decode_tokens_per_second is not None]
    return EngineResult(
        contestant.engine,
        versions=load["versions"],
        weights=load.get("weights", subject.storage_type),
        isa=load["isa"],
        import_seconds=Spread.of([load["import_seconds"] for load in contestant.loads]),
        load_seconds=Spread.of([load["load_seconds"] for load in contestant.loads]),
        peak_memory=contestant.peak_memory,
        runs=runs,
        time_to_first_token=Spread.of([run.time_to_first_token for run in runs]),
        prefill_tokens_per_second=Spread.of([run.prefill_tokens_per_second for run in runs]),
        decode_tokens_per_second=Spread.of(decode),
    )


def _beside_peaks(
    engines: list[EngineResult], work: Work, probe: PeaksProbe, prompt_tokens: int
) -> tuple[list[EngineResult], Roofline]:
    """Compares every engine's medians with the highest measured peaks."""
    if probe.failed:
        return engines, Roofline(work, failed=probe.failed)
    rounds = tuple(peaks_from(answer) for answer in probe.answers)
    roofline = Roofline(work, rounds, Peaks.best(rounds))
    engines = [
        dataclasses.replace(
            engine,
            prefill_of_peak=roofline.prefill_fraction(prompt_tokens, prefill.median) if prefill else None,
            decode_of_bandwidth=roofline.decode_fraction(decode.median) if decode else None,
        )
        for engine in engines
        for prefill, decode in [(engine.prefill_tokens_per_second, engine.decode_tokens_per_second)]
    ]
    over = [
        line
        for engine in engines
        for line in roofline.above_peak(engine.engine, engine.prefill_of_peak, engine.decode_of_bandwidth)
    ]
    return engines, dataclasses.replace(roofline, warnings=tuple(over))


def _run(answer: dict[str, Any], reference: list[int], prompt_tokens: int, new_tokens: int) -> Run:
    seconds = answer["time_to_first_token"]
    decoded = new_tokens - answer["first_count"]
    same = zip(answer["token_ids"], reference, strict=True)
    return Run(
        time_to_first_token=seconds,
        prefill_tokens_per_second=prompt_tokens / seconds,
        decode_seconds=answer["decode_seconds"],
        decode_tokens_per_second=decoded / answer["decode_seconds"] if decoded else None,
        same_tokens=next((i for i, (ours, theirs) in enumerate(same) if ours != theirs), new_tokens),
    )
