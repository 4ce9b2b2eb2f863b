"""Measures engines fairly: each in a fresh process, all with the same tokens and threads, in turn.

In each round, every engine processes one prompt and continues it. Each round has another prompt, so that no
engine gains from its cache.
"""

import dataclasses
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from candle_llama.bench.contest import Contestant, PeaksProbe, take_turns
from candle_llama.bench.result import BenchResult, EngineResult, Run, Spread
from candle_llama.bench.roofline import BUFFER_BYTES, Peaks, Roofline, Work, peaks_from
from candle_llama.bench.setting import WARM_UP_TOKENS, Setting, check_positive
from candle_llama.bench.subject import Subject


def run_bench(
    path: str | os.PathLike[str],
    *,
    against: Sequence[str] | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    runs: int = 3,
    device: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
    roofline: bool = False,
    note: Callable[[str], None] | None = None,
) -> BenchResult:
    """Compares a device's default engine, on the CPU `cpu`, else `tensor`, with others on one checkpoint.

    Every engine loads the checkpoint in a fresh process and processes one prompt to warm up. Then, in each
    round, every engine processes the same seeded prompt of ordinary tokens and continues it greedily, beyond
    end-of-sequence tokens. If the engines do not fit into memory together, or run on a GPU, they take turns
    and load again in every round.

    Args:
        path: A folder or a .gguf file.
        against: Names of `engines.opponents`; None takes all of them.
        prompt_tokens: Length of the prompts.
        new_tokens: Tokens to generate.
        runs: Number of rounds.
        device: Where every engine runs: "cpu", "cuda", "cuda:1", "metal".
        threads: Threads of every engine; None uses the performance cores that this process may use.
        seed: Seed of the prompts.
        roofline: Whether to measure also the CPU's peak memory bandwidth and arithmetic, in each round.
        note: Called with a line about every step.

    Returns:
        One result per engine, the default engine first. If an engine is not installed, cannot read the
        checkpoint, does not fit into memory, or fails, its result holds the reason.

    Raises:
        DeviceError: If the device cannot be used here.
        FileNotFoundError: If a file of the checkpoint is missing.
        ValueError: If a number is not positive, an engine unknown, or the context too short; with `roofline`
            also if the device is a GPU, or a tensor's type is not known.
    """
    check_positive(prompt_tokens=prompt_tokens, new_tokens=new_tokens, runs=runs)
    setting = Setting.open(
        path,
        against=against,
        device=device,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads,
    )
    if roofline and setting.device != "cpu":
        raise ValueError(f"roofline measures the CPU, not {setting.device}")
    subject = setting.subject

    def request(turn: int, new_tokens: int) -> dict[str, Any]:
        return {"do": "run", "prompt": subject.prompt(prompt_tokens, (seed, turn)), "new_tokens": new_tokens}

    contestants = setting.contestants(warm_up=request(runs, min(new_tokens, WARM_UP_TOKENS)))
    work = Work.of(subject.tensors) if roofline else None
    buffer_bytes = min(BUFFER_BYTES, setting.memory_available // 4)
    peaks_request = {"do": "peaks", "threads": setting.threads, "buffer_bytes": buffer_bytes}
    probe = PeaksProbe("peaks", peaks_request, {})
    probes = [probe] if work else []
    together = setting.fits(contestants, len(probes) * buffer_bytes)
    subject.warm_page_cache()
    rounds = [[request(turn, new_tokens)] for turn in range(runs)]
    take_turns([*contestants, *probes], rounds, together, note)
    results = {c.engine: _result(c, contestants, subject, prompt_tokens, new_tokens) for c in contestants}
    results |= {name: EngineResult(name, skipped=reason) for name, reason in setting.skipped.items()}
    engines = [results[name] for name in setting.names]
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
        device=setting.device,
        threads=setting.threads,
        seed=seed,
        together=together,
        machine=dict(setting.machine),
        engines=tuple(engines),
        roofline=measured,
    )


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
        for [answer], [other] in zip(contestant.answers, reference.answers, strict=True)
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
    """Compares every run with the peaks of its round, because those of a shared host change.

    Warnings are about fractions of the highest peaks of all rounds.
    """
    if probe.failed:
        return engines, Roofline(work, failed=probe.failed)
    rounds = tuple(peaks_from(answer) for [answer] in probe.answers)
    best = Peaks.best(rounds)
    compared, warnings = [], []
    for engine in engines:
        if not engine.runs:
            compared.append(engine)
            continue
        prefill, decode = _fractions(zip(engine.runs, rounds, strict=True), work, prompt_tokens)
        compared.append(dataclasses.replace(engine, prefill_of_peak=prefill, decode_of_bandwidth=decode))
        of_best = _fractions(((run, best) for run in engine.runs), work, prompt_tokens)
        warnings += work.above_peak(engine.engine, *of_best)
    return compared, Roofline(work, rounds, best, warnings=tuple(warnings))


def _fractions(
    runs: Iterable[tuple[Run, Peaks]], work: Work, prompt_tokens: int
) -> tuple[float, float | None]:
    """Returns the medians of the runs' fractions of the peak arithmetic and of the peak bandwidth.

    Args:
        runs: The runs of an engine, at least one, each with the peaks that it is compared with.
        work: The work of the checkpoint.
        prompt_tokens: Length of the prompts.
    """
    prefill, decode = [], []
    for run, peaks in runs:
        prefill.append(work.prefill_fraction(prompt_tokens, run.prefill_tokens_per_second, peaks))
        if run.decode_tokens_per_second is not None:
            decode.append(work.decode_fraction(run.decode_tokens_per_second, peaks))
    return statistics.median(prefill), statistics.median(decode) if decode else None


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
