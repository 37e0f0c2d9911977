"""The Gram matrix of per-sample gradients, parameter by parameter, without the gradients of the whole model.

The forget batch takes an ordinary backward pass. Then one backward pass over the activations of the retain batch
delivers the gradient of each recorded call's output; the call's share of the inner products is formed at once, and what
the update will need of it is kept in its smaller form while the graph is given free.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..distributed import Placement
from .base import (
    ForgetBatch,
    GradientEngine,
    Parameters,
    PerSampleLosses,
    StepGradients,
    assemble_grams,
    exact_arithmetic,
)
from .calls import Call, Source, SpreadCall
from .chunked import Chunk, RepeatedGradients, split_samples
from .layers import per_sample_pieces
from .pieces import Dense, Outer, Piece
from .randomness import RandomState, preserved_random_state
from .recording import Recorder
from .shares import ParameterShare, Scratch, Use, count_cost


# of a chunk, as many samples as memory holds at once, one in so many runs forward where that has to be done again and
# again; what the others would take is left to gradients or factors of all samples
FORWARD_PART = 4


@dataclass
class KeptGradients(StepGradients):
    """Inner products beside the retain gradients or their factors, parameter by parameter; no graph is left.

    Parameters:
        parameters ([`Parameters`]): What the gradients belong to.
        shares (`dict[str, ParameterShare]`): What is kept for each trainable parameter.
        keep (`bool`): Whether it is there after [`combine`].
    """

    parameters: Parameters
    shares: dict[str, ParameterShare]
    keep: bool

    @property
    def outlives_combine(self) -> bool:
        return self.keep

    def combine(self, forget_weight: float, retain_weight: float, coefficients: dict[str, Tensor]) -> Tensor:
        gradients = {}
        for name, share in self.shares.items():
            weights = self.own_weights(retain_weight, coefficients.get(name))
            with exact_arithmetic(weights.device):
                gradients[name] = share.gradient(forget_weight, weights, keep=self.keep)
        return self.parameters.hand_over(gradients)

    def along(self, step: Iterable[tuple[str, Tensor]]) -> Tensor:
        own = sum(self.shares[name].inner(change).cpu() for name, change in step)
        return self.placement.gather_rows(own.to(self.retain_losses.device))

    def combination(self, name: str, coefficients: Tensor) -> Tensor:
        weights = coefficients[self.placement.span].to(self.retain_losses)
        return self.placement.exchange.sum(self.shares[name].combination(weights))


@dataclass
class RecomputedGradients(StepGradients):
    """Inner products beside the live graph of the retain batch, for a second backward pass of weighted losses.

    Under activation checkpointing that graph is small, and keeping gradients or factors would undo the saving.

    Parameters:
        parameters ([`Parameters`]): What the gradients belong to.
        forget_gradients (`dict[str, torch.Tensor]`): `g_u` of each trainable parameter that the forget loss uses.
        live_losses (`torch.Tensor`): The retain losses, scaled, with their graph, shape (k,).
        recorder ([`Recorder`]): The one that the graph was made under: what runs again must keep the same tensors.
    """

    parameters: Parameters
    forget_gradients: dict[str, Tensor]
    live_losses: Tensor
    recorder: Recorder

    def combine(self, forget_weight: float, retain_weight: float, coefficients: dict[str, Tensor]) -> Tensor:
        found, others = {}, self.parameters.others
        if others:
            mean = self.own_weights(retain_weight, None)
            found.update(self._weighted_gradients(mean, others, retain_graph=True))
        weights = self.own_weights(retain_weight, next(iter(coefficients.values()), None))
        found.update(self._weighted_gradients(weights, self.parameters.projected, retain_graph=False))
        for name, gradient in self.forget_gradients.items():
            gradient.mul_(forget_weight)
            found[name] = gradient if found[name] is None else gradient.add_(found[name])
        return self.parameters.hand_over(found)

    def _weighted_gradients(self, weights: Tensor, parameters: dict[str, nn.Parameter], *, retain_graph: bool):
        edges = [get_gradient_edge(parameter) for parameter in parameters.values()]
        weighted = weights @ self.live_losses
        with self.recorder:
            gradients = self.recorder.gradients(weighted, edges, retain_graph=retain_graph)
        return dict(zip(parameters, gradients, strict=True))


class GramEngine(GradientEngine):
    """Watches the retain batch's forward pass, then lets one backward pass over activations deliver what each call needs.

    Args:
        parameters ([`Parameters`]): What to differentiate by.
        per_sample_losses (`Callable`): The losses of a batch.
        keeps (`bool`): Whether retain gradients (or factors) are kept in any case: a projection tensor by tensor, or of the
            optimizer's step, needs them.
        chunk_size (`int`, *optional*): How many retain samples memory holds at once; all by default.

    Parameters:
        recomputes (`bool`): Whether activation checkpointing was seen to run parts of the forward pass again.
    """

    name = "gram"

    def __init__(
        self,
        parameters: Parameters,
        per_sample_losses: PerSampleLosses,
        *,
        keeps: bool = False,
        chunk_size: int | None = None,
    ):
        super().__init__(parameters, per_sample_losses)
        self.keeps, self.chunk_size = keeps, chunk_size
        self.recomputes = False
        self._scratch = Scratch()

    def measure(self, model: nn.Module, forget: list[ForgetBatch], retain: list[Mapping]) -> StepGradients:
        forget_losses, forget_gradients = self.forget_gradients(model, forget)
        chunks = split_samples(retain, self.chunk_size)
        placement = self.exchange.place(chunks[-1].samples.stop, forget_losses.device)
        if len(chunks) == 1 and not self._keeps_gradients(model, max(placement.counts)):
            groups, keeps = [list(self.parameters.trainable)], False
        else:
            groups = self.exchange.agree(self._group(model, chunks))
            keeps = len(groups) == 1
            if not keeps and self.chunk_size is not None:
                chunks = split_samples(retain, max(1, self.chunk_size // FORWARD_PART))
        products = {}
        for group in groups:
            shares = self._make_shares(group, forget_gradients, placement, keeps=keeps)
            losses, recorder = self._sweep(model, chunks, shares, retain_graph=not keeps and len(groups) == 1)
            products.update(self._products(shares))
            if group is groups[0]:
                retain_losses, end = losses, RandomState.now() if len(groups) > 1 else None
        if end is not None:
            end.restore()
        grams = assemble_grams(products, forget_gradients, placement)
        common = (forget_losses, retain_losses.detach(), grams, placement, self.parameters)
        if keeps:
            return KeptGradients(*common, shares, self.keeps or self.outlives_combine)
        if len(groups) == 1:
            return RecomputedGradients(*common, forget_gradients, self.loss_scale * retain_losses, recorder)
        scaled = partial(self._scaled_losses, model)
        return RepeatedGradients(*common, scaled, forget_gradients, chunks)

    def _keeps_gradients(self, model: nn.Module, num_samples: int) -> bool:
        """By rule: what is kept replaces the graph, unless checkpointing keeps that small.

        Then only gradients that together take no more memory than the model are kept, those of an adapter, unless
        they are needed in any case.
        """
        if not self.recomputes or self.keeps:
            return True
        trained = sum(parameter.numel() for parameter in self.parameters.trainable.values())
        return num_samples * trained <= sum(parameter.numel() for parameter in model.parameters())

    def _group(self, model: nn.Module, chunks: list[Chunk]) -> list[list[str]]:
        """Parameters in the order of their use, cut where a group would keep too much.

        That is more than all parameters would of one chunk together, less the part of it that will run forward, or, as
        with an adapter, more than the model takes.
        """
        trainable, first = self.parameters.trainable, chunks[0]
        if len(chunks) == 1 or self.keeps:
            return [list(trainable)]
        recorder = Recorder(trainable)
        try:
            with recorder, preserved_random_state():
                recorder.begin(first.inputs)
                size = len(first.losses(model, self.per_sample_losses))
            uses = find_uses(recorder.calls)
        finally:
            recorder.close()
        kept = {name: count_cost(trainable[name].shape, uses[name], size).kept_bytes for name in uses}
        share = 1 if self.chunk_size is None else 1 - 1 / FORWARD_PART
        budget = max(share * sum(kept.values()), sum(parameter.nbytes for parameter in model.parameters()))
        groups, used = [[]], 0
        for name in [*uses, *(name for name in trainable if name not in uses)]:
            bytes_of_all = kept.get(name, 0) * chunks[-1].samples.stop / size
            if groups[-1] and used + bytes_of_all > budget:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += bytes_of_all
        return groups

    def _scaled_losses(self, model: nn.Module, chunk: Chunk) -> Tensor:
        return self.loss_scale * chunk.losses(model, self.per_sample_losses)

    def _make_shares(
        self, group: list[str], forget_gradients: dict[str, Tensor], placement: Placement, *, keeps: bool
    ) -> dict[str, ParameterShare]:
        trainable, projected = self.parameters.trainable, self.parameters.projected
        return {
            name: ParameterShare(
                trainable[name], forget_gradients.get(name), placement, projected=name in projected, keeps=keeps
            )
            for name in group
        }

    def _sweep(
        self, model: nn.Module, chunks: list[Chunk], shares: dict[str, ParameterShare], *, retain_graph: bool
    ) -> tuple[Tensor, Recorder]:
        """Takes every chunk forward and backward for one group; returns all losses and the last recorder."""
        losses = []
        for chunk in chunks:
            recorder = Recorder(self.parameters.trainable, wanted=shares)
            try:
                with recorder:
                    recorder.begin(chunk.inputs)
                    own = chunk.losses(model, self.per_sample_losses)
                    self._collect(recorder, shares, own, chunk.samples, retain_graph=retain_graph)
            finally:
                recorder.close()
            self.recomputes = self.recomputes or recorder.recomputes
            losses.append(own if retain_graph else own.detach())
        return (losses[0] if len(losses) == 1 else torch.cat(losses)), recorder

    def _products(self, shares: dict[str, ParameterShare]) -> dict[str, Tensor]:
        projected = [name for name in shares if name in self.parameters.projected]
        with exact_arithmetic(self._device_of(shares)):
            return {name: shares[name].products(self._scratch) for name in projected}

    def _device_of(self, shares: dict[str, ParameterShare]) -> torch.device:
        return self.parameters.trainable[next(iter(shares))].device

    def _collect(
        self, recorder: Recorder, shares: dict[str, ParameterShare], losses: Tensor, samples: slice, retain_graph: bool
    ) -> None:
        for name, uses in find_uses(recorder.calls).items():
            if name in shares:
                shares[name].expect(uses, len(losses))
        wanted = {name: self.parameters.trainable[name] for name in shares}

        def consume(call: Call | SpreadCall, output_gradient: Tensor) -> None:
            with exact_arithmetic(output_gradient.device):
                pieces = per_sample_pieces(call, output_gradient)
            for source, piece in pieces:
                for name, own_piece in _resolve(source, piece, wanted):
                    with exact_arithmetic(output_gradient.device):
                        shares[name].add(own_piece, samples, self._scratch)

        recorder.deliver(self.loss_scale * losses.sum(), len(losses), consume, retain_graph=retain_graph)
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
    """Carries the gradient of a derived tensor on to those of the parameters that it was made from."""
    names = [name for name in source.parameters if name in parameters]
    if source.is_parameter or not names:
        return [(name, piece) for name in names]
    gradients = piece.dense() if isinstance(piece, Outer) else piece.gradients
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            [source.edge],
            [parameters[name] for name in names],
            grad_outputs=[gradients.to(source.dtype)],
            is_grads_batched=True,
            retain_graph=True,
        )
    return [(name, Dense(gradient)) for name, gradient in zip(names, gradients, strict=True)]
