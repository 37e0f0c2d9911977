"""What was found, and how it is shown: tables, figures, and a page."""

from .figures import plot_report, plot_unlearning
from .report import Check, HardestHit, RelearningPoint, UnlearningReport
from .tables import NOT_MEASURED, show


__all__ = [
    "NOT_MEASURED",
    "Check",
    "HardestHit",
    "RelearningPoint",
    "UnlearningReport",
    "plot_report",
    "plot_unlearning",
    "show",
]
