"""Per-sample gradients by torch.func: one vectorised backward over the retain samples, in chunks."""

from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch
from ..objectives import PerSampleLosses
from ..parallel import Parameters
from .base import RetainTerm, UnsupportedModelError
from .loop import MaterializingEngine, sum_gradients


class FunctionalEngine(MaterializingEngine):
    """`torch.func.vmap` over `grad_and_value` of one sample's loss.

    Args:
        parameters ([`Parameters`]): What to differentiate by.
        per_sample_losses (`Callable`): The losses of a batch; called with one sample at a time, vectorised.
        chunk_size (`int`, *optional*): Samples vectorised at once; all of the batch by default.
    """

    name = "func"

    def __init__(self, parameters: Parameters, per_sample_losses: PerSampleLosses, chunk_size: int | None = None):
        super().__init__(parameters, per_sample_losses)
        self.chunk_size = chunk_size

    def retain_rows(
        self, model: nn.Module, retain: Batch, loss_scale: float, term: RetainTerm | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
        tensors = {name: value for name, value in retain.inputs.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in retain.inputs.items() if not isinstance(value, Tensor)}
        other = [name for name, value in tensors.items() if value.ndim == 0 or len(value) != retain.size]
        if other:
            raise UnsupportedModelError(
                f"torch.func takes samples apart along the first dimension, which in {', '.join(other)} is not that of "
                f"the {retain.size} samples. Set `gradient_engine` to 'gram' or 'loop'."
            )

        def loss_of_one(trainable: dict[str, Tensor], sample: dict[str, Tensor]) -> Tensor:
            batch_of_one = {name: value[None] for name, value in sample.items()}
            functional_model = _FunctionalModel(model, trainable)
            return loss_scale * self.per_sample_losses(functional_model, {**batch_of_one, **constants})[0]

        gradient_of_one = torch.func.grad_and_value(loss_of_one)
        vectorised = torch.func.vmap(gradient_of_one, (None, 0), randomness="different", chunk_size=self.chunk_size)
        trainable = {name: parameter.detach() for name, parameter in self.parameters.trainable.items()}
        try:
            rows, losses = vectorised(trainable, tensors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"torch.func cannot vectorise {type(model).__name__} over samples ({str(error).splitlines()[0]}). "
                "Set `gradient_engine` to 'gram' or 'loop'."
            ) from error
        if term is None:
            return losses / loss_scale, rows, losses / loss_scale, {}
        # a forward pass of its own: what runs sample by sample under torch.func leaves no graph
        _, terms = retain.losses_and_terms(model, self.per_sample_losses, term)
        return losses / loss_scale, rows, terms, sum_gradients(loss_scale * terms.sum(), self.parameters.trainable)


class _FunctionalModel:
    """A model called with other parameters than its own; everything else it answers as the model does."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]):
        self._model, self._parameters = model, parameters

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return torch.func.functional_call(self._model, self._parameters, args, inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
