"""Unlearning with retain-orthogonal gradients for Hugging Face models."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import OrthoGradConfig
    from .data import split_forget_retain
    from .projection import project_orthogonal
    from .trainer import OrthoGradTrainer

__version__ = "0.2.0"

__all__ = ["OrthoGradConfig", "OrthoGradTrainer", "project_orthogonal", "split_forget_retain"]

_MODULES = {
    "OrthoGradConfig": "config",
    "OrthoGradTrainer": "trainer",
    "project_orthogonal": "projection",
    "split_forget_retain": "data",
}


if not TYPE_CHECKING:  # to a type checker every name would be there

    def __getattr__(name: str) -> Any:
        """Imports what is asked for, rooms too: a command's help need not wait for torch."""
        if name in _MODULES:
            return getattr(import_module(f".{_MODULES[name]}", __name__), name)
        if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
