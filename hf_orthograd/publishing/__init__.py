"""What goes to the Hub: the model, its card, the report's public edition, and a record; and what is taken back from there."""

from .access import check_access
from .card import CardOptions, make_card, write_card
from .history import OldWeights, Retraction, find_weights, retract
from .push import PUBLIC_FOLDER, Publication, prepare_folder, publish, publish_trainer
from .record import SALT_NAME, UnlearningRecord, load_records, read_salt
from .verification import verify


__all__ = [
    "PUBLIC_FOLDER",
    "SALT_NAME",
    "CardOptions",
    "OldWeights",
    "Publication",
    "Retraction",
    "UnlearningRecord",
    "check_access",
    "find_weights",
    "load_records",
    "make_card",
    "prepare_folder",
    "publish",
    "publish_trainer",
    "read_salt",
    "retract",
    "verify",
    "write_card",
]
