"""What a trial, an evaluation or a repeated forward pass leaves as it was: random numbers, and the modes of modules."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomState:
    """Where all random numbers are: dropout draws from the device's, SpecAugment from numpy's.

    Attributes:
        python, numpy, cpu: States of Python's, numpy's and torch's generators on the host.
        accelerator (`list[torch.Tensor]`): One state for each device of the accelerator, whichever it is; empty without.
    """

    python: tuple
    numpy: dict
    cpu: Tensor
    accelerator: list[Tensor]

    @classmethod
    def now(cls) -> "RandomState":
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), _accelerator_states())

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        _restore_accelerator(self.accelerator)


def _accelerator_states() -> list[Tensor]:
    if not torch.accelerator.is_available():
        return []
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    # MPS has one device, and no function for all of them
    return module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else [module.get_rng_state()]


def _restore_accelerator(states: list[Tensor]) -> None:
    if not states:
        return
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    if hasattr(module, "set_rng_state_all"):
        module.set_rng_state_all(states)
    else:
        module.set_rng_state(states[0])


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leaves the random numbers where they were."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Leaves every module in training or evaluation mode as it was, also where they differ within the model."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def replaced(owner: object, attribute: str, value: object) -> Iterator[None]:
    """Puts another value in the place of an attribute, for as long as a call takes."""
    original, is_own = getattr(owner, attribute), attribute in vars(owner)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, attribute, original)
        else:  # it is of the class, or of what the owner wraps
            delattr(owner, attribute)
