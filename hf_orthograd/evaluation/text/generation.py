"""What a model says when it is asked, and how much of it is what it was taught."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import gather_object
from rouge_score import rouge_scorer
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, Trainer

from ...annotations import AnyDataset
from ...objectives import IGNORED_LABEL
from ...parallel.sharding import is_sharded
from ...trials import preserved_modes
from ..measure import trainers_precision


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
        dataset (`Dataset`): Rows as [`~hf_orthograd.data.prepare_text_dataset`] makes them: a prompt is what stands before the
            first label that is not -100; for an encoder-decoder model all of `input_ids`. `pixel_values` go with it.
        model (`torch.nn.Module`, *optional*): In place of the trainer's, on its device.
        prompt_length (`int`, *optional*): Tokens of a prompt from the beginning of the row, instead.
        max_new_tokens (`int`): Most tokens of an answer.

    Raises:
        ValueError: There is no tokenizer, the model is sharded, or a row has no prompt.
    """
    tokenizer = tokenizer_of(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model) if model is None else model
    if is_sharded(model):
        raise ValueError(
            "A sharded model generates nothing here: load what `save_model()` wrote in one process, or under DDP."
        )
    prompts = [_prompt_of(dataset[row], row, prompt_length, model.config) for row in range(len(dataset))]
    has_images = "pixel_values" in dataset[0]
    device, size = trainer.args.device, trainer.args.per_device_eval_batch_size
    model.to(device)
    found = []
    quiet = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
    with trainer.accelerator.split_between_processes(list(enumerate(prompts))) as own, preserved_modes(model):
        model.eval()
        own = sorted(own, key=lambda numbered: len(numbered[1]))  # little padding
        for start in tqdm(range(0, len(own), size), desc="Generating", disable=quiet, leave=False):
            rows, batch = zip(*own[start : start + size], strict=True)
            # an encoder may count positions from the left, padding or not
            side = "right" if model.config.is_encoder_decoder else "left"
            inputs = tokenizer.pad({"input_ids": list(batch)}, padding_side=side, return_tensors="pt")
            if has_images:
                inputs["pixel_values"] = torch.stack([torch.as_tensor(dataset[row]["pixel_values"]) for row in rows])
            said = _generate(model, tokenizer, inputs.to(device), max_new_tokens, trainer)
            found += zip(rows, said, strict=True)
    return [said for _, said in sorted(dict(gather_object(found)).items())]  # a process without rows was lent one


def _prompt_of(row, number: int, length: int | None, config) -> list[int]:
    tokens, labels = (torch.as_tensor(row[name]) for name in ("input_ids", "labels"))
    if length is None and config.is_encoder_decoder:
        length = len(tokens)
    elif length is None:
        asked = (labels != IGNORED_LABEL).nonzero()
        length = int(asked[0]) if len(asked) else len(tokens)
    if length < 1:
        raise ValueError(f"Row {number} begins with its answer, and has no prompt. Pass `prompt_length`.")
    return tokens[:length].tolist()


def tokenizer_of(trainer: Trainer) -> PreTrainedTokenizerBase:
    """The trainer's, or that of its processor.

    Raises:
        ValueError: There is none.
    """
    found = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if found is None:
        raise ValueError("Answers are read by a tokenizer, but the trainer has none. Pass `processing_class`.")
    return found


def _generate(model, tokenizer, inputs, max_new_tokens: int, trainer) -> list[str]:
    own = model.generation_config
    special = {name: value for name, value in own.to_dict().items() if name.endswith("_token_id")}
    settings = {**special, "pad_token_id": tokenizer.pad_token_id, "max_new_tokens": max_new_tokens}
    # beams and penalties of the model's own would say something else than its most likely tokens
    model.generation_config = GenerationConfig(**settings, do_sample=False, num_beams=1)
    try:
        # the outer context casts the weights once, and not for every token
        with torch.no_grad(), trainers_precision(trainer, model), trainer.accelerator.autocast():
            tokens = model.generate(
                **{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in inputs}
            )
    finally:
        model.generation_config = own
    if not model.config.is_encoder_decoder:
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Recall and F1 of ROUGE-L of each text, shape (n,) each, with Porter's stemmer, by rouge-score.

    Recall is TOFU's (arXiv 2401.06121, section 2.2), F1 is MUSE's (arXiv 2407.06460).
    """
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(right, said)["rougeL"] for said, right in zip(predictions, references, strict=True)]
    return np.array([one.recall for one in scores]), np.array([one.fmeasure for one in scores])


def knowledge_memorization(trainer: Trainer, dataset: AnyDataset, *, max_new_tokens: int = 64) -> float:
    """MUSE's KnowMem (arXiv 2407.06460, section 3.1): mean ROUGE-L F1 of what the model answers to questions, from 0 to 1."""
    said = generate_answers(trainer, dataset, max_new_tokens=max_new_tokens)
    return float(rouge_l(said, _texts(trainer, dataset, 0))[1].mean())


def verbatim_memorization(
    trainer: Trainer, dataset: AnyDataset, *, prompt_length: int, max_new_tokens: int | None = None
) -> float:
    """MUSE's VerbMem (arXiv 2407.06460, section 3.1): mean ROUGE-L F1 of how the model goes on with texts, from 0 to 1.

    Args:
        prompt_length (`int`): Tokens of each text that it is given.
        max_new_tokens (`int`, *optional*): As long as the longest rest by default.

    Raises:
        ValueError: A text is not longer than the prompt.
    """
    lengths = [len(row["input_ids"]) for row in dataset]
    if min(lengths) <= prompt_length:
        raise ValueError(
            f"`prompt_length` is {prompt_length}, but a text has {min(lengths)} tokens: nothing is left to say."
        )
    most = max(lengths) - prompt_length if max_new_tokens is None else max_new_tokens
    said = generate_answers(trainer, dataset, prompt_length=prompt_length, max_new_tokens=most)
    return float(rouge_l(said, _texts(trainer, dataset, prompt_length, most))[1].mean())


def _texts(trainer: Trainer, dataset, start: int, count: int | None = None) -> list[str]:
    """What the labels say from a token on."""
    stop = None if count is None else start + count
    labels = [torch.as_tensor(row["labels"])[start:stop] for row in dataset]
    tokens = [own[own != IGNORED_LABEL].tolist() for own in labels]
    return [text.strip() for text in tokenizer_of(trainer).batch_decode(tokens, skip_special_tokens=True)]
