"""Selective synaptic dampening, which makes no steps."""

from collections.abc import Iterable, Mapping

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..data import Batch
from ..gradients.gram.chunks import split_samples
from ..objectives import PerSampleLoss
from ..trials import preserved_modes


def dampen_synapses(
    model: nn.Module,
    forget_batches: Iterable[Mapping],
    all_batches: Iterable[Mapping],
    *,
    selection: float = 10.0,
    dampening: float = 1.0,
) -> float:
    """Selective synaptic dampening (arXiv 2308.07707, equations 6 and 7), in place; no step is made.

    A weight whose importance on the forget set exceeds `selection` times that on all data is multiplied by
    `min(dampening * importance_all / importance_forget, 1)`. Importance is the diagonal of the empirical Fisher
    information: the mean over samples of the squared gradient.

    Args:
        model (`torch.nn.Module`): A model whose loss is known per sample.
        forget_batches, all_batches (`Iterable[Mapping]`): Inputs of the forget set, and of the training data at hand.
        selection, dampening (`float`): The paper's alpha and lambda.

    Returns:
        The share of trainable weights that was dampened.

    Raises:
        ValueError: There is no batch in one of them.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with preserved_modes(model):
        model.eval()
        on_forget, on_all = (_importances(model, trained, batches) for batches in (forget_batches, all_batches))
    dampened = 0
    with torch.no_grad():
        for parameter, forget, everything in zip(trained, on_forget, on_all, strict=True):
            chosen = forget > selection * everything
            factors = (dampening * everything / forget).clamp(max=1.0)
            parameter.copy_(parameter.float() * torch.where(chosen, factors, torch.ones_like(factors)))
            dampened += int(chosen.sum())
    return dampened / sum(parameter.numel() for parameter in trained)


def _importances(model: nn.Module, trained: list[Tensor], batches: Iterable[Mapping]) -> list[Tensor]:
    per_sample_loss, count, device = PerSampleLoss(model), 0, trained[0].device
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained]  # bf16 ends at 256 equal ones
    for batch in batches:
        for sample in split_samples([Batch.of(send_to_device(batch, device))], 1):
            gradients = torch.autograd.grad(per_sample_loss(model, sample.inputs).sum(), trained, allow_unused=True)
            for sums, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    sums.add_(gradient.float().square())
            count += 1
    if not count:
        raise ValueError(
            "`forget_batches` or `all_batches` holds no batch. Pass lists, or loaders that were not read before."
        )
    return [sums / count for sums in total]
