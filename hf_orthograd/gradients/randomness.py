"""Random numbers that a repeated forward pass draws again, and that a trial leaves alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Where torch's, numpy's and Python's random numbers are: dropout draws from the first, SpecAugment from numpy's."""

    python: tuple
    numpy: dict
    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> "RandomState":
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leaves the random numbers where they were."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()
