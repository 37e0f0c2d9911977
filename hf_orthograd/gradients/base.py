"""What every gradient engine offers the trainer, whichever way it comes by the inner products."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed import Exchange, Placement


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

    @property
    def stored(self) -> dict[str, nn.Parameter]:
        """What the optimizer holds of the projected parameters."""
        return self.projected

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that is stored as the parameters are, in full."""
        return tensor

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """A full tensor, the same in every process, as the parameter of that name is stored."""
        return tensor

    def hand_over(self, gradients: dict[str, Tensor | None]) -> Tensor:
        """A scalar of value zero whose gradient with respect to each parameter is the tensor given for it.

        The tensors are used up; `None` leaves a parameter out. With several processes, a parameter's gradient will be
        the mean of theirs.
        """
        return known_gradients(self.trainable, gradients)


@dataclass
class StepGradients(ABC):
    """What one step knows of its gradients, before any of them reaches `p.grad`.

    Row 0 of a Gram matrix is the forget gradient `g_u`: that of the mean over the forget samples of slope times loss,
    the slopes held constant. Rows 1 to k are the retain samples' gradients, or one row, their mean.

    Parameters:
        forget_losses (`torch.Tensor`): Of this process' forget samples, detached.
        retain_losses (`torch.Tensor`): Of this process' retain samples, detached.
        grams (`dict[str, torch.Tensor]`): For each projected parameter, its share of the Gram matrix over the retain
            samples of all processes, shape (1 + k, 1 + k), float64. Their sum is that of the whole gradients.
        placement ([`Placement`]): The rows of this process among those of all.
    """

    forget_losses: Tensor
    retain_losses: Tensor
    grams: dict[str, Tensor]
    placement: Placement

    @property
    def outlives_combine(self) -> bool:
        """Whether the retain gradients are there after [`combine`], for [`along`] and [`combination`]."""
        return False

    @property
    def gram(self) -> Tensor:
        """The Gram matrix over all projected parameters, shape (1 + k, 1 + k), float64."""
        return torch.stack(list(self.grams.values())).sum(dim=0)

    @abstractmethod
    def combine(self, forget_weight: float, retain_weight: float, coefficients: dict[str, Tensor]) -> Tensor:
        """A scalar of value zero whose gradient is `forget_weight * g_u + retain_weight * mean_i g_i + sum_i c_i g_i`.

        With several processes it is the mean over them that has this gradient, as their gradients are averaged. To be
        called once: it may use up what was kept.

        Args:
            forget_weight (`float`): Of the forget gradient.
            retain_weight (`float`): Of the mean of the retain gradients.
            coefficients (`dict[str, torch.Tensor]`): Shape (k,) for each projected parameter's name; on the other
                parameters the last term is missing.
        """

    def along(self, step: Iterable[tuple[str, Tensor]]) -> Tensor:
        """Inner products of all retain gradients with a change of the projected parameters, (k,), float64.

        Args:
            step (`Iterable[tuple[str, torch.Tensor]]`): Name and change of each, in full.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no retain gradients.")

    def combination(self, name: str, coefficients: Tensor) -> Tensor:
        """`sum_i c_i g_i` of one parameter over the retain samples of all processes."""
        raise NotImplementedError(f"{type(self).__name__} keeps no retain gradients.")

    def own_weights(self, retain_weight: float, coefficients: Tensor | None) -> Tensor:
        """Weights of this process' rows: in the mean over processes each row comes from one of them alone."""
        own = self.retain_losses.new_full((self.placement.own,), retain_weight / self.placement.total)
        if coefficients is not None:
            own = own + coefficients[self.placement.span].to(own)
        return own * self.placement.exchange.num_processes


@dataclass
class ForgetBatch:
    """Some of a step's forget samples.

    Parameters:
        inputs (`Mapping`): Their inputs, with labels.
        slopes (`Callable`): Slopes of the forget objective at their losses.
    """

    inputs: Mapping
    slopes: Slopes = torch.ones_like


class GradientEngine(ABC):
    """A way from forget and retain batches to the inner products of their gradients.

    Parameters:
        exchange ([`Exchange`]): The processes whose samples make up a step.
        outlives_combine (`bool`): Whether the retain gradients of the next step, if they are kept at all, are to be there until
            the step is made.
        loss_scale (`float`): What losses are multiplied by before they go backward, as half precision loses small
            gradients. All gradients of a step are this many times too large, and inner products its square.
    """

    name: str

    def __init__(self, parameters: Parameters, per_sample_losses: PerSampleLosses):
        self.parameters = parameters
        self.per_sample_losses = per_sample_losses
        self.exchange = Exchange()
        self.loss_scale = 1.0
        self.outlives_combine = False

    @abstractmethod
    def measure(self, model: nn.Module, forget: list[ForgetBatch], retain: list[Mapping]) -> StepGradients:
        """Runs the forward passes and finds the inner products.

        Args:
            model (`torch.nn.Module`): The model as the training step received it, wrapped or not.
            forget (`list[ForgetBatch]`): All forget samples of the step in this process, batch by batch.
            retain (`list[Mapping]`): Inputs of all its retain samples, batch by batch, with labels.

        Raises:
            UnsupportedModelError: The model does something this engine cannot follow.
        """

    def forget_gradients(self, model: nn.Module, forget: list[ForgetBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        """This process' forget losses, and `g_u`, times the loss scale, of all processes by name of each parameter that the losses use."""
        trainable = self.parameters.trainable
        total = self.exchange.place(sum(count_samples(batch.inputs) for batch in forget), first_device(model)).total
        losses, found = [], {}
        for batch in forget:
            own = self.per_sample_losses(model, batch.inputs)
            weighted = self.loss_scale * (batch.slopes(own.detach()) * own).sum() / total
            gradients = torch.autograd.grad(weighted, list(trainable.values()), allow_unused=True)
            for name, gradient in zip(trainable, gradients, strict=True):
                if gradient is not None:
                    found[name] = gradient if name not in found else found[name].add_(gradient)
            losses.append(own.detach())
        if not self.exchange.is_alone:  # all processes have to name the same parameters
            found = {
                name: self.exchange.sum(found[name] if name in found else torch.zeros_like(parameter))
                for name, parameter in trainable.items()
            }
        return torch.cat(losses), found


def count_samples(inputs: Mapping) -> int:
    """Length of the first dimension of a batch's tensors."""
    return next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim)


def first_device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=parameters[0].device)

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


def assemble_grams(
    products: dict[str, Tensor], forget_gradients: dict[str, Tensor], placement: Placement
) -> dict[str, Tensor]:
    """From what each process found to Gram matrices of `g_u` and the retain samples of all processes.

    Args:
        products (`dict[str, torch.Tensor]`): Of this process' samples with `g_u` and with the samples of all, shape
            (own, 1 + k) for each parameter.
        forget_gradients (`dict[str, torch.Tensor]`): `g_u`, by parameter, where the forget loss uses it.
        placement ([`Placement`]): The samples of all processes.

    Returns:
        `dict[str, torch.Tensor]`: Shape (1 + k, 1 + k) for each parameter, float64, the same in every process.
    """
    device = next(iter(products.values())).device
    own = torch.stack([product.to(device) for product in products.values()], dim=1)
    grams = {}
    for name, rows in zip(products, placement.gather_rows(own).unbind(dim=1), strict=True):
        gram = torch.zeros(1 + placement.total, 1 + placement.total, dtype=torch.float64, device=device)
        gram[1:] = rows
        gram[0, 1:] = rows[:, 0]
        if name in forget_gradients:
            flat = forget_gradients[name].reshape(1, -1).float()
            gram[0, 0] = inner_products(flat, flat)[0, 0].to(device)
        grams[name] = gram
    return grams
