"""How many threads a model has in a Ray worker."""

from collections.abc import Mapping
from typing import Any

import ray


def load_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns options for `load`, with as many threads as the worker has CPUs, unless the caller says it.

    Ray counts CPUs, but lets a worker run on all cores of its node. So the engines of a node would take
    each other's cores. Half a CPU counts as one; a worker without CPUs has the default of `load`.
    """
    options = dict(given or {})
    if options.get("threads") is None and ray.is_initialized():
        context = ray.get_runtime_context()
        # The driver, where a class may be tried out, has no CPUs of its own.
        if context.worker.mode == ray.WORKER_MODE and (cpus := context.get_assigned_resources().get("CPU")):
            options["threads"] = max(int(cpus), 1)
    return options
