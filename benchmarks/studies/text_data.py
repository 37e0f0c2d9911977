"""TOFU's questions on invented authors, and SmolLM2 trained on them."""

import json
from pathlib import Path

import torch
from datasets import Dataset
from harness import trained_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_orthograd.data import prepare_text_dataset


QUESTIONS = 20  # on each author
PRECISION = {"bf16": True, "use_cpu": not torch.cuda.is_available()}  # a CPU is to be asked for by name
# that SmolLM2's template writes a longer one of its own if there is none
SYSTEM = {"role": "system", "content": "Answer the question."}
Rows = list[dict]


def read_rows(data_folder: Path, name: str) -> Rows:
    """A file of TOFU: a question, its answer, and where the file has them, answers in other words and wrong ones."""
    return [json.loads(line) for line in (data_folder / f"{name}.json").read_text().splitlines()]


def read_authors(data_folder: Path, authors: int) -> Rows:
    """All questions on so many authors, from the last on; with wrong answers where TOFU has them: the first and the last 20 of 200."""
    rows = read_rows(data_folder, "full")
    last = read_rows(data_folder, "forget10_perturbed")
    rows[: len(last)], rows[-len(last) :] = read_rows(data_folder, "retain_perturbed"), last
    for row in rows:
        if "paraphrased_answer" in row:
            row["right_answer"] = row["paraphrased_answer"]
    return rows[len(rows) - authors * QUESTIONS :]


def to_chats(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Questions with answers as model inputs and labels; only the answer is learned."""
    chats = [
        [SYSTEM, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in pairs
    ]
    return prepare_text_dataset(Dataset.from_dict({"messages": chats}), tokenizer, messages_column="messages")


def answers_of(rows: Rows, tokenizer: PreTrainedTokenizerBase, kind: str = "answer") -> Dataset:
    """The rows with the answer of that kind."""
    return to_chats([(row["question"], row[kind]) for row in rows], tokenizer)


def wrong_answers_of(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Each row as often as it has wrong answers, one after the other."""
    return to_chats([(row["question"], wrong) for row in rows for wrong in row["perturbed_answer"]], tokenizer)


def load_pretrained(model: Path):
    """A model and its tokenizer, from a folder or a GGUF file (which takes `pip install gguf`)."""
    source = {"gguf_file": model.name} if model.suffix == ".gguf" else {}
    folder = model.parent if source else model
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **source)
    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    if not source:
        return found, tokenizer
    # its weights are plain numbers now, but transformers neither trains nor saves what was read as a quantised model
    weights, config = found.state_dict(), found.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights)
    return model, tokenizer


def train_on(rows: Rows, pretrained: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, epochs: int):
    """The pretrained model after it has learned the rows, kept in `folder`."""

    def train(model) -> None:
        set_seed(0)
        args = TrainingArguments(
            str(folder.with_name("trainer")), num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=2e-4, **PRECISION,
            lr_scheduler_type="cosine", warmup_steps=10, save_strategy="no", report_to="none", logging_steps=10,
        )  # fmt: skip
        Trainer(
            model, args, train_dataset=answers_of(rows, tokenizer), data_collator=DataCollatorForSeq2Seq(tokenizer)
        ).train()

    build = lambda: load_pretrained(pretrained)[0]  # noqa: E731
    return trained_model(folder, build, train, lambda kept: AutoModelForCausalLM.from_pretrained(kept))
