"""Which engine a run uses: found by trying it on a few samples, and said in the log."""

import torch
from torch import nn
from transformers.utils import logging

from ..data import Batch
from ..objectives import PerSampleLosses
from ..parallel import Parameters
from ..trials import preserved_modes, preserved_random_state
from .base import ForgetBatch, GradientEngine, UnsupportedModelError
from .functional import FunctionalEngine
from .gram import GramEngine
from .loop import LoopEngine


logger = logging.get_logger(__name__)

# relative difference of inner products above which an engine counts as wrong for the model
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def choose_engine(
    requested: str,
    parameters: Parameters,
    losses: PerSampleLosses,
    model: nn.Module,
    forget: Batch,
    retain: Batch,
    *,
    needs_gradients: bool = False,
    chunk_size: int | None = None,
    retain_chunk_size: int | None = None,
    compute_dtype: torch.dtype = torch.float32,
    loss_scale: float = 1.0,
) -> GradientEngine:
    """Picks an engine and checks it on a few samples against one backward pass per sample.

    Args:
        requested (`str`): "auto", or the one engine to use.
        parameters ([`Parameters`]): What is trained and what is projected.
        losses (`Callable`): Per-sample losses of a batch.
        model (`torch.nn.Module`): The model in training mode, as the steps will run it.
        forget, retain ([`Batch`]): A few samples each.
        needs_gradients (`bool`): Whether the steps need the retain gradients themselves after the inner products.
        chunk_size (`int`, *optional*): Of the "func" engine.
        retain_chunk_size (`int`, *optional*): Of the "gram" engine.
        compute_dtype (`torch.dtype`): What autocast makes of the forward pass. The check is as strict as this and the
            parameters' own precision allow.
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
    builders = {
        "gram": lambda: GramEngine(parameters, losses, needs_gradients=needs_gradients, chunk_size=retain_chunk_size),
        "func": lambda: FunctionalEngine(parameters, losses, chunk_size),
        "loop": lambda: LoopEngine(parameters, losses),
    }
    dtypes = {compute_dtype, *(parameter.dtype for parameter in parameters.projected.values())}
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    for name in names:
        engine = builders[name]()
        try:
            check_engine(engine, model, forget, retain, tolerance, loss_scale)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (UnsupportedModelError, RuntimeError, AttributeError, TypeError) as error:
            # a call that an engine does not know how to follow, as a GRU's, fails somewhere within it; the loop follows all
            if name == "loop" or (name == names[-1] and isinstance(error, UnsupportedModelError)):
                raise
            said = str(error) if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: {error}"
            if name == names[-1]:
                raise UnsupportedModelError(
                    f"The gradient engine {name!r} cannot follow {type(model).__name__} ({said}). Set `gradient_engine` to 'loop'."
                ) from error
            logger.warning(f"Not using the gradient engine {name!r}: {said}")
            continue
        break
    logger.info(f"Using the gradient engine {engine.name!r}: it agrees with one backward pass per sample.")
    return engine


def check_engine(
    engine: GradientEngine, model: nn.Module, forget: Batch, retain: Batch, tolerance: float, loss_scale: float = 1.0
) -> None:
    """Compares an engine's inner products with those of plain backward passes, parameter by parameter.

    Raises:
        UnsupportedModelError: They differ; the message names the parameters.
    """
    if engine.name == "loop":
        return
    reference = LoopEngine(engine.parameters, engine.per_sample_losses)
    batches = [ForgetBatch(forget.inputs, forget.size)], [retain]
    with preserved_modes(model):
        if engine.name == "func":
            # what a model does in training alone, as dropping whole layers, may be nothing that torch.func can follow
            with preserved_random_state():
                engine.measure(model, *batches, loss_scale=loss_scale)
            # it draws its own random numbers for each sample: only without any can the two agree
            model.eval()
        with preserved_random_state():
            grams = engine.measure(model, *batches, loss_scale=loss_scale, per_parameter=True).grams
        with preserved_random_state():
            expected = reference.measure(model, *batches, loss_scale=loss_scale, per_parameter=True).grams
    if loss_scale > 1 and not all(torch.isfinite(gram).all() for gram in expected.values()):
        # as a gradient scaler does at an overflow
        return check_engine(engine, model, forget, retain, tolerance, loss_scale / 2)
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
            f"{listed}. {_way_out(wrong)}"
        )


def _way_out(wrong: list[str]) -> str:
    if any(".experts." in name for name in wrong):
        return (
            "Its experts sort the tokens of all samples together. `model.set_experts_implementation('batched_mm')` keeps each "
            "sample's apart; large experts are better not trained, as by LoRA on attention; or set `gradient_engine` to 'loop'."
        )
    return "Set `gradient_engine` to 'loop'."
