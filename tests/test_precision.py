"""Half precision: losses are scaled on their way back, and an overflow costs a step and nothing else."""

from functools import partial

import pytest
import torch
from conftest import MODELS
from launched import KINDS, launch, settings, train

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.baselines import RmuTrainer, UndialTrainer
from hf_orthograd.data import Batch
from hf_orthograd.evaluation import evaluate_unlearning, per_sample_losses
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.preparation import StartingModel


BF16 = {"bf16": True}
FP16 = {"fp16": True, "scaling": {"init_scale": 2.0**14}}
# the first step overflows, and one backing off is enough
OVERFLOW = {"fp16": True, "scaling": {"init_scale": 2.0**40, "backoff_factor": 2.0**-26}}
# what half precision may change of the way that three steps go, as a share of its length (docs/scaling.md)
TOLERANCE = {"bf16": 3e-2, "fp16": 3e-3}


def trained_parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def flat(parameters):
    return torch.cat([p.double().flatten() for p in parameters.values()])


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """For each (kind, lora): where training starts, and where it ends in float32."""
    folder, found = tmp_path_factory.mktemp("float32"), {}
    for kind in KINDS:
        for lora in (False, True):
            start = train(folder, kind, lora, settings(8, learning_rate=0.0))
            end = train(folder, kind, lora, settings(8))
            found[kind, lora] = flat(trained_parameters(start)), flat(trained_parameters(end))
    return found


def deviation(parameters, reference):
    start, end = reference
    return ((flat(parameters) - end).norm() / (end - start).norm()).item()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
def test_half_precision_goes_the_way_of_float32(shape, precision, kind, lora, references, tmp_path):
    trainer = train(tmp_path, kind, lora, settings(*shape, **{"bf16": BF16, "fp16": FP16}[precision]))
    assert trainer.gradient_engine.name == "gram"
    assert 0 < deviation(trained_parameters(trainer), references[kind, lora]) < TOLERANCE[precision]


@pytest.mark.parametrize("engine", ["func", "loop"])
@pytest.mark.parametrize("projection", ["orthogonal", "mean"])
def test_every_engine_scales_its_losses(engine, projection, references, tmp_path):
    own = settings(8, gradient_engine=engine, projection=projection)
    start, _ = references["vit", False]
    end = flat(trained_parameters(train(tmp_path, "vit", False, own)))
    found = trained_parameters(train(tmp_path, "vit", False, own | FP16))
    assert deviation(found, (start, end)) < TOLERANCE["fp16"]


def test_small_gradients_survive_in_chunks_and_under_checkpointing(references, tmp_path):
    for more in ({"retain_chunk_size": 2}, {"gradient_checkpointing": True}):
        found = trained_parameters(train(tmp_path, "llama", False, settings(8, **FP16, **more)))
        assert deviation(found, references["llama", False]) < TOLERANCE["fp16"]


@pytest.mark.parametrize("target", ["gradient", "update"])
def test_overflow_skips_the_step_and_scaling_goes_on(target, references, tmp_path):
    """The first of three steps overflows; the same steps without it, at rate zero, give the same model."""
    own = settings(8, projection_target=target, alpha=0.0)
    trainer = train(tmp_path, "vit", False, own | OVERFLOW)
    assert trainer.accelerator.scaler.get_scale() == 2.0**14
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert "kept_signal" not in logged[0] and logged[1]["kept_signal"] > 0
    found = flat(trained_parameters(trainer))
    assert torch.isfinite(found).all()
    start, _ = references["vit", False]
    assert not torch.equal(found, start)
    skipped = train(tmp_path, "vit", False, own | FP16, skip_first=True)
    assert (found - flat(trained_parameters(skipped))).norm() < 1e-6 * found.norm()


OVERFLOWS = [("llama", False), ("whisper", True)]


def precisions_of(model):
    """The types in which its first projection computes, in a list that forward passes fill."""
    found = []
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    layer.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    return found


def test_models_that_no_trainer_prepared_run_in_the_precision_of_the_trained_one(tmp_path):
    """What is compared is compared alike: references in evaluation, `ref_model`, and teachers."""
    half = {"bf16": True, "use_cpu": True, "max_steps": 1}
    held = MODELS["llama"]()
    seen = [precisions_of(held)]
    base = train(tmp_path, "llama", False, settings(8, retain_loss="kl", alpha=0.5, **half))
    sets = {"train_dataset": base.train_dataset, "forget_dataset": base.forget_dataset}
    OrthoGradTrainer(MODELS["llama"](), base.args, ref_model=held, **sets).train()
    args = OrthoGradConfig(str(tmp_path), report_to="none", save_strategy="no", projection="none", **half)
    for made in (UndialTrainer, partial(RmuTrainer, layer="model.layers.0")):
        taught = made(MODELS["llama"](), args, **sets)
        seen.append(precisions_of(taught.teacher))
        taught.train()
    assert [set(found) for found in seen] == [{torch.bfloat16}] * 3 and all(seen)


def test_a_reference_is_measured_in_the_precision_of_the_trained_model(tmp_path):
    """Losses and predictions, also by a trainer that trained nothing; and the model is left as it was."""
    base = train(tmp_path, "vit", False, settings(8, bf16=True, max_steps=1))
    unused = OrthoGradTrainer(MODELS["vit"](), base.args)
    for trainer in (base, unused):
        reference = MODELS["vit"]()
        seen, own = precisions_of(reference), precisions_of(trainer.model)
        report = evaluate_unlearning(trainer, reference, datasets={"forget": base.forget_dataset})
        assert report.models["reference"]["forget"].value is not None
        for found in (seen, own):
            assert len(found) >= 6 and set(found) == {torch.bfloat16}
        assert "forward" not in vars(reference)
        seen.clear()
        reference(pixel_values=torch.zeros(1, 3, 16, 16))
        assert seen == [torch.float32]


def test_a_loss_of_ones_own_is_measured_as_it_is_trained(tmp_path):
    """What it computes of the outputs is not rounded: mixed precision is of the model alone."""
    products = []

    def loss(outputs, labels, num_items_in_batch=None):
        products.append((outputs.logits @ outputs.logits.T).dtype)
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    base = train(tmp_path, "vit", False, settings(8, bf16=True, max_steps=1))
    trainer = OrthoGradTrainer(MODELS["vit"](), base.args, compute_loss_func=loss)
    per_sample_losses(trainer, base.forget_dataset)
    assert set(products) == {torch.float32}


def test_the_starting_model_answers_by_its_own_weights_under_an_autocast_around_it():
    model = MODELS["llama"]()
    ids = {"input_ids": torch.arange(1, 9)[None], "labels": torch.arange(1, 9)[None]}
    start, losses, batch = StartingModel(model), PerSampleLoss(model), Batch(ids, 1)
    with torch.autocast("cpu", torch.bfloat16):
        expected = start.outputs(losses, batch).logits
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.5
        torch.clear_autocast_cache()
        moved = model(**ids).logits
        found = start.outputs(losses, batch).logits
        again = model(**ids).logits
    assert torch.equal(found, expected) and torch.equal(again, moved) and not torch.equal(found, moved)


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """Two processes of two micro-batches each."""
    own = {"bf16": BF16, "fp16": FP16, "overflow": OVERFLOW}
    cases = [(precision, kind, lora) for precision in ("bf16", "fp16") for kind in KINDS for lora in (False, True)]
    cases += [("overflow", *case) for case in OVERFLOWS]
    runs = [(f"{name}-{kind}-{lora}", kind, lora, settings(2, 2, **own[name])) for name, kind, lora in cases]
    return launch(tmp_path_factory.mktemp("launches"), 2, runs)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_launches_in_half_precision(kind, lora, launches, references):
    for precision in ("bf16", "fp16"):
        found = launches[f"{precision}-{kind}-{lora}"]["parameters"]
        assert 0 < deviation(found, references[kind, lora]) < TOLERANCE[precision], precision


@pytest.mark.parametrize(("kind", "lora"), OVERFLOWS)
def test_overflow_in_several_processes(kind, lora, launches):
    overflown = launches[f"overflow-{kind}-{lora}"]
    assert all(torch.isfinite(p).all() for p in overflown["parameters"].values())
    assert len(overflown["logs"]) == 2  # of three steps
