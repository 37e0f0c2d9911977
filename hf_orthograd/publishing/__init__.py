"""What goes to the Hub: the model, its card, the report's public edition, and a record; and what is taken back from there."""

from .access import check_access, refuse_owner_files
from .card import CardOptions, make_card, write_card
from .files import PUBLIC_FOLDER, is_weights, published_files
from .history import OldWeights, Retraction, find_weights, retract
from .push import Publication, prepare_folder, publish, publish_trainer
from .record import SALT_NAME, Origin, UnlearningRecord, commit, load_records, owner_salt, read_salt
from .verification import verify


__all__ = [
    "PUBLIC_FOLDER",
    "SALT_NAME",
    "CardOptions",
    "OldWeights",
    "Origin",
    "Publication",
    "Retraction",
    "UnlearningRecord",
    "check_access",
    "commit",
    "find_weights",
    "is_weights",
    "load_records",
    "make_card",
    "owner_salt",
    "prepare_folder",
    "publish",
    "publish_trainer",
    "published_files",
    "read_salt",
    "refuse_owner_files",
    "retract",
    "verify",
    "write_card",
]
