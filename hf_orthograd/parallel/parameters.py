"""The parameters that receive the update: as a forward pass works with them, and as the optimizer holds them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model that receive the update.

    Attributes:
        projected (`dict[str, torch.nn.Parameter]`): Those the projection runs over, by name.
        others (`dict[str, torch.nn.Parameter]`): Trainable ones that take the unprojected gradient.
    """

    projected: dict[str, nn.Parameter]
    others: dict[str, nn.Parameter]

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {**self.projected, **self.others}

    @property
    def device(self) -> torch.device:
        return next(iter(self.trainable.values())).device

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


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx, scale: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, scale)
        return None, *gradients


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
