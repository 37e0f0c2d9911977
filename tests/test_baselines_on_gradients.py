"""Methods that weight the ascent, work on gradients or steer hidden states, against their papers' equations."""

import copy

import pytest
import torch
from equations import RATE, batch_of, flat, gradient, mean_surprise, npo, other, probabilities, probability_of_labels

from hf_orthograd import OrthoGradConfig
from hf_orthograd.baselines import (
    GruTrainer,
    GuTrainer,
    OnpoTrainer,
    RmuTrainer,
    SamTrainer,
    SatImpTrainer,
    UndialTrainer,
    WgaTrainer,
    rectify,
)
from hf_orthograd.baselines.gradients import GradientTrainer
from hf_orthograd.data import Batch


def own_loss(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().mean(dim=(1, 2))


WEIGHTS = {
    WgaTrainer: ({"beta": 2.0}, lambda p: p**2),
    SatImpTrainer: ({"beta1": 3.0, "beta2": 0.5}, lambda p: p**3 * (1 - p) ** 0.5),
}


@pytest.mark.parametrize("trainer_class", WEIGHTS)
def test_weighted_ascent(trainer_class, vit_trainer):
    options, weight = WEIGHTS[trainer_class]
    trainer = vit_trainer(trainer_class, options=options, alpha=0.3)
    forget, retain = batch_of(trainer.forget_dataset), batch_of(trainer.train_dataset)

    def loss(model):
        p = probability_of_labels(model, forget)
        return 0.7 * (weight(p.detach()) * p.log()).mean() + 0.3 * mean_surprise(model, retain)

    expected = flat(trainer.model) - RATE * gradient(copy.deepcopy(trainer.model), loss)
    trainer.train()
    torch.testing.assert_close(flat(trainer.model), expected, rtol=0, atol=1e-5)


def test_weighted_ascent_of_tokens(make_model, make_samples, tmp_path):
    """Each sample's mean is over its own tokens."""
    sets = {"train_dataset": make_samples("llama", 4, seed=1), "forget_dataset": make_samples("llama", 4, seed=2)}
    args = OrthoGradConfig(str(tmp_path), per_device_train_batch_size=4, report_to="none")
    trainer = WgaTrainer(make_model("llama"), args, **sets)
    batch = batch_of(sets["forget_dataset"])
    logged = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    rows = []
    for sample, labels in zip(logged, batch["labels"], strict=True):
        counted = [sample[t, labels[t + 1]] for t in range(len(labels) - 1) if labels[t + 1] != -100]
        rows.append(torch.stack([one.exp() * one for one in counted]).mean())
    found = trainer.forget_loss(trainer.model, Batch.of(batch))
    torch.testing.assert_close(found, torch.stack(rows).mean())


def test_undial(vit_trainer, make_model):
    trainer = vit_trainer(UndialTrainer, options={"strength": 4.0}, alpha=0.3)
    trainer.teacher = teacher = other(make_model)
    forget, retain = batch_of(trainer.forget_dataset), batch_of(trainer.train_dataset)
    target = teacher(pixel_values=forget["pixel_values"]).logits.detach()
    target = (target - 4.0 * torch.nn.functional.one_hot(forget["labels"], 5)).softmax(-1)

    def loss(model):
        cross_entropy = -(target * probabilities(model, forget).log()).sum(-1).mean()
        return 0.7 * cross_entropy + 0.3 * mean_surprise(model, retain)

    expected = flat(trainer.model) - RATE * gradient(copy.deepcopy(trainer.model), loss)
    trainer.train()
    torch.testing.assert_close(flat(trainer.model), expected, rtol=0, atol=1e-5)


def test_gru_takes_out_what_would_raise_the_retain_loss(vit_trainer):
    """Three steps, the retain gradient smoothed; both cases of the rectification occur."""
    trainer = vit_trainer(GruTrainer, max_steps=3, options={"smoothing": 0.6}, forget_loss="ascent")
    forget, retain = batch_of(trainer.forget_dataset), batch_of(trainer.train_dataset)
    expected, smoothed = copy.deepcopy(trainer.model), None
    for _ in range(3):
        ascent = -gradient(expected, lambda model: mean_surprise(model, forget))
        newest = gradient(expected, lambda model: mean_surprise(model, retain))
        smoothed = newest if smoothed is None else 0.6 * newest + 0.4 * smoothed
        if ascent @ smoothed < 0:
            ascent = ascent - (ascent @ smoothed) / (smoothed @ smoothed) * smoothed
        torch.nn.utils.vector_to_parameters(flat(expected) - RATE * ascent, expected.parameters())
    trainer.train()
    torch.testing.assert_close(flat(trainer.model), flat(expected), rtol=0, atol=1e-5)
    against, along = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])
    assert torch.equal(rectify([along], [torch.tensor([0.0, -1.0])])[0], along)
    assert torch.equal(rectify([-against], [torch.tensor([0.0, 1.0])])[0], torch.tensor([-1.0, 0.0]))


def test_methods_on_gradients_refuse_steps_that_have_none(vit_trainer):
    with pytest.raises(ValueError, match="GruTrainer works on .* `gradient_accumulation_steps` is 2"):
        vit_trainer(GruTrainer, gradient_accumulation_steps=2)


def test_gu_is_normal_to_retain_gradients_in_the_geometry_of_adam(vit_trainer):
    trainer = vit_trainer(GuTrainer, max_steps=4, options={"rank": 2}, optim="adamw_torch", alpha=0.3)
    forget, retain = batch_of(trainer.forget_dataset), batch_of(trainer.train_dataset)
    start, expected = copy.deepcopy(trainer.model), copy.deepcopy(trainer.model)
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    parameters = list(expected.parameters())
    mean, square = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    kept = []
    for step in range(1, 5):
        ascended = torch.autograd.grad(npo(expected, start, forget), parameters)
        kept = [*kept, torch.autograd.grad(mean_surprise(expected, retain), parameters)][-2:]
        for number, parameter in enumerate(parameters):
            scale = torch.ones_like(parameter)
            if step > 1:
                scale = (square[number] / (1 - beta2 ** (step - 1))).sqrt() + eps
            basis = torch.stack([(own[number] / scale.sqrt()).flatten() for own in kept])
            normal = (ascended[number] / scale.sqrt()).flatten()
            orthonormal = torch.linalg.svd(basis, full_matrices=False)
            rows = orthonormal.Vh[orthonormal.S > 1e-6 * orthonormal.S[0]]
            normal = (normal - rows.T @ (rows @ normal)).view_as(parameter) * scale.sqrt()
            handed = 0.7 * normal + 0.3 * kept[-1][number]
            mean[number] = beta1 * mean[number] + (1 - beta1) * handed
            square[number] = beta2 * square[number] + (1 - beta2) * handed**2
            change = (mean[number] / (1 - beta1**step)) / ((square[number] / (1 - beta2**step)).sqrt() + eps)
            with torch.no_grad():
                parameter -= 1e-3 * change
    trainer.args.learning_rate = 1e-3
    trainer.train()
    moved = (flat(expected) - flat(start)).norm()
    # Adam divides by what is almost zero
    assert (flat(trainer.model) - flat(expected)).norm() < 1e-2 * moved


def test_gu_takes_the_plain_geometry_where_an_optimizer_keeps_something_else(vit_trainer):
    """Adafactor keeps rows and columns, of one dimension the whole, and has no `betas`."""
    trainer = vit_trainer(GuTrainer, max_steps=3, options={"rank": 2}, optim="adafactor")
    start = flat(trainer.model)
    trainer.train()
    assert (flat(trainer.model) - start).norm() > 0
    parameter = next(p for p in trainer.model.parameters() if p.ndim == 1)
    assert torch.equal(trainer._denominator(parameter), torch.ones_like(parameter))


def test_sam_leaves_the_parameters_where_they_were_if_a_pass_fails(vit_trainer, monkeypatch):
    trainer = vit_trainer(SamTrainer, options={"radius": 0.5})
    start, calls, plain = flat(trainer.model), [], GradientTrainer.forget_gradients

    def fails_the_second_time(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return plain(self, *args)

    monkeypatch.setattr(GradientTrainer, "forget_gradients", fails_the_second_time)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert torch.equal(flat(trainer.model), start)


def test_sam_takes_the_forget_gradient_where_forgetting_is_worst(vit_trainer):
    trainer = vit_trainer(SamTrainer, max_steps=2, options={"radius": 0.5}, alpha=0.3)
    forget, retain = batch_of(trainer.forget_dataset), batch_of(trainer.train_dataset)
    start, expected = copy.deepcopy(trainer.model), copy.deepcopy(trainer.model)
    for _ in range(2):
        nearby = copy.deepcopy(expected)
        ascent = gradient(nearby, lambda model: npo(model, start, forget))
        torch.nn.utils.vector_to_parameters(flat(nearby) + 0.5 * ascent / ascent.norm(), nearby.parameters())
        update = 0.7 * gradient(nearby, lambda model: npo(model, start, forget))
        update += 0.3 * gradient(expected, lambda model: mean_surprise(model, retain))
        torch.nn.utils.vector_to_parameters(flat(expected) - RATE * update, expected.parameters())
    trainer.train()
    torch.testing.assert_close(flat(trainer.model), flat(expected), rtol=0, atol=1e-5)


def test_onpo_leaves_earlier_requests_alone(vit_trainer):
    """Two runs: the first is NPO, the second has no part along the forget gradients that the first kept."""
    first = vit_trainer(OnpoTrainer, max_steps=3, options={"rank": 2}, alpha=0.3)
    forget, retain = batch_of(first.forget_dataset), batch_of(first.train_dataset)
    start, expected, kept = copy.deepcopy(first.model), copy.deepcopy(first.model), []

    def update(start):
        ascended = gradient(expected, lambda model: npo(model, start, forget))
        return ascended, 0.7 * ascended + 0.3 * gradient(expected, lambda model: mean_surprise(model, retain))

    for _ in range(3):
        ascended, step = update(start)
        kept.append(ascended)
        torch.nn.utils.vector_to_parameters(flat(expected) - RATE * step, expected.parameters())
    first.train()
    torch.testing.assert_close(flat(first.model), flat(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(first.directions, torch.stack(kept[-2:]), rtol=1e-3, atol=1e-5)

    options = {"rank": 1, "earlier": first.directions}
    second = vit_trainer(OnpoTrainer, max_steps=2, options=options, alpha=0.3)
    second.model.load_state_dict(first.model.state_dict())
    expected = copy.deepcopy(first.model)
    start = copy.deepcopy(expected)
    rows = torch.linalg.qr(first.directions.T.double())[0].T
    for _ in range(2):
        ascended, step = update(start)
        step = step - (rows.T @ (rows @ step.double())).float()
        torch.nn.utils.vector_to_parameters(flat(expected) - RATE * step, expected.parameters())
    second.train()
    torch.testing.assert_close(flat(second.model), flat(expected), rtol=0, atol=1e-5)
    moved = flat(second.model) - flat(first.model)
    assert (rows @ moved.double()).norm() < 1e-4 * moved.norm() and second.directions.shape == (3, len(moved))
    with pytest.raises(ValueError, match=r"`earlier` must be .* of shape \(directions, \d+\).* but is \(2, 5\)"):
        vit_trainer(OnpoTrainer, options={"earlier": torch.zeros(2, 5)})


def test_rmu_steers_hidden_states(make_model, make_samples, tmp_path):
    sets = {"train_dataset": make_samples("llama", 4, seed=1), "forget_dataset": make_samples("llama", 4, seed=2)}
    args = OrthoGradConfig(str(tmp_path), per_device_train_batch_size=4, report_to="none", use_cpu=True)
    model = make_model("llama")
    with pytest.raises(ValueError, match="`layer` is 'model.layers.9', but the model has no module"):
        RmuTrainer(model, args, layer="model.layers.9", **sets)
    own = RmuTrainer(make_model("llama"), args, layer="model.layers.0", compute_loss_func=own_loss, **sets)
    assert not own.needs_divergence  # it compares hidden states
    trainer = RmuTrainer(model, args, layer="model.layers.0", steering=2.0, retain_weight=3.0, **sets)
    with pytest.raises(ValueError, match="do not change what `layer` 'model.layers.0' puts out, model.layers.1"):
        trainer.refuse_idle_parameters()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("model.layers.0."))
    trainer.refuse_idle_parameters()
    model.requires_grad_(True)
    batch = batch_of(sets["forget_dataset"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    states = model(**inputs, output_hidden_states=True).hidden_states[1]
    direction = torch.rand(states.shape[-1], generator=torch.Generator().manual_seed(args.seed))
    distances = (states - 2.0 * direction / direction.norm()).pow(2).sum(-1)
    expected = distances[batch["attention_mask"].bool()].mean()
    torch.testing.assert_close(trainer.forget_loss(model, Batch.of(batch)), expected)
    assert trainer.retain_loss(model, Batch.of(batch)) == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.1
    moved = model(**inputs, output_hidden_states=True).hidden_states[1]
    expected = 3.0 * (moved - states).pow(2).sum(-1)[batch["attention_mask"].bool()].mean()
    torch.testing.assert_close(trainer.retain_loss(model, Batch.of(batch)), expected)
    trainer.train()
