"""The methods that papers compare with, through the same trainer.

Those that are a combination of `forget_loss`, `projection` and `alpha` stand in `BASELINES`. The others are small
subclasses of [`OrthoGradTrainer`], which keep its data, launches, checks and logs and replace what a step descends; and
selective synaptic dampening, which makes no steps.
"""

from .base import BaselineTrainer
from .dampening import dampen_synapses
from .gradients import GradientTrainer, GruTrainer, GuTrainer, OnpoTrainer, SamTrainer, rectify
from .labels import RandomLabelTrainer, saliency_masks
from .representations import RmuTrainer
from .settings import BASELINES
from .teachers import BadTeacherTrainer, ScrubTrainer, UndialTrainer
from .tokens import SatImpTrainer, TokenWeightedTrainer, WgaTrainer


__all__ = [
    "BASELINES",
    "BadTeacherTrainer",
    "BaselineTrainer",
    "GradientTrainer",
    "GruTrainer",
    "GuTrainer",
    "OnpoTrainer",
    "RandomLabelTrainer",
    "RmuTrainer",
    "SamTrainer",
    "SatImpTrainer",
    "ScrubTrainer",
    "TokenWeightedTrainer",
    "UndialTrainer",
    "WgaTrainer",
    "dampen_synapses",
    "rectify",
    "saliency_masks",
]
