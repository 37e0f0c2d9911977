"""The model that a run starts from, whose predictions on retain samples the run is to keep."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

from ..data import Batch
from ..objectives import PerSampleLoss
from ..parallel import ProcessGroup
from ..parallel.sharding import is_sharded, reshard
from ..trials import preserved_modes, preserved_random_state
from .stored_predictions import StoredPredictions


# where a model masks what it reads while it trains (SpecAugment), with random numbers of numpy
_MASKING = ("_mask_input_features", "_mask_hidden_states")


class StartingModel:
    """A copy of what is trained, put in the place of the model's own for a forward pass.

    With LoRA that is a copy of the adapter alone; the base is shared. Of full parameters it is one more copy of all, in their
    type; of shards, of this process' own.

    Args:
        model (`torch.nn.Module`): Unwrapped, before its first step.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._values = {name: _local(tensor).detach().clone() for name, tensor in _changing(model)}
        self._is_sharded = is_sharded(model)

    def fingerprint(self, group: ProcessGroup) -> list[float]:
        """The sum of the magnitudes in each tensor, that of all its shards: of another model it is another."""
        sums = torch.stack([value.abs().sum(dtype=torch.float32) for value in self._values.values()])
        return (group.sum(sums) if self._is_sharded else sums).tolist()

    @torch.no_grad()
    def run(self, forward: Callable[[nn.Module], object]) -> object:
        """What `forward` returns of the model as it was at the start, in evaluation mode.

        Masks of SpecAugment are those that the next forward pass of the model itself will draw.
        """
        with preserved_random_state(), preserved_modes(self._model), self._in_place():
            for module in self._model.modules():
                module.training = any(hasattr(module, name) for name in _MASKING)
            return forward(self._model)

    def outputs(self, per_sample_loss: PerSampleLoss, batch: Batch) -> ModelOutput:
        """What it answers to a batch."""
        return self.run(lambda start: per_sample_loss.outputs(start, batch.inputs))

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        reshard(self._model)  # a sharded model then gathers what is put in place here
        self._swap()
        try:
            yield
        finally:
            reshard(self._model)
            self._swap()

    def _swap(self) -> None:
        torch.clear_autocast_cache()  # under an autocast around the step it holds casts of the weights that go
        for name, tensor in _changing(self._model):
            own, value = _local(tensor), self._values[name]
            if isinstance(tensor, DTensor):  # FSDP keeps memory of its own for the shards
                self._values[name] = own.detach().clone()
                own.detach().copy_(value)
            else:
                self._values[name], tensor.data = tensor.data, value.to(tensor.device, tensor.dtype)


class ReferenceModel(StartingModel):
    """A model beside the one that is trained, as that before any request.

    Args:
        model (`torch.nn.Module`): Of the same outputs. It is frozen.
        device (`torch.device`): Of the run.
        autocast (`Callable`): A context in which it runs in the precision of the model that is trained.
    """

    def __init__(self, model: nn.Module, device: torch.device, autocast: Callable[[], AbstractContextManager]):
        self._model, self._is_sharded = model.to(device).requires_grad_(False), False
        self._autocast = autocast
        self._values = dict(model.named_parameters())  # they tell which model it is

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        with self._autocast():
            yield


class KeepPredictions:
    """How far a retain sample's predictions have gone from those of another model: KL(start || model).

    Args:
        start ([`StartingModel`] or [`StoredPredictions`]): Whose predictions they were.
        per_sample_loss ([`PerSampleLoss`]): Of the model; says which positions count.
    """

    def __init__(self, start: StartingModel | StoredPredictions, per_sample_loss: PerSampleLoss):
        self._start, self._per_sample_loss = start, per_sample_loss

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """One forward pass of the model gives both, beside the starting model's answers."""
        before = self._start.outputs(self._per_sample_loss, batch)
        losses, outputs = self._per_sample_loss.with_outputs(model, batch.inputs)
        return losses, self._per_sample_loss.divergences(outputs, before, batch.inputs)


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What training changes: trained parameters, and the statistics of BatchNorm."""
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    for prefix, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None:
            yield from ((f"{prefix}.{name}", getattr(module, name)) for name in ("running_mean", "running_var"))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
