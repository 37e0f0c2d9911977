"""One result whatever the launch: processes, accumulation, or neither."""

import json

import pytest
import torch
from launched import KINDS, examine, launch, settings, train


# with its usual epsilon AdamW makes whole steps of gradients that are nothing but rounding errors
UPDATE = {"projection_target": "update", "optim": "adamw_torch", "adam_epsilon": 1e-2, "alpha": 0.0}


SETTINGS = {
    "per tensor": ("vit", False, {"projection_scope": "per_tensor"}),
    "adapter alone": ("vit", True, {"projection_parameters": "lora", "head": ["classifier"]}),
    "refusal": ("whisper", True, {"forget_loss": "refusal", "refusal_labels": [7, 8, 2]}),
    "mean": ("llama", False, {"projection": "mean"}),
    "unused": ("llama", False, {"unused": True, "optim": "adamw_torch", "weight_decay": 0.5, "adam_epsilon": 1e-2}),
}

KL = {"retain_loss": "kl", "learning_rate": 0.3}
KEEPING = [("whisper", True), ("vit", False), ("llama", False)]
CASES = [(kind, lora) for kind in KINDS for lora in (False, True)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder and what each run saved: processes are started once, whatever they are to show."""
    folder = tmp_path_factory.mktemp("processes")
    shapes = {"2x4": settings(4), "2x2x2": settings(2, 2)}
    runs = [(f"{kind}-{lora}-{name}", kind, lora, shape) for kind, lora in CASES for name, shape in shapes.items()]
    runs.append(("llama-False-2x2x2u", "llama", False, settings(2, 2, **UPDATE)))
    for kind, lora in KEEPING:  # of two models the start's predictions are found once
        runs.append((f"{kind}-{lora}-2x2x2k", kind, lora, settings(2, 2, **KL, precompute_ref_logits=not lora)))
    # two samples a process for "per tensor": more leave small tensors directions that float32 cannot tell from zero
    for name, (kind, lora, own) in SETTINGS.items():
        runs.append((name, kind, lora, settings(1 if name == "per tensor" else 4, **own)))
    # sequences as long as they are; and 21 samples, of which the last step has 5 for 8 places
    runs.append(("ragged", "llama", False, settings(4, ragged=True)))
    runs.append(("uneven", "llama", False, settings(4, ragged=True, count=21, max_steps=6)))
    runs.append(("examined", "vit", False, settings(4, examined=True)))
    return folder, launch(folder, 2, runs)


@pytest.fixture(scope="module")
def launches(two_processes, tmp_path_factory):
    """All runs by (kind, lora, launch)."""
    folder = tmp_path_factory.mktemp("launches")
    found = {}
    for kind, lora in CASES:
        for name, own in (("1x8", settings(8)), ("1x4x2", settings(4, 2)), ("1x2x4", settings(2, 4))):
            trainer = train(folder, kind, lora, own)
            trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
            found[kind, lora, name] = {"parameters": trained, "logs": trainer.state.log_history}
    trainer = train(folder, "llama", False, settings(8, **UPDATE))
    trained = {n: p.detach() for n, p in trainer.model.named_parameters()}
    found["llama", False, "1x8u"] = {"parameters": trained, "logs": trainer.state.log_history}
    for kind, lora in KEEPING:
        trainer = train(folder, kind, lora, settings(8, **KL))
        trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
        found[kind, lora, "1x8k"] = {"parameters": trained, "logs": trainer.state.log_history}
    for name, result in two_processes[1].items():
        if name.count("-") == 2:
            kind, lora, shape = name.split("-")
            found[kind, lora == "True", shape] = result
    four = launch(folder, 4, [("four", "llama", False, settings(2))])
    found["llama", False, "4x2"] = four["four"]
    return found


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["1x4x2", "1x2x4", "2x4", "2x2x2"])
def test_every_launch_gives_the_same_model(kind, lora, shape, launches):
    assert_equal(launches[kind, lora, shape], launches[kind, lora, "1x8"])


def test_four_processes_give_the_same_model(launches):
    assert_equal(launches["llama", False, "4x2"], launches["llama", False, "1x8"])


@pytest.mark.parametrize(("kind", "lora"), KEEPING)
def test_a_retain_term_is_the_same_too(kind, lora, launches):
    found, expected = launches[kind, lora, "2x2x2k"], launches[kind, lora, "1x8k"]
    assert_equal(found, expected)
    held = [[e["retain_divergence"] for e in run["logs"] if "retain_divergence" in e] for run in (found, expected)]
    assert held[0] == pytest.approx(held[1], rel=1e-3, abs=1e-7) and held[1][-1] > 1e-6


def test_corrected_updates_are_the_same_too(launches):
    found, expected = launches["llama", False, "2x2x2u"], launches["llama", False, "1x8u"]
    assert_equal(found, expected)
    kept = [[entry["update_kept"] for entry in run["logs"] if "update_kept" in entry] for run in (found, expected)]
    assert kept[0] == pytest.approx(kept[1], rel=1e-4) and kept[1][-1] < 0.999


@pytest.mark.parametrize("name", SETTINGS)
def test_further_settings_are_the_same_in_two_processes(name, two_processes, tmp_path):
    _, scopes = two_processes
    kind, lora, own = SETTINGS[name]
    trainer = train(tmp_path, kind, lora, settings(2 if name == "per tensor" else 8, **own))
    for parameter_name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            found = scopes[name]["parameters"][parameter_name]
            assert (found - parameter.detach()).norm() <= 1e-4 * parameter.norm() + 1e-7, parameter_name
    if name == "unused":  # no gradient of zero, which AdamW would take for one and decay the parameter
        assert torch.equal(scopes[name]["parameters"]["unused"], torch.ones(3))


def test_report_is_the_same_in_two_processes(two_processes, tmp_path):
    """Sets of 13, 7 and 11 rows in batches of 3, and an attack that trains."""
    _, launches = two_processes
    trainer = train(tmp_path, "vit", False, settings(8, examined=True))
    found = json.loads(launches["examined"]["report"])
    expected = json.loads(examine(trainer, "vit"))
    assert found["models"]["unlearned"]["forget"]["size"] == 13
    assert found["relearning"]["relearning"]["unlearned"][2]["step"] == 2
    assert_close(found, expected)


def assert_close(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = found.values(), expected.values()
    if isinstance(expected, (int, float)) and not isinstance(expected, bool):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    elif isinstance(expected, str) or not hasattr(expected, "__iter__"):
        assert found == expected
    else:
        for pair in zip(found, expected, strict=True):
            assert_close(*pair)


def test_sequences_of_other_lengths_in_each_process(two_processes, tmp_path):
    _, launches = two_processes
    trainer = train(tmp_path, "llama", False, settings(8, ragged=True))
    trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert_equal(launches["ragged"], {"parameters": trained, "logs": trainer.state.log_history})


def test_last_batches_that_do_not_come_out_even(two_processes):
    folder, launches = two_processes
    found, other = launches["uneven"], torch.load(folder / "uneven-1.pt")
    assert len(found["logs"]) == 6  # two epochs
    for name, parameter in found["parameters"].items():
        assert torch.isfinite(parameter).all() and torch.equal(parameter, other[name])


def test_loss_that_is_not_finite_in_one_process_ends_all(tmp_path):
    """None waits for the other: that with the sample names it."""
    found = launch(tmp_path, 2, [("nan", "vit", False, settings(4, poisoned=5))])["nan"]
    messages = sorted((found["message"], torch.load(tmp_path / "nan1.pt")["message"]))
    assert "rows 5 of `train_dataset`" in messages[0]
    assert "samples of another process" in messages[1]


def assert_equal(found, expected):
    one, other = found["parameters"], expected["parameters"]
    assert set(one) == set(other)
    for name, parameter in other.items():
        # the gradient of a key's bias is zero but for rounding: so is the bias after training
        assert (one[name] - parameter).norm() <= 1e-5 * parameter.norm() + 1e-8, name
    ranks = [entry["projection_rank"] for entry in expected["logs"] if "projection_rank" in entry]
    assert max(ranks) > 4  # more directions than one micro-batch or process has samples
    assert [entry["projection_rank"] for entry in found["logs"] if "projection_rank" in entry] == ranks


def test_a_projection_per_micro_batch_would_not_pass(launches, tmp_path):
    """The comparison can fail: with half the retain samples the model is another one."""
    trainer = train(tmp_path, "llama", False, {**settings(8), "per_device_train_batch_size": 4})
    trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    expected = launches["llama", False, "1x8"]["parameters"]
    assert any((trained[name] - p).norm() > 1e-4 * p.norm() for name, p in expected.items())
