"""What /metrics shows, in Prometheus' format, under vLLM's names where they fit."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from candle_llama.errors import CandleLlamaError
from candle_llama.llama import Llama
from candle_llama.types import Stats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """Counts requests and answers; the engine's own counts are read when Prometheus asks."""

    def __init__(self, llm: Llama, name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(llm, name))
        label = ["model_name"]
        self._requests = Counter(
            "candle_llama:http_requests",
            "Responses by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self._ended = Counter(
            "vllm:request_success",
            "Answers that have ended.",
            [*label, "finished_reason"],
            registry=self._registry,
        )
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "Seconds to the first token.", _SECONDS, name
        )
        self._each = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean seconds between the tokens of an answer.",
            _SECONDS_PER_TOKEN,
            name,
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "Seconds from request to end.", _SECONDS, name
        )
        self._name = name

    def _histogram(self, name: str, text: str, buckets: Sequence[float], model: str) -> Histogram:
        family = Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)
        return family.labels(model_name=model)

    def response(self, path: str, status: int) -> None:
        """Counts a response."""
        self._requests.labels(path=path, status=str(status)).inc()

    def answer(self, reason: str, stats: Stats | None, seconds: float) -> None:
        """Counts an answer that has ended."""
        self._ended.labels(model_name=self._name, finished_reason=reason).inc()
        self._whole.observe(seconds)
        if stats is not None and stats.time_to_first_token is not None:
            self._first.observe(stats.time_to_first_token)
            if stats.completion_tokens > 1:
                self._each.observe(stats.decode_seconds / (stats.completion_tokens - 1))

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """The engine's counts at the moment when they are asked for."""

    def __init__(self, llm: Llama, name: str) -> None:
        self._llm = llm
        self._name = name

    def describe(self) -> list[Metric]:
        """Names nothing in advance, so that registering does not ask the engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Reads the engine's counts. There are none if the model has failed or is closed."""
        try:
            now = self._llm.metrics()
        except (CandleLlamaError, ValueError):
            return
        blocks = now.blocks_used + now.blocks_free
        gauges = {
            "vllm:num_requests_running": ("Sequences that run.", now.running),
            "vllm:num_requests_waiting": ("Sequences that wait.", now.waiting),
            "vllm:kv_cache_usage_perc": (
                "Share of the KV blocks in use; 1 is all.",
                now.blocks_used / blocks if blocks else 0,
            ),
            "candle_llama:kv_blocks_used": ("KV blocks that requests hold.", now.blocks_used),
            "candle_llama:kv_blocks_cached": ("Free KV blocks that may be reused.", now.blocks_cached),
        }
        counters = {
            "vllm:prompt_tokens": ("Tokens of prompts.", now.tokens_in),
            "vllm:generation_tokens": ("Tokens generated.", now.tokens_out),
            "vllm:prefix_cache_queries": ("Tokens looked up in the prefix cache.", now.tokens_in),
            "vllm:prefix_cache_hits": ("Tokens found in the prefix cache.", now.tokens_cached),
            "vllm:num_preemptions": ("Sequences that lost their KV blocks.", now.preemptions),
            "candle_llama:busy_seconds": ("Seconds of forward passes and sampling.", now.busy_seconds),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._name], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._name], value)
            yield counter
