"""Non-reentrant activation checkpointing: exact, and nothing inside a checkpointed block outlives its forward pass."""

import gc
import weakref

import pytest
import torch
from engines import forget_batch, retain_batch, weighed
from peft import LoraConfig, get_peft_model
from torch.utils.data import default_collate

from hf_orthograd.gradients import GramEngine, LoopEngine
from hf_orthograd.gradients.gram.engine import KeptGradients, RecomputedGradients
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.parallel import Parameters


KINDS = ["whisper", "wav2vec2", "vit", "llama"]


def batches(kind, make_samples):
    return (default_collate(make_samples(kind, count, seed=seed).examples) for count, seed in ((3, 2), (4, 1)))


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def checkpointed(model):
    # the older of the two names goes in transformers 6, the newer came after 5.17
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model.train()


def assert_same_step(engine, reference, model, batches):
    forget, retain = batches
    results = []
    for one, checkpointing in ((engine, True), (reference, False)):
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = checkpointing
        torch.manual_seed(3)
        step = one.measure(model, [forget_batch(forget)], [retain_batch(retain)])
        names = list(engine.parameters.projected)
        coefficients = dict.fromkeys(names, torch.tensor([0.3, -1.0, 0.5, 2.0]))
        loss = step.combine(weighed(-0.4, 0.6, coefficients))
        gradients = torch.autograd.grad(loss, list(engine.parameters.trainable.values()), materialize_grads=True)
        results.append((step, gradients))
    (step, gradients), (expected_step, expected) = results
    norms = expected_step.gram.diagonal().sqrt()
    assert ((step.gram - expected_step.gram).abs() / torch.outer(norms, norms)).max() <= 1e-5
    scale = max(gradient.abs().max().item() for gradient in expected)
    for name, one, other in zip(engine.parameters.trainable, gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale, msg=name)
    return step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keeps", [True, False])
def test_full_parameters(kind, keeps, make_model, make_samples):
    """With dropout: what is computed again has to be what was computed first."""
    model = checkpointed(make_model(kind, dropout=0.1 if kind == "llama" else 0.0))
    everything = trainable(model)
    others = {name: p for name, p in everything.items() if "norm" in name}
    parameters = Parameters({name: p for name, p in everything.items() if name not in others}, others)
    losses = PerSampleLoss(model)
    engine = GramEngine(parameters, losses, needs_gradients=keeps)
    engine.recomputes = not keeps
    step = assert_same_step(engine, LoopEngine(parameters, losses), model, batches(kind, make_samples))
    assert isinstance(step, KeptGradients if keeps else RecomputedGradients)
    assert engine.recomputes


def test_an_adapter_keeps_its_small_gradients(make_model, make_samples):
    base = make_model("llama")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    checkpointed(base)
    base.enable_input_require_grads()
    parameters, losses = Parameters(trainable(model), {}), PerSampleLoss(base)
    engine = GramEngine(parameters, losses)
    engine.recomputes = True
    step = assert_same_step(engine, LoopEngine(parameters, losses), model, batches("llama", make_samples))
    assert isinstance(step, KeptGradients)


def test_activations_do_not_outlive_the_forward_pass(make_model, make_samples):
    model = make_model("llama")
    inside = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda module, args, output: inside.append(weakref.ref(output)))
    alive = {}

    def losses(model, inputs):
        inside.clear()
        result = PerSampleLoss(base)(model, inputs)
        gc.collect()
        alive[model.model.layers[0].gradient_checkpointing] = [ref() is not None for ref in inside]
        return result

    base = model
    forget, retain = batches("llama", make_samples)
    engine = GramEngine(Parameters(trainable(model), {}), losses)
    engine.measure(model.train(), [forget_batch(forget)], [retain_batch(retain)])
    engine.measure(checkpointed(model), [forget_batch(forget)], [retain_batch(retain)])
    assert alive == {False: [True, True], True: [False, False]}
