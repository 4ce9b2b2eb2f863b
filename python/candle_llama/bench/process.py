"""A process that holds one engine, so that engines affect each other as little as possible."""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from candle_llama.bench import worker as worker_module

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
