"""[`AnyArgumentsTrainer`]: transformers' Seq2SeqTrainer, or its Trainer, as the arguments say."""

from typing import Any

from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import PredictionOutput


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
