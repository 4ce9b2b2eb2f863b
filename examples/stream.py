# One paragraph, printed as it is generated; then why it ended, and how fast it was.
# Run: python examples/stream.py [MODEL [PROMPT]]
import sys

import candle_llama

PARAMS = candle_llama.SamplingParams(max_new_tokens=200, temperature=0.8, min_p=0.05, seed=7, stop="\n\n")


def main(model: str = "demo", prompt: str = "Once upon a time, there was a little") -> None:
    with candle_llama.load(model) as llm:
        print(prompt, end="", flush=True)
        stats = None
        # Leaving the `with` block early, as by `break`, stops the work.
        with llm.stream(prompt, PARAMS) as chunks:
            for chunk in chunks:
                print(chunk.text, end="", flush=True)
                stats = chunk.stats  # On the last chunk; until then None.
        print()
        if stats is not None:
            first, speed = stats.time_to_first_token or 0, stats.decode_tokens_per_second or 0
            print(f"[{chunk.finish_reason}: {stats.completion_tokens} tokens,", end=" ", file=sys.stderr)
            print(f"the first after {first:.3f} s, then {speed:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
