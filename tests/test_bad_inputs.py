"""Bad input, and what is said of it: before any step, by the argument's name, what was given and what to do.

Each row is given, the kind of error, and words of its message. `python tests/test_bad_inputs.py` prints them as a table.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import MODELS, Samples, make_example
from datasets import Dataset, DatasetDict, IterableDataset
from peft import PromptTuningConfig, get_peft_model
from transformers import TrainingArguments

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer, project_orthogonal, split_forget_retain
from hf_orthograd.data import check_corpus
from hf_orthograd.data.speech import decode_audio
from hf_orthograd.evaluation import Quantization, evaluate_unlearning


NUMBER = "must be a number"
FINITE = "must be a finite number"
WHOLE = "must be a whole number"
SWITCH = "must be True or False"

# settings of OrthoGradConfig, and words of the ValueError
SETTINGS = [
    ({"alpha": 1.5}, "`alpha` must be a finite number from 0 to 1, but is 1.5"),
    ({"alpha": -0.1}, "`alpha` must be a finite number from 0 to 1, but is -0.1"),
    ({"alpha": math.nan}, "`alpha` must be a finite number from 0 to 1, but is nan"),
    ({"alpha": "0.5"}, "`alpha` must be a number, but is '0.5' (str)"),
    ({"alpha": None}, "`alpha` must be a number, but is None"),
    ({"alpha": True}, "`alpha` must be a number, but is True (bool)"),
    ({"npo_beta": 0.0}, "`npo_beta` must be positive, but is 0"),
    ({"npo_beta": -1.0}, "`npo_beta` must be a finite number of 0 or more, but is -1.0"),
    ({"npo_beta": math.inf}, "`npo_beta` must be a finite number of 0 or more, but is inf"),
    ({"npo_beta": "1"}, "`npo_beta` must be a number, but is '1'"),
    ({"simnpo_gamma": math.nan}, "`simnpo_gamma` must be a finite number, but is nan"),
    ({"simnpo_gamma": None}, "`simnpo_gamma` must be a number"),
    (
        {"per_device_forget_batch_size": 0},
        "`per_device_forget_batch_size` must be a whole number of 1 or more, but is 0",
    ),
    (
        {"per_device_forget_batch_size": 2.5},
        "`per_device_forget_batch_size` must be a whole number of 1 or more, but is 2.5",
    ),
    ({"per_device_forget_batch_size": None}, "`per_device_forget_batch_size` must be a whole number of 1 or more"),
    ({"func_chunk_size": 0}, "`func_chunk_size` must be a whole number of 1 or more, but is 0"),
    ({"retain_chunk_size": -2}, "`retain_chunk_size` must be a whole number of 1 or more, but is -2"),
    ({"retain_chunk_size": "4"}, "`retain_chunk_size` must be a whole number of 1 or more, but is '4'"),
    ({"monitor_steps": -1}, "`monitor_steps` must be a whole number of 0 or more, but is -1"),
    ({"stop_patience": -1}, "`stop_patience` must be a whole number of 0 or more, but is -1"),
    ({"stop_patience": 1.5}, "`stop_patience` must be a whole number"),
    ({"stop_metric": None}, "`stop_metric` must be the name of a metric, but is None"),
    ({"forget_loss": "descent"}, "`forget_loss` must be one of ascent, npo, simnpo, but is 'descent'"),
    ({"projection": "yes"}, "`projection` must be one of orthogonal, mean, none, but is 'yes'"),
    ({"projection": None}, "`projection` must be one of orthogonal, mean, none, but is None"),
    ({"projection_scope": "layer"}, "`projection_scope` must be one of global, per_tensor, but is 'layer'"),
    ({"projection_parameters": "all"}, "`projection_parameters` must be one of trainable, lora, but is 'all'"),
    ({"projection_target": "step"}, "`projection_target` must be one of gradient, update, but is 'step'"),
    ({"projection_target": "update", "projection": "none"}, "`projection_target` is 'update', which needs"),
    ({"gradient_engine": "fast"}, "`gradient_engine` must be one of auto, gram, func, loop, but is 'fast'"),
    ({"projection_solver": "qr"}, "`projection_solver` must be one of exact, cg, kaczmarz, but is 'qr'"),
    ({"projection_iterations": 5}, "has no iterations: use 'cg' or 'kaczmarz'"),
    (
        {"projection_solver": "cg", "projection_iterations": 0},
        "`projection_iterations` must be a whole number of 1 or more",
    ),
    ({"projection_rtol": 2.0}, "`projection_rtol` must be a finite number from 0 to 1, but is 2.0"),
    ({"projection_rtol": 0.0}, "`rtol` must lie strictly between 0 and 1"),
    ({"projection_rtol": "1e-3"}, "`projection_rtol` must be a number, but is '1e-3'"),
    ({"retain_budget": math.nan}, "`retain_budget` must be a finite number of 0 or more, but is nan"),
    ({"retain_budget": -0.1}, "`retain_budget` must be a finite number of 0 or more, but is -0.1"),
    ({"retain_budget": "small"}, "`retain_budget` must be a number, but is 'small'"),
    ({"retain_budget": 0.1, "metric_for_best_model": "loss"}, "`metric_for_best_model` is 'loss'"),
    ({"retain_budget": 0.1, "greater_is_better": False}, "`greater_is_better` False"),
    ({"forget_target": "nan"}, "`forget_target` must be a finite number, but is nan"),
    ({"forget_target": "soon"}, "`forget_target` must be a number or 'reference', but is 'soon'"),
    ({"forget_target": math.inf}, "`forget_target` must be a finite number, but is inf"),
    ({"forget_target": [1.0]}, "`forget_target` must be a number or 'reference', but is [1.0]"),
    ({"freeze_batch_norm": "yes"}, "`freeze_batch_norm` must be True or False, but is 'yes'"),
    ({"merge_adapter": None}, "`merge_adapter` must be True or False, but is None"),
    ({"stop_greater_is_better": 1}, "`stop_greater_is_better` must be True or False, but is 1"),
    ({"check_overlap": "no"}, "`check_overlap` must be True or False, but is 'no'"),
    (
        {"retain_chunk_size": 4, "projection": "mean"},
        "`retain_chunk_size` is 4, which needs `projection` to be orthogonal",
    ),
    ({"retain_chunk_size": 4, "gradient_engine": "loop"}, "`gradient_engine` to be auto or gram, but it is 'loop'"),
]


def samples(kind, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [make_example(kind, number, generator) for number in range(count)]


def changed(kind, seed, row, **entries):
    rows = samples(kind, 4, seed)
    rows[row] = {**rows[row], **entries}
    return Samples(rows)


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
RUNS = {
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
        "`--label_column` is 'label', but the split 'train' has the columns speaker, text",
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


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=str)
def test_settings(settings, message, tmp_path):
    with pytest.raises(ValueError) as raised:
        OrthoGradConfig(str(tmp_path), report_to="none", **settings)
    assert message in str(raised.value)


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
