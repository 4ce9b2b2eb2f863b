# Answers to a file of questions, one a line, as JSON lines; several questions are generated together.
# Run: python examples/batch.py QUESTIONS.txt ANSWERS.jsonl [MODEL]
import json
import sys
from pathlib import Path

import candle_llama

# Questions per call of `generate`, which runs eight at a time. Answers are written after each call.
PER_CALL = 64
PARAMS = candle_llama.SamplingParams(max_new_tokens=128, temperature=0, on_overflow="truncate_left")


def prompt(llm: candle_llama.Llama, question: str) -> str | list[int]:
    if llm.tokenizer.chat_template is None:
        return question
    text = llm.tokenizer.apply_chat_template([{"role": "user", "content": question}])
    return llm.tokenizer.encode(text, add_special_tokens=False)  # The template writes BOS itself.


def main(source: str, destination: str, model: str = "demo") -> None:
    lines = Path(source).read_text(encoding="utf-8").splitlines()
    questions = [line for line in lines if line.strip()]
    with candle_llama.load(model) as llm, Path(destination).open("w", encoding="utf-8") as file:
        for start in range(0, len(questions), PER_CALL):
            group = questions[start : start + PER_CALL]
            answers = llm.generate([prompt(llm, question) for question in group], PARAMS)
            for question, answer in zip(group, answers, strict=True):
                record = {"question": question, "answer": answer.text, "finish_reason": answer.finish_reason}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            print(f"{start + len(group)} of {len(questions)}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
