"""The same samples with another answer in place of their own: what `forget_loss="refusal"` teaches. Batches are on the host."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .families import IGNORED_LABEL


# of a token: what kind it is. Another answer is of the kind of the own one: PaliGemma reads kind 0 in both directions
_KINDS = ("token_type_ids", "mm_token_type_ids")


def with_class(inputs: Mapping, answer: Tensor) -> dict:
    """Samples with the class `answer`, shape (1,), in place of theirs."""
    return {**inputs, "labels": answer.repeat(len(inputs["labels"]))}


def with_labels(inputs: Mapping, answer: Tensor) -> dict:
    """Samples with the labels `answer`, shape (R,), in place of theirs; a decoder's inputs are left to be made of them."""
    kept = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    return {**kept, "labels": answer.repeat(len(inputs["labels"]), 1)}


def after_prompts(inputs: Mapping, answer: Tensor) -> dict:
    """Samples whose prompts, up to the first label that counts, are followed by the tokens `answer`, shape (R,), and by padding.

    Args:
        inputs (`Mapping`): With `input_ids` and `labels` (B, T), padded on either side. What else is not of tokens stays.

    Raises:
        ValueError: A sample has no prompt, no answer, or several; or the batch says something of each token that cannot be
            carried over.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    _check_carried(inputs, mask)
    counted, columns = labels != IGNORED_LABEL, torch.arange(ids.shape[1])
    starts = counted.int().argmax(dim=1, keepdim=True)
    has_prompt = ((columns < starts) & (mask > 0)).any(dim=1)
    pieces = counted[:, 0].int() + (counted[:, 1:] & ~counted[:, :-1]).sum(dim=1)
    for sample in (~has_prompt | (pieces != 1)).nonzero().flatten().tolist():
        raise ValueError(
            f"forget_loss='refusal' answers a prompt, but sample {sample} of a batch of `forget_dataset` has labels in "
            f"{pieces[sample]} pieces, {'behind a prompt' if has_prompt[sample] else 'and no prompt before them'}. Its labels "
            "must be -100 for the prompt, and one answer after it."
        )
    within = torch.arange(starts.max() + len(answer)) - starts  # how far into the answer a column is
    is_prompt, is_answer = within < 0, (within >= 0) & (within < len(answer))
    answers = answer[within.clamp(0, len(answer) - 1)]

    def changed(values: Tensor, behind: Tensor | int) -> Tensor:
        room = within.shape[1] - values.shape[1]
        values = torch.nn.functional.pad(values, (0, room)) if room > 0 else values[:, :room] if room < 0 else values
        return torch.where(is_prompt, values, torch.as_tensor(behind, dtype=values.dtype))

    made = {"input_ids": changed(ids, answers), "attention_mask": changed(mask, is_answer.to(mask.dtype))}
    made |= {name: changed(inputs[name], inputs[name].gather(1, starts)) for name in _KINDS if name in inputs}
    made["labels"] = torch.where(is_answer, answers, IGNORED_LABEL)
    first = int(made["attention_mask"].any(dim=0).int().argmax())  # before it there is padding alone
    return {**inputs, **{name: values[:, first:] for name, values in made.items()}}


def _check_carried(inputs: Mapping, mask: Tensor) -> None:
    """Raises ValueError if something of each token is neither known nor a kind of token."""
    shape = inputs["input_ids"].shape
    others = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name not in _KINDS}
    unknown = {name for name, value in others.items() if value.shape[:2] == shape and name != "pixel_values"} - {
        "input_ids",
        "attention_mask",
        "labels",
    }
    of_positions = {name for name in others if "position_ids" in name or name == "cross_attention_mask"}
    unknown |= of_positions | ({"attention_mask"} if mask.shape != shape else set())
    if unknown:
        raise ValueError(
            f"forget_loss='refusal' puts other tokens in the place of answers, and cannot tell what "
            f"{', '.join(sorted(unknown))} in the batches of `forget_dataset` would be for them. Use a collator that leaves it to "
            "the model, or another `forget_loss`."
        )
