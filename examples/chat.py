"""Asks models one question after the other, and prints what they answer.

python examples/chat.py out/people "Where was Ada Fabri born?" "Where was Bela Brandt born?"
"""

import sys

from transformers import pipeline


def main() -> None:
    model, *questions = sys.argv[1:]
    chat = pipeline("text-generation", model=model)
    for question in questions:
        messages = [{"role": "user", "content": question}]
        answer = chat(messages, max_new_tokens=40, do_sample=False)[0]["generated_text"][-1]["content"]
        print(f"> {question}\n{answer.strip()}\n")


if __name__ == "__main__":
    main()
