"""Losses, divergences and gradients of a small ViT, written out from their equations: softmax and sums in place of losses."""

import torch
from torch.utils.data import default_collate


RATE = 0.5


def gradient(model, function):
    """The gradient of `function(model)`, flattened, with the parameters as they are."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(function(model), list(model.parameters()))])


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def batch_of(samples):
    return default_collate([samples[index] for index in range(len(samples))])


def probabilities(model, batch):
    return torch.softmax(model(pixel_values=batch["pixel_values"]).logits, dim=-1)


def mean_kl(model, teacher, batch):
    p, q = probabilities(teacher, batch).detach(), probabilities(model, batch)
    return (p * (p / q).log()).sum(-1).mean()


def mean_surprise(model, batch):
    return -probabilities(model, batch)[torch.arange(4), batch["labels"]].log().mean()


def other(make_model):
    model = make_model("vit")
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def probability_of_labels(model, batch):
    return probabilities(model, batch)[torch.arange(len(batch["labels"])), batch["labels"]]


def npo(model, start, batch):
    """NPO's loss with beta = 1, from its equation."""
    ratio = probability_of_labels(model, batch) / probability_of_labels(start, batch).detach()
    return (2 * torch.log1p(ratio)).mean()
