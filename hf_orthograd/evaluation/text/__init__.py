"""What a language model still knows: from the probabilities of answers, and from what it says when it is asked."""

from .generation import generate_answers
from .memorization import knowledge_memorization, rouge_l, verbatim_memorization
from .scores import (
    AnswerProbability,
    ExactAnswers,
    ExtractionStrength,
    MinKProbability,
    TokenLoss,
    answer_scores,
    min_k_membership,
    perplexity,
)
from .tofu import answer_probabilities, choice_probability, forget_quality, model_utility, truth_ratio


__all__ = [
    "AnswerProbability",
    "ExactAnswers",
    "ExtractionStrength",
    "MinKProbability",
    "TokenLoss",
    "answer_probabilities",
    "answer_scores",
    "choice_probability",
    "forget_quality",
    "generate_answers",
    "knowledge_memorization",
    "min_k_membership",
    "model_utility",
    "perplexity",
    "rouge_l",
    "truth_ratio",
    "verbatim_memorization",
]
