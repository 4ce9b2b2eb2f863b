"""`python -m candle_llama` is the command `candle-llama`."""

import sys

from candle_llama.cli import main

if __name__ == "__main__":
    sys.exit(main())
