"""Runs one engine in a process of its own, controlled by JSON lines from `runner`.

This file is run by its path and imports nothing of this package at the top, so that the process of another
engine holds only that engine. Requests come on stdin; one answer to each goes to the original stdout:

    {"do": "load", "engine": "numpy", "path": "...", "device": "cpu", "threads": 2, "clients": 1,
     "context_length": 640}
    {"do": "run", "prompt": [1, 2, 3], "new_tokens": 64}
    {"do": "serve", "clients": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]], "new_tokens": 64}
    {"do": "peaks", "threads": 2, "buffer_bytes": 536870912}

A request that fails is answered by {"error": "..."}. The process ends when stdin does.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Arrived = Callable[[Sequence[int]], None]
"""Called with new token ids as soon as the engine's user could see them."""

UNKNOWN_ID = -1
"""Stands for the id of a token that an engine counts without telling its id."""


@dataclass(frozen=True)
class Task:
    """The checkpoint to load, and the settings for it."""

    path: Path
    device: str
    """"cpu", or for engines that run on GPUs "cuda:0" and so on, or "metal"."""
    threads: int
    clients: int
    """Threads that call `run` at the same time."""
    context_length: int
    """Positions of each client's sequence."""


class Adapter(Protocol):
    """The common interface of the engines. `__init__` imports the engine's packages."""

    versioned: tuple[str, ...]
    """Modules whose versions are reported."""

    def load(self, task: Task) -> dict[str, str]:
        """Loads the checkpoint; returns `isa`, and `weights` if the engine changes their type."""

    def run(self, prompt: list[int], new_tokens: int, arrived: Arrived) -> None:
        """Continues `prompt` greedily by `new_tokens` tokens, beyond end-of-sequence tokens.

        The engine must not reuse its cache of earlier prompts. If `clients` is more than 1, several threads
        call this at the same time.
        """


class CandleLlama:
    """This package: its own decoders, or Candle's Llama. A token that arrives has left the device."""

    versioned: tuple[str, ...] = ("candle_llama",)

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.module = importlib.import_module("candle_llama")

    def load(self, task: Task) -> dict[str, str]:
        """Loads the model as a user would, with only the context that is needed."""
        self.llm = self.module.load(
            task.path,
            device=task.device,
            engine=self.engine,
            threads=task.threads,
            context_length=task.context_length,
            # Rounds repeat their prompts, and the time of a cached prompt would say nothing.
            prefix_cache=False,
            progress=False,
        )
        report = self.llm.load_report
        largest = max(report.storage, key=lambda name: report.storage[name].bytes)
        return {"weights": largest, "isa": report.isa}

    def run(self, prompt: list[int], new_tokens: int, arrived: Arrived) -> None:
        """Streams, as a user would."""
        for chunk in self.llm.stream(prompt, max_new_tokens=new_tokens, temperature=0, ignore_eos=True):
            arrived(chunk.token_ids)


class Numpy:
    """The model in plain NumPy, float32."""

    versioned: tuple[str, ...] = ("numpy",)

    def __init__(self) -> None:
        self.module = importlib.import_module("candle_llama.bench.numpy_llama")

    def load(self, task: Task) -> dict[str, str]:
        """Converts every weight to float32."""
        import numpy as np

        self.model = self.module.NumpyLlama.load(task.path)
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return {"weights": "F32", "isa": f"{blas['name']} {blas['version']}"}

    def run(self, prompt: list[int], new_tokens: int, arrived: Arrived) -> None:
        """Decodes step by step with the cache."""
        self.model.reset()
        pending, position = prompt, 0
        for _ in range(new_tokens):
            logits = self.model.forward(pending, start=position, last_only=True)
            position += len(pending)
            pending = [int(logits[0].argmax())]
            arrived(pending)


class Transformers:
    """Hugging Face transformers on torch, in the checkpoint's own type; GGUF is dequantised by it.

    One call of `generate` runs at a time: clients wait for it.
    """

    versioned: tuple[str, ...] = ("transformers", "torch")

    def __init__(self) -> None:
        self.torch = importlib.import_module("torch")
        self.transformers = importlib.import_module("transformers")
        # transformers imports these late; without this, the imports would count as loading time.
        self.model_class = self.transformers.AutoModelForCausalLM
        importlib.import_module("transformers.models.llama.modeling_llama")
        self.free = threading.Lock()

    def load(self, task: Task) -> dict[str, str]:
        """Keeps the checkpoint's type; GGUF files become float32, on a GPU bfloat16, as in this package."""
        self.torch.set_num_threads(task.threads)
        self.device = self.torch.device("mps" if task.device == "metal" else task.device)
        if task.path.is_dir():
            source = {"pretrained_model_name_or_path": task.path, "dtype": "auto"}
        else:
            dtype = self.torch.float32 if task.device == "cpu" else self.torch.bfloat16
            folder, name = task.path.parent, task.path.name
            source = {"pretrained_model_name_or_path": folder, "gguf_file": name, "dtype": dtype}
        model = self.model_class.from_pretrained(**source, local_files_only=True)
        self.model = model.to(self.device).eval()
        self._synchronize()
        # The checkpoint's sampling defaults and end-of-sequence tokens must not have an effect.
        self.model.generation_config = self.transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        weights = str(self.model.dtype).removeprefix("torch.")
        return {"weights": weights, "isa": self._isa()}

    def _isa(self) -> str:
        name: str = {
            "cpu": self.torch.backends.cpu.get_cpu_capability,
            "cuda": lambda: self.torch.cuda.get_device_name(self.device),
            "mps": lambda: "mps",
        }[self.device.type]()
        return name

    def _synchronize(self) -> None:
        """Waits until the device has done all work, which torch queues."""
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            self.torch.mps.synchronize()

    def run(self, prompt: list[int], new_tokens: int, arrived: Arrived) -> None:
        """Calls `generate` with a streamer."""

        class Streamer:
            """Called by `generate`: with the prompt first, then with every token."""

            saw_prompt = False

            def put(self, value: Any) -> None:
                """Receives token ids."""
                if self.saw_prompt:
                    arrived(value.flatten().tolist())
                self.saw_prompt = True

            def end(self) -> None:
                """Called after the last one."""

        with self.free, self.torch.inference_mode():
            ids = self.torch.tensor([prompt], device=self.device)
            self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=new_tokens,
                streamer=Streamer(),
            )
            self._synchronize()


class LlamaCpp:
    """llama.cpp through llama-cpp-python, whose model object holds one sequence: clients wait for it."""

    versioned: tuple[str, ...] = ("llama_cpp",)

    def __init__(self) -> None:
        self.module = importlib.import_module("llama_cpp")
        self.free = threading.Lock()

    def load(self, task: Task) -> dict[str, str]:
        """Maps the file."""
        self.llama = self.module.Llama(
            model_path=str(task.path),
            n_ctx=task.context_length,
            n_threads=task.threads,
            n_threads_batch=task.threads,
            n_gpu_layers=0,
            verbose=False,
        )
        return {"isa": self.module.llama_print_system_info().decode().strip()}

    def run(self, prompt: list[int], new_tokens: int, arrived: Arrived) -> None:
        """Takes tokens from `generate`, which never ends by itself."""
        with self.free:
            # Otherwise the common prefix of this prompt and the last one would stay in the cache.
            self.llama.reset()
            stream = self.llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
            for _, token in zip(range(new_tokens), stream, strict=False):
                arrived([token])
            stream.close()


class XLlamaCpp:
    """llama.cpp's server in this process, through xllamacpp, with a slot for each client."""

    versioned: tuple[str, ...] = ("xllamacpp",)

    def __init__(self) -> None:
        self.module = importlib.import_module("xllamacpp")

    def load(self, task: Task) -> dict[str, str]:
        """Maps the file and starts the server's thread."""
        params = self.module.CommonParams()
        params.model.path = str(task.path)
        params.n_parallel = task.clients
        # The slots share this number equally; nothing may shrink it.
        params.n_ctx = task.clients * task.context_length
        params.kv_unified = False
        params.fit_params = False
        # Copies of earlier prompts would be kept for later ones.
        params.cache_ram_mib = 0
        params.n_gpu_layers = 0
        for pool in (params.cpuparams, params.cpuparams_batch):
            pool.n_threads = task.threads
        # Errors only.
        params.verbosity = 1
        self.server = self.module.Server(params)
        return {"isa": self.module.get_system_info().strip()}

    def run(self, prompt: list[int], new_tokens: int, arrived: Arrived) -> None:
        """Streams a completion; the server tells how many tokens there are, also while it holds text back.

        Raises:
            RuntimeError: If the server refuses the request.
        """
        counted, errors = 0, []

        def receive(chunk: dict[str, Any]) -> None:
            # An exception would be lost here.
            nonlocal counted
            if "timings" not in chunk:
                errors.append(chunk)
                return
            total = int(chunk["timings"]["predicted_n"])
            arrived([UNKNOWN_ID] * (total - counted))
            counted = total

        request = {
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "timings_per_token": True,
            "stream": True,
        }
        self.server.handle_completions(request, receive)
        if errors:
            raise RuntimeError(str(errors[0].get("error", errors[0])))


ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "cpu": lambda: CandleLlama("cpu"),
    "tensor": lambda: CandleLlama("tensor"),
    "candle": lambda: CandleLlama("candle"),
    "numpy": Numpy,
    "transformers": Transformers,
    "llama-cpp-python": LlamaCpp,
    "xllamacpp": XLlamaCpp,
}


class Arrivals:
    """Records when tokens arrive; the clock starts when this is created."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.chunks: list[tuple[float, int]] = []
        """The time and the number of tokens of each arrival."""
        self.started = time.perf_counter()

    def __call__(self, token_ids: Sequence[int]) -> None:
        """Records that these tokens have just arrived; there may be none."""
        if token_ids:
            self.chunks.append((time.perf_counter(), len(token_ids)))
            self.token_ids.extend(token_ids)


class Worker:
    """Carries out requests."""

    adapter: Adapter

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Imports the engine and loads the checkpoint."""
        began = time.perf_counter()
        self.adapter = ADAPTERS[request["engine"]]()
        imported = time.perf_counter()
        options = {name: request[name] for name in ("device", "threads", "clients", "context_length")}
        task = Task(Path(request["path"]), **options)
        facts = self.adapter.load(task)
        loaded = time.perf_counter()
        return {
            "import_seconds": imported - began,
            "load_seconds": loaded - imported,
            "versions": {name: sys.modules[name].__version__ for name in self.adapter.versioned},
            **facts,
        }

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Measures one prompt."""
        arrivals = Arrivals()
        self.adapter.run(request["prompt"], request["new_tokens"], arrivals)
        first, first_count = arrivals.chunks[0] if arrivals.chunks else (arrivals.started, 0)
        last, _ = arrivals.chunks[-1] if arrivals.chunks else (first, 0)
        return {
            "time_to_first_token": first - arrivals.started,
            "first_count": first_count,
            "decode_seconds": last - first,
            "token_ids": arrivals.token_ids,
        }

    def serve(self, request: dict[str, Any]) -> dict[str, Any]:
        """Measures clients at the same time; each sends its next prompt when its last one has ended.

        All times are those of `time.perf_counter`.
        """
        failed = threading.Event()

        def client(number: int, prompts: list[list[int]]) -> list[dict[str, Any]]:
            served = []
            for prompt in prompts:
                # Whatever the others still measured would be thrown away.
                if failed.is_set():
                    break
                arrivals = Arrivals()
                try:
                    self.adapter.run(prompt, request["new_tokens"], arrivals)
                except BaseException:
                    failed.set()
                    raise
                times = {"started": arrivals.started, "ended": time.perf_counter()}
                served.append({"client": number, **times, "chunks": arrivals.chunks})
            return served

        clients = request["clients"]
        with ThreadPoolExecutor(len(clients)) as pool:
            began = time.perf_counter()
            served = [*pool.map(client, range(len(clients)), clients)]
        return {"began": began, "requests": [one for requests in served for one in requests]}


def peaks(request: dict[str, Any]) -> dict[str, Any]:
    """Measures the machine's peaks, in a process without an engine."""
    core = importlib.import_module("candle_llama._core")
    threads, buffer_bytes = request["threads"], request["buffer_bytes"]
    measured: dict[str, Any] = core.roofline_peaks(threads=threads, buffer_bytes=buffer_bytes)
    return measured


def peak_memory() -> int | None:
    """Returns the largest resident size of this process so far, in bytes; None if it is not known."""
    try:
        # On Linux, not ru_maxrss: it starts with the size of the process that forked this one.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Answers requests until stdin ends."""
    # Ctrl-C reaches the whole process group, but only the runner must react to it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Engines may print: their output to stdout is redirected to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    actions = {"load": worker.load, "run": worker.run, "serve": worker.serve, "peaks": peaks}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = actions[request["do"]](request)
            answer["peak_memory"] = peak_memory()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
