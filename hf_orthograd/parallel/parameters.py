"""The parameters that receive the update: as a forward pass works with them, and as the optimizer holds them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .process_group import ProcessGroup


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model that receive the update.

    Attributes:
        projected (`dict[str, torch.nn.Parameter]`): Those the projection runs over, by name.
        others (`dict[str, torch.nn.Parameter]`): Trainable ones that take the unprojected gradient.
        averaged_later (`bool`): Whether somebody else takes the mean of the processes' gradients, as DeepSpeed does.
    """

    projected: dict[str, nn.Parameter]
    others: dict[str, nn.Parameter]
    averaged_later: bool = field(default=False, kw_only=True)

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

    def hand_over(self, gradients: dict[str, Tensor | None], group: ProcessGroup) -> Tensor:
        """A scalar of value zero whose gradient with respect to each parameter is the mean over processes of those given.

        The tensors are used up; `None` in every process leaves a parameter out. The mean is taken here and not by DDP, which
        would wait for parameters that no loss uses, and lets pass those only that its own last forward pass did not use.
        """
        if not group.is_alone:
            gradients = self.agreed(gradients, group)
            if not self.averaged_later:
                group.average(list(gradients.values()))
        return known_gradients(self.trainable, gradients)

    def agreed(self, gradients: dict[str, Tensor | None], group: ProcessGroup) -> dict[str, Tensor]:
        """The same parameters in every process: those that one at least has a gradient of, zeros where this has none."""
        own = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        trainable, found = self.trainable, {}
        for name in group.used_anywhere(trainable, own, self.device):
            # in the same precision everywhere, whichever way each process came by it
            dtype = torch.promote_types(trainable[name].dtype, torch.float32)
            found[name] = own.pop(name).to(dtype) if name in own else torch.zeros_like(trainable[name], dtype=dtype)
        return found


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, scale)
        return None, *gradients


def known_gradients(parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor | None]) -> Tensor:
    """A scalar of value zero whose gradient with respect to each parameter is the tensor given for it.

    Handing known gradients to the ordinary backward pass in this way keeps loss scaling and accumulation as they are. The
    tensors are used up; `None` leaves a parameter out.
    """
    known = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    if not known:
        return torch.zeros(())
    typed = [gradient.to(parameters[name].dtype) for name, gradient in known.items()]
    return _KnownGradients.apply(typed, *(parameters[name] for name in known))
