"""What a model says when it is asked."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    BlipForConditionalGeneration,
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerBase,
    Trainer,
)

from ...annotations import AnyDataset
from ...objectives import IGNORED_LABEL
from ...parallel.sharding import is_sharded
from ...trials import preserved_modes
from ..measure import trainers_precision


# what stands in a row and goes to `generate()`, or is not asked for there
_CARRIED = frozenset(
    {"input_ids", "attention_mask", "labels", "pixel_values", "decoder_input_ids", "decoder_attention_mask"}
)


def generate_answers(
    trainer: Trainer,
    dataset: AnyDataset,
    *,
    model: nn.Module | None = None,
    prompt_length: int | None = None,
    max_new_tokens: int = 64,
) -> list[str]:
    """What greedy decoding says to each prompt, in the order of the rows; the same on every process, which share the work.

    Args:
        trainer ([`~transformers.Trainer`]): Its `processing_class` is the tokenizer; its batch size is that of evaluation.
        dataset (`Dataset`): Rows as [`~hf_orthograd.data.prepare_text_dataset`] makes them, padded or not: a prompt is what
            stands before the first label that is not -100; for an encoder-decoder model all of `input_ids`. `pixel_values`
            go with it.
        model (`torch.nn.Module`, *optional*): In place of the trainer's; it is on its device meanwhile.
        prompt_length (`int`, *optional*): Tokens of a prompt from the beginning of the row, padding left out, instead.
        max_new_tokens (`int`): Most tokens of an answer.

    Raises:
        ValueError: There is no tokenizer, the model is sharded or has a `generate()` of its own, or a row has no prompt, or inputs
            that would be left out.
    """
    found = generate_tokens(trainer, dataset, model=model, prompt_length=prompt_length, max_new_tokens=max_new_tokens)
    return decode(trainer, found)


def generate_tokens(
    trainer: Trainer,
    dataset: AnyDataset,
    *,
    model: nn.Module | None = None,
    prompt_length: int | None = None,
    max_new_tokens: int = 64,
) -> list[list[int]]:
    """[`generate_answers`] before it is decoded."""
    tokenizer = tokenizer_of(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model) if model is None else model
    if is_sharded(model):
        raise ValueError(
            "A sharded model generates nothing here: load what `save_model()` wrote in one process, or under DDP."
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    _refuse_other_ways(base)
    _refuse_further_inputs(base, dataset[0])
    prompts = [_prompt_of(dataset[row], row, prompt_length, base.config) for row in range(len(dataset))]
    has_images = "pixel_values" in dataset[0]
    device, size, place = trainer.args.device, trainer.args.per_device_eval_batch_size, next(model.parameters()).device
    found = []
    quiet = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
    try:
        model.to(device)
        with trainer.accelerator.split_between_processes(list(enumerate(prompts))) as own, preserved_modes(model):
            model.eval()
            own = sorted(own, key=lambda numbered: len(numbered[1]))  # little padding
            parts = _batches(own, size, alike=isinstance(base, BlipForConditionalGeneration))
            for part in tqdm(parts, desc="Generating", disable=quiet, leave=False):
                rows, batch = zip(*part, strict=True)
                # an encoder may count positions from the left, padding or not
                side = "right" if base.config.is_encoder_decoder else "left"
                inputs = tokenizer.pad({"input_ids": list(batch)}, padding_side=side, return_tensors="pt")
                if has_images:
                    inputs["pixel_values"] = torch.stack([_image_of(dataset[row], row) for row in rows])
                with _greedy(model, base, tokenizer, max_new_tokens), trainers_precision(trainer, model):
                    said = _generate(model, base, inputs.to(device), trainer)
                found += zip(rows, said, strict=True)
    finally:
        model.to(place)  # two models need not be on the device at once
    return [said for _, said in sorted(dict(gather_object(found)).items())]  # a process without rows was lent one


def decode(trainer: Trainer, tokens: Sequence[Sequence[int]]) -> list[str]:
    """Texts without special tokens and without blanks around them."""
    return [text.strip() for text in tokenizer_of(trainer).batch_decode(tokens, skip_special_tokens=True)]


def _batches(own: list[tuple[int, list[int]]], size: int, *, alike: bool) -> list[list[tuple[int, list[int]]]]:
    """Numbered prompts in batches, sorted by length as they are; `alike` ones in each have one length, and need no padding."""
    groups = [list(group) for _, group in groupby(own, key=lambda numbered: len(numbered[1]))] if alike else [own]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def _refuse_other_ways(model: nn.Module) -> None:
    """Of a `generate()` of its own it is not known what it reads and returns. BLIP's is known."""
    if getattr(type(model), "generate", None) is GenerationMixin.generate or isinstance(
        model, BlipForConditionalGeneration
    ):
        return
    raise ValueError(
        f"{type(model).__name__} has no `generate()`, or one of its own, of which it is not known what it reads and returns. Ask the model "
        "yourself."
    )


def _refuse_further_inputs(model: nn.Module, row: Mapping) -> None:
    taken = inspect.signature(model.forward).parameters
    further = [name for name in row if name in taken and name not in _CARRIED]
    if further:
        raise ValueError(
            f"Answers are generated from `input_ids` and `pixel_values`, but {type(model).__name__} is given "
            f"{', '.join(f'`{name}`' for name in further)} in each row, too. Leave those columns out if the model does not need them, or "
            "call its `generate()` yourself."
        )


def _prompt_of(row: Mapping, number: int, length: int | None, config) -> list[int]:
    tokens, labels = (torch.as_tensor(row[name]) for name in ("input_ids", "labels"))
    read = torch.as_tensor(row["attention_mask"]).bool() if "attention_mask" in row else torch.ones_like(tokens).bool()
    if length is None and not config.is_encoder_decoder:
        asked = (labels != IGNORED_LABEL).nonzero()
        length = int(read[: int(asked[0])].sum()) if len(asked) else None
    prompt = tokens[read][:length].tolist()
    if not prompt:
        raise ValueError(f"Row {number} begins with its answer, and has no prompt. Pass `prompt_length`.")
    return prompt


def _image_of(row: Mapping, number: int) -> torch.Tensor:
    if row.get("pixel_values") is None:
        raise ValueError(
            f"Row {number} has no `pixel_values`, but row 0 has. Ask about rows with and without images by themselves."
        )
    return torch.as_tensor(row["pixel_values"])


def tokenizer_of(trainer: Trainer) -> PreTrainedTokenizerBase:
    """The trainer's, or that of its processor.

    Raises:
        ValueError: There is none.
    """
    found = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if found is None:
        raise ValueError("Answers are read by a tokenizer, but the trainer has none. Pass `processing_class`.")
    return found


@contextmanager
def _greedy(
    model: nn.Module, base: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Iterator[None]:
    """Beams and penalties of the model's own would say something else than its most likely tokens.

    An adapter's wrapper hands over to the model below, and BLIP to its decoder. Whose settings count, has them itself.
    """

    def settings_of(one: nn.Module) -> GenerationConfig:
        own = (base if one is model else one).generation_config.to_dict()
        special = {name: value for name, value in own.items() if name.endswith("_token_id")}
        special["pad_token_id"] = tokenizer.pad_token_id
        return GenerationConfig(**special, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)

    holders = [one for one in model.modules() if "generation_config" in vars(one)]
    before = [one.generation_config for one in holders]
    greedy = [settings_of(one) for one in holders]
    for one, own in zip(holders, greedy, strict=True):
        one.generation_config = own
    try:
        yield
    finally:
        for one, own in zip(holders, before, strict=True):
            one.generation_config = own


def _generate(model: nn.Module, base: nn.Module, inputs: Mapping, trainer: Trainer) -> list[list[int]]:
    length = inputs["input_ids"].shape[1]
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in inputs}
    if isinstance(base, BlipForConditionalGeneration):  # it drops the last token, the end that its processor writes
        for name in ("input_ids", "attention_mask"):
            given[name] = torch.nn.functional.pad(given[name], (0, 1))
    # the outer context casts the weights once, and not for every token
    with torch.no_grad(), trainer.accelerator.autocast():
        tokens = model.generate(**given)
    return (tokens if base.config.is_encoder_decoder else tokens[:, length:]).tolist()
