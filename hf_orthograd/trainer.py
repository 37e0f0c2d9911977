"""[`OrthoGradTrainer`]: transformers' Trainer with a forget set."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_utils import TrainOutput

from . import callbacks as watching
from . import checkpoints, evaluation, parallel, preparation, publishing, trials, validation, verbosity
from .annotations import AnyDataset, EvalDatasets, NumItems, Processor, TrainDataset
from .any_arguments import AnyArgumentsTrainer, forgetting_alone, with_unlearning
from .config import OrthoGradConfig
from .data import Batch, ForgetStream, PairedBatches, RowSource, fill_last_batch, load_batches
from .gradients import ForgetBatch, GradientEngine, check_finite, mean_retain_term, summarize_step, value_of
from .objectives import PerSampleLoss
from .projection import solve_projections, update_weights


class OrthoGradTrainer(AnyArgumentsTrainer):
    """Trainer that makes a model forget `forget_dataset` while it keeps learning from `train_dataset`.

    Each step ascends the forget gradient after projecting it onto the orthogonal complement of the gradients of the
    step's retain samples, and descends their mean (arXiv 2503.02312). An epoch is one of the retain set; the forget set is
    cycled. Without `forget_dataset` it is Trainer.

    A method of your own overrides [`unlearning_loss`], which says what a step descends, and where it needs them
    [`begin_unlearning`] and [`make_gradient_engine`].

    Args:
        model, args, data_collator, train_dataset, ...: As in [`~transformers.Seq2SeqTrainer`]. `train_dataset` is the
            retain set. `args` may be any `TrainingArguments`; with a forget set the trainer works on a copy that has the
            fields of [`OrthoGradConfig`] beside its own. `compute_loss_func`, where the model's own loss is not known per
            sample, must return shape (batch size,).
        forget_dataset (`torch.utils.data.Dataset`, *optional*): What to forget, with the columns of `train_dataset`.
        ref_model (`torch.nn.Module`, *optional*): Whose predictions `retain_loss="kl"` holds to; by default the model at the start.
        compute_divergence_func (`Callable`, *optional*): Beside it for `retain_loss="kl"`: of outputs, the start's, labels: (batch size,).

    Attributes:
        per_sample_loss ([`PerSampleLoss`]): The losses of a batch's samples; there is one with a forget set.
        retain_term (`RetainTerm`, *optional*): While it trains under `retain_loss="kl"`, what is descended on retain samples.
        group ([`ProcessGroup`]): The processes of the run.
        origin (`Origin`): Where the model came from, for the record of the request.
        gradient_engine ([`GradientEngine`], *optional*): While it trains, where inner products come from.

    Raises:
        ValueError: Bad input, before the first step; the message names the argument and what to do.
        FloatingPointError: A loss that is not finite, from `train()`, naming the step and the samples.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: TrainDataset | None = None,
        eval_dataset: EvalDatasets | None = None,
        processing_class: Processor | None = None,
        model_init: Callable[[], nn.Module] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        *,
        forget_dataset: AnyDataset | None = None,
        ref_model: nn.Module | None = None,
        compute_divergence_func: Callable | None = None,
    ):
        args = OrthoGradConfig(output_dir="tmp_trainer") if args is None else args
        unlearns = forget_dataset is not None
        if unlearns:
            args = with_unlearning(args)
            validation.check_arguments(args)
            validation.check_datasets(args, forget_dataset, train_dataset)
        publishing.check_access(args, unlearns)
        if isinstance(args, OrthoGradConfig):
            watching.check_stopping(args, forget_dataset, eval_dataset, compute_metrics)
            args = watching.keep_best_model(args)
        self.forget_dataset, self.has_retain = forget_dataset, not validation.is_empty(train_dataset)
        # kept from Trainer, which would take its loss as already scaled for accumulation
        self.per_sample_loss_func = compute_loss_func if unlearns else None
        self.divergence_func, self.ref_model, self.retain_term = compute_divergence_func, ref_model, None
        if unlearns and not self.has_retain:
            train_dataset, args = forget_dataset, forgetting_alone(args)
        given = model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init
        given += None if unlearns else compute_loss_func, compute_metrics, callbacks, optimizers
        # past Seq2SeqTrainer's own constructor, which knows no `optimizer_cls_and_kwargs` and no arguments but its own
        super(Seq2SeqTrainer, self).__init__(*given, optimizer_cls_and_kwargs, preprocess_logits_for_metrics)
        if isinstance(args, Seq2SeqTrainingArguments) and args.generation_config is not None:
            self.model.generation_config = self.load_generation_config(args.generation_config)
        self.group = parallel.ProcessGroup(self.accelerator.num_processes, self.accelerator.process_index)
        self.gradient_engine: GradientEngine | None = None
        self._forget_stream: ForgetStream | None = None
        self._start: preparation.StartingModel | None = None  # as it was before a checkpoint was loaded
        self._observers, self._window, self._loading = [], PairedBatches(), checkpoints.CompleteLoading()
        self._recorded: dict[str, list[float]] = defaultdict(list)
        if unlearns:
            self._set_up_unlearning()

    def _set_up_unlearning(self) -> None:
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        verbosity.follow(args.get_process_log_level())
        validation.check_launch(args, self.accelerator.state, model)
        validation.find_parameters(model, args)
        self.per_sample_loss = PerSampleLoss(model, self.per_sample_loss_func, self.divergence_func)
        validation.check_objectives(args, self.per_sample_loss, self.ref_model, model, self.train_dataset)
        validation.check_tokens({name: getattr(self, name) for name in ("forget_dataset", "train_dataset")}, model)
        if args.check_overlap and self.has_retain and self.is_world_process_zero():
            validation.check_overlap(self.forget_dataset, self.train_dataset, self.per_sample_loss.model)
        self._observers = watching.set_callbacks(self)
        self.origin = publishing.Origin(model, args.hub_token, is_first=self.is_world_process_zero())

    # ---- Before the first step ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As [`~transformers.Trainer.train`]; `True` goes on from the last checkpoint that was saved to its end."""
        if self.forget_dataset is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoints.find_last_checkpoint(self.args.output_dir)
        self._observers = watching.set_callbacks(self)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._forget_stream = self._start = self.retain_term = None  # workers would go on, a copy stay

    def begin_unlearning(self) -> None:
        """Finds the engine and what steps are compared with; called when model and optimizer are ready for the first step."""
        self._window, self._recorded, model = PairedBatches(), defaultdict(list), self.model_wrapped
        args, handler, plain = self.args, self.callback_handler, self.accelerator.unwrap_model(self.model)
        self.per_sample_loss = PerSampleLoss(plain, self.per_sample_loss_func, self.divergence_func)
        self.retain_term = preparation.prepare_retain_term(self, self._start)
        self._start = self._start if args.auto_find_batch_size else None  # which begins again
        self._forget_stream = ForgetStream(self._source("forget_dataset"), args, self._train_batch_size, self.group)
        if self.is_world_process_zero() and self.has_retain:
            validation.check_steps(self.args, self._train_batch_size, self.train_dataset)
        with self.compute_loss_context_manager():
            self.gradient_engine = self.make_gradient_engine(model)
            watching.begin_run(self, model, self._observers)
        if (rule := watching.find_callback(handler, watching.StoppingRule)) is not None:
            save = partial(self._save_checkpoint, self.model, trial=None)
            rule.begin_run(args, self.state, evaluate=self.evaluate, save=save)
        self._forget_stream.start(self.state.global_step, handler.train_dataloader, args.gradient_accumulation_steps)

    def make_gradient_engine(self, model: nn.Module) -> GradientEngine:
        """Looks at the first samples of both sets and finds the engine that follows the model, as the steps run it."""
        return preparation.prepare_engine(self, self._step_model(model))

    def estimate(self) -> preparation.Estimate:
        """Counts what a step will take, without making one: parameters under the projection, rules, memory, time."""
        return preparation.estimate_run(self)

    # ---- The two streams ----

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The retain stream, as in Trainer; with a forget set its batches carry row numbers, and each step is full."""
        if self.forget_dataset is None:
            return super().get_train_dataloader()
        source = self._source("train_dataset")
        with trials.replaced(self, "data_collator", source.collator):
            if not source.is_indexed:
                return super().get_train_dataloader()
            size = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            return self._get_dataloader(
                dataset=source.dataset,
                description="Training",
                batch_size=self._train_batch_size,
                sampler_fn=lambda rows: fill_last_batch(self._get_train_sampler(self.train_dataset), len(rows), size),
                is_training=True,
            )

    def batches_of(self, name: str, numbers: Sequence[Sequence[int]] | None = None) -> Iterator[Batch]:
        """Batches of "forget_dataset" or "train_dataset" on the device: of rows of these numbers, or all once, in order."""
        for inputs in load_batches(self._source(name), self.args, numbers):
            yield Batch.of(self._prepare_inputs(inputs))

    def first_batch(self, name: str, count: int, start: int = 0) -> Batch:
        """`count` rows from the beginning of "forget_dataset" or "train_dataset", as the steps will see them."""
        return Batch.of(self._prepare_inputs(self._source(name).first(count, start)))

    def _source(self, name: str) -> RowSource:
        """One of the two sets with its collator, as Trainer would use them, and with row numbers."""
        dataset, collator = getattr(self, name), preparation.collator_of(self, name)
        if isinstance(dataset, Dataset):
            return RowSource(self._remove_unused_columns(dataset, name), collator, name)
        return RowSource(dataset, self._get_collator_with_removed_columns(collator, name), name)

    # ---- The step: forward, inner products, k numbers, one backward ----

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: NumItems = None) -> Tensor:
        if self.forget_dataset is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._forget_stream is None:
            raise RuntimeError("An unlearning step rests on what `train()` prepares: call `train()`.")
        self._window["forget"].append(self._forget_stream.next_batch() if self.has_retain else {**inputs})
        self._window["retain"] += [{**inputs}] if self.has_retain else []
        if self.args.projection != "none" and not self.accelerator.sync_gradients:
            # one projection against the retain samples of all micro-batches, when the last has come
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, PairedBatches()
        try:
            # a mean over samples, not over tokens: the number of tokens would be that of the retain batch alone
            return super().training_step(model, window, None)
        except FloatingPointError as error:
            watching.stop_or_raise(error, self)
            return torch.zeros((), device=self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: NumItems = None
    ) -> Tensor | tuple[Tensor, Any]:
        if isinstance(inputs, PairedBatches):
            if self.args.freeze_batch_norm:
                validation.freeze_batch_norm(model)
            loss = self.unlearning_loss(model, *(list(map(Batch.of, inputs[name])) for name in ("forget", "retain")))
            # Trainer divides by the number of micro-batches, which is right where each adds its own part
            return loss if self.args.projection == "none" else loss * self.current_gradient_accumulation_steps
        if self.per_sample_loss_func is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses, outputs = self.per_sample_loss.with_outputs(model, inputs)
        return (losses.mean(), outputs) if return_outputs else losses.mean()

    def unlearning_loss(self, model: nn.Module, forget: list[Batch], retain: list[Batch]) -> Tensor:
        """What a step descends: a scalar whose gradient is the update, and whose value is for the log.

        Here the gradient is `alpha * mean_i g_i - (1 - alpha) * g_perp` (arXiv 2503.02312, equation 5), the mean's place taken
        by that of [`retain_term`] if there is one, and the value GradDiff's loss. A method of your own returns what it descends, and calls [`record`] for its quantities.

        Args:
            model (`torch.nn.Module`): In training mode, wrapped as the launch has it.
            forget, retain (`list[Batch]`): This process' samples: of all micro-batches with a projection, else of one. `retain` may be empty.
        """
        args, scaler = self.args, self.accelerator.scaler if self.args.projection != "none" else None
        loss_scale = 1.0 if scaler is None else scaler.get_scale()
        objectives = watching.objectives_of(forget, args, self.callback_handler)
        ascended = [ForgetBatch(b.inputs, b.size, o.slopes) for b, o in zip(forget, objectives, strict=True)]
        model, observers = self._step_model(model), [o for o in self._observers if o.watches(self.state.global_step)]
        for observer in observers:
            observer.begin_step(model, retain)
        options = {"group": self.group, "loss_scale": loss_scale, "keep_gradients": bool(observers)}
        options |= {"per_parameter": args.projection_scope == "per_tensor", "retain_term": self.retain_term}
        step = self.gradient_engine.measure(model, ascended, retain, **options)
        summary = summarize_step(step)
        check_finite(step, summary, forget, retain, can_back_off=loss_scale > 1)
        projection = solve_projections(summary.grams, **args.solver_settings) if summary.grams else None
        names, where = step.parameters.projected, {"device": args.device, "has_term": self.retain_term is not None}
        loss = step.combine(update_weights(args.alpha, projection, names, **where)) / loss_scale
        for observer in observers:
            observer.take_gradients(step)
        for name, value in {**summary.losses, **(projection.metrics if projection is not None else {})}.items():
            self.record(name, value)
        if self.retain_term is not None:
            self.record("retain_divergence", mean_retain_term(step, summary))
        # the value is for the log; the gradient is that of the combination
        return loss + value_of(step, forget, objectives, args.alpha)

    def _step_model(self, model: nn.Module) -> nn.Module:
        # DDP's wrapper waits for a backward pass through its last forward pass, DeepSpeed's takes any for the last
        return model if self.args.projection == "none" else self.accelerator.unwrap_model(model)

    # ---- What is reported ----

    def record(self, name: str, value: float) -> None:
        """Takes a quantity of this step; the log shows the mean since the last one."""
        self._recorded[name].append(value)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of what was recorded: forget_loss, retain_loss, kept_signal, projection_rank and others."""
        if "loss" in logs:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._recorded.items()}}
            self._recorded.clear()
        super().log(logs, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: EvalDatasets | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """As in Trainer; while training under a stopping rule, the forget set is evaluated too, and the rule judges."""
        metrics = self._parent.evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        rule = watching.find_callback(self.callback_handler, watching.StoppingRule)
        if rule is not None and self.is_in_train and eval_dataset is None and metric_key_prefix == "eval":
            again = partial(self._parent.evaluate, self.forget_dataset, ignore_keys, "eval_forget", **gen_kwargs)
            with trials.replaced(self.args, "dataloader_persistent_workers", False):  # else an earlier loader
                rule.take_evaluation(metrics, again, self.state, self.control)
        return metrics

    # ---- What is saved ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; a LoRA model is merged first, unless this is a checkpoint or `merge_adapter` is False.

        Under FSDP the adapter is saved as it is, with a warning. With a forget set, only [`push_to_hub`] pushes.
        """
        is_checkpoint = output_dir is not None and _internal_call
        if is_checkpoint and self.args.should_save:  # another process may be late, and take the new state for the old
            checkpoints.begin_checkpoint(output_dir)
        if self.forget_dataset is None or is_checkpoint:
            return super().save_model(output_dir, _internal_call)
        self.origin.before_save(output_dir or self.args.output_dir)
        if not checkpoints.merges(self.model, self.args, sharded=self.is_fsdp_enabled):
            super().save_model(output_dir, _internal_call=True)
        elif self.args.should_save:
            checkpoints.save_merged(self, output_dir or self.args.output_dir)

    def create_model_card(self, *args: Any, report: evaluation.UnlearningReport | None = None, **kwargs: Any) -> None:
        """As in Trainer; with a forget set all that may be published, in `output_dir/public`, its card from a `report`.
        `kwargs` are the fields of [`~hf_orthograd.publishing.CardOptions`].
        """
        if self.forget_dataset is None:
            return super().create_model_card(*args, **kwargs)
        publishing.prepare_folder(self, report=report, options=publishing.CardOptions(*args, **kwargs))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> CommitInfo:  # as Trainer has it, whose own is None too in all processes but one
        """As in Trainer; with a forget set pushes what [`create_model_card`] writes, given its arguments, and waits."""
        if self.forget_dataset is None:
            publishing.refuse_owner_files(self.args.output_dir)
            return super().push_to_hub(commit_message, blocking, token, revision, *args, **kwargs)
        return publishing.publish_trainer(self, commit_message, token, revision, *args, **kwargs)

    def _issue_warnings_after_load(self, load_result) -> None:
        if not self._loading.is_in_part(load_result, self.model):
            super()._issue_warnings_after_load(load_result)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.forget_dataset is not None and self.args.keeps_predictions:
            self._start = preparation.StartingModel(self.accelerator.unwrap_model(self.model))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._loading.complete(resume_from_checkpoint, model or self.model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._loading.complete(self.state.best_model_checkpoint, self.model)
