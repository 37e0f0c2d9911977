"""What every gradient engine offers the trainer, whichever way it comes by the inner products."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


# maps (model, inputs) to the losses of the batch's samples, shape (B,)
PerSampleLosses = Callable[[nn.Module, Mapping], Tensor]
# maps forget losses (m,) to the slopes (m,) of the forget objective at them
Slopes = Callable[[Tensor], Tensor]


_COLUMNS = 1 << 16


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Products in the precision of their factors: autocast would take inner products of float32 in half precision."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class UnsupportedModelError(ValueError):
    """The engine cannot find this model's per-sample gradients; the message says where and what to do."""


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model that receive the update.

    Parameters:
        projected (`dict[str, torch.nn.Parameter]`): Those the projection runs over, by name.
        others (`dict[str, torch.nn.Parameter]`): Trainable ones that take the unprojected gradient.
    """

    projected: dict[str, nn.Parameter]
    others: dict[str, nn.Parameter]

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {**self.projected, **self.others}


@dataclass
class StepGradients(ABC):
    """What one step knows of its gradients, before any of them reaches `p.grad`.

    Row 0 of a Gram matrix is the forget gradient `g_u`: that of the mean over the forget samples of slope times loss,
    the slopes held constant. Rows 1 to k are the retain samples' gradients, or one row, their mean.

    Parameters:
        forget_losses (`torch.Tensor`): Shape (m,), detached.
        retain_losses (`torch.Tensor`): Shape (k,), detached.
        grams (`dict[str, torch.Tensor]`): For each projected parameter, its share of the Gram matrix,
            shape (1 + k, 1 + k), float64. Their sum is the Gram matrix of the whole gradients.
    """

    forget_losses: Tensor
    retain_losses: Tensor
    grams: dict[str, Tensor]

    @property
    def gram(self) -> Tensor:
        """The Gram matrix over all projected parameters, shape (1 + k, 1 + k), float64."""
        return torch.stack(list(self.grams.values())).sum(dim=0)

    @abstractmethod
    def combine(self, forget_weight: float, retain_weight: float, coefficients: dict[str, Tensor]) -> Tensor:
        """A scalar of value zero whose gradient is `forget_weight * g_u + retain_weight * mean_i g_i + sum_i c_i g_i`.

        To be called once: it may use up what was kept.

        Args:
            forget_weight (`float`): Of the forget gradient.
            retain_weight (`float`): Of the mean of the retain gradients.
            coefficients (`dict[str, torch.Tensor]`): Shape (k,) for each projected parameter's name; on the other
                parameters the last term is missing.
        """


class GradientEngine(ABC):
    """A way from two batches to the inner products of their gradients."""

    name: str

    def __init__(self, parameters: Parameters, per_sample_losses: PerSampleLosses):
        self.parameters = parameters
        self.per_sample_losses = per_sample_losses

    @abstractmethod
    def measure(self, model: nn.Module, forget: Mapping, retain: Mapping, slopes: Slopes) -> StepGradients:
        """Runs the forward passes and finds the inner products.

        Args:
            model (`torch.nn.Module`): The model as the training step received it, wrapped or not.
            forget (`Mapping`): Inputs of m forget samples, with labels.
            retain (`Mapping`): Inputs of k retain samples, with labels.
            slopes (`Callable`): Slopes of the forget objective at the forget losses.

        Raises:
            UnsupportedModelError: The model does something this engine cannot follow.
        """

    def forget_gradients(self, model: nn.Module, forget: Mapping, slopes: Slopes) -> tuple[Tensor, dict[str, Tensor]]:
        """The forget losses, (m,), and `g_u` by parameter name where the loss uses it; the graph is given free."""
        losses = self.per_sample_losses(model, forget)
        trainable = self.parameters.trainable
        found = torch.autograd.grad(weighted_mean(losses, slopes), list(trainable.values()), allow_unused=True)
        pairs = zip(trainable, found, strict=True)
        return losses.detach(), {name: gradient for name, gradient in pairs if gradient is not None}


def weighted_mean(losses: Tensor, slopes: Slopes) -> Tensor:
    """The scalar whose gradient is the forget gradient: slopes are constants of the step."""
    return (slopes(losses.detach()) * losses).mean()


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, scale: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(gradient.mul_(scale) for gradient in gradients)


def known_gradients(parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor | None]) -> Tensor:
    """A scalar of value zero whose gradient with respect to each parameter is the tensor given for it.

    Handing known gradients to the ordinary backward pass in this way keeps loss scaling, accumulation and the
    reduction over processes as they are. The tensors are used up; `None` leaves a parameter out.
    """
    known = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    if not known:
        return torch.zeros(())
    typed = [gradient.to(parameters[name].dtype) for name, gradient in known.items()]
    return _KnownGradients.apply(typed, *(parameters[name] for name in known))


def inner_products(rows: Tensor, others: Tensor) -> Tensor:
    """Inner products of the rows of (n, P) and (m, P), shape (n, m), float64.

    In float32 within blocks of columns and float64 over them: a float32 sum over the 2e7 entries of a vocabulary is off
    by 4e-5.
    """
    total = torch.zeros(len(rows), len(others), dtype=torch.float64, device=rows.device)
    with exact_arithmetic(rows.device):
        for block, other_block in zip(rows.split(_COLUMNS, dim=1), others.split(_COLUMNS, dim=1), strict=True):
            total += block @ other_block.T
    return total
