"""[`OrthoGradTrainer`]: transformers' Trainer with a forget set."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Seq2SeqTrainer, TrainingArguments
from transformers.utils import logging

from . import validation
from .checkpoints import Checkpoints
from .config import OrthoGradConfig
from .data import SAMPLE_INDEX
from .gradients import ForgetBatch, GradientEngine, StepGradients
from .monitor import UnlearningMonitor
from .objectives import Ascent, NegativePreference, PerSampleLoss, SimpleNegativePreference
from .preparation import Preparation
from .projection import Projection, solve_projections
from .reference import ReferenceLosses
from .stopping import JudgedTraining, StoppingRule, check_stopping, has_rule
from .streams import PairedStreams
from .update import UpdateCorrection


logger = logging.get_logger(__name__)


class PairedBatches(dict):
    """The batches of an unlearning step, in two lists: "forget" and "retain", empty if the update needs none."""


class OrthoGradTrainer(Preparation, JudgedTraining, Checkpoints, PairedStreams, Seq2SeqTrainer):
    """Trainer that makes a model forget `forget_dataset` while it keeps learning from `train_dataset`.

    Each step ascends the forget gradient after projecting it onto the orthogonal complement of the gradients of the
    step's retain samples, and descends their mean (arXiv 2503.02312). Without `forget_dataset` it is Trainer.

    Args:
        model, args, data_collator, train_dataset, ...: As in [`~transformers.Seq2SeqTrainer`]. `train_dataset` is the
            retain set. `args` may be an [`OrthoGradConfig`] or plain `TrainingArguments`, which get its defaults.
            `compute_loss_func`, where the model's own loss is not known per sample, must return shape (batch size,).
        forget_dataset (`torch.utils.data.Dataset` or `datasets.Dataset`, *optional*): What to forget, with the columns
            of `train_dataset`.

    Raises:
        ValueError: Bad input, before the first step; the message names the argument and what to do.
        FloatingPointError: A loss that is not finite, from `train()`, naming the step and the samples.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        model_init: Callable[[], nn.Module] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        *,
        forget_dataset=None,
    ):
        args = as_config(args)
        if forget_dataset is not None:
            validation.check_datasets(args, forget_dataset, train_dataset)
        check_stopping(args, forget_dataset, eval_dataset, compute_metrics)
        self.forget_dataset = forget_dataset
        # kept from Trainer, which would take its loss as already scaled for accumulation
        self.per_sample_loss_func = compute_loss_func if forget_dataset is not None else None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset if train_dataset is not None else forget_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func if forget_dataset is None else None,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self._has_retain = train_dataset is not None and (
            not hasattr(train_dataset, "__len__") or len(train_dataset) > 0
        )
        if not self._has_retain and forget_dataset is not None:
            self.train_dataset = forget_dataset
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._engine: GradientEngine | None = None
        self._forget_batches: Iterator | None = None
        self._window = _empty_window()
        self._correction: UpdateCorrection | None = None
        self._monitor: UnlearningMonitor | None = None
        self._publishing = self._loaded_in_part = False
        if forget_dataset is not None:
            validation.check_launch(self.args, self.accelerator.state)
            validation.find_parameters(self.model, self.args)
            if self.args.forget_loss == "npo":
                self.add_callback(ReferenceLosses())
            if has_rule(self.args):
                self.add_callback(StoppingRule(self.args))

    # ---- The step: forward, inner products, k numbers, one backward ----

    def train(self, *args, **kwargs):
        """As [`~transformers.Trainer.train`]; bad input is found before the first step."""
        self._engine = self._forget_batches = None
        self._window = _empty_window()
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> Tensor:
        if self.forget_dataset is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._engine is None:
            self._prepare_unlearning(model)
        window = self._window
        window["forget"].append(next(self._forget_batches) if self._has_retain else {**inputs})
        window["retain"] += [{**inputs}] if self._has_retain else []
        if self.args.projection != "none" and not self.accelerator.sync_gradients:
            # one projection against the retain samples of all micro-batches, when the last has come
            return torch.zeros((), device=self.args.device)
        self._window = _empty_window()
        # a mean over samples, not over tokens: the number of tokens would be that of the retain batch alone
        try:
            return super().training_step(model, window, None)
        except FloatingPointError as error:
            if not self._ends_with_the_best(error):
                raise
            if self.accelerator.scaler is not None:  # it takes a step without any gradient for a mistake
                trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
                self.accelerator.backward(sum(0.0 * parameter.sum() for parameter in trained))
            return torch.zeros((), device=self.args.device)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        if isinstance(inputs, PairedBatches):
            loss = self._unlearning_loss(model, inputs["forget"], inputs["retain"])
            # Trainer divides by the number of micro-batches, which is right where each adds its own part
            return loss if self.args.projection == "none" else loss * self.current_gradient_accumulation_steps
        if self.per_sample_loss_func is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses, outputs = PerSampleLoss(model, self.per_sample_loss_func).with_outputs(model, inputs)
        return (losses.mean(), outputs) if return_outputs else losses.mean()

    def _unlearning_loss(self, model: nn.Module, forget: list[dict], retain: list[dict]) -> Tensor:
        """A scalar whose gradient is `alpha * mean_i g_i - (1 - alpha) * g_perp`, and whose value is GradDiff's loss."""
        self._freeze_batch_norm(model)
        forget_rows = [batch.pop(SAMPLE_INDEX) for batch in forget]
        retain_rows = [batch.pop(SAMPLE_INDEX, None) for batch in retain]
        objectives = [self._forget_objective(model, rows) for rows in forget_rows]
        batches = [ForgetBatch(*pair) for pair in zip(forget, (one.slopes for one in objectives), strict=True)]
        scaler = self.accelerator.scaler if self.args.projection != "none" else None
        self._engine.loss_scale = scale = 1.0 if scaler is None else scaler.get_scale()
        if self.is_deepspeed_enabled and self.args.projection != "none":
            model = self.accelerator.unwrap_model(model)  # DeepSpeed's wrapper takes any backward pass for the last
        watched = self._monitor is not None and self._monitor.watches(self.state.global_step)
        if watched:
            self._monitor.begin(model, retain)
        self._engine.outlives_combine = watched or self._correction is not None
        step = self._engine.measure(model, batches, retain)
        self._check_finite(step, forget_rows, retain_rows)

        alpha, projection, coefficients = self.args.alpha, None, {}
        if step.grams:
            solved, projection = self._solve(step)
            coefficients = {name: (1 - alpha) * values for name, values in solved.items()}
        # the scaler multiplies by its scale, which these gradients have already
        loss = step.combine(-(1 - alpha), alpha, coefficients) / scale
        if self._correction is not None:
            self._correction.gradients = step
        if watched:
            self._monitor.expect(step)
        self._collect_metrics(step, projection)
        # the value is for the log; the gradient is that of the combination
        retain_loss = step.retain_losses.mean() if len(step.retain_losses) else 0.0
        losses = step.forget_losses.split([len(rows) for rows in forget_rows])
        ascended = [one.value(own) * len(own) for one, own in zip(objectives, losses, strict=True)]
        return loss + alpha * retain_loss - (1 - alpha) * sum(ascended) / len(step.forget_losses)

    def _solve(self, step: StepGradients) -> tuple[dict[str, Tensor], Projection]:
        args = self.args
        return solve_projections(
            step.grams,
            per_tensor=args.projection_scope == "per_tensor",
            solver=args.projection_solver,
            num_iterations=args.projection_iterations,
            rtol=args.projection_rtol,
        )

    def _forget_objective(
        self, model: nn.Module, forget_rows: Tensor
    ) -> Ascent | NegativePreference | SimpleNegativePreference:
        if self.args.forget_loss == "ascent":
            return Ascent()
        if self.args.forget_loss == "simnpo":
            return SimpleNegativePreference(self.args.npo_beta, self.args.simnpo_gamma)
        reference = ReferenceLosses.of(self.callback_handler)
        if reference.losses is None:
            reference.compute(model, self._per_sample_loss, self._reference_batches(), self.state.global_step)
        losses = torch.tensor(reference.losses, device=forget_rows.device)
        return NegativePreference(losses[forget_rows], self.args.npo_beta)

    def _freeze_batch_norm(self, model: nn.Module) -> None:
        if self.args.freeze_batch_norm:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    # ---- What is reported ----

    def _check_finite(self, step: StepGradients, forget_rows: list[Tensor], retain_rows: list[Tensor | None]) -> None:
        """Raises in every process if a loss is not finite in one."""
        found = [
            (what, rows, ~torch.isfinite(losses))
            for what, losses, rows in (
                ("forget_dataset", step.forget_losses, forget_rows),
                ("train_dataset", step.retain_losses, retain_rows),
            )
        ]
        number = sum(bad.sum() for _, _, bad in found)
        saved = f"checkpoints saved so far in {self.args.output_dir!r} are intact."
        if self._engine.exchange.sum(number.float()) > 0:
            listed = [f"{_name_rows(rows, bad)} of `{what}`" for what, rows, bad in found if bad.any()]
            raise FloatingPointError(
                f"The loss at step {self.state.global_step + 1} is not finite for "
                f"{' and '.join(listed) or 'samples of another process'}. No update was made; {saved} Lower the learning "
                "rate, set forget_loss='npo', or look at these samples."
            )
        # an overflow that a smaller scale may avoid passes: the scaler will find it, skip the step and back off
        if step.grams and not torch.isfinite(step.gram).all() and self._engine.loss_scale <= 1:
            raise FloatingPointError(
                f"A gradient at step {self.state.global_step + 1} is not finite, though all losses are. No update was "
                f"made; {saved}"
            )

    def _collect_metrics(self, step: StepGradients, projection: Projection | None) -> None:
        for name, losses in (("forget_loss", step.forget_losses), ("retain_loss", step.retain_losses)):
            if len(losses):
                self._metrics[name].append(self.accelerator.reduce(losses.mean(), "mean").item())
        if projection is not None and math.isfinite(projection.kept_signal):
            self._metrics["kept_signal"].append(projection.kept_signal)
            self._metrics["projection_rank"].append(projection.rank)
            self._metrics["projection_residual"].append(projection.residual)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the means since the last log: forget_loss, retain_loss, kept_signal, projection_rank and _residual."""
        if "loss" in logs and self._metrics:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._metrics.items()}}
            self._metrics.clear()
        super().log(logs, *args, **kwargs)


def _name_rows(rows: list[Tensor | None], bad: Tensor) -> str:
    known = rows and all(row is not None for row in rows)
    return f"rows {', '.join(map(str, torch.cat(rows)[bad].tolist()))}" if known else "unknown rows"


def _empty_window() -> PairedBatches:
    return PairedBatches(forget=[], retain=[])


def as_config(args: TrainingArguments | None) -> OrthoGradConfig:
    """Takes plain `TrainingArguments` over into an [`OrthoGradConfig`], whose own fields get their defaults."""
    if isinstance(args, OrthoGradConfig):
        return args
    if args is None:
        return OrthoGradConfig(output_dir="tmp_trainer")
    return OrthoGradConfig(**{f.name: getattr(args, f.name) for f in fields(args) if f.init})
