"""Which engine a run uses: found by trying it on a few samples, and said in the log."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers.utils import logging

from .base import ForgetBatch, GradientEngine, Parameters, PerSampleLosses, UnsupportedModelError
from .functional import FunctionalEngine
from .gram import GramEngine
from .loop import LoopEngine
from .randomness import preserved_random_state


logger = logging.get_logger(__name__)

# relative difference of inner products above which an engine counts as wrong for the model
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def make_engine(
    name: str,
    parameters: Parameters,
    losses: PerSampleLosses,
    *,
    keeps: bool = False,
    chunk_size: int | None = None,
    retain_chunk_size: int | None = None,
) -> GradientEngine:
    """Builds the engine called "gram", "func" or "loop"."""
    if name == "func":
        return FunctionalEngine(parameters, losses, chunk_size)
    if name == "gram":
        return GramEngine(parameters, losses, keeps=keeps, chunk_size=retain_chunk_size)
    return LoopEngine(parameters, losses)


def choose_engine(
    requested: str,
    parameters: Parameters,
    losses: PerSampleLosses,
    model: nn.Module,
    forget: Mapping,
    retain: Mapping,
    *,
    keeps: bool = False,
    chunk_size: int | None = None,
    retain_chunk_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    loss_scale: float = 1.0,
) -> GradientEngine:
    """Picks an engine and checks it on a few samples against one backward pass per sample.

    Args:
        requested (`str`): "auto", or the one engine to use.
        parameters ([`Parameters`]): What is trained and what is projected.
        losses (`Callable`): Per-sample losses of a batch.
        model (`torch.nn.Module`): The model in training mode.
        forget, retain (`Mapping`): Inputs of a few samples each, with labels.
        keeps (`bool`): Whether the step's retain gradients will be needed after the inner products.
        chunk_size (`int`, *optional*): Of the "func" engine.
        retain_chunk_size (`int`, *optional*): Of the "gram" engine.
        dtype (`torch.dtype`): Precision of the forward pass.
        loss_scale (`float`): What losses are multiplied by before they go backward.

    Returns:
        [`GradientEngine`]. "auto" falls back from "gram" to "func" to "loop", with a warning that says why.

    Raises:
        UnsupportedModelError: The requested engine cannot follow the model or finds other inner products.
    """
    if requested == "auto":
        # the others would hold every retain gradient, which chunks were asked for to avoid
        names = ("gram", "func", "loop") if retain_chunk_size is None else ("gram",)
    else:
        names = (requested,)
    for name in names:
        engine = make_engine(
            name,
            parameters,
            losses,
            keeps=keeps,
            chunk_size=chunk_size,
            retain_chunk_size=retain_chunk_size,
        )
        engine.loss_scale = loss_scale
        try:
            check_engine(engine, model, forget, retain, TOLERANCE[dtype])
        except UnsupportedModelError as error:
            if name == names[-1]:
                raise
            logger.warning(f"Not using the gradient engine {name!r}: {error}")
            continue
        if requested == "auto":
            logger.info(f"Using the gradient engine {name!r}: it agrees with one backward pass per sample.")
        return engine
    raise AssertionError("unreachable: the last engine is returned or raises")


def check_engine(engine: GradientEngine, model: nn.Module, forget: Mapping, retain: Mapping, tolerance: float) -> None:
    """Compares an engine's inner products with those of plain backward passes, parameter by parameter.

    Raises:
        UnsupportedModelError: They differ; the message names the parameters.
    """
    if engine.name == "loop":
        return
    reference = LoopEngine(engine.parameters, engine.per_sample_losses)
    reference.loss_scale = engine.loss_scale
    with preserved_modes(model):
        if (
            engine.name == "func"
        ):  # it draws its own random numbers for each sample: only without any can the two agree
            model.eval()
        with preserved_random_state():
            grams = engine.measure(model, [ForgetBatch(forget)], [retain]).grams
        with preserved_random_state():
            expected = reference.measure(model, [ForgetBatch(forget)], [retain]).grams
    if engine.loss_scale > 1 and not all(torch.isfinite(gram).all() for gram in expected.values()):
        engine.loss_scale /= 2  # as a gradient scaler does at an overflow; the step will set its own
        return check_engine(engine, model, forget, retain, tolerance)
    scale = max(gram.abs().max().item() for gram in expected.values())
    wrong = [
        name
        for name, gram in expected.items()
        if not (grams[name] - gram).abs().max() <= tolerance * gram.abs().max() + 1e-6 * scale
    ]
    if wrong:
        listed = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UnsupportedModelError(
            f"The gradient engine {engine.name!r} finds other inner products than one backward pass per sample for "
            f"{listed}. Set `gradient_engine` to 'loop'."
        )


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Leaves every module in training or evaluation mode as it was, also where they differ within the model."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
