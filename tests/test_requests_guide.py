"""The guide on requests, followed command by command."""

import random
import re
import shlex
from pathlib import Path

import pytest
from conftest import MODELS
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_orthograd.commands import run
from hf_orthograd.requests import RequestHistory


ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "requests.md").read_text()
NAMES = (
    "ada ben cleo dan eve fay gus hal ida jon kim lea max ned ola pia quin ray sue tom uma vic wes xia yan zoe".split()
)


def sentences(seed, count, length=12):
    draw = random.Random(seed)
    return [" ".join(draw.choices(NAMES, k=length)) for _ in range(count)]


@pytest.fixture
def folder(tmp_path):
    """A model, its tokenizer and rows under the names that the guide gives them."""
    vocabulary = {"[PAD]": 0} | {name: number for number, name in enumerate(NAMES, start=1)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[PAD]")
    tokenizer.save_pretrained(tmp_path / "original")
    MODELS["llama"](0.0).save_pretrained(tmp_path / "original")
    for number, name in enumerate(("march", "april", "may", "retain")):
        texts = sentences(number, 10)
        if name == "may":
            texts[4] = sentences(0, 3)[2].rpartition(" ")[0] + " zoe"  # one of March, nearly
        tokens = [tokenizer(text).input_ids for text in texts]
        rows = {"input_ids": tokens, "attention_mask": [[1] * len(own) for own in tokens], "labels": tokens}
        kept = rows if name == "retain" else rows | {"text": texts}
        Dataset.from_dict(kept).to_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


def test_each_command_does_what_the_guide_says(folder, monkeypatch, capsys):
    code = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    commands = re.findall(r"```bash\n(.*?)```", GUIDE, re.S)
    monkeypatch.chdir(folder)
    Path("train.py").write_text(next(block for block in code if block.startswith("# train.py")))

    def said(block, code=0):
        """What the block's commands print, each a call of the command line."""
        for line in block.splitlines():
            command, _, _ = line.removeprefix("python -m hf_orthograd ").partition(" && ")
            assert run(shlex.split(command)) == code
        return capsys.readouterr().out

    assert said(commands[0]) == "Begun: history\n"
    march = said(commands[1])
    assert (
        march.startswith("Added: request 1 (case-17), 10 rows.\n")
        and "Done: request 1 (case-17); loss on its forget set" in march
    )
    april = said(commands[2])
    assert "1 case-17; erased: done; 10 rows; kept: model, rows, salt, sketches\n" in april
    assert re.search(r"request 1 \(case-17\): as recorded; loss on its forget set .* came back", april)
    history = RequestHistory("history")
    assert history.pending() == []
    assert "text" not in history.requests[0].rows("forget").column_names

    found = said(commands[3], code=1)
    assert "like a row of request case-17.\n" in found and found.endswith("1 of 10 rows were asked to be forgotten.\n")

    new_data = load_dataset("parquet", data_files="may.parquet", split="train").remove_columns("text")
    names = {"new_data": new_data}
    exec(next(block for block in code if block.startswith("# may.py")), names)
    assert [seen.step for seen in names["stays"].history] == [0, 3]  # the end, as `logging_steps` has not come yet

    last = said(commands[4])
    assert "Deleted: rows of request 1." in last and "Pending again: [2]" in last and "Withdrawn: request 2." in last
    assert history.requests[0].rows("forget") is None
    assert len(commands) == 5

    again, then = commands[2].splitlines()[:2]
    assert run(shlex.split(again.removeprefix("python -m hf_orthograd "))) == 0
    assert run(shlex.split(then.removeprefix("python -m hf_orthograd ") + " --report train.py:make_report")) == 0
    assert (history.requests[-1].private / "unlearning_report.json").exists()
    capsys.readouterr()
    assert run(["requests", "run", "history", "--trainer", "train.py:make_trainer", "--report", "train.py:made"]) == 2
    assert run(["requests", "withdraw", "history", "case-99"]) == 2
    assert run(["requests", "add", "history", "--forget", "may.parquet", "--drop_sketched"]) == 2
    assert run(["requests", "run", "history", "--trainer", "train.py:make_trainer", "--at_most", "0"]) == 2
    said = capsys.readouterr().err
    assert "`--report` is 'train.py:made', but train.py has no function 'made'" in said
    assert "`--drop_sketched` is given without `--sketch`" in said
    assert "`at_most` must be 1 or more, or left out to carry all out, but is 0." in said
    Path("broken.json").write_text("[1, {")
    assert run(["requests", "find", "history", "--rows", "broken.json"]) == 2
    Path("wrong.py").write_text("def make_trainer(model): ...")
    assert run(["requests", "check", "history", "--trainer", "wrong.py:make_trainer"]) == 2
    unforeseen = capsys.readouterr().err
    assert "'broken.json' gives no rows" in unforeseen and "TypeError: make_trainer() takes 1" in unforeseen
    assert "`request` is 'case-99', which names no request. The history has 1 (case-17), 2 (case-23): pass" in said
