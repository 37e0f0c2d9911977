"""Metrics from one forward pass over prompt and answer: the tokens that the model would say, and their probabilities."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import EvalPrediction, Trainer

from ...annotations import AnyDataset
from ...objectives import IGNORED_LABEL, losses_at_positions
from ..measure import measure
from ..membership import MembershipInference, membership_inference


def answer_scores(
    logits: Tensor | tuple, labels: Tensor, *, is_encoder_decoder: bool = False
) -> tuple[Tensor, Tensor]:
    """What the metrics of this module are taken from, in place of logits over a whole vocabulary.

    Pass it to a trainer as `preprocess_logits_for_metrics`; for an encoder-decoder model
    `functools.partial(answer_scores, is_encoder_decoder=True)`.

    Args:
        logits (`torch.Tensor`): Shape (n, length, vocabulary), or a tuple whose first tensor of three dimensions they are.
        labels (`torch.Tensor`): Shape (n, length), -100 where nothing is asked.

    Returns:
        Shape (n, length) each, at the place of the label: the most likely token, given all tokens before it; and the
        log-probability of the label, in nats, 0 where nothing is asked. It is infinite for the first token of a causal model's
        row, which nothing predicts: the metrics leave it out.
    """
    if isinstance(logits, tuple):  # a mixture of experts may have put a loss before them
        logits = next(tensor for tensor in logits if tensor.ndim == 3)
    logits = logits[:, -labels.shape[1] :]  # before the text there may be tokens of an image
    tokens = logits.argmax(dim=-1)
    if is_encoder_decoder:
        return tokens, -losses_at_positions(logits, labels)
    # the token at a place is predicted at the place before, and the last place predicts none
    losses = losses_at_positions(logits, functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL))
    tokens = torch.cat([tokens.new_zeros(len(tokens), 1), tokens[:, :-1]], dim=1)
    losses = torch.cat([losses.new_full((len(losses), 1), -torch.inf), losses[:, :-1]], dim=1)
    return tokens, -losses


class _AnswerMetric:
    """A value of each answer; over a set, their mean."""

    name: str
    greater_is_better = True

    def counts(self, prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
        values = np.array([self.of(*answer) for answer in _answers(prediction)], dtype=float)
        return values, np.ones(len(values))

    def of(self, tokens: np.ndarray, log_probabilities: np.ndarray, labels: np.ndarray) -> float:
        """That of one answer, given what [`answer_scores`] says of its tokens, shape (answer length,) each."""
        raise NotImplementedError


def _answers(prediction: EvalPrediction):
    found, labels = prediction.predictions, prediction.label_ids
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(
            "Metrics of answers need tokens and their log-probabilities: pass `preprocess_logits_for_metrics=answer_scores` to the "
            "trainer."
        )
    # a model that unlearning has broken may say NaN: it knows nothing
    broken = np.isnan(found[1])
    tokens, log_probabilities = np.where(broken, IGNORED_LABEL, found[0]), np.where(broken, -np.inf, found[1])
    for row, asked in enumerate((labels != IGNORED_LABEL) & (log_probabilities < np.inf)):
        if not asked.any():
            raise ValueError(
                f"All labels are {IGNORED_LABEL} in row {row} of a set that is evaluated: nothing is asked there. Remove it."
            )
        yield tokens[row][asked], log_probabilities[row][asked], labels[row][asked]


class ExactAnswers(_AnswerMetric):
    """Share of answers that greedy decoding gives word for word, to the token that ends them.

    It does so exactly if each token is the most likely one given those before it, so that nothing is generated.
    """

    name = "exact answers"

    def of(self, tokens: np.ndarray, log_probabilities: np.ndarray, labels: np.ndarray) -> float:
        return float((tokens == labels).all())


class AnswerProbability(_AnswerMetric):
    """`P(answer | prompt)^(1 / length)`, the geometric mean of token probabilities, as TOFU (arXiv 2401.06121, section 2.2)."""

    name = "answer probability"

    def of(self, tokens: np.ndarray, log_probabilities: np.ndarray, labels: np.ndarray) -> float:
        return float(np.exp(log_probabilities.mean()))


class ExtractionStrength(_AnswerMetric):
    """`1 - k / length`, with k the shortest beginning of the answer after which greedy decoding gives its rest.

    1 if the prompt alone calls up the answer, 0 if nothing does (arXiv 2012.07805; as in OpenUnlearning, arXiv 2506.12618).
    """

    name = "extraction strength"

    def of(self, tokens: np.ndarray, log_probabilities: np.ndarray, labels: np.ndarray) -> float:
        wrong = np.flatnonzero(tokens != labels)
        known_from = wrong[-1] + 1 if len(wrong) else 0
        return 1 - known_from / len(labels)


class MinKProbability(_AnswerMetric):
    """Mean log-probability of the least likely tokens, in nats: high for text that was trained on (arXiv 2310.16789).

    Args:
        share (`float`): Of the tokens, at least one; the paper's k % is 20 %.

    Raises:
        ValueError: `share` out of (0, 1].
    """

    def __init__(self, share: float = 0.2):
        if not 0 < share <= 1:
            raise ValueError(f"`share` must lie above 0 and not beyond 1, but is {share}.")
        self.share, self.name = share, f"min-{share:.0%} log-probability"

    def of(self, tokens: np.ndarray, log_probabilities: np.ndarray, labels: np.ndarray) -> float:
        count = max(1, int(self.share * len(log_probabilities)))
        return float(np.sort(log_probabilities)[:count].mean())


class TokenLoss:
    """Negative log-likelihood of a token, in nats: the logarithm of the perplexity. A long text counts for more."""

    name, greater_is_better = "loss per token", False

    def counts(self, prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
        found = [(-log_probabilities.sum(), len(labels)) for _, log_probabilities, labels in _answers(prediction)]
        losses, lengths = np.array(found, dtype=float).T
        return losses, lengths


def perplexity(trainer: Trainer, dataset: AnyDataset) -> float:
    """`exp` of the mean negative log-likelihood over all tokens that have a label, under the trainer's model."""
    losses, lengths = measure(trainer, dataset, [TokenLoss()]).counts[TokenLoss.name]
    return float(np.exp(losses.sum() / lengths.sum()))


def min_k_membership(
    trainer: Trainer, members: AnyDataset, nonmembers: AnyDataset, share: float = 0.2
) -> MembershipInference:
    """Whether text was trained on, guessed from [`MinKProbability`] under the trainer's model.

    Args:
        members, nonmembers (`Dataset`): Text of one kind that was trained on, as the forget set, and that never was.
    """
    metric = MinKProbability(share)
    scores = [measure(trainer, rows, [metric]).counts[metric.name][0] for rows in (members, nonmembers)]
    return membership_inference(*(-one for one in scores))  # as a loss, which is low for members
