"""An HTTP server with OpenAI's interface; it needs the extra `server`.

Start reading at `app`, which lists the routes. OpenAI's words stay in this package.
"""

from candle_llama.server.app import build_app

__all__ = ["build_app"]
