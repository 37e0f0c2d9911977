"""What is there before the first step: the engine of a run, its retain term and starting model, and what a step will take."""

from .engines import collator_of, prepare_engine, prepare_retain_term
from .estimate import Estimate, estimate_run, estimate_step
from .starting_model import KeepPredictions, ReferenceModel, StartingModel
from .stored_predictions import StoredPredictions


__all__ = [
    "Estimate",
    "KeepPredictions",
    "ReferenceModel",
    "StartingModel",
    "StoredPredictions",
    "collator_of",
    "estimate_run",
    "estimate_step",
    "prepare_engine",
    "prepare_retain_term",
]
