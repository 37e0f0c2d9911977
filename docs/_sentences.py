"""Names each sentence of more than 30 words: `python docs/_sentences.py README.md docs`. Tables, headings and code aside."""

import re
import sys
from pathlib import Path


MOST_WORDS = 30
ENDS = re.compile(r"(?<=[.!?])[)\"*]*\s+(?=[(\[\"*`]*[A-Z0-9`])")
NO_END = re.compile(r"\b(e\.g|i\.e|cf|vs|No|Fig|et al)\.$")


def sentences(text: str) -> list[str]:
    """Those of a Markdown file's paragraphs and lists, each as one line."""
    text = re.sub(r"```.*?```|<!--.*?-->|^---\n.*?\n---\n", "\n\n", text, flags=re.S)
    blocks, block = [], []
    for line in text.splitlines():
        plain = line.strip()
        starts = re.match(r"[-*] |\d+\. ", plain)
        if not plain or plain.startswith(("|", "#", "!", ":::")) or line.startswith("    ") and not block or starts:
            blocks.append(" ".join(block))
            block = [re.sub(r"^([-*]|\d+\.) ", "", plain)] if starts else []
        else:
            block.append(plain)
    blocks.append(" ".join(block))
    return [one for block in blocks if block for one in ENDS.split(block)]


def words(sentence: str) -> int:
    """Of a link its text counts, and code is one word."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", sentence))
    return sum(any(letter.isalnum() for letter in word) for word in plain.split())


def main(places: list[str]) -> int:
    files = [
        path for place in map(Path, places) for path in (sorted(place.rglob("*.md")) if place.is_dir() else [place])
    ]
    long = [
        (path, words(one), one) for path in files for one in sentences(path.read_text()) if words(one) > MOST_WORDS
    ]
    for path, count, sentence in long:
        print(f"{path}: {count} words: {sentence}")
    return bool(long)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
