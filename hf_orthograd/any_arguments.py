"""Arguments of any class: the fields of unlearning added to them, and the trainer that reads them."""

import copy
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any

from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from .config import OrthoGradConfig


class AnyArgumentsTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer reads arguments of its own; with any others this predicts as Trainer."""

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        return self._parent.predict(*args, **kwargs)

    # Any, as Trainer says that the first is a tensor, and Seq2SeqTrainer a float
    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor | None, Tensor | None]:
        return self._parent.prediction_step(*args, **kwargs)

    @property
    def _parent(self):
        return super() if isinstance(self.args, Seq2SeqTrainingArguments) else super(Seq2SeqTrainer, self)


def with_unlearning(args: TrainingArguments) -> OrthoGradConfig:
    """Arguments of any class with the fields of [`OrthoGradConfig`] beside their own.

    Args:
        args ([`~transformers.TrainingArguments`]): Left as they are. An [`OrthoGradConfig`] is returned itself.

    Returns:
        A copy that is an instance of the class of `args` and of [`OrthoGradConfig`]; what `args` lack has its default.

    Raises:
        ValueError: The class has a field of its own with the name of one of [`OrthoGradConfig`]'s.
    """
    if isinstance(args, OrthoGradConfig):
        return args
    if not isinstance(args, TrainingArguments):
        raise ValueError(
            f"`args` must be TrainingArguments or a subclass, as OrthoGradConfig, but is a {type(args).__name__}."
        )
    inherited = {f.name for f in fields(Seq2SeqTrainingArguments)}
    own = {f.name for f in fields(args)} - inherited
    shared = sorted(own & {f.name for f in fields(OrthoGradConfig)})
    if shared:
        raise ValueError(
            f"`args` is a {type(args).__name__}, whose own fields {', '.join(shared)} have the names of fields of "
            "OrthoGradConfig that mean something else. Make it a subclass of OrthoGradConfig, or rename them."
        )
    combined = copy.copy(args)
    combined.__class__ = _combined_class(type(args))
    known = {f.name for f in fields(args)}
    for f in fields(OrthoGradConfig):
        if f.name not in known:
            setattr(combined, f.name, f.default if f.default is not MISSING else f.default_factory())
    combined.check_unlearning()
    return combined


def forgetting_alone(args: OrthoGradConfig) -> OrthoGradConfig:
    """A copy for a run without a retain set, whose batches of training are those of the forget set."""
    alone = copy.copy(args)
    alone.per_device_train_batch_size = args.per_device_forget_batch_size
    return alone


@cache
def _combined_class(arguments_class: type) -> type:
    if issubclass(OrthoGradConfig, arguments_class):
        return OrthoGradConfig
    # made anew by pickle, which knows no class by the name of one that was made on the spot
    body = {"__reduce__": lambda self: (_restore, (arguments_class, self.__dict__)), "__module__": __name__}
    return dataclass(type(f"{arguments_class.__name__}WithUnlearning", (arguments_class, OrthoGradConfig), body))


def _restore(arguments_class: type, state: dict) -> OrthoGradConfig:
    restored = object.__new__(_combined_class(arguments_class))
    restored.__dict__.update(state)
    return restored
