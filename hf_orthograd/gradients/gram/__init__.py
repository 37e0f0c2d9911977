"""The engine that watches which torch calls use which parameter, and never forms the gradients of the whole model."""

from .calls import Call, Source, SpreadCall
from .engine import GramEngine
from .forms import Dense, Outer
from .rules import register_rule


__all__ = ["Call", "Dense", "GramEngine", "Outer", "Source", "SpreadCall", "register_rule"]
