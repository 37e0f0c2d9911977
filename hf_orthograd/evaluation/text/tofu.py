"""TOFU's metrics (arXiv 2401.06121, section 2.2): forget quality and model utility, and what they are made of."""

from collections.abc import Sequence

import numpy as np
from scipy import stats
from transformers import Trainer

from ...annotations import AnyDataset
from ..measure import measure
from .scores import AnswerProbability


def answer_probabilities(trainer: Trainer, dataset: AnyDataset) -> np.ndarray:
    """`P(answer | prompt)^(1 / length)` of each row under the trainer's model, shape (n,)."""
    return measure(trainer, dataset, [AnswerProbability()]).counts[AnswerProbability.name][0]


def choice_probability(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """The right answer's share among the choices, shape (n,), for questions on real authors and world facts.

    Args:
        right (`np.ndarray`): Probability of the right answer, shape (n,).
        wrong (`np.ndarray`): Those of the wrong ones, shape (n, choices).
    """
    return right / (right + wrong.sum(axis=1))


def truth_ratio(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """`mean(wrong) / right`, shape (n,): below 1 where the model tells the right answer from wrong ones (equation 1).

    The mean is arithmetic, as in the paper; the authors' code takes the geometric one.

    Args:
        right (`np.ndarray`): Probability of the right answer in other words, shape (n,).
        wrong (`np.ndarray`): Those of wrong answers of the same form, shape (n, answers).
    """
    return wrong.mean(axis=1) / right


def forget_quality(ratios: np.ndarray, reference_ratios: np.ndarray) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test that truth ratios on the forget set are those of a retrained model.

    Ratios have shapes (n,) and (m,). High is good. Below 0.05 the two models are told apart.
    """
    return float(stats.ks_2samp(ratios, reference_ratios).pvalue)


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean of nine numbers: probability, ROUGE-L recall and `max(0, 1 - truth ratio)` on retained authors, real authors
    and world facts.

    One that is 0 makes it 0: no skill may be lost.

    Raises:
        ValueError: One is negative, or there is none.
    """
    if not len(values) or min(values) < 0:
        raise ValueError(f"Model utility is a mean of numbers from 0 to 1, but they are {list(values)}.")
    return float(stats.hmean(values))
