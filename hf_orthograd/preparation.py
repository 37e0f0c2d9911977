"""What is found out before the first step: whether the data fit, which engine follows the model, what a step will take."""

from itertools import islice

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn

from . import validation
from .data import SAMPLE_INDEX
from .distributed import Exchange
from .estimate import Estimate, estimate_step, optimizer_state_bytes
from .gradients import (
    GradientEngine,
    MeanEngine,
    PlainEngine,
    choose_engine,
    preserved_modes,
    preserved_random_state,
    split_samples,
)
from .monitor import UnlearningMonitor
from .objectives import PerSampleLoss
from .sharding import is_sharded, unshard
from .update import UpdateCorrection


class Preparation:
    """What [`OrthoGradTrainer`] does once for a run; it expects to be mixed into a Trainer."""

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
        """Chooses the engine, sets up what watches the steps, and starts the forget stream."""
        self._engine = self._choose_engine(model)
        self._engine.exchange = Exchange(self.accelerator.num_processes, self.accelerator.process_index)
        self._check_agreement(self._engine.name)
        if self.is_world_process_zero() and self._has_retain:
            validation.warn_of_few_retain_samples(self.args, self._train_batch_size, self.train_dataset)
        for callback in (self._correction, self._monitor):
            if callback is not None:
                self.remove_callback(callback)
        self._correction = self._monitor = None
        if self.args.projection_target == "update":
            self._correction = UpdateCorrection(
                self._engine.parameters, equality=self.args.alpha == 0, metrics=self._metrics
            )
            self.add_callback(self._correction)
        steps = self.state.logging_steps if self.args.monitor_steps is None else self.args.monitor_steps
        if steps and self._has_retain:
            self._monitor = UnlearningMonitor(steps, self._metrics, self._engine.parameters, self._per_sample_loss)
            self.add_callback(self._monitor)
        self._begin_rule()
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
        self._per_sample_loss = PerSampleLoss(base_model, self.per_sample_loss_func)
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
