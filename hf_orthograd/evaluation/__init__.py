"""Whether a model has forgotten, what that cost, and whether it stays forgotten."""

from .attacks import Attack, DetachAdapter, Quantization, Relearning
from .checks import Tolerances, average_gap, tug_of_war, unlearning_impact_score
from .measure import per_sample_losses
from .membership import (
    MembershipInference,
    ShadowLosses,
    attack_shadows,
    loss_distance,
    membership_inference,
    shadow_losses,
    unlearning_lira,
)
from .metrics import (
    Accuracy,
    CharacterErrorRate,
    CharacterErrors,
    Refusals,
    SampleMetric,
    WordErrorRate,
    WordErrors,
)
from .quality import Quality
from .reporting import UnlearningReport, plot_report, plot_unlearning
from .unlearning import evaluate_unlearning


__all__ = [
    "Accuracy",
    "Attack",
    "CharacterErrorRate",
    "CharacterErrors",
    "DetachAdapter",
    "MembershipInference",
    "Quality",
    "Quantization",
    "Refusals",
    "Relearning",
    "SampleMetric",
    "ShadowLosses",
    "Tolerances",
    "UnlearningReport",
    "WordErrorRate",
    "WordErrors",
    "attack_shadows",
    "average_gap",
    "evaluate_unlearning",
    "loss_distance",
    "membership_inference",
    "per_sample_losses",
    "plot_report",
    "plot_unlearning",
    "shadow_losses",
    "tug_of_war",
    "unlearning_impact_score",
    "unlearning_lira",
]
