"""The loss of each sample of a batch, what is ascended on the forget set, and what holds the retain set."""

from .contrastive import FixedNegatives
from .families import IGNORED_LABEL, kl_divergence, losses_at_positions, mean_where
from .forget import (
    FORGET_LOSSES,
    Ascent,
    ForgetObjective,
    NegativePreference,
    Refusal,
    SimpleNegativePreference,
    forget_objective,
)
from .per_sample import RETAIN_LOSSES, PerSampleLoss, PerSampleLosses


__all__ = [
    "FORGET_LOSSES",
    "IGNORED_LABEL",
    "RETAIN_LOSSES",
    "Ascent",
    "FixedNegatives",
    "ForgetObjective",
    "NegativePreference",
    "PerSampleLoss",
    "PerSampleLosses",
    "Refusal",
    "SimpleNegativePreference",
    "forget_objective",
    "kl_divergence",
    "losses_at_positions",
    "mean_where",
]
