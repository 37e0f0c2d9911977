"""Methods that make a step of the gradients of both batches: GRU, GU, SAM-NPO and ONPO."""

from typing import Any

import torch
from torch import Tensor, nn

from ..callbacks import objectives_of
from ..data import Batch
from ..parallel import Parameters
from ..projection import project_orthogonal
from .base import BaselineTrainer, refuse_shards


class GradientTrainer(BaselineTrainer):
    """A method whose step is made of the gradients of the step's forget and retain batch, the means over all processes.

    `forget_loss` is what is ascended: "npo", "simnpo" or "ascent"; or "refusal", whose loss is descended.

    Raises:
        ValueError: Steps are accumulated or losses scaled, where a step has no one gradient; the model is sharded; or there are no
            retain samples.
    """

    keeps_objective = True
    keeps_gradients = False  # of earlier steps, which no checkpoint holds

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.forget_dataset is None:
            return
        if self.args.gradient_accumulation_steps > 1 or self.args.fp16:
            raise ValueError(
                f"{type(self).__name__} works on the gradients of one batch in full, but `gradient_accumulation_steps` is "
                f"{self.args.gradient_accumulation_steps} and `fp16` {self.args.fp16}. Set them to 1 and False."
            )
        if not self.has_retain:
            raise ValueError(f"{type(self).__name__} needs retain samples, but `train_dataset` has none. Pass some.")
        refuse_shards(self, "A step is made of the whole gradients of both losses")

    def forget_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Minus what is ascended, a scalar in nats."""
        (objective,) = objectives_of([batch], self.args, self.callback_handler)
        return -objective.value(batch.losses(model, self.per_sample_loss))

    def step_of(self, forget: list[Tensor], retain: list[Tensor], trained: list[nn.Parameter]) -> list[Tensor]:
        """What the optimizer is handed, from the gradients of both losses, both to be descended; each of the shape of its parameter."""
        raise NotImplementedError

    def gradients(self, loss: Tensor, trained: list[nn.Parameter]) -> list[Tensor]:
        """The gradient of a scalar loss by parameter, the mean over processes, float32."""
        found = [g.float() for g in torch.autograd.grad(loss, trained, materialize_grads=True)]
        self.group.average(found)
        return found

    def forget_gradients(self, model: nn.Module, batch: Batch, trained: list[nn.Parameter]) -> tuple[Tensor, list]:
        """The loss on the forget batch, a scalar, and its gradient by parameter."""
        loss = self.forget_loss(model, batch)
        return loss, self.gradients(loss, trained)

    def unlearning_loss(self, model: nn.Module, forget: list[Batch], retain: list[Batch]) -> Tensor:
        # DDP would wait for a backward pass of its own
        plain = self.accelerator.unwrap_model(model)
        named = {name: parameter for name, parameter in plain.named_parameters() if parameter.requires_grad}
        trained = list(named.values())
        forget_loss, forget_gradients = self.forget_gradients(plain, forget[0], trained)
        retain_loss = self.retain_loss(plain, retain[0])
        step = self.step_of(forget_gradients, self.gradients(retain_loss, trained), trained)
        values = torch.stack([forget_loss.detach(), retain_loss.detach()]).float()
        names = ("forget_loss", "retain_loss")
        self.record_losses(dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True)))
        # the mean over processes of the same in each
        handed = Parameters(named, {}).hand_over(dict(zip(named, step, strict=True)), self.group)
        return handed + self.weigh({"forget_loss": forget_loss.detach(), "retain_loss": retain_loss.detach()}, [], [])

    def weigh(self, losses: dict[str, Tensor], forget: list[Batch], retain: list[Batch]) -> Tensor:
        return (1 - self.args.alpha) * losses["forget_loss"] + self.args.alpha * losses["retain_loss"]

    def begin_unlearning(self) -> None:
        super().begin_unlearning()
        if self.keeps_gradients and self.state.global_step > 0:
            raise ValueError(
                f"A run of {type(self).__name__} cannot be resumed: the gradients that it keeps are not saved. Start from the "
                "beginning."
            )


class GruTrainer(GradientTrainer):
    """Gradient rectified unlearning (arXiv 2503.09117, section 3): the ascent, less what would raise the retain loss.

    Where a step along the forget gradient would raise the retain loss, to first order, its part along the retain gradient
    is taken out; where not, it stays. The retain gradient is that of the batch's mean, smoothed over steps. The rectified
    ascent is the whole step: there is no retain term.

    Args:
        smoothing (`float`): Share of the newest retain gradient in the smoothed one, the paper's gamma.
    """

    keeps_gradients = True
    unread = ("alpha",)

    def __init__(self, *args: Any, smoothing: float = 0.8, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._smoothing, self._retain_gradient = smoothing, None

    def begin_unlearning(self) -> None:
        super().begin_unlearning()
        self._retain_gradient = None

    def step_of(self, forget: list[Tensor], retain: list[Tensor], trained: list[nn.Parameter]) -> list[Tensor]:
        if self._retain_gradient is not None:
            retain = torch._foreach_lerp(self._retain_gradient, retain, self._smoothing)
        self._retain_gradient = retain
        return rectify(forget, retain)

    def weigh(self, losses: dict[str, Tensor], forget: list[Batch], retain: list[Batch]) -> Tensor:
        return losses["forget_loss"]


class GuTrainer(GradientTrainer):
    """Geometric-disentanglement unlearning (arXiv 2511.17100): the ascent, normal to retain gradients in Adam's geometry.

    Of each tensor, gradients are divided by the square root of Adam's denominator. The forget gradient loses its part
    in the span of the retain gradients of the last steps, each the mean of a batch. So the step that Adam makes of it
    does not change their losses, to first order. Weights are `1 - alpha`, and `alpha` on the retain gradient. Before
    the first step Adam has no denominator, and under another optimizer none at all: the geometry is then the plain
    one.

    Args:
        rank (`int`): How many retain gradients are kept, each the size of the parameters.

    Raises:
        ValueError: `rank` below 1, or a run that is resumed: earlier retain gradients are not saved.
    """

    keeps_gradients = True

    def __init__(self, *args: Any, rank: int = 8, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, but is {rank}.")
        self._rank, self._kept = rank, []

    def begin_unlearning(self) -> None:
        super().begin_unlearning()
        self._kept = []

    def step_of(self, forget: list[Tensor], retain: list[Tensor], trained: list[nn.Parameter]) -> list[Tensor]:
        self._kept = [*self._kept, retain][-self._rank :]
        step = []
        for number, (parameter, ascended, kept) in enumerate(zip(trained, forget, retain, strict=True)):
            root = self._denominator(parameter).sqrt()
            rows = torch.stack([(gradients[number] / root).flatten() for gradients in self._kept])
            normal = project_orthogonal((ascended / root).flatten(), rows).view_as(ascended) * root
            step.append((1 - self.args.alpha) * normal + self.args.alpha * kept)
        return step

    def _denominator(self, parameter: nn.Parameter) -> Tensor:
        """What Adam divides the step of each entry by."""
        group = next(own for own in self.optimizer.param_groups if any(p is parameter for p in own["params"]))
        state = self.optimizer.state[parameter] if parameter in self.optimizer.state else {}
        fits = "betas" in group and "exp_avg_sq" in state and state["exp_avg_sq"].shape == parameter.shape
        if not fits:  # Adafactor and GaLore keep something else under that name
            return torch.ones_like(parameter, dtype=torch.float32)
        unbiased = state["exp_avg_sq"].float() / (1 - group["betas"][1] ** state["step"])
        return unbiased.sqrt() + group["eps"]


class SamTrainer(GradientTrainer):
    """Sharpness-aware unlearning (arXiv 2502.05374, equation 6), SAM-NPO with the default objective: robust to relearning.

    The forget gradient is taken where the forget loss is worst nearby, to first order: `radius` further along it. Weights
    are `1 - alpha`, and `alpha` on the retain gradient, which is taken where the parameters are.

    Args:
        radius (`float`): The paper's rho, in the norm of all trained parameters.
    """

    def __init__(self, *args: Any, radius: float = 0.01, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._radius = radius

    @torch.no_grad()
    def forget_gradients(self, model: nn.Module, batch: Batch, trained: list[nn.Parameter]) -> tuple[Tensor, list]:
        with torch.enable_grad():
            loss, gradients = super().forget_gradients(model, batch, trained)
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        before = [parameter.clone() for parameter in trained]
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter += (self._radius / norm.clamp(min=1e-12) * gradient).to(parameter.dtype)
        try:
            with torch.enable_grad():
                _, gradients = super().forget_gradients(model, batch, trained)
        finally:  # with smaller batches a run may begin again
            torch._foreach_copy_(trained, before)
        return loss, gradients

    def step_of(self, forget: list[Tensor], retain: list[Tensor], trained: list[nn.Parameter]) -> list[Tensor]:
        alpha = self.args.alpha
        return torch._foreach_add(torch._foreach_mul(forget, 1 - alpha), torch._foreach_mul(retain, alpha))


class OnpoTrainer(GradientTrainer):
    """NPO for requests in turn, after the abstract of ONPO (OpenReview lb6Ce20kl5): off the forget gradients of earlier requests.

    The gradient that the optimizer is handed, `1 - alpha` times the forget gradient and `alpha` times the retain gradient,
    loses its part in the span of forget gradients that earlier runs kept. To first order a step of SGD leaves the losses
    of earlier requests alone; Adam's scaling bends it. No data of earlier requests is needed. Without kept gradients it
    is NPO. Which gradients are kept the abstract leaves open: here it is those of a run's last steps.

    Args:
        earlier (`torch.Tensor`, *optional*): Shape (r, d): [`directions`] of the run before, of a model with the same trained
            parameters. They are held on the device, 4 bytes a number.
        rank (`int`): How many forget gradients a call of `train()` keeps, each the size of the parameters.

    Raises:
        ValueError: `rank` below 1, `earlier` of another shape or not finite, or a run that is resumed: kept gradients are not
            saved.
    """

    keeps_gradients = True

    def __init__(self, *args: Any, earlier: Tensor | None = None, rank: int = 8, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, but is {rank}.")
        size = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        is_tensor = isinstance(earlier, Tensor)
        fits = is_tensor and earlier.ndim == 2 and earlier.shape[1] == size and bool(earlier.isfinite().all())
        if earlier is not None and not fits:
            shape = tuple(earlier.shape) if is_tensor else type(earlier).__name__
            raise ValueError(
                f"`earlier` must be a tensor of finite numbers, of shape (directions, {size}), one column for each trained "
                f"parameter, but is {shape}. Pass `directions` of a run on the same model."
            )
        self._earlier, self._rank, self._size = earlier, rank, size
        self._kept: list[Tensor] = []

    @property
    def directions(self) -> Tensor:
        """What to pass as `earlier` to the next run, shape (r, d), on the CPU: what this one was given, and what it kept."""
        before = torch.zeros(0, self._size) if self._earlier is None else self._earlier.cpu()
        return torch.cat([before, *(gradient.cpu()[None] for gradient in self._kept)])

    def begin_unlearning(self) -> None:
        super().begin_unlearning()
        self._kept = []

    def step_of(self, forget: list[Tensor], retain: list[Tensor], trained: list[nn.Parameter]) -> list[Tensor]:
        flat = torch.cat([gradient.flatten() for gradient in forget])
        self._kept = [*self._kept, flat][-self._rank :]
        step = (1 - self.args.alpha) * flat + self.args.alpha * torch.cat([gradient.flatten() for gradient in retain])
        if self._earlier is not None:
            self._earlier = self._earlier.to(step)
            step = project_orthogonal(step, self._earlier)
        return [
            part.view_as(gradient)
            for part, gradient in zip(step.split([g.numel() for g in forget]), forget, strict=True)
        ]


def rectify(descended: list[Tensor], retain_gradient: list[Tensor]) -> list[Tensor]:
    """What is descended, without its part against the retain gradient; as it is where it has none. Lists of tensors, of the same shapes."""
    along = sum(torch.stack([(a * b).sum() for a, b in zip(descended, retain_gradient, strict=True)]))
    squared = sum(torch.stack([gradient.square().sum() for gradient in retain_gradient]))
    # no branch on a number that is on the device
    share = torch.where(squared > 0, along.clamp(max=0) / squared, torch.zeros_like(along))
    return [a - share * b for a, b in zip(descended, retain_gradient, strict=True)]
