"""Which GPUs this build of the package can use on this machine."""

from candle_llama import _core


def accelerators() -> list[str]:
    """Their names, as `device=` takes them."""
    return [device for device in _core.doctor()["devices"] if device != "cpu"]
