"""Whether the loss is one number for each sample, of that sample alone: found out on a few samples of both sets."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..data import Batch
from ..objectives import IGNORED_LABEL, PerSampleLoss
from ..trials import preserved_modes
from .samples import check_batch, check_label_column


def check_samples(per_sample_loss: PerSampleLoss, model: nn.Module, sets: Mapping[str, object], batches: dict) -> None:
    """Checks both sets' labels, and that the loss is one number for each sample, of that sample alone.

    Args:
        per_sample_loss ([`PerSampleLoss`]): What the run will use.
        model (`torch.nn.Module`): The model, unwrapped, in training mode.
        sets (`Mapping`): The data sets by the names of their arguments.
        batches (`dict[str, list[Batch]]`): For each, its first two rows as one batch, and then one by one.

    Raises:
        ValueError: The message names the argument, the rows and what to do.
    """
    for name, (pair, *_) in batches.items():
        check_batch(pair, name, per_sample_loss)
        check_label_column(sets[name], name, per_sample_loss)
    pair, *alone = batches["forget_dataset"]
    check_losses(per_sample_loss, model, pair, alone[0])
    with preserved_modes(model):
        model.eval()
        if not per_sample_loss.label_names:  # a loss of the user's own
            check_coupling(per_sample_loss, model, pair, _cut(pair) or alone)
        for name, (pair, *_) in batches.items() if per_sample_loss.shifts_labels else ():
            check_left_padding(per_sample_loss, model, pair, name)


def _cut(batch: Batch) -> list[Batch]:
    """The batch's own samples one by one, as a transform has varied them; none if its tensors do not run over samples."""
    tensors = {name: value for name, value in batch.inputs.items() if isinstance(value, Tensor)}
    if any(value.ndim == 0 or len(value) != batch.size for value in tensors.values()):
        return []
    parts = [{name: value[row : row + 1] for name, value in tensors.items()} for row in range(batch.size)]
    return [Batch({**batch.inputs, **part}, 1) for part in parts]


def check_left_padding(per_sample_loss: PerSampleLoss, model: nn.Module, batch: Batch, name: str) -> None:
    """Checks that padding on the left leaves a sample's loss alone.

    Args:
        per_sample_loss ([`PerSampleLoss`]): What the run will use.
        model (`torch.nn.Module`): In evaluation mode.
        batch ([`Batch`]): A few samples.
        name (`str`): Their data set's argument, in messages.

    Raises:
        ValueError: It does not: the model counts positions from the padding on.
    """
    mask, ids, apart = batch.inputs.get("attention_mask"), batch.inputs.get("input_ids"), []
    is_padded = (
        isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.shape == ids.shape and not mask[:, 0].all()
    )
    samples = _cut(batch) if is_padded else []
    for sample in samples:
        read = sample.inputs["attention_mask"][0].bool()
        of_tokens = {n: v for n, v in sample.inputs.items() if isinstance(v, Tensor) and v.shape[:2] == (1, len(read))}
        inputs = {**sample.inputs, **{n: value[:, read] for n, value in of_tokens.items()}}
        with torch.no_grad():
            apart.append(per_sample_loss(model, inputs)[0].float())
    if not samples:
        return
    with torch.no_grad():
        together = per_sample_loss(model, batch.inputs).float()
    is_half = next(model.parameters()).dtype != torch.float32
    for row, (padded, alone) in enumerate(zip(together, apart, strict=True)):
        if not torch.isclose(padded, alone, rtol=5e-2 if is_half else 2e-2, atol=1e-2 if is_half else 5e-3):
            raise ValueError(
                f"Row {batch.rows[row]} of `{name}` has the loss {padded.item():.4f} with padding on its left, and {alone.item():.4f} without: "
                f"{type(model).__name__} counts positions from the left, padding or not. Pad on the right: set the tokenizer's "
                "`padding_side` to 'right'."
            )


def check_labels_stay(forget_loss: str, pair: Batch, alone: Batch) -> None:
    """Checks that a row of the forget set has the same labels when it is read again, where a loss is compared with an earlier one.

    Args:
        forget_loss (`str`): That of the arguments.
        pair, alone ([`Batch`]): The first rows, and the first by itself.

    Raises:
        ValueError: It has others.
    """
    first, again = (batch.inputs.get("labels") for batch in (pair, alone))
    if forget_loss != "npo" or not isinstance(first, Tensor) or first.ndim != 2 or first.is_floating_point():
        return
    first, again = (labels[0][labels[0] != IGNORED_LABEL] for labels in (first, again))
    if not torch.equal(first, again):
        raise ValueError(
            "Row 0 of `forget_dataset` has other labels when it is read again: the collator masks other tokens. forget_loss='npo' "
            "compares a row's loss with that of the starting model, so mask once, by `map`, or set forget_loss='ascent'."
        )


def check_losses(per_sample_loss: PerSampleLoss, model: nn.Module, batch: Batch, sample: Batch) -> None:
    """Checks that the loss is per sample, and that for a single sample it is the loss the model itself computes.

    Args:
        per_sample_loss ([`PerSampleLoss`]): What the run will use.
        model (`torch.nn.Module`): The model.
        batch, sample ([`Batch`]): A few samples, and one.

    Raises:
        ValueError: The message says what was found.
    """
    with torch.no_grad():
        check_per_sample(per_sample_loss(model, batch.inputs), batch.size)
        losses, outputs = per_sample_loss.with_outputs(model, sample.inputs, own_loss=True)
    own = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if own is not None and outputs.get("aux_loss") is not None:
        raise ValueError(
            f"{type(model).__name__} adds a loss that balances its experts (`aux_loss`), which the per-sample loss leaves out. Set its "
            "`config.output_router_logits` to False, or pass a `compute_loss_func` that returns shape (batch size,)."
        )
    if own is not None and own.isnan() and losses[0] == 0:
        return  # of a question whose answer was cut off nothing counts
    if own is not None and not torch.isclose(own.float(), losses[0].float(), rtol=1e-2, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"{type(model).__name__} computes the loss {own.item():.4f} for a sample whose per-sample loss is "
            f"{losses[0].item():.4f}: it has terms of its own. Pass a `compute_loss_func` that returns shape (batch size,)."
        )


def check_per_sample(losses: object, batch_size: int) -> None:
    """Raises `ValueError` unless `losses` is one number for each sample."""
    if not isinstance(losses, Tensor) or losses.shape != (batch_size,):
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(
            f"The loss must be one number for each sample, shape ({batch_size},), but `compute_loss_func` returned "
            f'{found}: use reduction="none" and take the mean over each sample\'s own tokens. (A collator that joins samples '
            "into one row, padding-free, leaves no batch of samples: use one that pads.)"
        )


def check_coupling(per_sample_loss: PerSampleLoss, model: nn.Module, batch: Batch, alone: list[Batch]) -> None:
    """Checks that the loss of a sample does not depend on the others of its batch, as an in-batch contrastive loss does.

    Args:
        per_sample_loss ([`PerSampleLoss`]): What the run will use.
        model (`torch.nn.Module`): The model, whose modules are put into evaluation mode and back by the caller.
        batch ([`Batch`]): A few samples.
        alone (`list[Batch]`): The same, one by one.

    Raises:
        ValueError: They differ by more than padding and rounding make them.
    """
    with torch.no_grad():
        together = per_sample_loss(model, batch.inputs).float()
        apart = torch.cat([per_sample_loss(model, one.inputs).float() for one in alone])
    close = torch.isclose(together, apart, rtol=5e-2, atol=1e-2, equal_nan=True)
    if not close.all():
        sample = int((~close).nonzero()[0])
        raise ValueError(
            f"The loss of a sample depends on the others of its batch: {together[sample].item():.4f} among {batch.size} samples, "
            f"{apart[sample].item():.4f} alone. Such a loss (contrastive, or with statistics of the batch) has no gradient of a "
            "single sample to protect. Pass a `compute_loss_func` in which each sample stands alone, as "
            "`hf_orthograd.objectives.FixedNegatives`."
        )
