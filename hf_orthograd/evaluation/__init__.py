"""How well a model still does, and on what."""

from .metrics import CharacterErrorRate, WordErrorRate


__all__ = ["CharacterErrorRate", "WordErrorRate"]
