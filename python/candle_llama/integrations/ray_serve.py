"""Serves a model with Ray Serve: OpenAI's HTTP interface, on many nodes. Needs the extra `ray`.

    from ray import serve
    from candle_llama.integrations.ray_serve import deployment

    serve.run(deployment("demo", ray_actor_options={"num_cpus": 8}).bind())

Each replica has a model and the application of `candle_llama.server`; Serve's proxies choose among the
replicas. docs/scale.md says how to choose the numbers.
"""

import os
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve

import candle_llama
from candle_llama.errors import CandleLlamaError
from candle_llama.integrations import ray_threads
from candle_llama.options import LoadOptions
from candle_llama.server import build_app

_AUTOSCALING = {"min_replicas": 1, "max_replicas": 100, "target_ongoing_requests": 16}
"""Half of the 32 requests that an engine runs together, so that there is room while a replica starts."""
_MAX_ONGOING_REQUESTS = 64
"""The engine begins a waiting request as soon as one ends; Serve's default of 5 would leave it idle."""


def deployment(
    model: str | os.PathLike[str],
    *,
    load_options: LoadOptions | None = None,
    server_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> serve.Deployment:
    """Makes a Serve deployment whose replicas answer as `candle-llama serve` does.

    A replica whose engine has failed is replaced by Serve. A client that disconnects stops its work.

    Args:
        model: The model, as for `candle_llama.load`. A path must exist on every node.
        load_options: Keywords for `candle_llama.load`. `threads` is the number of the replica's CPUs, unless
            it is given.
        server_options: Keywords for `candle_llama.server.build_app`.
        **options: Those of `ray.serve.deployment`. Without `num_replicas`, or with "auto", there are 1 to 100
            replicas, for 16 requests each; `autoscaling_config` overrides these numbers one by one.
            `max_ongoing_requests` is 64: what is more waits in Serve's proxy.

    Returns:
        The deployment; `serve.run(deployment(...).bind())` runs it.

    Raises:
        TypeError: An option is unknown.
        ValueError: An option has a wrong value.

    Example:
        >>> from candle_llama.integrations.ray_serve import deployment
        >>> deployment("demo", autoscaling_config={"max_replicas": 4}).name
        'candle-llama'
    """
    given = {"name": "candle-llama", "max_ongoing_requests": _MAX_ONGOING_REQUESTS, **options}
    if given.get("num_replicas", "auto") == "auto":
        given.pop("num_replicas", None)
        scaling = given.get("autoscaling_config") or {}
        if isinstance(scaling, Mapping):
            given["autoscaling_config"] = {**_AUTOSCALING, **scaling}

    # Serve calls this in each replica.
    def build() -> FastAPI:
        llm = candle_llama.load(model, **ray_threads.load_options(load_options))
        return build_app(llm, **(server_options or {}))

    return serve.deployment(**given)(serve.ingress(build)(_Replica))


class _Replica:
    """What Serve asks of a replica beside requests."""

    app: FastAPI
    """The application that `build` has made; Serve sets it."""

    def check_health(self) -> None:
        """Raises an error if the engine has failed for good: Serve replaces the replica."""
        if self.app.state.server.is_dead:
            raise CandleLlamaError("the model has failed")

    def __del__(self) -> None:
        # Serve has waited for the requests; those that still run end with an error. There is no application
        # if `build` has failed.
        if app := getattr(self, "app", None):
            app.state.server.stop()
            app.state.server.llm.close()
