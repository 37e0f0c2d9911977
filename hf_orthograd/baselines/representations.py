"""Methods that steer hidden states: RMU."""

from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch
from ..trials import preserved_random_state
from .teachers import TeacherTrainer


class RmuTrainer(TeacherTrainer):
    """RMU (arXiv 2403.03218, section 4): hidden states of forget samples go to one random direction, others stay.

    Minimises the squared distance of a layer's output to `steering * u` on forget samples, `u` a random unit vector.
    To it comes `retain_weight` times the squared distance to the starting model's output on retain samples. Both are
    means over the positions of all samples. With `retain_loss="kl"` the divergence takes the place of the latter. The
    paper trains the MLP weights of this layer and the two before: the trainable parameters are the user's to choose,
    by `requires_grad`.

    Args:
        layer (`str`): Name of the module, as "model.layers.7", whose output, or the first part of it, is (B, T, width).
        steering, retain_weight (`float`): The paper's c and alpha.

    Raises:
        ValueError: The model has no module of the name `layer`. Or, with several processes from `train()`, a trainable parameter
            that the layer's output does not depend on: DDP would wait for its gradient.
    """

    unread = ("alpha",)

    def __init__(self, *args: Any, layer: str, steering: float = 6.5, retain_weight: float = 1200.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.needs_divergence = self.args.keeps_predictions
        if layer not in dict(self.model.named_modules()):
            raise ValueError(f"`layer` is {layer!r}, but the model has no module of that name.")
        self._layer, self._steering, self._retain_weight = layer, steering, retain_weight
        self._direction: Tensor | None = None

    def begin_unlearning(self) -> None:
        super().begin_unlearning()
        if self.args.world_size > 1:
            self.refuse_idle_parameters()

    def refuse_idle_parameters(self) -> None:
        """Raises `ValueError` where a trainable parameter gets no gradient from the layer's output."""
        plain = self.accelerator.unwrap_model(self.model)
        trained = {name: own for name, own in plain.named_parameters() if own.requires_grad}
        with preserved_random_state():
            states = self._states(plain, self.first_batch("forget_dataset", 1))
        if states.requires_grad:
            states.float().sum().backward()  # not `autograd.grad`, which reentrant checkpointing cannot follow
        idle = [name for name, parameter in trained.items() if parameter.grad is None]
        plain.zero_grad(set_to_none=True)
        if idle:
            raise ValueError(
                f"{len(idle)} trainable parameters do not change what `layer` {self._layer!r} puts out, {idle[0]} for one: processes would wait "
                "for their gradients. Freeze them by `requires_grad_(False)`; the paper trains the MLPs of that layer and the two before."
            )

    def forget_loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        states = self._states(model, batch)
        if self._direction is None:
            # by the seed, so that it is the same in every process and in a resumed run
            generator = torch.Generator().manual_seed(self.args.seed)
            drawn = torch.rand(states.shape[-1], generator=generator)
            self._direction = (self._steering * drawn / drawn.norm()).to(states)
        return _mean_distance(states, self._direction, batch)

    def retain_loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        if self.args.keeps_predictions:
            return super().retain_loss(model, batch)
        with torch.no_grad(), self.accelerator.autocast():  # as the model, which accelerate has prepared
            target = self._states(self.teacher, batch)
        return self._retain_weight * _mean_distance(self._states(model, batch), target, batch)

    def _states(self, model: nn.Module, batch: Batch) -> Tensor:
        kept = []
        plain = self.accelerator.unwrap_model(model)
        watch = plain.get_submodule(self._layer).register_forward_hook(
            lambda module, inputs, output: kept.append(output)
        )
        with watch:
            model(**batch.inputs)
        return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


def _mean_distance(states: Tensor, target: Tensor, batch: Batch) -> Tensor:
    """The squared distance in the mean over the positions that hold something, of all samples."""
    distances = (states.float() - target.float()).square().sum(-1)
    mask = batch.inputs.get("attention_mask")
    if mask is None or mask.shape != distances.shape:
        return distances.mean()
    return (distances * mask).sum() / mask.sum()
