"""How well a model still does, and on what."""

from .figures import plot_unlearning
from .metrics import CharacterErrorRate, WordErrorRate


__all__ = ["CharacterErrorRate", "WordErrorRate", "plot_unlearning"]
