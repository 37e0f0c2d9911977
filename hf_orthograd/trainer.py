"""[`OrthoGradTrainer`]: transformers' Trainer with a forget set."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import islice

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Seq2SeqTrainer, TrainingArguments
from transformers.utils import logging

from . import validation
from .config import OrthoGradConfig
from .data import SAMPLE_INDEX
from .distributed import Exchange
from .estimate import Estimate, estimate_step, optimizer_state_bytes
from .gradients import (
    ForgetBatch,
    GradientEngine,
    MeanEngine,
    PlainEngine,
    StepGradients,
    choose_engine,
    preserved_modes,
    preserved_random_state,
    split_samples,
)
from .objectives import Ascent, NegativePreference, PerSampleLoss
from .projection import Projection, solve_projections
from .reference import ReferenceLosses
from .sharding import is_sharded, unshard
from .streams import PairedStreams
from .update import UpdateCorrection


logger = logging.get_logger(__name__)


class PairedBatches(dict):
    """The batches of an unlearning step, in two lists: "forget" and "retain", empty if the update needs none."""


class OrthoGradTrainer(PairedStreams, Seq2SeqTrainer):
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
        self.forget_dataset = forget_dataset
        # kept from Trainer, which would take its loss as already scaled for accumulation
        self._per_sample_loss_func = compute_loss_func if forget_dataset is not None else None
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
        self._publishing = False
        if forget_dataset is not None:
            validation.check_launch(self.args, self.accelerator.state)
            validation.find_parameters(self.model, self.args)
            if self.args.forget_loss == "npo":
                self.add_callback(ReferenceLosses())

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
        return super().training_step(model, window, None)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        if isinstance(inputs, PairedBatches):
            loss = self._unlearning_loss(model, inputs["forget"], inputs["retain"])
            # Trainer divides by the number of micro-batches, which is right where each adds its own part
            return loss if self.args.projection == "none" else loss * self.current_gradient_accumulation_steps
        if self._per_sample_loss_func is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses, outputs = PerSampleLoss(model, self._per_sample_loss_func).with_outputs(model, inputs)
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

    def _forget_objective(self, model: nn.Module, forget_rows: Tensor) -> Ascent | NegativePreference:
        if self.args.forget_loss == "ascent":
            return Ascent()
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

    # ---- What is checked and reported ----

    def estimate(self) -> Estimate:
        """Counts what a step will take, without making one: parameters under the projection, rules, memory, time.

        From forward and backward passes over two samples of each set, padded as the first batch is. Time counts the
        multiplications of matrix products alone. Activations are taken to grow with the number of samples, and the
        state of optimizers other than torch's Adam counts as nothing.

        Returns:
            [`Estimate`], which prints as a table.

        Raises:
            ValueError: There is no `forget_dataset`, or the model or samples would be refused by `train()`.
        """
        if self.forget_dataset is None:
            raise ValueError("`estimate()` needs a `forget_dataset`: without one the trainer is Trainer.")
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        num_retain = self._train_batch_size if self._has_retain else 0
        with preserved_random_state(), preserved_modes(model), self.compute_loss_context_manager():
            engine = self._choose_engine(model)
            forget = self._first_batch(self.forget_dataset, "forget_dataset", args.per_device_forget_batch_size)
            retain = self._first_batch(self.train_dataset, "train_dataset", max(num_retain, 1))
            return estimate_step(
                model,
                engine.per_sample_losses,
                engine.parameters,
                split_samples([forget], 2)[0].inputs,
                split_samples([retain], 2)[0].inputs,
                engine=engine.name,
                num_forget=args.per_device_forget_batch_size,
                num_retain=num_retain,
                chunk_size=args.retain_chunk_size,
                optimizer_bytes=optimizer_state_bytes(args.optim.value),
            )

    def _prepare_unlearning(self, model: nn.Module) -> None:
        """Chooses the engine and starts the forget stream."""
        self._engine = self._choose_engine(model)
        self._engine.exchange = Exchange(self.accelerator.num_processes, self.accelerator.process_index)
        self._check_agreement(self._engine.name)
        if self._correction is not None:
            self.remove_callback(self._correction)
            self._correction = None
        if self.args.projection_target == "update":
            self._correction = UpdateCorrection(
                self._engine.parameters, equality=self.args.alpha == 0, metrics=self._metrics
            )
            self.add_callback(self._correction)
        self._forget_batches = self._start_forget_stream()

    def _check_agreement(self, engine: str) -> None:
        engines = gather_object([engine])
        if len(set(engines)) > 1:
            raise ValueError(
                f"The processes would use different gradient engines ({', '.join(engines)}): the first samples of one did "
                "not pass the check that others passed. Set `gradient_engine` to 'loop'."
            )

    def _choose_engine(self, model: nn.Module) -> GradientEngine:
        """Checks the model and a few samples, and finds the engine that follows it."""
        args, plain_model, scaler = self.args, self.accelerator.unwrap_model(self.model), self.accelerator.scaler
        parameters = validation.find_parameters(plain_model, args)
        base_model = plain_model.get_base_model() if isinstance(plain_model, PeftModel) else plain_model
        self._per_sample_loss = PerSampleLoss(base_model, self._per_sample_loss_func)
        model.train()
        self._freeze_batch_norm(model)
        validation.check_batch_norm(plain_model)
        for dataset, what in ((self.forget_dataset, "forget_dataset"), (self.train_dataset, "train_dataset")):
            validation.check_label_column(dataset, what, self._per_sample_loss.shifts_labels)
        with preserved_random_state():
            forget = self._first_batch(self.forget_dataset, "forget_dataset", 2)
            retain = self._first_batch(self.train_dataset, "train_dataset", 2)
            sample = self._first_batch(self.forget_dataset, "forget_dataset", 1)
            validation.check_losses(self._per_sample_loss, plain_model, forget, sample)
            if is_sharded(plain_model):
                parameters = unshard(plain_model, parameters)
            if args.projection == "none":
                return PlainEngine(parameters, self._per_sample_loss)
            if args.projection == "mean":
                return MeanEngine(parameters, self._per_sample_loss)
            return choose_engine(
                args.gradient_engine,
                parameters,
                self._per_sample_loss,
                plain_model,
                forget,
                retain,
                keeps=args.projection_scope == "per_tensor" or args.projection_target == "update",
                chunk_size=args.func_chunk_size,
                retain_chunk_size=args.retain_chunk_size,
                dtype=torch.bfloat16 if args.bf16 else torch.float16 if scaler else torch.float32,
                loss_scale=scaler.get_scale() if scaler else 1.0,
            )

    def _first_batch(self, dataset, what: str, count: int) -> dict:
        indexed, collator = self._indexed(dataset, what)
        if hasattr(dataset, "__len__"):
            examples = [indexed[row] for row in range(min(count, len(indexed)))]
        else:
            examples = list(enumerate(islice(dataset, count)))
        batch = self._prepare_inputs(collator(examples))
        del batch[SAMPLE_INDEX]
        rows = [row for row, _ in examples]
        shifted = self._per_sample_loss.shifts_labels
        validation.check_labels(batch.get("labels"), what=what, shifted=shifted, sample_indices=rows)
        return dict(batch)

    def _check_finite(self, step: StepGradients, forget_rows: list[Tensor], retain_rows: list[Tensor | None]) -> None:
        for what, losses, rows in (
            ("forget_dataset", step.forget_losses, forget_rows),
            ("train_dataset", step.retain_losses, retain_rows),
        ):
            bad = ~torch.isfinite(losses)
            if bad.any():
                known = rows and all(row is not None for row in rows)
                listed = ", ".join(str(row) for row in torch.cat(rows)[bad].tolist()) if known else "unknown"
                raise FloatingPointError(
                    f"The loss at step {self.state.global_step + 1} is not finite for rows {listed} of `{what}`. No "
                    f"update was made; checkpoints saved so far in {self.args.output_dir!r} are intact. Lower the "
                    "learning rate, set forget_loss='npo', or look at these samples."
                )
        # an overflow that a smaller scale may avoid passes: the scaler will find it, skip the step and back off
        if step.grams and not torch.isfinite(step.gram).all() and self._engine.loss_scale <= 1:
            raise FloatingPointError(
                f"A gradient at step {self.state.global_step + 1} is not finite, though all losses are. No update was "
                f"made; checkpoints saved so far in {self.args.output_dir!r} are intact."
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

    # ---- What is saved ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; a LoRA model is merged first, unless this is a checkpoint or `merge_adapter` is False.

        Under FSDP the adapter is saved as it is, with a warning.
        """
        final = self._publishing or not _internal_call
        merge = self.forget_dataset is not None and self.args.merge_adapter and isinstance(self.model, PeftModel)
        if final and merge and self.is_fsdp_enabled:
            logger.warning(
                "A sharded LoRA model cannot be merged here: saving the adapter alone, without which the model remembers. "
                "Before it is published, load it with `AutoPeftModel...from_pretrained` in one process, call "
                "`merge_and_unload()` and save the result."
            )
        elif final and merge:
            merged = copy.deepcopy(self.model).merge_and_unload(safe_merge=True)
            with self._replaced("model", merged):
                return super().save_model(output_dir, _internal_call)
        super().save_model(output_dir, _internal_call)

    def push_to_hub(self, *args, **kwargs):
        """As in Trainer, with the model that `save_model()` writes."""
        with self._replaced("_publishing", True):
            return super().push_to_hub(*args, **kwargs)


def _empty_window() -> PairedBatches:
    return PairedBatches(forget=[], retain=[])


def as_config(args: TrainingArguments | None) -> OrthoGradConfig:
    """Takes plain `TrainingArguments` over into an [`OrthoGradConfig`], whose own fields get their defaults."""
    if isinstance(args, OrthoGradConfig):
        return args
    if args is None:
        return OrthoGradConfig(output_dir="tmp_trainer")
    return OrthoGradConfig(**{f.name: getattr(args, f.name) for f in fields(args) if f.init})
