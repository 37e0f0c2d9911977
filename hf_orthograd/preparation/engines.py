"""What a run needs before its first step: its engine, after a look at the first samples of both sets, and its retain term."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.utils import logging

from .. import callbacks, validation
from ..data import ChangingCollator
from ..gradients import GradientEngine, MeanEngine, PlainEngine, choose_engine
from ..parallel.sharding import is_sharded, unshard
from ..trials import preserved_random_state
from .starting_model import KeepPredictions, ReferenceModel, StartingModel
from .stored_predictions import StoredPredictions


if TYPE_CHECKING:
    from ..trainer import OrthoGradTrainer

logger = logging.get_logger(__name__)

_READ_AGAIN = 64  # retain samples whose stored predictions are compared with new ones


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
        validation.check_labels_stay(args.forget_loss, *batches["forget_dataset"][:2])
        if args.forget_loss == "refusal":
            validation.check_prompts(trainer.forget_dataset, trainer.per_sample_loss)
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


def collator_of(trainer: "OrthoGradTrainer", name: str) -> Callable:
    """What makes batches of "forget_dataset" or "train_dataset" for the steps; under "refusal" forget samples get that answer."""
    is_forgotten = name == "forget_dataset" or not trainer.has_retain
    if trainer.args.forget_loss != "refusal" or not is_forgotten:
        return trainer.data_collator
    return ChangingCollator(trainer.data_collator, trainer.per_sample_loss.answering(trainer.args.refusal_labels))


def prepare_retain_term(trainer: "OrthoGradTrainer", start: StartingModel | None) -> KeepPredictions | None:
    """Keeps the model that a run starts from, or takes the one given, for `retain_loss="kl"`; `None` under "nll".

    Args:
        trainer ([`OrthoGradTrainer`]): With its model ready for the first step.
        start ([`StartingModel`], *optional*): The model as it was before a checkpoint was loaded, if one was.

    Raises:
        ValueError: A run goes on whose starting model is gone, or another than it was; or predictions cannot be found once for
            all steps.
    """
    if not trainer.args.keeps_predictions:
        return None
    place = None if trainer.ref_model is None else next(trainer.ref_model.parameters()).device
    if trainer.ref_model is not None:
        start = ReferenceModel(trainer.ref_model, trainer.args.device, trainer.accelerator.autocast)
    if start is None and trainer.state.global_step > 0:
        raise ValueError(
            "retain_loss='kl' needs the model that the run started from, which is gone when DeepSpeed loads a checkpoint. Start "
            "from the beginning, resume without DeepSpeed, or set retain_loss='nll'."
        )
    if start is None:
        start = StartingModel(trainer.accelerator.unwrap_model(trainer.model))
    fingerprint = callbacks.find_callback(trainer.callback_handler, callbacks.StartingFingerprint)
    argument = "model" if trainer.ref_model is None else "ref_model"
    fingerprint.begin_run(trainer.state, start.fingerprint(trainer.group), argument)
    if not trainer.args.precompute_ref_logits:
        return KeepPredictions(start, trainer.per_sample_loss)
    validation.check_precomputed(trainer.args, trainer.per_sample_loss, trainer.train_dataset)
    with preserved_random_state(), trainer.compute_loss_context_manager():
        stored = _store_predictions(trainer, start)
        _check_stored(trainer, start, stored)
    if place is not None:
        trainer.ref_model.to(place)
    return KeepPredictions(stored, trainer.per_sample_loss)


def _store_predictions(trainer: "OrthoGradTrainer", start: StartingModel) -> StoredPredictions:
    """Each process runs the starting model on its part of the retain set."""
    args, group, rows = trainer.args, trainer.group, range(len(trainer.train_dataset))
    read = trainer.state.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if read < len(rows) and trainer.is_world_process_zero():
        logger.warning(
            f"`precompute_ref_logits` runs the starting model on all {len(rows)} retain samples, but the steps read {read} at "
            "most: without it the run is faster."
        )
    size = args.per_device_eval_batch_size
    batches = [rows[first : first + size] for first in rows[::size]]
    own = batches[group.process_index :: group.num_processes]
    # the forward passes of a sharded model are made by all processes together
    own += batches[:1] * (-(-len(batches) // group.num_processes) - len(own))
    source = trainer.batches_of("train_dataset", own)
    answer = partial(start.outputs, trainer.per_sample_loss)
    return StoredPredictions.find(answer, trainer.per_sample_loss, source, len(rows), group)


def _check_stored(trainer: "OrthoGradTrainer", start: StartingModel, stored: StoredPredictions) -> None:
    """Reads some of the retain samples again, in other batches.

    Raises:
        ValueError: The starting model then answers otherwise.
    """
    args, generator = trainer.args, torch.Generator().manual_seed(trainer.args.seed)
    some = torch.randperm(len(trainer.train_dataset), generator=generator)[:_READ_AGAIN].tolist()
    apart, largest = [], []
    for batch in trainer.batches_of("train_dataset", [some[first : first + 7] for first in range(0, len(some), 7)]):
        answers = (one.outputs(trainer.per_sample_loss, batch) for one in (stored, start))
        once, again = (trainer.per_sample_loss.counted_logits(one, batch.inputs)[0].float() for one in answers)
        apart.append((once - again).abs().max())
        largest.append(again.abs().max())
    found = (torch.stack(apart).max() / torch.stack(largest).max().clamp(min=1e-6)).item()
    is_half = args.bf16 or args.fp16 or next(trainer.model.parameters()).dtype != torch.float32
    differs = not found <= (5e-2 if is_half else 5e-3)
    agreed = trainer.group.all_equal(differs)  # all processes ask, whatever they found
    if differs or not agreed:
        raise ValueError(
            f"`precompute_ref_logits` is True, but the starting model answers otherwise when rows of `train_dataset` are read again in other "
            f"batches: its logits differ by {found:.2g} of the largest. The rows vary, or padding or masks change what it "
            "answers. Leave `precompute_ref_logits` out, or change that."
        )
