"""How much of what a model says is what it was taught: ROUGE, and MUSE's two metrics (arXiv 2407.06460)."""

import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from rouge_score import rouge_scorer, tokenizers
from transformers import Trainer

from ...annotations import AnyDataset
from ...objectives import IGNORED_LABEL
from .generation import decode, generate_answers, generate_tokens


# whose words have no blanks between them
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


class _AnyScript(tokenizers.Tokenizer):
    """Words of any script, without stems; characters one by one where words are not told apart."""

    def tokenize(self, text: str) -> list[str]:
        return "".join(map(self._spaced, text.lower())).split()

    @staticmethod
    def _spaced(character: str) -> str:
        if unicodedata.category(character)[0] not in "LMN":  # letters, their marks, and digits
            return " "
        return f" {character} " if unicodedata.name(character, "").startswith(_UNSPACED) else character


def _is_latin(text: str) -> bool:
    return all("LATIN" in unicodedata.name(letter, "") for letter in text if letter.isalpha())


def rouge_l(
    predictions: Sequence[str], references: Sequence[str], *, use_stemmer: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and F1 of ROUGE-L of each text, shape (n,) each, by rouge-score.

    Recall with Porter's stemmer is TOFU's (arXiv 2401.06121, section 2.2), F1 without it MUSE's (arXiv 2407.06460). rouge-score
    knows the letters a to z alone: where a reference has letters of another script, its words are taken as they are, and
    one character after the other where no blanks stand between words, as in Chinese. Latin letters with accents split a
    word, as they do in published numbers.
    """
    latin = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=use_stemmer)
    other = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_AnyScript())
    pairs = zip(predictions, references, strict=True)
    scores = [(latin if _is_latin(right) else other).score(right, said)["rougeL"] for said, right in pairs]
    return np.array([one.recall for one in scores]), np.array([one.fmeasure for one in scores])


def knowledge_memorization(trainer: Trainer, dataset: AnyDataset, *, max_new_tokens: int = 64) -> float:
    """MUSE's KnowMem (arXiv 2407.06460, section 3.1): mean ROUGE-L F1 of what the model answers to questions, from 0 to 1.

    MUSE asks a model that was not taught to answer: it puts other questions with answers before each, generates 32 tokens, and
    cuts at a blank line. Rows may hold such a prompt; nothing is cut here.
    """
    said = generate_answers(trainer, dataset, max_new_tokens=max_new_tokens)
    return float(rouge_l(said, decode(trainer, _labels(trainer, dataset)), use_stemmer=False)[1].mean())


def verbatim_memorization(
    trainer: Trainer, dataset: AnyDataset, *, prompt_length: int, max_new_tokens: int | None = None
) -> float:
    """MUSE's VerbMem (arXiv 2407.06460, section 3.1): mean ROUGE-L F1 of how the model goes on with texts, from 0 to 1.

    Of what it says as many tokens count as the text has left.

    Args:
        prompt_length (`int`): Tokens of each text that it is given.
        max_new_tokens (`int`, *optional*): Most of both, MUSE has 128; all by default.

    Raises:
        ValueError: A text is not longer than the prompt.
    """
    lengths = [
        int(np.sum(row["attention_mask"])) if "attention_mask" in row else len(row["labels"]) for row in dataset
    ]
    if min(lengths) <= prompt_length:
        raise ValueError(
            f"`prompt_length` is {prompt_length}, but a text has {min(lengths)} tokens: nothing is left to say."
        )
    most = max(lengths) - prompt_length if max_new_tokens is None else max_new_tokens
    rests = _labels(trainer, dataset, prompt_length, prompt_length + most)
    said = generate_tokens(trainer, dataset, prompt_length=prompt_length, max_new_tokens=most)
    cut = [own[: len(rest)] for own, rest in zip(said, rests, strict=True)]
    return float(rouge_l(decode(trainer, cut), decode(trainer, rests), use_stemmer=False)[1].mean())


def _labels(trainer: Trainer, dataset: AnyDataset, start: int = 0, stop: int | None = None) -> list[list[int]]:
    """The labels of each row between two of its tokens, padding left out."""
    found, is_one_text = [], not trainer.accelerator.unwrap_model(trainer.model).config.is_encoder_decoder
    for row in dataset:
        labels = torch.as_tensor(row["labels"])
        if is_one_text and "attention_mask" in row:
            labels = labels[torch.as_tensor(row["attention_mask"]).bool()]
        labels = labels[start:stop]
        found.append(labels[labels != IGNORED_LABEL].tolist())
    return found
