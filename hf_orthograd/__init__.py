"""Unlearning with retain-orthogonal gradients for Hugging Face models."""

from .config import OrthoGradConfig
from .data import split_forget_retain
from .projection import project_orthogonal
from .trainer import OrthoGradTrainer


__version__ = "0.2.0"

__all__ = ["OrthoGradConfig", "OrthoGradTrainer", "project_orthogonal", "split_forget_retain"]
