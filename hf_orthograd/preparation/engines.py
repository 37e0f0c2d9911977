"""What a run needs before its first step: its engine, after a look at the first samples of both sets, and its retain term."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import callbacks, validation
from ..gradients import GradientEngine, MeanEngine, PlainEngine, choose_engine
from ..parallel.sharding import is_sharded, unshard
from ..trials import preserved_random_state
from .starting_model import KeepPredictions, KeepStoredPredictions, ReferenceModel, StartingModel


if TYPE_CHECKING:
    from ..trainer import OrthoGradTrainer


def prepare_engine(trainer: "OrthoGradTrainer", model: nn.Module) -> GradientEngine:
    """Checks the model and a few samples, and finds the engine that follows it.

    Args:
        trainer ([`OrthoGradTrainer`]): With a forget set.
        model (`torch.nn.Module`): Its model as the steps will run it, wrapped or not; left in training mode.

    Raises:
        ValueError: The model or samples cannot be unlearned with; the message says why and what to do.
    """
    args, scaler = trainer.args, trainer.accelerator.scaler
    plain = trainer.accelerator.unwrap_model(trainer.model)
    model.train()
    if args.freeze_batch_norm:
        validation.freeze_batch_norm(plain)
    validation.check_batch_norm(plain)
    parameters = replace(validation.find_parameters(plain, args), averaged_later=trainer.is_deepspeed_enabled)
    if trainer.is_world_process_zero():
        validation.warn_of_half_precision(parameters)
    sets = {"forget_dataset": trainer.forget_dataset, "train_dataset": trainer.train_dataset}
    with preserved_random_state():
        batches = {name: [trainer.first_batch(name, *rows) for rows in ((2,), (1,), (1, 1))] for name in sets}
        validation.check_samples(trainer.per_sample_loss, plain, sets, batches)
        if is_sharded(plain):
            parameters = unshard(plain, parameters)
        if args.projection == "none":
            return PlainEngine(parameters, trainer.per_sample_loss)
        if args.projection == "mean":
            return MeanEngine(parameters, trainer.per_sample_loss)
        engine = choose_engine(
            args.gradient_engine,
            parameters,
            trainer.per_sample_loss,
            model,
            batches["forget_dataset"][0],
            batches["train_dataset"][0],
            needs_gradients=args.projection_scope == "per_tensor" or args.projection_target == "update",
            chunk_size=args.func_chunk_size,
            retain_chunk_size=args.retain_chunk_size,
            compute_dtype=torch.bfloat16 if args.bf16 else torch.float16 if scaler else torch.float32,
            loss_scale=scaler.get_scale() if scaler else 1.0,
        )
    if not trainer.group.all_equal(engine.name):
        raise ValueError(
            "The processes would use different gradient engines: the first samples of one did not pass the check that others "
            "passed. Set `gradient_engine` to 'loop'."
        )
    return engine


def prepare_retain_term(trainer: "OrthoGradTrainer", start: StartingModel | None) -> KeepPredictions | None:
    """Keeps the model that a run starts from, or takes the one given, for `retain_loss="kl"`; `None` under "nll".

    Args:
        trainer ([`OrthoGradTrainer`]): With its model ready for the first step.
        start ([`StartingModel`], *optional*): The model as it was before a checkpoint was loaded, if one was.

    Raises:
        ValueError: A run goes on whose starting model is gone, or another than it was; or predictions are to be found once for
            samples that vary.
    """
    if not trainer.args.keeps_predictions:
        return None
    if trainer.ref_model is not None:
        start = ReferenceModel(trainer.ref_model, trainer.args.device)
    if start is None and trainer.state.global_step > 0:
        raise ValueError(
            "retain_loss='kl' needs the model that the run started from, which is gone when DeepSpeed loads a checkpoint. Start "
            "from the beginning, resume without DeepSpeed, or set retain_loss='nll'."
        )
    if start is None:
        start = StartingModel(trainer.accelerator.unwrap_model(trainer.model))
    fingerprint = callbacks.find_callback(trainer.callback_handler, callbacks.StartingFingerprint)
    fingerprint.begin_run(trainer.state, start.fingerprint(trainer.group))
    if not trainer.args.precompute_ref_logits:
        return KeepPredictions(start, trainer.per_sample_loss)
    validation.check_samples_are_fixed(lambda: trainer.first_batch("train_dataset", trainer.args.train_batch_size))
    with trainer.compute_loss_context_manager():
        return KeepStoredPredictions(start, trainer.per_sample_loss, trainer.batches_in_order("train_dataset"))
