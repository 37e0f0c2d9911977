"""The Gram matrix of per-sample gradients, parameter by parameter, without the gradients of the whole model.

One backward pass over the activations delivers the gradient of each recorded call's output; the call's share of the
inner products is formed at once and dropped. No parameter gradient and no k copies of the model ever exist.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import GradientEngine, Parameters, Slopes, StepGradients, inner_products, linear_surrogate, weighted_mean
from .layers import Dense, Outer, Piece, per_sample_pieces
from .loop import gradients_or_zeros
from .recording import Call, Recorder


# what writing or reading one number of a large tensor costs, in multiplications: memory is slower than arithmetic
_MEMORY_COST = 8


@dataclass
class GramGradients(StepGradients):
    """Inner products beside the live graph of both forward passes.

    Parameters:
        parameters ([`Parameters`]): What the Gram matrix is about.
        merged (`bool`): Whether the retain samples make one row, their mean.
    """

    parameters: Parameters
    merged: bool

    def retain_mean(self) -> Tensor:
        return self.retain_losses.mean()

    def retain_combination(self, coefficients: dict[str, Tensor]) -> Tensor:
        shared = next(iter(coefficients.values())).to(self.retain_losses)
        combination = shared[0] * self.retain_losses.mean() if self.merged else shared @ self.retain_losses
        if self.parameters.others:
            unprojected = gradients_or_zeros(combination, self.parameters.others)
            combination = combination - linear_surrogate(self.parameters.others, unprojected)
        return combination - combination.detach()


class GramEngine(GradientEngine):
    """Watches the forward passes, then lets one backward pass over activations deliver what each call needs."""

    name = "gram"
    supports_per_tensor = False

    def measure(
        self, model: nn.Module, forget: Mapping, retain: Mapping, slopes: Slopes, merge_retain: bool = False
    ) -> StepGradients:
        recorder = Recorder(self.parameters.projected)
        try:
            with recorder:
                forget_pass = recorder.begin(forget, merged=True)
                forget_losses = self.per_sample_losses(model, forget)
                retain_pass = recorder.begin(retain, merged=merge_retain)
                retain_losses = self.per_sample_losses(model, retain)
            forget_pass.num_samples, forget_pass.rows = len(forget_losses), slice(0, 1)
            retain_pass.num_samples = len(retain_losses)
            retain_pass.rows = slice(1, 2 if merge_retain else 1 + len(retain_losses))
            forget_term = weighted_mean(forget_losses, slopes)
            retain_term = retain_losses.mean() if merge_retain else retain_losses.sum()
            grams = _gram_matrices(recorder, self.parameters.projected, forget_term + retain_term)
        finally:
            recorder.close()
        return GramGradients(forget_losses, retain_losses, forget_term, grams, self.parameters, merge_retain)


def _gram_matrices(recorder: Recorder, parameters: dict[str, nn.Parameter], loss: Tensor) -> dict[str, Tensor]:
    num_rows = max((call.forward.rows.stop for call in recorder.calls), default=1)
    shares = {name: _ParameterShare(parameter, num_rows) for name, parameter in parameters.items()}
    for call in recorder.calls:
        for source in call.sources:
            for name in source.parameters:
                shares[name].expect(call, source.is_parameter)

    def consume(call: Call, output_gradient: Tensor) -> None:
        with torch.no_grad():
            pieces = per_sample_pieces(call, output_gradient)
        for source, piece in pieces:
            for name, own_piece in _resolve(source, piece, parameters):
                shares[name].add(call, own_piece)

    recorder.consumer = consume
    if recorder.calls:
        ends = _last_reached([call.edge for call in recorder.calls])
        torch.autograd.grad(loss, ends, retain_graph=True, allow_unused=True)
    return {name: share.finish() for name, share in shares.items()}


def _resolve(source, piece: Piece, parameters: dict[str, nn.Parameter]) -> list[tuple[str, Piece]]:
    """Carries the gradient of a derived tensor on to the parameters it was made from."""
    if source.is_parameter:
        return [(source.parameters[0], piece)]
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            source.tensor,
            [parameters[name] for name in source.parameters],
            grad_outputs=piece.gradients.to(source.tensor.dtype),
            is_grads_batched=True,
            retain_graph=True,
        )
    return [(name, Dense(gradient)) for name, gradient in zip(source.parameters, gradients, strict=True)]


class _ParameterShare:
    """Collects the pieces of one parameter and adds up its inner products once all have come.

    Pieces of the same pass belong to the same samples (a tied weight has several) and are summed before the product.
    """

    def __init__(self, parameter: nn.Parameter, num_rows: int):
        self._parameter = parameter
        self._expected: list[Call] = []
        self._outer_only = True
        self._pieces: list[tuple[slice, Piece]] = []
        self._dense: dict[int, tuple[slice, Tensor]] = {}
        self.gram = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=parameter.device)
        self._left_to_come = 0

    def expect(self, call: Call, is_parameter: bool) -> None:
        self._expected.append(call)
        self._outer_only = self._outer_only and is_parameter and self._parameter.ndim == 2
        self._left_to_come += 1

    def add(self, call: Call, piece: Piece) -> None:
        rows = call.forward.rows
        if isinstance(piece, Outer) and self._pairwise_is_cheaper():
            self._pieces.append((rows, piece))
        else:
            self._add_dense(rows, piece.dense() if isinstance(piece, Outer) else piece.gradients)
        self._left_to_come -= 1
        if not self._left_to_come:
            self._multiply()

    def _add_dense(self, rows: slice, gradients: Tensor) -> None:
        if rows.start in self._dense:
            gradients = self._dense[rows.start][1] + gradients
        self._dense[rows.start] = (rows, gradients)

    def finish(self) -> Tensor:
        """The inner products; calls the loss does not depend on never delivered anything and add nothing."""
        self._multiply()
        return self.gram

    def _pairwise_is_cheaper(self) -> bool:
        """Counts multiplications and memory traffic of both forms over all calls of this parameter."""
        if not self._outer_only:
            return False
        p, q = self._parameter.shape
        num_rows = len(self.gram)
        # an embedding's left factors are one-hot: its gradients are only gathered, and so are its products
        calls = [(call.shape.numel() // call.shape[-1], call.function is F.embedding) for call in self._expected]
        gradients = sum(positions * q * (1 if one_hot else p) for positions, one_hot in calls)
        materialised = gradients + (num_rows**2 + _MEMORY_COST * num_rows * (1 + len(calls))) * p * q
        pairwise = sum(
            positions * others * (q + 2 * _MEMORY_COST + (0 if one_hot or other_one_hot else p))
            for i, (positions, one_hot) in enumerate(calls)
            for others, other_one_hot in calls[: i + 1]
        )
        return pairwise < materialised

    def _multiply(self) -> None:
        if self._dense:  # factors and whole gradients of one parameter have cross terms: bring them to one form
            for rows, piece in self._pieces:
                self._add_dense(rows, piece.dense())
            self._pieces = []
        for i, (rows, piece) in enumerate(self._pieces):
            for other_rows, other in self._pieces[: i + 1]:
                self._add_block(rows, other_rows, piece.inner(other), symmetric=other is piece)
        blocks = [(rows, gradients.flatten(1).float()) for rows, gradients in self._dense.values()]
        for i, (rows, gradients) in enumerate(blocks):
            for other_rows, other in blocks[: i + 1]:
                block = inner_products(gradients, other)
                self._add_block(rows, other_rows, block, symmetric=other is gradients)
        self._pieces, self._dense = [], {}

    def _add_block(self, rows: slice, other_rows: slice, block: Tensor, symmetric: bool) -> None:
        self.gram[rows, other_rows] += block
        if not symmetric:
            self.gram[other_rows, rows] += block.T


def _last_reached(edges: list) -> list:
    """The edges from which the backward pass reaches no other: asking for these alone runs through all the rest.

    Asking for every edge would keep every output gradient alive until the pass ends.
    """
    recorded = {edge.node for edge in edges}
    reaches: dict = {}

    def visit(root) -> None:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in reaches:
                stack.pop()
                continue
            children = [child for child, _ in node.next_functions if child is not None]
            unseen = [child for child in children if child not in reaches]
            if unseen:
                stack.extend(unseen)
                continue
            reaches[node] = any(child in recorded or reaches[child] for child in children)
            stack.pop()

    for edge in edges:
        visit(edge.node)
    return [edge for edge in edges if not reaches[edge.node]]
