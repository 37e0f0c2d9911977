"""Methods that ascend tokens by weights of their own: WGA and SatImp."""

from typing import Any

from torch import Tensor, nn

from ..data import Batch
from ..objectives import IGNORED_LABEL, losses_at_positions, mean_where
from .base import BaselineTrainer, weigh_by_alpha


class TokenWeightedTrainer(BaselineTrainer):
    """Ascends `mean_t w(p_t) loss_t` of each forget sample, `p_t` the probability of token t, its weight held constant.

    The weights of both batches are `1 - alpha` and `alpha`. A class counts as one token.
    """

    needs_positions = True

    def token_weights(self, probabilities: Tensor) -> Tensor:
        """From probabilities (B, T) to weights (B, T)."""
        raise NotImplementedError

    def forget_loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        logits, labels = self.per_sample_loss.positions(model(**batch.inputs), batch.inputs)
        losses = losses_at_positions(logits, labels)
        weights = self.token_weights((-losses.detach()).exp())
        return -mean_where(weights * losses, labels != IGNORED_LABEL).mean()

    def weigh(self, losses: dict[str, Tensor], forget: list[Batch], retain: list[Batch]) -> Tensor:
        return weigh_by_alpha(losses, self.args.alpha)


class WgaTrainer(TokenWeightedTrainer):
    """Weighted gradient ascent (arXiv 2502.19301): `w = p^beta`, so that what is forgotten is left alone.

    Args:
        beta (`float`): The paper's exponent.
    """

    def __init__(self, *args: Any, beta: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._beta = beta

    def token_weights(self, probabilities: Tensor) -> Tensor:
        return probabilities**self._beta


class SatImpTrainer(TokenWeightedTrainer):
    """SatImp (arXiv 2505.11953): `w = p^beta1 (1 - p)^beta2`, saturation times importance.

    Args:
        beta1, beta2 (`float`): The paper's exponents.
    """

    def __init__(self, *args: Any, beta1: float = 5.0, beta2: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._beta1, self._beta2 = beta1, beta2

    def token_weights(self, probabilities: Tensor) -> Tensor:
        return probabilities**self._beta1 * (1 - probabilities) ** self._beta2
