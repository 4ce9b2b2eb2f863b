# Which of several answers a model finds likeliest, how often that is the right one, and a perplexity.
# Run: python examples/score.py [MODEL]
import sys

import candle_llama

# The right answer stands first.
QUESTIONS = {
    "The capital of France is": (" Paris", " Berlin", " Rome"),
    "Water freezes at zero degrees": (" Celsius", " Fahrenheit"),
    "The opposite of hot is": (" cold", " warm", " hot"),
    "The sun rises in the": (" east", " west"),
    "A dog barks, and a cat": (" meows", " barks", " moos"),
}
TEXT = "The Moon goes around the Earth, and the Earth goes around the Sun. A year is one such journey."


def main(model: str = "demo") -> None:
    with candle_llama.load(model) as llm:
        correct = 0
        for context, answers in QUESTIONS.items():
            # By the mean of a token: the sum favours answers of few tokens.
            found = {answer: llm.loglikelihood(context, answer) for answer in answers}
            means = {answer: score.sum / len(score.token_ids) for answer, score in found.items()}
            best = max(means, key=means.__getitem__)
            correct += best == answers[0]
            print(context, *(f"{answer.strip()} {mean:.2f}" for answer, mean in means.items()), sep=" | ")
        print(f"right: {correct} of {len(QUESTIONS)}")

        score = llm.score(TEXT)
        # The first token has no log-probability: nothing comes before it.
        worst = min(range(1, len(score.token_ids)), key=lambda i: score.logprobs[i] or 0.0)
        token = llm.tokenizer.decode([score.token_ids[worst]])
        print(f"perplexity {score.perplexity:.2f}; least expected: {token!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
