"""Bad input, and what is said of it: before any step, by the argument's name, what was given and what to do.

Each row is given, the kind of error, and words of its message. `python tests/test_bad_inputs.py` prints them as a table.
"""

import io
from dataclasses import dataclass

import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import MODELS, Samples, make_example
from datasets import Dataset, DatasetDict, IterableDataset
from peft import PromptTuningConfig, get_peft_model
from test_bad_settings import SETTINGS
from transformers import TrainingArguments

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer, project_orthogonal, split_forget_retain
from hf_orthograd.data import check_corpus
from hf_orthograd.data.speech import decode_audio
from hf_orthograd.evaluation import Quantization, evaluate_unlearning


def samples(kind, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [make_example(kind, number, generator) for number in range(count)]


def changed(kind, seed, row, **entries):
    rows = samples(kind, 4, seed)
    rows[row] = {**rows[row], **entries}
    return Samples(rows)


def asked(lengths):
    """Questions and answers, with prompts of these lengths."""
    rows = [{**row, "labels": row["labels"].clone()} for row in samples("llama", len(lengths), 2)]
    for row, length in zip(rows, lengths, strict=True):
        row["labels"][:length] = -100
    return Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in rows])


def without(kind, seed, name):
    return Samples([{key: value for key, value in row.items() if key != name} for row in samples(kind, 4, seed)])


def prompt_tuned():
    model = MODELS["llama"]()
    return get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def frozen(kind):
    return MODELS[kind]().requires_grad_(False)


def resnet():
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


def coupled_loss(outputs, labels, num_items_in_batch=None):
    """An in-batch contrastive loss: each sample against the others."""
    return torch.nn.functional.cross_entropy(
        outputs.logits @ outputs.logits.T, torch.arange(len(labels)), reduction="none"
    )


def joined(examples):
    """A padding-free collator: all samples in one row."""
    return {name: torch.cat([example[name] for example in examples])[None] for name in examples[0]}


class WithPatches(torch.nn.Module):
    """Reads patches of all samples in one tensor, as Qwen2-VL does: the first dimension is not the batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, pixel_values, grid, labels=None):
        return {"logits": torch.stack([own.mean(0) for own in self.layer(pixel_values).split(grid.tolist())])}


def patch_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")


def collate_patches(examples):
    return {
        "pixel_values": torch.cat([example["pixel_values"] for example in examples]),
        "grid": torch.tensor([len(example["pixel_values"]) for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def patches(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return Samples(
        [{"pixel_values": torch.randn(2 + n % 3, 4, generator=generator), "labels": n % 3} for n in range(count)]
    )


# a run of a ViT (or another model) that differs from a good one in what is given
RAGGED = [{"input_ids": own, "attention_mask": [1] * len(own), "labels": own} for own in ([1, 2], [3])]
REFUSAL = {"forget_loss": "refusal", "refusal_labels": [3]}
RUNS = {
    "a refusal by a class that is none": (
        {"settings": REFUSAL | {"refusal_labels": [5]}},
        "`refusal_labels` must be labels of the model, 0 to 4, but holds 5",
    ),
    "a refusal by two classes": (
        {"settings": REFUSAL | {"refusal_labels": [3, 4]}},
        "`refusal_labels` must hold one, and the model have one for each sample, but it holds 2",
    ),
    "a refusal without prompts": (
        {"kind": "llama", "settings": REFUSAL},
        "forget_loss='refusal' answers a prompt, but sample 0 of a batch of `forget_dataset` has labels in 1 pieces, and no prompt",
    ),
    "a refusal of a row without a prompt": (
        {"kind": "llama", "settings": REFUSAL, "forget_dataset": asked([3, 3, 3, 0])},
        "but row 3 of `forget_dataset` has none: its labels begin with",
    ),
    "a refusal by CTC's blank": (
        {"kind": "wav2vec2", "settings": REFUSAL | {"refusal_labels": [1, 0]}},
        "`refusal_labels` is [1, 0], but 0 is the blank of CTC",
    ),
    "rows of several lengths and no collator that pads": (
        {"kind": "llama", "train_dataset": Dataset.from_list(RAGGED)},
        "`data_collator` cannot make a batch of 2 rows: expected sequence of length 2",
    ),
    "a refusal of batches without labels": (
        {"settings": REFUSAL, "forget_dataset": without("vit", 2, "labels"), "train_dataset": without("vit", 1, "labels")},
        "The batches made from `forget_dataset` have no 'labels'",
    ),
    "a refusal under a loss of one's own": (
        {"settings": REFUSAL, "compute_loss_func": coupled_loss},
        "forget_loss='refusal' is not known for a `compute_loss_func` of your own",
    ),
    "an empty forget set": ({"forget_dataset": Samples([])}, "`forget_dataset` is empty"),
    "a generator to forget": ({"forget_dataset": (x for x in ())}, "`forget_dataset` is a generator"),
    "a stream to forget": (
        {"forget_dataset": IterableDataset.from_generator(lambda: iter(()))},
        "`forget_dataset` is a IterableDataset, but must have a length",
    ),
    "no retain set": ({"train_dataset": None}, "`train_dataset`, the retain set, is empty"),
    "an empty retain set": ({"train_dataset": Samples([])}, "set projection='none' and alpha=0"),
    "a number for a retain set": ({"train_dataset": 7}, "`train_dataset` is a int, which holds no rows"),
    "an empty stream to retain": (
        {"train_dataset": IterableDataset.from_generator(lambda: iter(())), "settings": {"max_steps": 1}},
        "`train_dataset` is a stream that gave no rows",
    ),
    "a row in both sets": ({"forget_dataset": Samples(samples("vit", 4, 1)[2:3])}, "row 0 of the one and row 2 of the other"),
    "other columns": (
        {"forget_dataset": Samples([{"pixels": torch.zeros(3), "labels": torch.tensor(0)}])},
        "`forget_dataset` has columns ['labels', 'pixels']",
    ),
    "no labels": (
        {"forget_dataset": without("vit", 2, "labels"), "train_dataset": without("vit", 1, "labels")},
        "have no 'labels': check `data_collator`",
    ),
    "a class that the model lacks": (
        {"forget_dataset": changed("vit", 2, 0, labels=torch.tensor(9))},
        "Row 0 of `forget_dataset` has the label 9, but this model knows 0 to 4",
    ),
    "a class of -100": (
        {"train_dataset": changed("vit", 1, 1, labels=torch.tensor(-100))},
        "Row 1 of `train_dataset` has the label -100",
    ),
    "labels that are no classes": (
        {"forget_dataset": Samples([{**row, "labels": torch.tensor(0.5)} for row in samples("vit", 4, 2)])},
        "have shape (2,) for 2 rows, but this model has 5 outputs",
    ),
    "several labels a sample": (
        {"forget_dataset": Samples([{**row, "labels": torch.tensor([1, 0])} for row in samples("vit", 4, 2)])},
        "have shape (2, 2) for 2 rows, but a classifier takes one class",
    ),
    "tokens that all are masked": (
        {"kind": "llama", "train_dataset": changed("llama", 1, 1, labels=torch.full((10,), -100))},
        "All labels are -100 in rows 1 of `train_dataset`",
    ),
    "a token outside of the vocabulary": (
        {"kind": "llama", "forget_dataset": changed("llama", 2, 0, labels=torch.full((10,), 64))},
        "Row 0 of `forget_dataset` has the label 64, but this model knows 0 to 63",
    ),
    "a column of labels with a row of None": (
        {
            "kind": "llama",
            "train_dataset": Dataset.from_list([{"input_ids": [i, 2, 3], "labels": [i, 2, 3]} for i in range(1, 4)]
                                               + [{"input_ids": [4, 5, 6], "labels": None}]),
            "forget_dataset": Dataset.from_list([{"input_ids": [i, 7, 8], "labels": [i, 7, 8]} for i in range(1, 4)]),
        },
        "Row 3 of `train_dataset` has no label (None)",
    ),
    "no trainable parameter": ({"model": lambda: frozen("vit")}, "has no trainable parameter: every `requires_grad` is False"),
    "no adapter to project": ({"settings": {"projection_parameters": "lora"}}, "no trainable LoRA parameter"),
    "BatchNorm in training mode": ({"model": resnet}, "BatchNorm in training mode couples the samples"),
    "a compiled model": ({"model": lambda: torch.compile(MODELS["vit"]())}, "does not support a compiled model"),
    "a quantised model": (
        {"model": lambda: torch.ao.quantization.quantize_dynamic(MODELS["vit"](), {torch.nn.Linear})},
        "does not support a dynamically quantised model",
    ),
    "torch_compile": ({"settings": {"torch_compile": True}}, "does not support a compiled model (leave `torch_compile`"),
    "label smoothing": ({"settings": {"label_smoothing_factor": 0.1}}, "does not support `label_smoothing_factor`"),
    "reentrant checkpointing": (
        {"settings": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}},
        "does not support reentrant activation checkpointing",
    ),
    "an optimizer inside of the backward pass": ({"settings": {"optim": "lomo"}}, "steps inside of the backward pass"),
    "prompt tuning": ({"kind": "llama", "model": prompt_tuned}, "does not support prompt learning"),
    "pushing half-unlearned weights": (
        {"settings": {"push_to_hub": True, "hub_model_id": "me/it"}},
        "hub_strategy='every_save' (set it to 'end'",
    ),
    "a loader that drops all there is": (
        {"settings": {"dataloader_drop_last": True, "per_device_train_batch_size": 8, "max_steps": -1}},
        "`dataloader_drop_last` is True, and `train_dataset`, the retain set, has 4 rows",
    ),
    "a loss that couples samples": ({"compute_loss_func": coupled_loss}, "depends on the others of its batch"),
    "a loss of one number": (
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()},
        "must be one number for each sample, shape (2,), but `compute_loss_func` returned shape ()",
    ),
    "a loss that is no tensor": (
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: 1.0},
        "`compute_loss_func` returned a float",
    ),
    "a collator that joins samples": ({"kind": "llama", "data_collator": joined}, "joins samples into one row"),
    "a model whose loss is not known": (
        {"model": WithPatches, "train_dataset": patches(4, 1), "forget_dataset": patches(4, 2), "data_collator": collate_patches},
        "The per-sample loss of WithPatches is not known. Pass `compute_loss_func",
    ),
    "chunks of what cannot be cut": (
        {
            "model": WithPatches, "train_dataset": patches(4, 1), "forget_dataset": patches(4, 2),
            "data_collator": collate_patches, "compute_loss_func": patch_loss, "settings": {"retain_chunk_size": 1},
        },
        "cannot be cut into chunks of 1: the first dimension of `pixel_values`",
    ),
    "arguments of another kind": ({"args": {"alpha": 0.5}}, "`args` must be TrainingArguments or a subclass"),
    "a rule without evaluations": ({"settings": {"forget_target": 3.0}}, "`eval_strategy` is 'no'"),
    "a budget without data": (
        {"settings": {"retain_budget": 1.0, "eval_strategy": "steps"}},
        "`retain_budget` is 1.0, but `eval_dataset` is missing",
    ),
    "a metric that nothing computes": (
        {"settings": {"forget_target": 0.9, "stop_metric": "wer", "eval_strategy": "steps"}},
        "`stop_metric` is 'wer', which needs a `compute_metrics`",
    ),
    "resuming where nothing was saved": ({"resume": True}, "`resume_from_checkpoint` is True, but `output_dir`"),
}  # fmt: skip


def wav(samples):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16000, format="WAV")
    return buffer.getvalue()


ROWS = Dataset.from_dict({"speaker": ["a", "b", "b"], "text": ["x", "y", "z"]})
CORPUS = DatasetDict(train=ROWS)
CALLS = {
    "audio that is None": (lambda: decode_audio(None, 16000), "audio must be a mapping"),
    "audio without any": (lambda: decode_audio({"bytes": None, "path": None}, 16000), "neither 'bytes' nor 'path'"),
    "corrupted audio": (lambda: decode_audio({"bytes": b"RIFFxxxx"}, 16000), "audio cannot be read"),
    "a file that is not there": (lambda: decode_audio({"path": "/nowhere.wav"}, 16000), "audio cannot be read"),
    "audio of length zero": (lambda: decode_audio({"bytes": wav(np.zeros(0))}, 16000), "but has shape (0,)"),
    "audio with NaN": (
        lambda: decode_audio({"array": np.array([0.0, np.nan]), "sampling_rate": 16000}, 16000),
        "samples that are not finite",
    ),
    "audio of three dimensions": (
        lambda: decode_audio({"array": np.zeros((2, 2, 9)), "sampling_rate": 16000}, 16000),
        "must have one or two dimensions",
    ),
    "a value that no row has": (lambda: split_forget_retain(ROWS, "speaker", "z"), "which has 'a', 'b'"),
    "a list among the values": (
        lambda: split_forget_retain(ROWS, "speaker", [["a"]]),
        "do not occur in column 'speaker'",
    ),
    "no value": (lambda: split_forget_retain(ROWS, "speaker", []), "do not occur in column 'speaker'"),
    "a column that is not there": (lambda: split_forget_retain(ROWS, "singer", "a"), "`column` is 'singer'"),
    "more rows than there are": (
        lambda: split_forget_retain(ROWS, "speaker", "a", retain_size=5),
        "`retain_size` is 5, but 2 rows are not forgotten",
    ),
    "a corpus without a test split": (lambda: check_corpus(CORPUS, {}), "has no split test, only train"),
    "a corpus in one piece": (lambda: check_corpus(ROWS, {}), "is one Dataset, but must have the splits"),
    "a flag that names no column": (
        lambda: check_corpus(DatasetDict(train=ROWS, test=ROWS), {"--label_column": "label"}),
        "`--label_column` is 'label', but the split 'train' of `--dataset_name` has the columns speaker, text",
    ),
    "gradients of unlike lengths": (
        lambda: project_orthogonal(torch.ones(3), torch.ones(2, 4)),
        "have shapes (3,) and (2, 4)",
    ),
    "a solver that is not there": (
        lambda: project_orthogonal(torch.ones(3), torch.ones(2, 3), solver="qr"),
        "`solver` must be one of",
    ),
    "integers of one bit": (lambda: Quantization(1), "`bits` must lie between 2 and 16, but is 1"),
    "a report of a goal that is none": (lambda: evaluate_unlearning(None, goal="gone"), "`goal` must be"),
}


def run(given, tmp_path):
    given = dict(given)
    kind, settings = given.pop("kind", "vit"), given.pop("settings", {})
    resume, model = given.pop("resume", None), given.pop("model", lambda: MODELS[kind]())()
    defaults = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "per_device_forget_batch_size": 2,
        "save_strategy": "no",
    }
    args = given.pop("args", None) or OrthoGradConfig(
        str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, **(defaults | settings)
    )
    sets = {"train_dataset": Samples(samples(kind, 4, 1)), "forget_dataset": Samples(samples(kind, 4, 2))}
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError) as raised:
        OrthoGradTrainer(model, args, **(sets | given)).train(resume_from_checkpoint=resume)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return str(raised.value)


@pytest.mark.parametrize("given", RUNS)
def test_runs(given, tmp_path):
    changes, message = RUNS[given]
    assert message in run(changes, tmp_path)


@pytest.mark.parametrize("given", CALLS)
def test_calls(given):
    call, message = CALLS[given]
    with pytest.raises(ValueError) as raised:
        call()
    assert message in str(raised.value)


def test_the_table_is_long_enough():
    assert len(SETTINGS) + len(RUNS) + len(CALLS) >= 80


def test_fields_that_mean_something_else(tmp_path):
    @dataclass
    class Arguments(TrainingArguments):
        alpha: int = 32  # of an adapter, say

    message = run({"args": Arguments(str(tmp_path), report_to="none", use_cpu=True)}, tmp_path)
    assert "own fields alpha have the names of fields of OrthoGradConfig" in message


if __name__ == "__main__":
    print("| given | error | message |\n|---|---|---|")
    for settings, message in SETTINGS:
        print(f"| `{settings}` | ValueError | {message} |")
    for given, (_, message) in (RUNS | CALLS).items():
        print(f"| {given} | ValueError | {message} |")
