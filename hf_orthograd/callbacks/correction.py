"""The optimizer's step, corrected: what is projected is the change that parameters really make.

Momentum, Adam's scaling, weight decay and clipping act on a projected gradient afterwards and bend it back towards the
retain gradients. Here the step that was made is replaced by the nearest one under which, to first order, no retain
sample of the step becomes worse.
"""

from collections.abc import Iterator
from typing import Any

import torch
from scipy.optimize import nnls
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..gradients import StepGradients
from ..gradients.products import accumulation_dtype
from ..objectives import PerSampleLosses
from ..parallel import Parameters
from .observer import Record, StepObserver


def solve_correction(gram: Tensor, products: Tensor, *, equality: bool) -> tuple[Tensor, Tensor]:
    """Solves for the smallest correction of a step that keeps it from making any retain sample worse.

    Of all steps with `<g_i, step> <= 0` for every retain sample (to first order, no loss rises), or `= 0`, the nearest to
    a given step is `step - sum_i c_i g_i`. The inequalities are the dual of a least-squares problem with c >= 0.

    Args:
        gram (`torch.Tensor`): Shape (k, k). Inner products of the retain gradients.
        products (`torch.Tensor`): Shape (k,). Inner products of the retain gradients with the step.
        equality (`bool`): Whether no retain loss may fall either.

    Returns:
        The coefficients c, shape (k,), and the inner products that are left, `products - gram @ c`, float64.

    Raises:
        RuntimeError: The least-squares problem did not converge (from scipy, Lawson and Hanson's algorithm).
    """
    gram, products = gram.detach().to("cpu", torch.float64), products.detach().to("cpu", torch.float64)
    norms = gram.diagonal().clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0)
    system, target = gram * scale * scale[:, None], products * scale
    eigenvalues, eigenvectors = torch.linalg.eigh(system)
    cut = len(gram) * torch.finfo(torch.float32).eps * eigenvalues[-1].clamp_min(0)
    basis, roots = eigenvectors[:, eigenvalues > cut], eigenvalues[eigenvalues > cut].sqrt()
    aim = (basis.T @ target) / roots
    if equality:
        solution = basis @ (aim / roots)
    else:
        solution = torch.from_numpy(nnls((basis * roots).T.numpy(), aim.numpy())[0])
    coefficients = solution * scale
    return coefficients, products - gram @ coefficients


class UpdateCorrection(StepObserver):
    """Corrects each step of the optimizer by the retain gradients of that step.

    Works with any optimizer of torch: it looks at parameters before and after. Takes the memory of one more copy of the
    projected parameters, and of the retain gradients or their factors until the step is made. For each step two
    numbers are recorded. "update_kept" is the norm of the corrected step over that of the optimizer's.
    "update_residual" is the largest cosine of the corrected step with a retain gradient by which a retain loss would
    still rise.

    Args:
        equality (`bool`): Whether no retain loss may fall either: for alpha = 0, where the update is to leave the retain
            samples alone.
        record (`Callable`): Takes what is to be logged.
    """

    def __init__(self, *, equality: bool, record: Record):
        super().__init__(record)
        self._equality = equality
        self._parameters: Parameters | None = None
        self._before: dict[str, Tensor] = {}
        self._step: StepGradients | None = None

    def attach(self, parameters: Parameters, per_sample_losses: PerSampleLosses, logging_steps: int) -> None:
        self._parameters, self._step, self._before = parameters, None, {}

    def watches(self, global_step: int) -> bool:
        return True

    def take_gradients(self, step: StepGradients) -> None:
        self._step = step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = {name: parameter.detach().clone() for name, parameter in self._parameters.stored.items()}

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, self._step = self._step, None
        before, self._before = self._before, {}
        if step is None:  # nothing was made to step along: a loss was not finite
            return
        parameters, squares = self._parameters, []

        def changes() -> Iterator[tuple[str, Tensor]]:
            for name, parameter in parameters.stored.items():
                change = parameters.whole(parameter.detach() - before[name])
                squares.append(_squared_norm(change))
                yield name, change

        products = step.along(changes())
        gram = step.gram[1:, 1:].to(products.device)
        on_host = torch.cat((gram, products[:, None], torch.stack(squares).sum().expand(len(gram), 1)), dim=1).cpu()
        gram, products, squared = on_host[:, :-2], on_host[:, -2], on_host[0, -1].item()
        if squared == 0:  # a step skipped for its overflow, or a learning rate of zero
            return
        coefficients, left = solve_correction(gram, products, equality=self._equality)
        coefficients, squares = coefficients.to(parameters.device), []
        for name, parameter in parameters.stored.items():
            taken_out = step.combination(name, coefficients).to(parameter.dtype)
            change = parameter.detach() - before[name] - parameters.as_stored(name, taken_out)
            parameter.copy_(before[name] + change)
            squares.append(_squared_norm(parameters.whole(change)))
        corrected = torch.stack(squares).sum().item()
        norms = gram.diagonal().clamp_min(0).sqrt() * corrected**0.5
        rises = (left.abs() if self._equality else left.clamp_min(0)) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        self.record("update_kept", (corrected / squared) ** 0.5)
        self.record("update_residual", rises.max().item())


def _squared_norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=accumulation_dtype(tensor.device)).square()
