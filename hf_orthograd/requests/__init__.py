"""Requests over time: a model's history, what is checked before it is trained on again, and what keeps it from coming back."""

from .checks import CheckedRequest
from .duplicates import FoundRow, Sketches, check_dataset
from .history import RequestHistory
from .request import Request
from .staying import StaysForgotten, Watched


__all__ = [
    "CheckedRequest",
    "FoundRow",
    "Request",
    "RequestHistory",
    "Sketches",
    "StaysForgotten",
    "Watched",
    "check_dataset",
]
