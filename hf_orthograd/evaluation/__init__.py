"""Whether a model has forgotten, what that cost, and whether it stays forgotten."""

from .attacks import Attack, DetachAdapter, Quantization, Relearning
from .checks import Tolerances
from .figures import plot_report, plot_unlearning
from .lira import ShadowLosses, attack_shadows, shadow_losses, unlearning_lira
from .measure import per_sample_losses
from .metrics import CharacterErrorRate, WordErrorRate
from .privacy import MembershipInference, loss_distance, membership_inference
from .quality import Accuracy, CharacterErrors, Quality, SampleMetric, WordErrors
from .report import UnlearningReport
from .summary import average_gap, tug_of_war, unlearning_impact_score
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
