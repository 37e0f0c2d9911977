"""What is ascended on the forget set, or answered in its place."""

import torch
import torch.nn.functional as F
from torch import Tensor


FORGET_LOSSES = ("ascent", "npo", "simnpo", "refusal")


class Ascent:
    """Gradient ascent on the loss itself. Unbounded."""

    def slopes(self, losses: Tensor) -> Tensor:
        """Ones, shape (m,)."""
        return torch.ones_like(losses)

    def value(self, losses: Tensor) -> Tensor:
        """What is ascended, a scalar: the mean of the losses (m,), in nats."""
        return losses.mean()


class NegativePreference:
    """Negative preference optimisation (arXiv 2404.05868, equation 3), a bounded form of ascent.

    NPO minimises `(2 / beta) log(1 + (p / p_ref)^beta)`. The paper takes the log-likelihood of the whole sequence.
    Here `log p` is minus the per-sample loss, a mean over tokens: `beta` means the same for short and long samples.

    Args:
        reference_losses (`torch.Tensor`): Shape (m,), the samples' losses under the starting model, in nats.
        beta (`float`): Inverse temperature, 1 / nats.
    """

    def __init__(self, reference_losses: Tensor, beta: float):
        self._reference_losses, self._beta = reference_losses, beta

    def slopes(self, losses: Tensor) -> Tensor:
        """`2 sigmoid(beta (reference - loss))`, shape (m,).

        1 at the start, as in ascent; 0 in the limit, as the loss rises above the reference.
        """
        return 2 * torch.sigmoid(self._beta * (self._reference_losses - losses))

    def value(self, losses: Tensor) -> Tensor:
        """What is ascended, a scalar: minus the mean of what NPO minimises."""
        return -(2 / self._beta * F.softplus(self._beta * (self._reference_losses - losses))).mean()


class SimpleNegativePreference:
    """SimNPO (arXiv 2410.07163, equation 4): NPO without a reference model.

    It minimises `-(2 / beta) log sigmoid(-(beta / |y|) log p - gamma)`; `-log p / |y|` is the per-sample loss, a mean over
    tokens.

    Args:
        beta (`float`): Inverse temperature, 1 / nats.
        gamma (`float`): Margin that beta times the loss is to reach; the higher, the longer a sample is pushed.
    """

    def __init__(self, beta: float, gamma: float):
        self._beta, self._gamma = beta, gamma

    def slopes(self, losses: Tensor) -> Tensor:
        """`2 sigmoid(gamma - beta loss)`, shape (m,); 0 in the limit, as the loss rises."""
        return 2 * torch.sigmoid(self._gamma - self._beta * losses)

    def value(self, losses: Tensor) -> Tensor:
        """What is ascended, a scalar: minus the mean of what SimNPO minimises."""
        return -(2 / self._beta * F.softplus(self._gamma - self._beta * losses)).mean()


class Refusal:
    """Descent on the loss of another answer, which the samples have in place of their own (TOFU's "I don't know", arXiv 2401.06121)."""

    def slopes(self, losses: Tensor) -> Tensor:
        """Minus ones, shape (m,)."""
        return -torch.ones_like(losses)

    def value(self, losses: Tensor) -> Tensor:
        """What is ascended, a scalar: minus the mean of the losses (m,) of that answer, in nats."""
        return -losses.mean()


ForgetObjective = Ascent | NegativePreference | SimpleNegativePreference | Refusal


def forget_objective(
    name: str, *, beta: float, gamma: float, reference_losses: Tensor | None = None
) -> ForgetObjective:
    """What is ascended on some forget samples: one of `FORGET_LOSSES`, for "npo" with their reference losses, (m,)."""
    if name == "ascent":
        return Ascent()
    if name == "simnpo":
        return SimpleNegativePreference(beta, gamma)
    if name == "refusal":
        return Refusal()
    return NegativePreference(reference_losses, beta)
