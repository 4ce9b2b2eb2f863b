"""GET /v1/models: the one model that this server has."""

from typing import Any

from candle_llama.server.state import State


def listed(state: State) -> dict[str, Any]:
    """Returns the list of models."""
    return {"object": "list", "data": [_model(state)]}


def one(state: State, name: str) -> dict[str, Any]:
    """Returns the model of this name.

    Raises:
        ApiError: There is no such model.
    """
    state.check_model(name)
    return _model(state)


def _model(state: State) -> dict[str, Any]:
    return {
        "id": state.name,
        "object": "model",
        "created": state.created,
        "owned_by": "candle-llama",
        # vLLM's name.
        "max_model_len": state.llm.config.context_length,
    }
