"""What every gradient engine offers the trainer, whichever way it comes by the inner products."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import Batch
from ..objectives import PerSampleLosses
from ..parallel import ALONE, Parameters, ProcessGroup, SampleLayout
from ..projection import UpdateWeights
from .products import own_memory


# maps (model, retain batch) to its losses and to what is descended in their place, both (size,)
RetainTerm = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
# maps forget losses (m,) to the slopes (m,) of the forget objective at them
Slopes = Callable[[Tensor], Tensor]


class UnsupportedModelError(ValueError):
    """The engine cannot find this model's per-sample gradients; the message says where and what to do."""


@dataclass
class ForgetBatch(Batch):
    """Some of a step's forget samples.

    Attributes:
        slopes (`Callable`): Slopes of the forget objective at their losses.
    """

    slopes: Slopes = torch.ones_like


@dataclass
class StepGradients(ABC):
    """What one step knows of its gradients, before any of them reaches `p.grad`.

    Row 0 of a Gram matrix is the forget gradient `g_u`: that of the mean over the forget samples of slope times loss,
    the slopes held constant. Rows 1 to k are the retain samples' gradients, or one row, their mean.

    Attributes:
        forget_losses (`torch.Tensor`): Of this process' forget samples, detached.
        retain_losses (`torch.Tensor`): Of this process' retain samples, detached.
        retain_terms (`torch.Tensor`, *optional*): What is descended on them in place of their losses, detached; `None` without
            a term of its own, and where only [`combine`] finds it.
        grams (`dict[str, torch.Tensor]`): The Gram matrix over the retain samples of all processes, shape (1 + k, 1 +
            k), float64. Its name is ""; where that was asked for, there is the part of each projected parameter under
            its name.
        layout ([`SampleLayout`]): The rows of this process among those of all.
        parameters ([`Parameters`]): What the gradients belong to.
        group ([`ProcessGroup`]): The processes whose samples make up the step.
    """

    forget_losses: Tensor
    retain_losses: Tensor
    retain_terms: Tensor | None
    grams: dict[str, Tensor]
    layout: SampleLayout
    parameters: Parameters
    group: ProcessGroup

    @property
    def has_retain_gradients(self) -> bool:
        """Whether the retain gradients are there after [`combine`], for [`along`] and [`combination`]."""
        return False

    @property
    def gram(self) -> Tensor:
        """The Gram matrix over all projected parameters, shape (1 + k, 1 + k), float64."""
        return self.grams[""] if "" in self.grams else torch.stack(list(self.grams.values())).sum(dim=0)

    @abstractmethod
    def combine(self, weights: UpdateWeights) -> Tensor:
        """A scalar of value zero whose gradient is the update: the weighted sum of `g_u` and the retain gradients.

        With several processes it has it in each ([`Parameters.hand_over`] takes the mean of their parts), but for the engine
        without a projection, whose mean DDP takes. To be called once: it may use up what was kept.
        """

    def along(self, step: Iterable[tuple[str, Tensor]]) -> Tensor:
        """Inner products of all retain gradients with a change of the projected parameters, (k,), float64.

        Args:
            step (`Iterable[tuple[str, torch.Tensor]]`): Name and change of each, in full.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no retain gradients.")

    def combination(self, name: str, coefficients: Tensor) -> Tensor:
        """`sum_i c_i g_i` of one parameter, of its shape, over the retain samples of all processes."""
        raise NotImplementedError(f"{type(self).__name__} keeps no retain gradients.")

    def hand_over(self, gradients: dict[str, Tensor | None]) -> Tensor:
        """From the update, by parameter, to a scalar that has it as its gradient; see [`Parameters.hand_over`]."""
        return self.parameters.hand_over(gradients, self.group)

    def local_weights(self, weights: UpdateWeights, name: str | None) -> Tensor:
        """Weights of this process' retain gradients of one parameter, shape (local,), float32.

        In the mean over processes each row comes from one of them alone, hence times their number. `None` stands for
        the parameters that are not projected.
        """
        layout = self.layout
        if name in weights.projected:
            own = weights.projected[name].to(self.retain_losses.device)[layout.span]
        else:
            own = torch.full((layout.local,), weights.retain_mean / layout.total, device=self.retain_losses.device)
        return own * layout.group.num_processes

    def term_weight(self, weights: UpdateWeights) -> float:
        """Weight of the gradient of the mean retain term, where that is of this process' samples over the number of all."""
        return weights.retain_term * self.layout.group.num_processes


@dataclass(frozen=True)
class MeasureSettings:
    """What [`GradientEngine.measure`] was asked for; its arguments say what each means."""

    group: ProcessGroup
    loss_scale: float
    keep_gradients: bool
    per_parameter: bool
    retain_term: RetainTerm | None


class GradientEngine(ABC):
    """A way from forget and retain batches to the inner products of their gradients.

    What a step needs are arguments of [`measure`]; what an engine keeps between steps is what it found out of the model.

    Args:
        parameters ([`Parameters`]): What to differentiate by, and what is projected.
        per_sample_losses (`Callable`): The losses of a batch.
    """

    name: str

    def __init__(self, parameters: Parameters, per_sample_losses: PerSampleLosses):
        self.parameters = parameters
        self.per_sample_losses = per_sample_losses

    def measure(
        self,
        model: nn.Module,
        forget: list[ForgetBatch],
        retain: list[Batch],
        *,
        group: ProcessGroup = ALONE,
        loss_scale: float = 1.0,
        keep_gradients: bool = False,
        per_parameter: bool = False,
        retain_term: RetainTerm | None = None,
    ) -> StepGradients:
        """Runs the forward passes and finds the inner products.

        Args:
            model (`torch.nn.Module`): The model as the training step received it, wrapped or not.
            forget (`list[ForgetBatch]`): All forget samples of the step in this process, batch by batch.
            retain (`list[Batch]`): All its retain samples, batch by batch.
            group ([`ProcessGroup`]): The processes whose samples make up the step.
            loss_scale (`float`): What losses are multiplied by before they go backward, as half precision loses small
                gradients. All gradients of the step are this many times too large, and inner products its square.
            keep_gradients (`bool`): Whether the retain gradients, if they are kept at all, are to be there until the step
                is made.
            per_parameter (`bool`): Whether the Gram matrix of each parameter is wanted, and not only their sum.
            retain_term (`Callable`, *optional*): Maps (model, retain batch) to its losses, whose gradients are
                projected on, and to what is descended in their place, both (size,).

        Raises:
            UnsupportedModelError: The model does something this engine cannot follow.
        """
        settings = MeasureSettings(group, loss_scale, keep_gradients, per_parameter, retain_term)
        return self.step_gradients(model, forget, retain, settings)

    @abstractmethod
    def step_gradients(
        self, model: nn.Module, forget: list[ForgetBatch], retain: list[Batch], settings: MeasureSettings
    ) -> StepGradients:
        """What an engine of its own implements: [`measure`], whose settings come in one piece."""

    def forget_gradients(
        self, model: nn.Module, forget: list[ForgetBatch], group: ProcessGroup, loss_scale: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This process' forget losses, (m,), and `g_u`, times the loss scale, of all processes by name of each parameter in use."""
        trainable, device = self.parameters.trainable, self.parameters.device
        # divided before it goes backward: half precision has no room for sums
        total = group.layout(sum(batch.size for batch in forget), device).total
        losses, found = [], {}
        for batch in forget:
            own = batch.losses(model, self.per_sample_losses)
            weighted = loss_scale * (batch.slopes(own.detach()) * own).sum() / total
            gradients = torch.autograd.grad(weighted, list(trainable.values()), allow_unused=True)
            for name, gradient in zip(trainable, own_memory(gradients), strict=True):
                if gradient is not None:
                    found[name] = gradient if name not in found else found[name].add_(gradient)
            losses.append(own.detach())
        if not group.is_alone:
            summed = {}
            for name in group.used_anywhere(trainable, found, device):
                own = found.pop(name) if name in found else torch.zeros_like(trainable[name])
                summed[name] = group.sum(own)
            found = summed
        return torch.cat(losses), found
