# A conversation in the terminal: answers appear as they are generated, Ctrl-C stops one, Ctrl-D leaves.
# Run: python examples/chat.py [MODEL]
import sys

import candle_llama

SYSTEM = {"role": "system", "content": "You are a helpful assistant. Answer in a sentence or two."}


def main(model: str = "demo") -> None:
    messages = [SYSTEM]
    with candle_llama.load(model) as llm:
        while True:
            try:
                question = input("> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            messages.append({"role": "user", "content": question})
            answer = ""
            try:
                for chunk in llm.stream_chat(messages, max_new_tokens=256):
                    print(chunk.text, end="", flush=True)
                    answer += chunk.text
            except KeyboardInterrupt:
                pass  # What was said so far stays in the conversation.
            except candle_llama.ContextLengthError as error:
                print(f"{error}\nThe conversation starts again.")
                messages = [SYSTEM]
                continue
            print()
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(*sys.argv[1:])
