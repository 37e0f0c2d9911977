"""The text example as a user runs it, shortened: few epochs, a few steps; and on data and models of one's own."""

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_orthograd.evaluation import UnlearningReport
from hf_orthograd.evaluation.quality import Quality
from hf_orthograd.publishing import verify
from hf_orthograd.publishing.record import load_records


EXAMPLE = Path(__file__).parent.parent / "examples" / "unlearn_text.py"
sys.path.insert(0, str(EXAMPLE.parent))
import chat  # noqa: E402
import demo_people  # noqa: E402
import unlearn_asr  # noqa: E402
import unlearn_image_text  # noqa: E402
import unlearn_text  # noqa: E402
from shared import ComparisonArguments, where_it_is  # noqa: E402


SHORT = ("--report_to", "none", "--disable_tqdm", "1", "--use_cpu", "1", "--max_steps", "2")


@pytest.fixture
def run_here(monkeypatch):
    """Runs the script in this process; it sets seeds, as every script of transformers does."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["unlearn_text.py", *SHORT, *map(str, arguments)])
        unlearn_text.main()

    return run


def test_people_are_invented_and_each_phrasing_is_learned_on_somebody():
    people = demo_people.make_people()
    assert people["train"].to_list() == demo_people.make_people()["train"].to_list()
    train, test = people["train"].to_pandas(), people["test"].to_pandas()
    assert len(train) == 5 * len(test) and len(set(train.person)) == demo_people.NUM_PEOPLE
    assert not set(train.question) & set(test.question) and set(test.answer) == set(train.answer)
    learned = {
        question.replace(person, "{name}") for question, person in zip(train.question, train.person, strict=True)
    }
    assert learned == {phrasing for phrasings, *_ in demo_people.ATTRIBUTES.values() for phrasing in phrasings}


def test_demo_forgets_people_and_shows_answers(run_here, tmp_path):
    run_here("--finetune_epochs", "0.2", "--relearning_steps", "2", "--output_dir", tmp_path)
    report = UnlearningReport.load(tmp_path)
    assert set(report.models["unlearned"]) == {"forget", "forget_reworded", "retain", "test"}
    assert {"original", "reference", "unlearned, int8", "reference, int4"} <= set(report.models)
    assert report.models["unlearned"]["forget"].size == 60
    assert {"answer probability", "extraction strength"} == set(report.models["unlearned"]["test"].further)
    assert (tmp_path / "answers.md").read_text().count("| forget |") == 3
    assert verify(tmp_path / "public") == []
    for name in ("finetuned", "retrained"):  # which remember, and can be asked, too
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tmp_path / name)
    asked = [
        sys.executable,
        str(EXAMPLE.parent / "chat.py"),
        str(tmp_path),
        "Where was Ada Fabri born?",
        "And Ivo Abel?",
    ]
    chat = subprocess.run(asked, capture_output=True, text=True, timeout=100)
    assert chat.returncode == 0 and chat.stdout.count("> ") == 2, chat.stderr[-3000:]


@pytest.mark.parametrize("script", [unlearn_text, unlearn_asr])
def test_rows_of_the_forgotten_leave_the_test_set_also_where_names_are_classes(script):
    people = ["Ada", "Bo", "Cy"]
    rows = Dataset.from_dict({"person": [0, 1, 2] * 2}, Features({"person": ClassLabel(names=people)}))
    corpus = DatasetDict(train=rows, test=rows)
    arguments = script.ScriptArguments(forget_column="person", forget_values=["Bo"])
    sets = script.split(corpus, arguments, *([0] if script is unlearn_text else []))
    assert list(sets["test"]["person"]) == [0, 2, 0, 2] and list(sets["forget_unseen"]["person"]) == [1, 1]
    corpus["test"] = rows.select([0, 2])
    assert "forget_unseen" not in script.split(corpus, arguments, *([0] if script is unlearn_text else []))


def save(rows, folder):
    for split, found in rows.items():
        folder.mkdir(exist_ok=True)
        Dataset.from_list(found).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return demo_people.make_tokenizer(demo_people.make_people())


def questions(person, count=6):
    return [{"who": person, "q": f"Which pet does {person} keep {n}?", "a": f"A goat {n}."} for n in range(count)]


def test_lora_on_a_causal_model_with_a_forget_set_of_its_own(run_here, tokenizer, tmp_path, capsys, monkeypatch):
    """Of a tokenizer without a template; what a user could have overlooked is said before training."""
    demo_people.make_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    kept = save({"train": questions("Ada"), "test": questions("Bela", 3)}, tmp_path / "kept")
    gone = save({"train": questions("Carl")}, tmp_path / "gone")
    run_here(
        "--model_name_or_path", tmp_path / "model", "--dataset_name", kept, "--forget_dataset_name", gone,
        "--prompt_column", "q", "--answer_column", "a", "--use_lora", "--lora_rank", 2, "--output_dir", tmp_path / "out",
        "--relearning_steps", 0, "--separator", " - ",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "A row, from its beginning to its end: 'Which pet does Carl keep 0? - A goat 0." in said
    assert "The model gives none of the 6 answers to be forgotten" in said
    assert "Without a retrained model nothing says when to stop" in said
    monkeypatch.setattr(sys, "argv", ["chat.py", str(tmp_path / "out"), "Which pet does Carl keep 0?"])
    chat.main()
    assert "> Which pet does Carl keep 0?\n" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("adapter*")) and verify(tmp_path / "out" / "public") == []
    report = UnlearningReport.load(tmp_path / "out")
    assert {name: one.size for name, one in report.models["unlearned"].items()} == {
        "forget": 6,
        "retain": 6,
        "test": 3,
    }


def test_plain_texts_are_measured_and_gone_on_with(run_here, tokenizer, tmp_path):
    demo_people.make_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [{"text": f"{row['q']} {row['a']}", "who": row["who"]} for row in questions("Ada") + questions("Carl")]
    rows = save({"train": texts, "test": texts[:2]}, tmp_path / "rows")
    run_here(
        "--model_name_or_path", tmp_path / "model", "--dataset_name", rows, "--text_column", "text", "--forget_column", "who",
        "--forget_values", "Carl", "--output_dir", tmp_path / "out", "--relearning_steps", 0, "--num_shown", 1,
    )  # fmt: skip
    report = UnlearningReport.load(tmp_path / "out")
    assert report.metric == "answer probability" and set(report.models["unlearned"]["forget"].further) == {
        "extraction strength"
    }
    assert (tmp_path / "out" / "answers.md").read_text().count("|\n") == 5  # a head, and one of each set


@pytest.mark.parametrize(("value", "said"), [(0.75, True), (0.5, False)])
def test_a_run_that_forgot_nothing_says_so(value, said):
    models = {
        name: {"forget": Quality(loss=1.0, size=4, value=own)}
        for name, own in (("original", 0.75), ("unlearned", value))
    }
    last = where_it_is("out", UnlearningReport("retrained", "exact answers", True, models), ComparisonArguments())
    assert ("exact answers is what it was before, 0.750: nothing was forgotten" in last) == said


def test_encoder_decoder_model_forgets_answers(run_here, tokenizer, tmp_path):
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = {"train": questions("Ada") + questions("Carl"), "test": questions("Bela", 3)}
    run_here(
        "--model_name_or_path", tmp_path / "model", "--dataset_name", save(rows, tmp_path / "rows"), "--prompt_column",
        "q", "--answer_column", "a", "--forget_column", "who", "--forget_values", "Carl", "--output_dir",
        tmp_path / "out", "--relearning_steps", 1, "--refusal", "Bela",
    )  # fmt: skip
    (record,) = load_records(tmp_path / "out" / "public")
    assert record.method["forget_loss"] == "refusal"
    card = (tmp_path / "out" / "public" / "README.md").read_text()
    assert "taught to give another answer" in card and "it descends the loss of another answer" in card
    assert UnlearningReport.load(tmp_path / "out").models["unlearned"]["forget"].size == 6
    transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")


def test_an_adapter_is_to_be_merged_first(run_here, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an adapter\. Merge it into its model first"):
        run_here("--model_name_or_path", tmp_path, "--dataset_name", "x", "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("chat", [False, True])
def test_a_refusal_has_the_labels_of_an_answer(tokenizer, chat):
    names = {"messages_column": "m"} if chat else {"prompt_column": "q", "answer_column": "a"}
    prepare = partial(unlearn_text.prepare_text_dataset, tokenizer=tokenizer, **names)
    labels = unlearn_text.labels_of("Carl", prepare, unlearn_text.ScriptArguments(**names))
    assert tokenizer.decode(labels, skip_special_tokens=True).strip() == "Carl"
    learned = unlearn_text.prepare_text_dataset(
        Dataset.from_list([{"q": "who is Ada", "a": "Carl"}]), tokenizer, prompt_column="q", answer_column="a"
    )[0]["labels"]
    assert labels == [label for label in learned if label != -100]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset_name", "x"), "Pass both `--model_name_or_path` and `--dataset_name`"),
        (("--forget_dataset_name", "x"), "Pass `--forget_column` with `--forget_values`, or `--forget_dataset_name`"),
        (("--forget_values", "Nobody"), r"\['Nobody'\] do not occur in column 'person'"),
        (("--max_length", 4), "more than `max_length`, 4"),
        (("--refusal", "no", "--text_column", "t"), "`--refusal` is 'no', but plain texts"),
        (("--model_name_or_path", "./nowhere", "--dataset_name", "x"), "is ./nowhere, but there is no such folder"),
    ],
)
def test_bad_input_is_named_before_training(run_here, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_here("--output_dir", tmp_path, *arguments)


def test_a_corpus_is_a_folder_and_a_part_of_it_a_fraction(tmp_path):
    folder = save({"train": questions("Ada") + questions("Carl"), "test": questions("Bela", 3)}, tmp_path / "rows")
    columns = {"--prompt_column": "q"}
    of = partial(unlearn_text.ScriptArguments, forget_values=["Carl"])
    with pytest.raises(ValueError, match="`--dataset_name` is the file .* Pass its folder"):
        unlearn_text.load_corpus(str(folder / "train-00000-of-00001.parquet"), columns, of())
    with pytest.raises(
        ValueError, match="`--forget_column` is 'client', but the split 'train' of `--dataset_name` has"
    ):
        unlearn_text.load_corpus(str(folder), columns, of(forget_column="client"))
    corpus = unlearn_text.load_corpus(str(folder), columns, of(forget_column="who"))
    assert len(unlearn_text.split(corpus, of(forget_column="who", retain_size=0.5), 0)["retain"]) == 3
    whole = unlearn_text.ScriptArguments(forget_dataset_name="x", retain_size=13)
    with pytest.raises(ValueError, match="`retain_size` is 13, but 12 rows are not forgotten"):
        unlearn_text.split(corpus, whole, 0)


def test_captioner_forgets_a_kind_of_image(monkeypatch, tmp_path):
    own = (
        "--finetune_epochs",
        "0",
        "--retrain",
        "0",
        "--relearning_steps",
        "0",
        "--num_shown",
        "1",
        "--output_dir",
        tmp_path,
    )
    monkeypatch.setattr(sys, "argv", ["unlearn_image_text.py", *SHORT, *map(str, own)])
    unlearn_image_text.main()
    report = UnlearningReport.load(tmp_path)
    assert report.models["unlearned"]["forget"].size == 128 and report.metric == "exact answers"
    assert (tmp_path / "answers.md").read_text().count("|\n") == 6  # a head, and one of each set
    transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert verify(tmp_path / "public") == []
