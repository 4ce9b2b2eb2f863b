"""GET /: the chat page, one file that loads nothing else.

Its content security policy allows only its own script and style, by their hashes, and requests to this
server. Text of the model is set as text, so that markup in an answer is shown and never run.
"""

import base64
import functools
import hashlib
import importlib.resources
import re

from starlette.responses import Response


@functools.cache
def _page() -> tuple[str, dict[str, str]]:
    """Returns the page and its headers."""
    page = (importlib.resources.files("candle_llama.server") / "page.html").read_text(encoding="utf-8")
    sources = {
        "script-src": _hash(page, "script"),
        "style-src": _hash(page, "style"),
        "connect-src": "'self'",
    }
    fixed = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    policy = "; ".join([fixed, *(f"{name} {value}" for name, value in sources.items())])
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _hash(page: str, element: str) -> str:
    (content,) = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def response() -> Response:
    """Returns the page."""
    page, headers = _page()
    return Response(page, media_type="text/html; charset=utf-8", headers=headers)
