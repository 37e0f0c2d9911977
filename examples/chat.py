"""Asks models one question after the other, and prints what they answer.

python examples/chat.py out/people "Where was Ada Fabri born?" "Where was Bela Brandt born?"
"""

import argparse

from transformers import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, or name on the Hub")
    parser.add_argument("questions", nargs="+")
    arguments = parser.parse_args()
    chat = pipeline("text-generation", model=arguments.model)
    for question in arguments.questions:
        asked = question if chat.tokenizer.chat_template is None else [{"role": "user", "content": question}]
        said = chat(asked, max_new_tokens=40, do_sample=False, return_full_text=False)[0]["generated_text"]
        answer = said if isinstance(said, str) else said[-1]["content"]
        print(f"> {question}\n{answer.strip()}\n")


if __name__ == "__main__":
    main()
