"""What every gradient engine offers the trainer, whichever way it comes by the inner products."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


# maps (model, inputs) to the losses of the batch's samples, shape (B,)
PerSampleLosses = Callable[[nn.Module, Mapping], Tensor]
# maps forget losses (m,) to the slopes (m,) of the forget objective at them
Slopes = Callable[[Tensor], Tensor]


_COLUMNS = 1 << 16


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
        forget_losses (`torch.Tensor`): Shape (m,).
        retain_losses (`torch.Tensor`): Shape (k,).
        forget_term (`torch.Tensor`): Scalar whose gradient is `g_u`.
        grams (`dict[str, torch.Tensor]`): For each projected parameter, its share of the Gram matrix,
            shape (1 + k, 1 + k), float64. Their sum is the Gram matrix of the whole gradients.
    """

    forget_losses: Tensor
    retain_losses: Tensor
    forget_term: Tensor
    grams: dict[str, Tensor]

    @property
    def gram(self) -> Tensor:
        """The Gram matrix over all projected parameters, shape (1 + k, 1 + k), float64."""
        return torch.stack(list(self.grams.values())).sum(dim=0)

    @abstractmethod
    def retain_mean(self) -> Tensor:
        """A scalar whose gradient is the mean of the retain gradients, and whose value is the mean loss."""

    @abstractmethod
    def retain_combination(self, coefficients: dict[str, Tensor]) -> Tensor:
        """A scalar whose gradient is `sum_i c_i g_i` on each projected parameter and zero on the other parameters.

        Args:
            coefficients (`dict[str, torch.Tensor]`): Shape (k,) for each projected parameter's name.
        """


class GradientEngine(ABC):
    """A way from two batches to the inner products of their gradients."""

    name: str
    supports_per_tensor: bool

    def __init__(self, parameters: Parameters, per_sample_losses: PerSampleLosses):
        self.parameters = parameters
        self.per_sample_losses = per_sample_losses

    @abstractmethod
    def measure(
        self, model: nn.Module, forget: Mapping, retain: Mapping, slopes: Slopes, merge_retain: bool = False
    ) -> StepGradients:
        """Runs the forward passes and finds the inner products.

        Args:
            model (`torch.nn.Module`): The model as the training step received it, wrapped or not.
            forget (`Mapping`): Inputs of m forget samples, with labels.
            retain (`Mapping`): Inputs of k retain samples, with labels.
            slopes (`Callable`): Slopes of the forget objective at the forget losses.
            merge_retain (`bool`): One row for the mean retain gradient in place of one for each sample.

        Raises:
            UnsupportedModelError: The model does something this engine cannot follow.
        """


def weighted_mean(losses: Tensor, slopes: Slopes) -> Tensor:
    """The scalar whose gradient is the forget gradient: slopes are constants of the step."""
    return (slopes(losses.detach()) * losses).mean()


def linear_surrogate(parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor]) -> Tensor:
    """A scalar of value zero whose gradient with respect to each parameter is the tensor given for it.

    Handing known gradients to the ordinary backward pass in this way keeps loss scaling, accumulation and the
    reduction over processes as they are.
    """
    products = [
        torch.dot(parameters[name].flatten(), gradient.detach().flatten().to(parameters[name].dtype))
        for name, gradient in gradients.items()
    ]
    total = torch.stack(products).sum()
    return total - total.detach()


def inner_products(rows: Tensor, others: Tensor) -> Tensor:
    """Inner products of the rows of (n, P) and (m, P), shape (n, m), float64.

    In float32 within blocks of columns and float64 over them: a float32 sum over the 2e7 entries of a vocabulary is off
    by 4e-5.
    """
    total = torch.zeros(len(rows), len(others), dtype=torch.float64, device=rows.device)
    for block, other_block in zip(rows.split(_COLUMNS, dim=1), others.split(_COLUMNS, dim=1), strict=True):
        total += block @ other_block.T
    return total
