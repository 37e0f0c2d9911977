"""The methods that papers compare with, through the same trainer.

Those that are a combination of `forget_loss`, `projection` and `alpha` stand in `BASELINES`. The others are small
subclasses of [`OrthoGradTrainer`], which keep its data, launches, checks and logs and replace what a step descends; and
selective synaptic dampening, which makes no steps.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from .data import SAMPLE_INDEX
from .gradients import preserved_modes, preserved_random_state, split_samples
from .objectives import IGNORED_LABEL, PerSampleLoss
from .trainer import OrthoGradTrainer


BASELINES = {
    "finetune": {"projection": "none", "forget_loss": "ascent", "alpha": 1.0},
    "gradient_ascent": {"projection": "none", "forget_loss": "ascent", "alpha": 0.0},
    "graddiff": {"projection": "none", "forget_loss": "ascent", "alpha": 0.5},  # NegGrad+ under another name
    "npo": {"projection": "none", "forget_loss": "npo", "alpha": 0.5},
    "simnpo": {"projection": "none", "forget_loss": "simnpo", "alpha": 0.5},
    # PCGrad's and GDR's projection, on the mean retain gradient, here whether or not the two conflict
    "mean_projection": {"projection": "mean", "forget_loss": "ascent", "alpha": 0.5},
    "orthograd": {"projection": "orthogonal", "forget_loss": "ascent", "alpha": 0.5},
    "orthograd_per_tensor": {
        "projection": "orthogonal",
        "projection_scope": "per_tensor",
        "forget_loss": "ascent",
        "alpha": 0.5,
    },
    "orthograd_npo": {"projection": "orthogonal", "forget_loss": "npo", "alpha": 0.5},
}


class BaselineTrainer(OrthoGradTrainer):
    """A method whose step descends losses of its own on the step's forget and retain batches.

    `alpha` and `forget_loss` are not used.

    Raises:
        ValueError: `args.projection` is not "none".
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.forget_dataset is not None and self.args.projection != "none":
            raise ValueError(
                f"{type(self).__name__} has no projection, but `projection` is {self.args.projection!r}. Set it to 'none'."
            )

    def forget_loss(self, model: nn.Module, inputs: dict, rows: Tensor) -> Tensor | None:
        """What is descended on a forget batch, a scalar; None if this step leaves the forget set out."""
        raise NotImplementedError

    def retain_loss(self, model: nn.Module, inputs: dict) -> Tensor | None:
        """What is descended on a retain batch: by default the mean of its samples' losses."""
        return self._per_sample_loss(model, inputs).mean()

    def _unlearning_loss(self, model: nn.Module, forget: list[dict], retain: list[dict]) -> Tensor:
        self._freeze_batch_norm(model)
        losses = {}
        for batch in forget:
            losses["forget_loss"] = self.forget_loss(model, batch, batch.pop(SAMPLE_INDEX))
        for batch in retain:
            batch.pop(SAMPLE_INDEX, None)
            losses["retain_loss"] = self.retain_loss(model, batch)
        losses = {name: loss for name, loss in losses.items() if loss is not None}
        for name, loss in losses.items():
            value = self.accelerator.reduce(loss.detach(), "mean")
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"`{name}` at step {self.state.global_step + 1} is not finite. No update was made; checkpoints saved "
                    f"so far in {self.args.output_dir!r} are intact. Lower the learning rate."
                )
            self._metrics[name].append(value.item())
        return sum(losses.values())


class _TeacherTrainer(BaselineTrainer):
    """Keeps the model it starts from as a teacher: one more copy of the parameters."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = _frozen(self.model, self.args.device)

    def _divergence(self, model: nn.Module, teacher: nn.Module, inputs: dict) -> Tensor:
        with torch.no_grad():
            target = teacher(**inputs).logits
        shifted = self._per_sample_loss.shifts_labels
        return kl_divergence(model(**inputs).logits, target, inputs["labels"], shifted=shifted).mean()


class ScrubTrainer(_TeacherTrainer):
    """SCRUB (arXiv 2302.09880, equation 3): away from the original model on the forget set, towards it on the rest.

    Minimises `retain_weight * KL_retain + gamma * loss_retain - KL_forget`, KL being that of the original model's
    predictions to the model's. As in the paper steps alternate between the two sets, one of ascent on the forget set and
    then one on the retain set, and the last ones are on the retain set alone.

    Args:
        retain_weight, gamma (`float`): The paper's alpha and gamma.
        forget_share (`float`): Share of all steps after which the forget set is left alone.
    """

    def __init__(self, *args, retain_weight: float = 0.001, gamma: float = 0.99, forget_share: float = 0.7, **kwargs):
        super().__init__(*args, **kwargs)
        self._retain_weight, self._gamma, self._forget_share = retain_weight, gamma, forget_share

    @property
    def _ascends(self) -> bool:
        return self.state.global_step % 2 == 0 and self.state.global_step < self._forget_share * self.state.max_steps

    def forget_loss(self, model: nn.Module, inputs: dict, rows: Tensor) -> Tensor | None:
        return -self._divergence(model, self.teacher, inputs) if self._ascends else None

    def retain_loss(self, model: nn.Module, inputs: dict) -> Tensor | None:
        if self._ascends:
            return None
        own = super().retain_loss(model, inputs)
        return self._retain_weight * self._divergence(model, self.teacher, inputs) + self._gamma * own


class BadTeacherTrainer(_TeacherTrainer):
    """Bad Teacher (arXiv 2205.08096, equation 3): towards an incompetent model on the forget set.

    Minimises, over the samples of both batches, the mean of KL from the original model's predictions on retain samples
    and KL from those of a model with random weights on forget samples.

    Args:
        incompetent (`torch.nn.Module`, *optional*): That model; one of the same configuration, drawn anew, by default.
    """

    def __init__(self, *args, incompetent: nn.Module | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        drawn = type(base)(copy.deepcopy(base.config)) if incompetent is None else incompetent
        self.incompetent = _frozen(drawn, self.args.device)

    def _unlearning_loss(self, model: nn.Module, forget: list[dict], retain: list[dict]) -> Tensor:
        self._sizes = [len(batch["labels"]) for batch in (forget[0], retain[0])]
        return super()._unlearning_loss(model, forget, retain)

    def forget_loss(self, model: nn.Module, inputs: dict, rows: Tensor) -> Tensor | None:
        return self._sizes[0] / sum(self._sizes) * self._divergence(model, self.incompetent, inputs)

    def retain_loss(self, model: nn.Module, inputs: dict) -> Tensor | None:
        return self._sizes[1] / sum(self._sizes) * self._divergence(model, self.teacher, inputs)


class RandomLabelTrainer(BaselineTrainer):
    """Random labels (arXiv 2010.10981): trains on the retain set and on forget samples with labels that are wrong.

    Each label is drawn once from all others; with token labels, each position. With `saliency` it is SalUn
    (arXiv 2310.12508, equations 3 and 5): only weights whose gradient of the forget loss, under the original model, is
    among the largest are trained. (Weight decay is not masked.)

    Args:
        saliency (`float`, *optional*): Share of the weights that is trained; the paper takes 0.5. All by default.
    """

    def __init__(self, *args, saliency: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if saliency is not None and not 0 < saliency <= 1:
            raise ValueError(f"`saliency` must lie in (0, 1], but is {saliency}.")
        self._saliency, self._masked = saliency, False

    def forget_loss(self, model: nn.Module, inputs: dict, rows: Tensor) -> Tensor | None:
        labels = [self._wrong(label, int(row)) for label, row in zip(inputs["labels"], rows, strict=True)]
        return self._per_sample_loss(model, {**inputs, "labels": torch.stack(labels)}).mean()

    def _wrong(self, labels: Tensor, row: int) -> Tensor:
        # by seed and row, so that a sample has one wrong label however often it comes, on any process
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + row)
        config = self.accelerator.unwrap_model(self.model).config
        count = config.vocab_size if labels.ndim else config.num_labels
        drawn = torch.randint(1, count, labels.shape, generator=generator).to(labels.device)
        return torch.where(labels == IGNORED_LABEL, labels, (labels + drawn) % count)

    def _prepare_unlearning(self, model: nn.Module) -> None:
        super()._prepare_unlearning(model)
        if self._saliency is None or self._masked:
            return
        self._masked = True
        plain = self.accelerator.unwrap_model(self.model)
        trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
        total = [torch.zeros_like(parameter) for parameter in trained]
        with preserved_modes(plain), preserved_random_state():
            plain.eval()
            for batch in self._reference_batches():
                batch.pop(SAMPLE_INDEX)
                gradients = torch.autograd.grad(self._per_sample_loss(plain, batch).sum(), trained, allow_unused=True)
                total = [t if g is None else t + g for t, g in zip(total, gradients, strict=True)]
        for parameter, mask in zip(trained, saliency_masks(total, self._saliency), strict=True):
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask)


def saliency_masks(gradients: list[Tensor], share: float) -> list[Tensor]:
    """1 where the absolute gradient is among the largest `share` of all entries of all tensors, else 0."""
    magnitudes = torch.cat([gradient.abs().flatten() for gradient in gradients])
    kept = max(1, round(share * len(magnitudes)))
    threshold = magnitudes.kthvalue(len(magnitudes) - kept + 1).values
    return [(gradient.abs() >= threshold).to(gradient.dtype) for gradient in gradients]


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
            parameter.mul_(torch.where(chosen, factors, torch.ones_like(factors)))
            dampened += int(chosen.sum())
    return dampened / sum(parameter.numel() for parameter in trained)


def _importances(model: nn.Module, trained: list[Tensor], batches: Iterable[Mapping]) -> list[Tensor]:
    per_sample_loss, count = PerSampleLoss(model), 0
    total = [torch.zeros_like(parameter) for parameter in trained]
    for batch in batches:
        for sample in split_samples([dict(batch)], 1):
            gradients = torch.autograd.grad(per_sample_loss(model, sample.inputs).sum(), trained, allow_unused=True)
            for sums, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    sums.addcmul_(gradient, gradient)
            count += 1
    return [sums / count for sums in total]


def kl_divergence(logits: Tensor, target_logits: Tensor, labels: Tensor, *, shifted: bool = False) -> Tensor:
    """KL(target || predicted) of each sample, in nats, shape (B,): the mean over positions with a label.

    Where labels do not belong to positions, as under CTC, all positions count.

    Args:
        logits, target_logits (`torch.Tensor`): Shape (B, V) or (B, T, V).
        labels (`torch.Tensor`): Shape (B,) or (B, T).
        shifted (`bool`): Whether position t predicts label t + 1.
    """
    divergence = F.kl_div(
        logits.float().log_softmax(-1), target_logits.float().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    if divergence.ndim == 1:
        return divergence
    if shifted:
        divergence, labels = divergence[:, :-1], labels[:, 1:]
    counted = labels != IGNORED_LABEL if labels.shape == divergence.shape else torch.ones_like(divergence)
    return (divergence * counted).sum(1) / counted.sum(1)


def _frozen(model: nn.Module, device: torch.device) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval().to(device)
