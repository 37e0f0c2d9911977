"""Which engine "auto" takes, and what the choice leaves as it was."""

import torch
from engines import retain_batch
from test_gradients import batch, hidden_losses, trainable
from torch import nn

from hf_orthograd.gradients import GramEngine, UnsupportedModelError, choose_engine
from hf_orthograd.objectives import PerSampleLoss


def test_choosing_an_engine_leaves_the_random_numbers_alone(make_model, make_samples):
    model = make_model("vit", dropout=0.2).train()
    data = batch(make_samples("vit", 2))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert (
        choose_engine(
            "auto", trainable(model), PerSampleLoss(model), model, retain_batch(data), retain_batch(data)
        ).name
        == "gram"
    )
    assert torch.equal(torch.rand(1), expected)
    assert model.training


class DropsInTraining(nn.Module):
    """As layerdrop: whether a layer runs is looked up in a tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, features):
        return features if self.training and torch.rand([]) < 0 else self.layer(features)


def test_auto_does_not_take_func_for_what_it_follows_in_evaluation_alone(monkeypatch):
    model = DropsInTraining().train()
    data = {"x": torch.randn(2, 3)}
    monkeypatch.setattr(GramEngine, "step_gradients", _fails)
    engine = choose_engine("auto", trainable(model), hidden_losses, model, retain_batch(data), retain_batch(data))
    assert engine.name == "loop"


def _fails(*args):
    raise UnsupportedModelError("as if it could not follow the model")
