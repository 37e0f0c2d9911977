"""What is measured is every row of the set that was asked for, of the model that would be published, whatever the trainer's arguments."""

import copy
import multiprocessing

import numpy as np
import pytest
import torch
import transformers
from conftest import MODELS, Samples, make_example
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.utils import parametrize
from transformers import GenerationConfig

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.baselines import (
    GuTrainer,
    RandomLabelTrainer,
    ScrubTrainer,
    UndialTrainer,
    WgaTrainer,
    base,
    dampen_synapses,
    dampening,
    gradients,
    labels,
)
from hf_orthograd.callbacks import UnlearningMonitor
from hf_orthograd.evaluation import Accuracy, Quantization, loss_distance, membership_inference, per_sample_losses
from hf_orthograd.evaluation.measure import examining, measure
from hf_orthograd.evaluation.settings import run_settings
from hf_orthograd.publishing import push


def rows(kind, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return Samples([make_example(kind, number, generator) for number in range(count)])


def ragged(count):
    """Texts of other lengths, so that an order by length is another."""
    texts = [torch.arange(3, 5 + number % 5).tolist() for number in range(count)]
    return Dataset.from_dict({"input_ids": texts, "labels": texts})


def trainer_of(folder, kind="vit", make=OrthoGradTrainer, forget=6, retain=6, **settings):
    args = {
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 1,
        "save_strategy": "no",
    } | settings
    sources = {"forget_dataset": rows(kind, forget, 2), "train_dataset": rows(kind, retain, 1) if retain else None}
    further = {name: args.pop(name) for name in ("compute_loss_func", "eval_dataset", "saliency") if name in args}
    return make(MODELS[kind](), OrthoGradConfig(str(folder), **args), **sources, **further)


# ---- Every row, of the set that was asked for ----


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_drop_last": True},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_row_is_measured_in_its_place(settings, tmp_path):
    def losses(**own):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, "llama", per_device_eval_batch_size=4, per_device_train_batch_size=4, **own)
        trainer.data_collator = transformers.DataCollatorForSeq2Seq(_Pads(), padding=True)
        found = [per_sample_losses(trainer, ragged(count)) for count in (10, 3)]
        return [*found, measure(trainer, ragged(5)).losses]

    for found, expected in zip(losses(**settings), losses(), strict=True):
        assert np.allclose(found, expected, atol=1e-6)


def test_a_model_keeps_its_precision(tmp_path):
    trainer = trainer_of(tmp_path, bf16_full_eval=True)
    measure(trainer, rows("vit", 4, 3), [Accuracy()])
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


class _Pads:
    """As much of a tokenizer as the collator takes."""

    padding_side = "right"

    def pad(self, features, *args, **kwargs):
        width = max(len(one["input_ids"]) for one in features)
        names = {"input_ids": 0, "attention_mask": 0}
        features = [{"attention_mask": [1] * len(one["input_ids"]), **one} for one in features]
        padded = {n: [one[n] + [fill] * (width - len(one[n])) for one in features] for n, fill in names.items()}
        return transformers.BatchEncoding({n: torch.tensor(own) for n, own in padded.items()})


def test_the_rule_reads_the_forget_set_where_loaders_are_kept(tmp_path):
    trainer = trainer_of(
        tmp_path, eval_dataset=rows("vit", 9, 3), eval_strategy="steps", eval_steps=1, forget_target=1e3,
        dataloader_persistent_workers=True, dataloader_num_workers=1, per_device_eval_batch_size=3,
    )  # fmt: skip
    trainer.train()
    logged = [entry["eval_forget_loss"] for entry in trainer.state.log_history if "eval_forget_loss" in entry]
    workers = len(multiprocessing.active_children())
    trainer.evaluate(trainer.eval_dataset)
    per_sample_losses(trainer, trainer.forget_dataset)
    assert len(multiprocessing.active_children()) == workers
    trainer.args.dataloader_persistent_workers = False
    expected = per_sample_losses(trainer, trainer.forget_dataset).mean()
    assert logged[-1] == pytest.approx(expected, abs=1e-5)


def test_other_models_generate_as_the_trainers_own(tmp_path):
    trainer = trainer_of(tmp_path, "llama", generation_config=GenerationConfig(max_new_tokens=3, num_beams=2))
    other = MODELS["llama"]()
    own = other.generation_config
    with examining(trainer, other):
        assert trainer.model is other and other.generation_config.num_beams == 2
    assert other.generation_config is own


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_losses_that_are_not_finite_count_as_the_largest(value):
    known, others = np.array([0.1, 0.2, 0.3]), np.array([0.4, value])
    assert membership_inference(known, others).auc == 1.0
    assert loss_distance(known, others) == 1.0


# ---- The model that would be published ----


def levels(weight):
    """The most values that a row holds."""
    return max(len(row.unique()) for row in weight.flatten(1))


def test_an_adapter_is_merged_before_it_is_rounded():
    torch.manual_seed(0)
    adapted = get_peft_model(MODELS["llama"](), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    found = Quantization(4)(adapted).state_dict()
    expected = Quantization(4)(copy.deepcopy(adapted).merge_and_unload()).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert levels(found["model.layers.0.mlp.up_proj.weight"]) <= 15


def test_matrices_of_other_layouts_are_rounded():
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=48, n_head=2, vocab_size=64, n_positions=8)
    )
    rounded = Quantization(3)(gpt2)
    assert levels(rounded.transformer.h[0].mlp.c_fc.weight.T) <= 7  # an output channel is a column there
    assert levels(rounded.transformer.wte.weight) <= 7
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=32, num_local_experts=4,
        )
    )  # fmt: skip
    rounded = Quantization(3)(mixtral)
    experts = [own for name, own in rounded.named_parameters() if ".experts." in name]
    assert experts and all(levels(own.flatten(0, -2)) <= 7 for own in experts)
    waves = MODELS["wav2vec2"]()
    assert any(parametrize.is_parametrized(module) for module in waves.modules())
    rounded = Quantization(3)(waves)
    kernels = [own for name, own in rounded.named_parameters() if "pos_conv_embed" in name and own.ndim == 3]
    assert len(kernels) == 1 and levels(kernels[0]) <= 7
    assert all(
        levels(own) <= 7 for name, own in rounded.named_parameters() if own.ndim > 1 and name.endswith("weight")
    )
    assert any(parametrize.is_parametrized(module) for module in waves.modules())  # of the copy alone
    with torch.no_grad():  # and both still compute
        assert all(model(torch.ones(1, 800)).logits.isfinite().all() for model in (waves, rounded))


# ---- What a run says of itself, and what it leaves behind ----


def test_without_a_retain_set_batches_are_as_large_as_asked(tmp_path):
    sizes = []

    class Counting(OrthoGradTrainer):
        def unlearning_loss(self, model, forget, retain):
            sizes.extend(batch.size for batch in forget)
            return super().unlearning_loss(model, forget, retain)

    given = {"retain": 0, "alpha": 0.0, "per_device_forget_batch_size": 2, "per_device_train_batch_size": 4}
    trainer = trainer_of(tmp_path, make=Counting, projection="none", **given)
    trainer.train()
    assert sizes == [2] and run_settings(trainer)["forget_samples_per_step"] == 2
    assert run_settings(trainer)["retain_samples_per_step"] == 0


def test_the_monitor_sees_all_of_a_step_and_copies_nothing_it_does_not_need(tmp_path, monkeypatch):
    """Without a projection each micro-batch comes by itself, and no change is predicted."""
    seen, end = [], UnlearningMonitor.on_step_end

    def on_step_end(self, *args, **kwargs):
        seen.append((len(self._losses), len(self._before)))
        return end(self, *args, **kwargs)

    monkeypatch.setattr(UnlearningMonitor, "on_step_end", on_step_end)
    micro = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    trainer_of(tmp_path, projection="none", **micro).train()
    projected = trainer_of(tmp_path, per_device_train_batch_size=4, logging_steps=1)
    projected.train()
    trained = sum(parameter.requires_grad for parameter in projected.model.parameters())
    assert seen == [(4, 0), (4, trained)]


def test_the_record_keeps_what_a_user_wrote_of_the_forgotten(tmp_path):
    class JaneDoeTrainer(OrthoGradTrainer):
        pass

    trainer = trainer_of(
        tmp_path, make=JaneDoeTrainer, forget_loss="refusal", refusal_labels=[3], stop_metric="of_jane_doe"
    )
    method = push._method(trainer)
    assert (method["trainer"], method["refusal_labels"]) == ("OrthoGradTrainer", "1 labels")
    assert method["stop_metric"] == "one of the user's own" and method["alpha"] == 0.5


def test_masks_leave_with_their_run(tmp_path):
    trainer = trainer_of(tmp_path, make=RandomLabelTrainer, saliency=0.1)
    trainer.train()
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.model.train()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.forget_dataset[0]]))
    trainer.model.zero_grad()
    trainer.model(**batch).loss.backward()
    moved = sum(int((own.grad != 0).sum()) for own in trainer.model.parameters())
    assert moved > 0.5 * sum(own.numel() for own in before)


@pytest.mark.parametrize(("module", "make"), [(labels, RandomLabelTrainer), (gradients, GuTrainer)])
def test_whole_gradients_are_asked_for_before_a_run(module, make, tmp_path, monkeypatch):
    def as_sharded(trainer, why):
        trainer.is_fsdp_enabled = True  # as Trainer sets it from the launch
        base.refuse_shards(trainer, why)

    monkeypatch.setattr(module, "refuse_shards", as_sharded)
    given = {"saliency": 0.5} if make is RandomLabelTrainer else {}
    with pytest.raises(ValueError, match=f"does not have under FSDP. Launch {make.__name__} in one process"):
        trainer_of(tmp_path, make=make, **given)


def test_methods_that_cannot_follow_a_loss_say_so_before_a_step(tmp_path):
    def own_loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().mean(-1)

    with pytest.raises(ValueError, match="Pass a `compute_divergence_func` beside it"):
        trainer_of(tmp_path, make=ScrubTrainer, compute_loss_func=own_loss).train()
    for make in (UndialTrainer, WgaTrainer):
        evaluated = {"eval_on_start": True, "eval_strategy": "steps", "eval_dataset": rows("wav2vec2", 2, 3)}
        trainer = trainer_of(tmp_path, "wav2vec2", make=make, **evaluated)
        with pytest.raises(ValueError, match="not one of positions with a label each"):
            trainer.train()
        assert not trainer.state.log_history


def test_importances_in_half_precision_do_not_stop_growing():
    """300 equal gradients of 1: the mean of their squares is 1, and a sum in bfloat16 would end at 256."""

    class Unit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, x, labels=None):
            return {"losses": x * self.weight}

    class Loss:
        def __init__(self, model):
            pass

        def __call__(self, model, inputs):
            return model(**inputs)["losses"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dampening, "PerSampleLoss", Loss)
        batch = {"x": torch.ones(100, dtype=torch.bfloat16), "labels": torch.zeros(100)}
        model = Unit()
        (found,) = dampening._importances(model, [model.weight], [batch] * 6)
        assert found.dtype == torch.float32 and found.item() == pytest.approx(1.0)
        assert dampen_synapses(model, [batch], [batch] * 6) == 0.0
