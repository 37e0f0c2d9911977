"""The Gram matrix of per-sample gradients, parameter by parameter, without the gradients of the whole model.

The forget batch takes an ordinary backward pass. Then one backward pass over the activations of the retain batch
delivers the gradient of each recorded call's output; the call's share of the inner products is formed at once, and what
the update will need of it is kept in its smaller form while the graph is given free.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from .base import GradientEngine, Parameters, PerSampleLosses, Slopes, StepGradients, exact_arithmetic, known_gradients
from .calls import Call, Source, SpreadCall
from .layers import per_sample_pieces
from .pieces import Dense, Outer, Piece
from .recording import Recorder
from .shares import ParameterShare, Scratch, Use


@dataclass
class KeptGradients(StepGradients):
    """Inner products beside the retain gradients or their factors, parameter by parameter; no graph is left.

    Parameters:
        parameters ([`Parameters`]): What the gradients belong to.
        shares (`dict[str, ParameterShare]`): What is kept for each trainable parameter.
    """

    parameters: Parameters
    shares: dict[str, ParameterShare]

    def combine(self, forget_weight: float, retain_weight: float, coefficients: dict[str, Tensor]) -> Tensor:
        mean = torch.full_like(self.retain_losses, retain_weight / len(self.retain_losses))
        gradients = {}
        for name, share in self.shares.items():
            weights = mean + coefficients[name].to(mean) if name in coefficients else mean
            with exact_arithmetic(weights.device):
                gradients[name] = share.gradient(forget_weight, weights)
        return known_gradients(self.parameters.trainable, gradients)


@dataclass
class RecomputedGradients(StepGradients):
    """Inner products beside the live graph of the retain batch, for a second backward pass of weighted losses.

    Under activation checkpointing that graph is small, and keeping gradients or factors would undo the saving.

    Parameters:
        parameters ([`Parameters`]): What the gradients belong to.
        forget_gradients (`dict[str, torch.Tensor]`): `g_u` of each trainable parameter that the forget loss uses.
        live_losses (`torch.Tensor`): The retain losses with their graph, shape (k,).
        recorder ([`Recorder`]): The one that the graph was made under: what runs again must keep the same tensors.
    """

    parameters: Parameters
    forget_gradients: dict[str, Tensor]
    live_losses: Tensor
    recorder: Recorder

    def combine(self, forget_weight: float, retain_weight: float, coefficients: dict[str, Tensor]) -> Tensor:
        weights = torch.full_like(self.retain_losses, retain_weight / len(self.retain_losses))
        found = {}
        if self.parameters.others:
            found.update(self._weighted_gradients(weights, self.parameters.others, retain_graph=True))
        if coefficients:
            weights = weights + next(iter(coefficients.values())).to(weights)
        found.update(self._weighted_gradients(weights, self.parameters.projected, retain_graph=False))
        for name, gradient in self.forget_gradients.items():
            gradient.mul_(forget_weight)
            found[name] = gradient if found[name] is None else gradient.add_(found[name])
        return known_gradients(self.parameters.trainable, found)

    def _weighted_gradients(self, weights: Tensor, parameters: dict[str, nn.Parameter], *, retain_graph: bool):
        edges = [get_gradient_edge(parameter) for parameter in parameters.values()]
        weighted = weights @ self.live_losses
        with self.recorder:
            gradients = self.recorder.gradients(weighted, edges, retain_graph=retain_graph)
        return dict(zip(parameters, gradients, strict=True))


class GramEngine(GradientEngine):
    """Watches the retain batch's forward pass, then lets one backward pass over activations deliver what each call needs.

    Parameters:
        recomputes (`bool`): Whether activation checkpointing was seen to run parts of the forward pass again.
    """

    name = "gram"

    def __init__(self, parameters: Parameters, per_sample_losses: PerSampleLosses, *, per_tensor: bool = False):
        super().__init__(parameters, per_sample_losses)
        self.per_tensor = per_tensor
        self.recomputes = False
        self._scratch = Scratch()

    def measure(self, model: nn.Module, forget: Mapping, retain: Mapping, slopes: Slopes) -> StepGradients:
        forget_losses, forget_gradients = self.forget_gradients(model, forget, slopes)
        trainable = self.parameters.trainable
        recorder = Recorder(trainable)
        try:
            with recorder:
                recorder.begin(retain)
                retain_losses = self.per_sample_losses(model, retain)
                keeps = self._keeps_gradients(model, len(retain_losses))
                shares = {
                    name: ParameterShare(
                        parameter,
                        forget_gradients.get(name),
                        len(retain_losses),
                        projected=name in self.parameters.projected,
                        keeps=keeps,
                    )
                    for name, parameter in trainable.items()
                }
                samples = slice(0, len(retain_losses))
                self._collect(recorder, shares, retain_losses, samples, retain_graph=not keeps)
            self.recomputes = self.recomputes or recorder.recomputes
        finally:
            recorder.close()
        grams = {name: shares[name].gram(self._scratch) for name in self.parameters.projected}
        losses = (forget_losses.detach(), retain_losses.detach(), grams)
        if keeps:
            return KeptGradients(*losses, self.parameters, shares)
        return RecomputedGradients(*losses, self.parameters, forget_gradients, retain_losses, recorder)

    def _keeps_gradients(self, model: nn.Module, num_samples: int) -> bool:
        """By rule: what is kept replaces the graph, unless checkpointing keeps that small.

        Then only gradients that together take no more memory than the model are kept, those of an adapter; projecting
        tensor by tensor needs them in any case.
        """
        if not self.recomputes or self.per_tensor:
            return True
        trained = sum(parameter.numel() for parameter in self.parameters.trainable.values())
        return num_samples * trained <= sum(parameter.numel() for parameter in model.parameters())

    def _collect(
        self, recorder: Recorder, shares: dict[str, ParameterShare], losses: Tensor, samples: slice, retain_graph: bool
    ) -> None:
        for name, uses in find_uses(recorder.calls).items():
            shares[name].expect(uses, len(losses))

        def consume(call: Call | SpreadCall, output_gradient: Tensor) -> None:
            with exact_arithmetic(output_gradient.device):
                pieces = per_sample_pieces(call, output_gradient)
            for source, piece in pieces:
                for name, own_piece in _resolve(source, piece, self.parameters.trainable):
                    with exact_arithmetic(output_gradient.device):
                        shares[name].add(own_piece, samples, self._scratch)

        recorder.deliver(losses.sum(), len(losses), consume, retain_graph=retain_graph)
        with exact_arithmetic(losses.device):
            for share in shares.values():
                share.finish(samples)


def find_uses(calls: list[Call | SpreadCall]) -> dict[str, list[Use]]:
    """How recorded calls use each parameter, by its name."""
    uses = defaultdict(list)
    for call in calls:
        for source in call.sources:
            for name in source.parameters:
                uses[name].append(Use.of(call, source))
    return uses


def _resolve(source: Source, piece: Piece, parameters: dict[str, nn.Parameter]) -> list[tuple[str, Piece]]:
    """Carries the gradient of a derived tensor on to the parameters it was made from."""
    if source.is_parameter:
        return [(source.parameters[0], piece)]
    gradients = piece.dense() if isinstance(piece, Outer) else piece.gradients
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            [source.edge],
            [parameters[name] for name in source.parameters],
            grad_outputs=[gradients.to(source.dtype)],
            is_grads_batched=True,
            retain_graph=True,
        )
    return [(name, Dense(gradient)) for name, gradient in zip(source.parameters, gradients, strict=True)]
