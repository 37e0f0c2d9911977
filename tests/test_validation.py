"""Bad input: an error before the first step that names the argument, what was given and what to do."""

import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Samples
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.validation import check_launch


def args(tmp_path, **settings):
    defaults = {"max_steps": 2, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return OrthoGradConfig(str(tmp_path), **{**defaults, "per_device_train_batch_size": 3, **settings})


@pytest.fixture
def fails_before_any_step(tmp_path, make_model, make_samples):
    """Builds and trains a run that differs from a good one in what is passed; returns the message."""

    def run(kind="vit", error=ValueError, settings=None, **changes):
        model = changes.pop("model", None) or make_model(kind)
        before = [p.detach().clone() for p in model.parameters()]
        given = {"train_dataset": make_samples(kind, 4, seed=1), "forget_dataset": make_samples(kind, 3, seed=2)}
        with pytest.raises(error) as raised:
            OrthoGradTrainer(model, args(tmp_path, **(settings or {})), **{**given, **changes}).train()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return str(raised.value)

    return run


def test_empty_forget_set(fails_before_any_step):
    assert "`forget_dataset` is empty" in fails_before_any_step(forget_dataset=Samples([]))


def test_streaming_forget_set(fails_before_any_step):
    assert "`forget_dataset` is a generator" in fails_before_any_step(forget_dataset=(x for x in ()))


@pytest.mark.parametrize("retain", [None, Samples([])])
def test_empty_retain_set(fails_before_any_step, retain):
    message = fails_before_any_step(train_dataset=retain)
    assert "`train_dataset`, the retain set, is empty" in message
    assert "projection='none' and alpha=0" in message


def test_overlap_of_tensors(fails_before_any_step, make_samples):
    shared = make_samples("vit", 4, seed=1)
    message = fails_before_any_step(train_dataset=shared, forget_dataset=Samples(shared.examples[2:3]))
    assert "1 rows stand in both `forget_dataset` and `train_dataset`" in message
    assert "row 0 of the one and row 2 of the other" in message


def test_overlap_of_arrow_rows(fails_before_any_step):
    rows = Dataset.from_list([{"input_ids": [i, 2, 3], "labels": [i, 2, 3]} for i in range(1, 9)])
    message = fails_before_any_step(
        "llama", train_dataset=rows.select([0, 1, 2, 5]), forget_dataset=rows.select([5, 6, 7])
    )
    assert "row 0 of the one and row 3 of the other" in message


def test_other_columns(fails_before_any_step):
    message = fails_before_any_step(forget_dataset=Samples([{"pixels": torch.zeros(3), "labels": torch.tensor(0)}]))
    assert (
        "`forget_dataset` has columns ['labels', 'pixels'] and `train_dataset` ['labels', 'pixel_values']" in message
    )


def test_batch_norm_in_training_mode(fails_before_any_step):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=5)
    message = fails_before_any_step(model=ResNetForImageClassification(config))
    assert "BatchNorm in training mode couples" in message
    assert "freeze_batch_norm=True" in message


def test_batch_norm_kept_in_evaluation_mode(tmp_path, make_samples):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=5)
    torch.manual_seed(0)
    model = ResNetForImageClassification(config)
    statistics = [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]
    trainer = OrthoGradTrainer(
        model,
        args(tmp_path, freeze_batch_norm=True),
        train_dataset=make_samples("vit", 4, seed=1),
        forget_dataset=make_samples("vit", 3, seed=2),
    )
    trainer.train()
    assert trainer.gradient_engine.name == "gram"
    after = [buffer for name, buffer in model.named_buffers() if "running" in name]
    assert all(torch.equal(a, b) for a, b in zip(statistics, after, strict=True))


def test_no_trainable_parameter(fails_before_any_step, make_model):
    model = make_model("vit").requires_grad_(False)
    assert "has no trainable parameter" in fails_before_any_step(model=model)


def test_no_lora_parameter(fails_before_any_step):
    message = fails_before_any_step(settings={"projection_parameters": "lora"})
    assert "`projection_parameters` is 'lora', but `model` has no trainable LoRA parameter" in message


def test_collator_that_drops_labels(fails_before_any_step):
    def collate(examples):
        return {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}

    message = fails_before_any_step(data_collator=collate)
    assert "batches made from `forget_dataset` have no 'labels': check `data_collator`" in message


def test_label_row_that_is_all_ignored(fails_before_any_step):
    rows = [{"input_ids": [i, 2, 3], "labels": [i, 2, 3]} for i in range(1, 9)]
    rows[6]["labels"] = [4, -100, -100]  # a causal model predicts nothing here: its first label has no position
    rows = Dataset.from_list(rows)
    message = fails_before_any_step(
        "llama", train_dataset=rows.select(range(4)), forget_dataset=rows.select(range(4, 8))
    )
    assert "All labels are -100 in rows 2 of `forget_dataset`" in message


def test_label_row_that_is_all_ignored_in_a_batch(fails_before_any_step, make_samples):
    samples = make_samples("whisper", 4, seed=1)
    samples.examples[1]["labels"][:] = -100
    message = fails_before_any_step("whisper", train_dataset=samples)
    assert "All labels are -100 in rows 1 of `train_dataset`" in message


def test_loss_that_is_not_per_sample(fails_before_any_step):
    def mean_loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    message = fails_before_any_step(compute_loss_func=mean_loss)
    assert "one number for each sample, shape (2,), but `compute_loss_func` returned shape ()" in message


def test_loss_with_terms_of_its_own(fails_before_any_step, make_model):
    """The model adds something to its loss that the per-sample loss would silently leave out."""

    class ViTForImageClassification(type(make_model("vit"))):
        def forward(self, pixel_values=None, labels=None):
            outputs = super().forward(pixel_values=pixel_values, labels=labels)
            outputs["loss"] = outputs["loss"] + 1
            return outputs

    model = make_model("vit")
    model.__class__ = ViTForImageClassification
    message = fails_before_any_step(model=model)
    assert "it has terms of its own" in message
    assert "compute_loss_func" in message


def test_label_smoothing_is_refused(fails_before_any_step):
    message = fails_before_any_step(settings={"label_smoothing_factor": 0.1})
    assert "does not support `label_smoothing_factor`" in message


class FailsLater(torch.utils.data.Dataset):
    """Samples that turn into NaN once they have been read `after` times."""

    def __init__(self, samples, row, after):
        self.samples, self.row, self.left = samples, row, after

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        example = dict(self.samples[index])
        if index == self.row:
            self.left -= 1
            if self.left < 0:
                example["pixel_values"] = example["pixel_values"] * math.nan
        return example


@pytest.mark.parametrize("which", ["forget_dataset", "train_dataset"])
def test_loss_that_is_not_finite_stops_with_the_samples(which, tmp_path, make_model, make_samples):
    sets = {"train_dataset": make_samples("vit", 3, seed=1), "forget_dataset": make_samples("vit", 3, seed=2)}
    sets[which] = FailsLater(sets[which], row=1, after=5 if which == "train_dataset" else 6)
    settings = {"max_steps": 20, "save_strategy": "steps", "save_steps": 1, "per_device_forget_batch_size": 3}
    trainer = OrthoGradTrainer(make_model("vit"), args(tmp_path, **settings), **sets)
    with pytest.raises(FloatingPointError) as raised:
        trainer.train()
    message, step = str(raised.value), trainer.state.global_step
    assert f"At step {step + 1} the loss is not finite for rows 1 of `{which}`" in message
    assert "intact" in message
    assert step > 0
    # the last checkpoint is the model as it was before the step, and finite
    saved = type(trainer.model).from_pretrained(Path(tmp_path) / f"checkpoint-{step}")
    for name, parameter in saved.named_parameters():
        assert torch.isfinite(parameter).all()
        assert torch.equal(parameter, trainer.model.get_parameter(name))


@pytest.mark.parametrize(
    ("plugin", "settings", "message"),
    [
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, {}, "`fsdp` of version 1"),
        (
            {"fsdp_plugin": SimpleNamespace(fsdp_version=2)},
            {"retain_chunk_size": 2},
            "`fsdp` with `retain_chunk_size`",
        ),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, {}, "`deepspeed` with ZeRO stage 3"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, {"fp16": True}, "`deepspeed` with `fp16`"),
        (
            {"deepspeed_plugin": SimpleNamespace(zero_stage=2)},
            {"projection_target": "update"},
            "`deepspeed` with projection_target='update'",
        ),
    ],
)
def test_launches_that_cannot_be_exact_are_refused(plugin, settings, message, tmp_path):
    args = OrthoGradConfig(str(tmp_path), report_to="none", **settings)
    with pytest.raises(ValueError, match=message):
        check_launch(args, SimpleNamespace(**plugin), torch.nn.Linear(1, 1))


def test_processes_that_do_not_know_of_one_another_are_refused(tmp_path, monkeypatch):
    """As torchrun starts them on a machine without a GPU."""
    own = args(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="The launcher started 2 processes, but this one knows of no other.*`use_cpu`"
    ):
        check_launch(own, SimpleNamespace(), torch.nn.Linear(1, 1))


def test_a_rule_that_is_looked_at_once_is_warned_of(tmp_path, make_model, make_samples, caplog):
    sets = {"train_dataset": make_samples("vit", 3, seed=1), "forget_dataset": make_samples("vit", 3, seed=2)}
    for every in (1, 500):
        caplog.clear()
        rule = {"forget_target": 9.0, "eval_strategy": "steps", "eval_steps": every}
        with caplog.at_level(logging.WARNING):
            OrthoGradTrainer(make_model("vit"), args(tmp_path, **rule), eval_dataset=sets, **sets).train()
        assert ("`eval_steps` is 500 and `max_steps` 2" in caplog.text) == (every == 500)


@pytest.mark.parametrize(
    ("rows", "settings", "warned"),
    [
        (20, {}, 3),
        (20, {"per_device_train_batch_size": 8}, 8),
        (20, {"gradient_accumulation_steps": 6}, None),
        (20, {"projection": "none"}, None),
        (3, {}, None),  # there are no more
    ],
)
def test_few_retain_samples_are_warned_of(rows, settings, warned, tmp_path, make_model, make_samples, caplog):
    sets = {"train_dataset": make_samples("vit", rows, seed=1), "forget_dataset": make_samples("vit", 3, seed=2)}
    with caplog.at_level(logging.WARNING):
        OrthoGradTrainer(make_model("vit"), args(tmp_path, max_steps=1, **settings), **sets).train()
    found = re.search(r"protects the gradients of only (\d+) retain samples", caplog.text)
    assert (found and int(found[1])) == warned


def tokens(count, seed, length=10):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 40, (count, length), generator=generator)
    return Samples([{"input_ids": row, "labels": row} for row in rows])


def test_a_loss_that_balances_experts_is_refused(fails_before_any_step):
    """At 0.002 of 4.17 it would pass for rounding."""
    size = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = MixtralConfig(**size, num_key_value_heads=2, num_local_experts=4, output_router_logits=True)
    sets = {"train_dataset": tokens(4, 1), "forget_dataset": tokens(3, 2)}
    assert "`config.output_router_logits` to False" in fails_before_any_step(model=MixtralForCausalLM(config), **sets)


def masked_language_model():
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=40, **size))


def test_masks_that_are_drawn_anew_are_refused_where_losses_are_compared(fails_before_any_step):
    def collate(rows):
        ids = torch.stack([row["input_ids"] for row in rows])
        labels = ids.masked_fill(torch.rand(ids.shape) < 0.5, -100)
        return {"input_ids": ids.masked_fill(labels != -100, 2), "labels": labels}

    sets = {"train_dataset": tokens(4, 1, 30), "forget_dataset": tokens(3, 2, 30), "data_collator": collate}
    message = fails_before_any_step(model=masked_language_model(), **sets)
    assert "Row 0 of `forget_dataset` has other labels when it is read again" in message and "by `map`" in message


def test_a_row_that_nothing_is_compared_with_is_named(fails_before_any_step):
    """The first rows, which are looked at, have labels; a third, made when it is read, has none."""

    class Late(list):
        def __getitem__(self, row):
            made = super().__getitem__(row)
            return {**made, "labels": torch.full_like(made["labels"], -100)} if row == 2 else made

    sets = {"train_dataset": tokens(4, 1), "forget_dataset": Late(tokens(3, 2))}
    message = fails_before_any_step(model=masked_language_model(), **sets)
    assert message.startswith("Row 2 of `forget_dataset` has the loss nan under the starting model")
