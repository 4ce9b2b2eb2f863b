# A model as a smaller GGUF file, and what that costs: sizes, and perplexities of a text before and after.
# Run: python examples/quantize.py DESTINATION.gguf [MODEL [TYPE]]
import sys

import candle_llama

# Better: a page of the text that the model is for.
TEXT = (
    "Photosynthesis is the process by which plants turn light into food. Leaves take in carbon dioxide from "
    "the air, roots take in water from the soil, and sunlight gives the energy to make sugar out of both. "
    "Oxygen is what remains, and the plant gives it off into the air, where animals breathe it."
)


def main(destination: str, model: str = "demo", dtype: str = "q4_0") -> None:
    # The demo model is quantised already. Start from float weights where you can: rounding twice loses more.
    report = candle_llama.quantize(model, destination, dtype, allow_requantize=model == "demo")
    for line in report.notes:
        print("note:", line)
    stored = ", ".join(f"{entry.count} tensors as {name}" for name, entry in report.tensors.items())
    print(f"{report.path}: {report.bytes / 1e6:.1f} MB in {report.seconds:.1f} s, {stored}")
    for name in (model, destination):
        with candle_llama.load(name) as llm:
            size, perplexity = llm.load_report.bytes / 1e6, llm.score(TEXT).perplexity
            print(f"{name}: {size:.1f} MB of weights, perplexity {perplexity:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
