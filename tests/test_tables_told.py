"""Each table of numbers in README and docs is made from records, or it is said here what holds it."""

import re
from collections import defaultdict
from pathlib import Path

import pytest
import told_costs
import told_demos
import told_images
import told_speech


ROOT = Path(__file__).parent.parent
TOLD = (told_images, told_costs, told_speech, told_demos)
MADE = [(page, make) for told in TOLD for page, own in told.TABLES.items() for make in own]
SAID = [(page, say) for told in TOLD for page, own in told.SAID.items() for say in own]
# tables by the beginnings of their heads: the test that compares their rows with records, or why there are none
ELSEWHERE = {
    "docs/choosing_settings.md": {
        "| method | labels": "test_retain_terms_told.py",
        "| time over that of": "test_costs_told.py",
        "| retain set at hand | 1 % | 5 % | 20 % | 475": "test_retain_terms_told.py",
        "| rows a step": "test_retain_terms_told.py",
        "| you have": "settings to choose",
        "| case | better": "numbers of the tables above it, in words",
    },
    "docs/evaluating.md": {
        "| number | what it is": "says what values mean",
        "| method | U-LiRA AUC": "test_studies.py",
        "| method | steps | loss": "test_studies.py",
    },
    "docs/methods.md": {"| method | how": "numbers of papers and equations"},
    "docs/modalities.md": {
        "| question | metric": "thresholds of metrics",
    },
    "docs/requests.md": {"| | found": "says what a search asks for"},
    "docs/results.md": {
        "| | the speaker, trained on": "test_speech_told.py",
        "| on the forgotten": "test_speakers.py",
        "| | 1 | 2 | 4 |": "test_speakers.py",
        "| steps of the attacker": "test_speakers.py",
        "| | gap": "test_sequences.py",
        "| | request 1 is back by": "test_sequences.py",
        "| | WER of the first speaker": "test_sequences.py",
        "| | forget quality": "test_text_told.py",
        "| WER / CER (%)": "made by the command above it",
    },
}


def lines_of(page: str) -> str:
    return (ROOT / page).read_text().replace("**", "")


def tables_in(page: str) -> list[tuple[str, str]]:
    """Heads and bodies of those with more than two decimals or percentages."""
    found = re.findall(r"^(\|.*)\n\|[-| :]+\|\n((?:\|.*(?:\n|$))+)", lines_of(page), flags=re.MULTILINE)
    return [(head, body.strip()) for head, body in found if len(re.findall(r"(?<![\w.])\d+\.\d+|\b\d+ %", body)) > 2]


@pytest.mark.parametrize(("page", "make"), MADE, ids=[f"{page} {make.__name__}" for page, make in MADE])
def test_a_table_is_that_of_the_records(page, make):
    bodies = [body for _, body in tables_in(page)]
    assert "\n".join(make()) in bodies


@pytest.mark.parametrize(("page", "say"), SAID, ids=[f"{page} {say.__name__}" for page, say in SAID])
def test_a_sentence_is_that_of_the_records(page, say):
    assert say() in " ".join(lines_of(page).split())


def test_something_holds_each_table():
    made = defaultdict(set)
    for page, make in MADE:
        made[page].add("\n".join(make()))
    pages = ["README.md", *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md")))]
    left, used = [], set()
    for page in pages:
        for head, body in tables_in(page):
            starts = [start for start in ELSEWHERE.get(page, ()) if head.startswith(start)]
            used |= {(page, start) for start in starts}
            if not starts and body not in made[page]:
                left.append(f"{page}: {head}")
    assert not left
    assert used == {(page, start) for page, own in ELSEWHERE.items() for start in own}
    named = {what for own in ELSEWHERE.values() for what in own.values() if what.endswith(".py")}
    assert all((ROOT / "tests" / name).exists() for name in named)
