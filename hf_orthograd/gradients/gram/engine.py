"""The Gram matrix of per-sample gradients, parameter by parameter, without the gradients of the whole model.

The forget batch takes an ordinary backward pass. Then one backward pass over the activations of the retain batch
delivers the gradient of each recorded call's output. The call's part of the inner products is formed at once. What the
update will need of it is kept, as gradients or their factors, while the graph is given free.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ...data import Batch
from ...objectives import PerSampleLosses
from ...parallel import Parameters, SampleLayout
from ...projection import UpdateWeights
from ...trials import RandomState, preserved_random_state
from ..base import ForgetBatch, GradientEngine, MeasureSettings, RetainTerm, StepGradients, UnsupportedModelError
from ..products import exact_arithmetic, own_memory
from .accumulation import ParameterGradients, Products, Scratch
from .calls import Call, Source, SpreadCall
from .chunks import Chunk, RepeatedGradients, check_images, image_tokens, split_samples, weigh_groups
from .forms import Dense, Form, Outer, Use, count_cost
from .recording import Recorder
from .rules import per_sample_forms


# of a chunk, as many samples as memory holds at once, one in so many runs forward where that has to be done again and
# again; what the others would take is left to gradients or factors of all samples
FORWARD_PART = 4
# torch has no batching rule for these: it would take the samples one by one too, and hold all results twice
_WITHOUT_BATCHING = frozenset({"WeightNormInterfaceBackward0"})


@dataclass
class KeptGradients(StepGradients):
    """Inner products beside the retain gradients or their factors, parameter by parameter; no graph is left.

    Attributes:
        kept (`dict[str, ParameterGradients]`): What is kept for each trainable parameter.
        survives_combine (`bool`): Whether it is there after [`combine`].
        term_gradients (`dict[str, torch.Tensor]`): Of the retain term, if it is not the losses' mean.
        joined (`tuple`, *optional*): Small parameters side by side, as [`Products`] has them.
    """

    kept: dict[str, ParameterGradients]
    survives_combine: bool
    term_gradients: dict[str, Tensor]
    joined: tuple[dict[str, int], Tensor] | None = None

    @property
    def has_retain_gradients(self) -> bool:
        return self.survives_combine

    def combine(self, weights: UpdateWeights) -> Tensor:
        gradients = {name: own.begin_update() for name, own in self.kept.items()}
        totals = {name: total for name, total in gradients.items() if total is not None}
        sizes, rows = ({}, None) if self.joined is None else self.joined
        with exact_arithmetic(self.retain_losses.device):
            torch._foreach_mul_(list(totals.values()), weights.forget)
            for name, gradient in self.term_gradients.items():
                if name not in totals:
                    totals[name] = gradients[name] = torch.zeros_like(gradient, dtype=torch.float32)
                totals[name].add_(gradient, alpha=self.term_weight(weights))
            self.term_gradients = {}
            for name, total in totals.items():
                if name not in sizes:
                    self.kept[name].add_update(self.local_weights(weights, name), total)
                if not self.survives_combine:
                    self.kept[name].let_go()
            if sizes:  # many tensors of few numbers in one product
                summed = (self.local_weights(weights, next(iter(sizes))) @ rows).split(list(sizes.values()))
                pairs = [(totals[name], own) for name, own in zip(sizes, summed, strict=True) if name in totals]
                torch._foreach_add_(
                    *map(list, zip(*((total, own.view_as(total)) for total, own in pairs), strict=True))
                )
        if not self.survives_combine:
            self.joined = None
        return self.hand_over(gradients)

    def along(self, step: Iterable[tuple[str, Tensor]]) -> Tensor:
        with exact_arithmetic(self.retain_losses.device):
            products = [self.kept[name].products_with(change) for name, change in step]
        device = self.retain_losses.device
        return self.layout.gather_rows(torch.stack([product.to(device) for product in products]).sum(dim=0))

    def combination(self, name: str, coefficients: Tensor) -> Tensor:
        weights = coefficients[self.layout.span].to(self.retain_losses)
        total = torch.zeros_like(self.parameters.trainable[name], dtype=torch.float32)
        with exact_arithmetic(total.device):
            self.kept[name].add_update(weights, total)
        return self.layout.group.sum(total)


@dataclass
class RecomputedGradients(StepGradients):
    """Inner products beside the live graph of the retain batch, for a second backward pass of weighted losses.

    Under activation checkpointing that graph is small, and keeping gradients or factors would undo the saving. A retain term
    of its own takes a second backward pass in any case.

    Attributes:
        forget_gradients (`dict[str, torch.Tensor]`): `g_u` of each trainable parameter that the forget loss uses.
        live_losses, live_terms (`torch.Tensor`): The retain losses, scaled, with their graph, shape (k,), and the retain
            terms; the losses again without a term of its own.
        recorder ([`Recorder`]): The one that the graph was made under: what runs again must keep the same tensors.
    """

    forget_gradients: dict[str, Tensor]
    live_losses: Tensor
    live_terms: Tensor
    recorder: Recorder

    def combine(self, weights: UpdateWeights) -> Tensor:
        found = {}
        groups = weigh_groups(self.parameters.others, self.parameters.projected)
        for number, (name, parameters) in enumerate(groups):
            edges = [get_gradient_edge(parameter) for parameter in parameters.values()]
            weighted = self.local_weights(weights, name).to(self.live_losses.dtype) @ self.live_losses
            if weights.retain_term:
                weighted = weighted + self.term_weight(weights) / self.layout.total * self.live_terms.sum()
            with self.recorder:
                retain_graph = number < len(groups) - 1
                gradients = self.recorder.gradients(weighted, edges, retain_graph=retain_graph)
            found.update(zip(parameters, own_memory(gradients), strict=True))
        for name, gradient in self.forget_gradients.items():
            gradient.mul_(weights.forget)
            found[name] = gradient if found[name] is None else gradient.add_(found[name])
        return self.hand_over(found)


class GramEngine(GradientEngine):
    """Watches the retain batch's forward pass, then lets one backward pass over activations deliver what each call needs.

    Args:
        parameters ([`Parameters`]): What to differentiate by.
        per_sample_losses (`Callable`): The losses of a batch.
        needs_gradients (`bool`): Whether the run needs the retain gradients themselves (or their factors) in any case: a
            projection tensor by tensor, or of the optimizer's step, does.
        chunk_size (`int`, *optional*): How many retain samples memory holds at once; all by default.

    Attributes:
        recomputes (`bool`): Whether activation checkpointing was seen to run parts of the forward pass again.
    """

    name = "gram"

    def __init__(
        self,
        parameters: Parameters,
        per_sample_losses: PerSampleLosses,
        *,
        needs_gradients: bool = False,
        chunk_size: int | None = None,
    ):
        super().__init__(parameters, per_sample_losses)
        self.needs_gradients, self.chunk_size = needs_gradients, chunk_size
        self.recomputes = False
        self.scratch = Scratch()
        self._image_tokens: set[int] | None = None
        self._grouping: tuple[tuple[int, ...], int, list[list[str]]] | None = None

    def step_gradients(
        self, model: nn.Module, forget: list[ForgetBatch], retain: list[Batch], settings: MeasureSettings
    ) -> StepGradients:
        group, loss_scale = settings.group, settings.loss_scale
        if self._image_tokens is None:
            self._image_tokens = image_tokens(model, self.parameters.trainable)
        check_images(retain, self._image_tokens)
        forget_losses, forget_gradients = self.forget_gradients(model, forget, group, loss_scale)
        chunks = split_samples(retain, self.chunk_size)
        layout = group.layout(chunks[-1].samples.stop, forget_losses.device)
        sweep = _Sweep(self, model, loss_scale, settings.retain_term, layout.total)
        own = len(chunks), max(chunk.extent for chunk in chunks)
        numbers = group.gather_numbers(*own, device=self.parameters.device)
        most, longest = (max(values) for values in zip(*numbers, strict=True))
        term = settings.retain_term
        if most == 1 and not self._keeps_gradients(model, max(layout.counts), takes_term=term is not None):
            groups, replaces_graph = [list(self.parameters.trainable)], False
        else:
            groups = self._group(sweep, chunks, layout, most, longest)
            replaces_graph = len(groups) == 1
            if not replaces_graph and self.chunk_size is not None:
                chunks = split_samples(retain, max(1, self.chunk_size // FORWARD_PART))
        found, end = Products(self.parameters, forget_gradients, layout, settings.per_parameter), None
        for names in groups:
            kept = self._make_accumulators(names, forget_gradients, layout, replaces_graph=replaces_graph)
            (losses, terms), recorder = sweep.run(chunks, kept, retain_graph=not replaces_graph and len(groups) == 1)
            found.take(kept, self.scratch)
            if names is groups[0]:
                retain_losses, end = losses, RandomState.now() if len(groups) > 1 else None
        if end is not None:
            end.restore()
        own_terms = terms.detach() if term is not None and len(groups) == 1 else None
        everything = (forget_losses, retain_losses.detach(), own_terms, found.grams(), layout, self.parameters, group)
        if replaces_graph:
            survives = self.needs_gradients or settings.keep_gradients
            return KeptGradients(*everything, kept, survives, sweep.term_gradients, found.joined)
        if len(groups) == 1:
            live = loss_scale * retain_losses, loss_scale * terms
            return RecomputedGradients(*everything, forget_gradients, *live, recorder)
        return RepeatedGradients(*everything, sweep.losses_of, loss_scale, forget_gradients, chunks)

    def _keeps_gradients(self, model: nn.Module, num_samples: int, *, takes_term: bool) -> bool:
        """By rule: what is kept replaces the graph, unless checkpointing keeps that small, or a retain term needs it.

        Then only gradients that together take no more memory than the model are kept, those of an adapter, unless
        they are needed in any case.
        """
        if not (self.recomputes or takes_term) or self.needs_gradients:
            return True
        trained = sum(parameter.numel() for parameter in self.parameters.trainable.values())
        return num_samples * trained <= sum(parameter.numel() for parameter in model.parameters())

    def _group(
        self, sweep: "_Sweep", chunks: list[Chunk], layout: SampleLayout, most: int, longest: int
    ) -> list[list[str]]:
        """Parameters in the order of their use, cut where a group would keep too much, the same in every process.

        It takes a forward pass to find out, whose answer holds until more samples or longer ones come.
        """
        if most == 1 or self.needs_gradients:
            return [list(self.parameters.trainable)]
        if self._grouping is None or self._grouping[0] != layout.counts or self._grouping[1] < longest:
            groups = layout.group.agree(self._find_groups(sweep, chunks))
            self._grouping = layout.counts, longest, groups
        return self._grouping[2]

    def _find_groups(self, sweep: "_Sweep", chunks: list[Chunk]) -> list[list[str]]:
        """A group replaces_graph no more than all parameters would of one chunk together.

        Less the part of it that will run forward, or, as with an adapter, no more than the model takes.
        """
        trainable, first = self.parameters.trainable, chunks[0]
        uses = sweep.watch(first)
        kept = {name: count_cost(trainable[name], uses[name], first.size).kept_bytes for name in uses}
        share = 1 if self.chunk_size is None else 1 - 1 / FORWARD_PART
        budget = max(share * sum(kept.values()), sum(parameter.nbytes for parameter in sweep.model.parameters()))
        groups, taken = [[]], 0
        for name in [*uses, *(name for name in trainable if name not in uses)]:
            bytes_of_all = kept.get(name, 0) * chunks[-1].samples.stop / first.size
            if groups[-1] and taken + bytes_of_all > budget:
                groups.append([])
                taken = 0
            groups[-1].append(name)
            taken += bytes_of_all
        return groups

    def _make_accumulators(
        self, names: list[str], forget_gradients: dict[str, Tensor], layout: SampleLayout, *, replaces_graph: bool
    ) -> dict[str, ParameterGradients]:
        trainable, projected = self.parameters.trainable, self.parameters.projected
        return {
            name: ParameterGradients(
                trainable[name],
                forget_gradients.get(name),
                layout,
                projected=name in projected,
                for_update=replaces_graph,
            )
            for name in names
        }


@dataclass
class _Sweep:
    """Passes over the retain chunks of one step."""

    engine: GramEngine
    model: nn.Module
    loss_scale: float
    term: RetainTerm | None
    total: int
    term_gradients: dict[str, Tensor] = field(default_factory=dict)

    def losses_of(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """And its retain terms."""
        return chunk.losses_and_terms(self.model, self.engine.per_sample_losses, self.term)

    def watch(self, chunk: Chunk) -> dict[str, list[Use]]:
        """How a forward pass of the chunk uses each parameter; leaves the random numbers as they were."""
        recorder = Recorder(self.engine.parameters.trainable)
        try:
            with recorder, preserved_random_state():
                recorder.begin(chunk.inputs)
                Batch.losses(chunk, self.model, self.engine.per_sample_losses)
            return find_uses(recorder.calls)
        finally:
            recorder.close()

    def run(
        self, chunks: list[Chunk], kept: dict[str, ParameterGradients], *, retain_graph: bool
    ) -> tuple[tuple[Tensor, Tensor], Recorder]:
        """Takes every chunk forward and backward for one group; returns all losses, all terms, and the last recorder."""
        found = []
        # where the parameters come in several groups, the terms wait for the update
        term = self.term if len(kept) == len(self.engine.parameters.trainable) else None
        for chunk in chunks:
            recorder = Recorder(self.engine.parameters.trainable, wanted=kept)
            try:
                with recorder:
                    recorder.begin(chunk.inputs)
                    own, terms = chunk.losses_and_terms(self.model, self.engine.per_sample_losses, term)
                    if not recorder.saw_parameters:
                        raise UnsupportedModelError(
                            f"No call of {type(self.model).__name__} that uses a trained parameter was seen, so nothing "
                            "could be projected: its forward pass does not run through torch's Python functions here. Is "
                            "the model compiled? Set `gradient_engine` to 'loop', or do not compile it."
                        )
                    if term is not None and not retain_graph:
                        self._take_term(recorder, terms)
                    self._collect(recorder, kept, own, chunk.samples, retain_graph=retain_graph)
            finally:
                recorder.close()
            self.engine.recomputes = self.engine.recomputes or recorder.recomputes
            found.append((own, terms) if retain_graph else (own.detach(), terms.detach()))
        return (found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))), recorder

    def _take_term(self, recorder: Recorder, terms: Tensor) -> None:
        """Adds this chunk's part of the gradient of the mean term, before its graph is given free."""
        trainable = self.engine.parameters.trainable
        edges = [get_gradient_edge(parameter) for parameter in trainable.values()]
        mean = self.loss_scale * terms.sum() / self.total
        gradients = recorder.gradients(mean, edges, retain_graph=True)
        for name, gradient in zip(trainable, own_memory(gradients), strict=True):
            if gradient is not None:
                own = self.term_gradients
                own[name] = gradient if name not in own else own[name].add_(gradient)

    def _collect(
        self,
        recorder: Recorder,
        kept: dict[str, ParameterGradients],
        losses: Tensor,
        samples: slice,
        *,
        retain_graph: bool,
    ) -> None:
        for name, uses in find_uses(recorder.calls).items():
            if name in kept:
                kept[name].begin_pass(uses, len(losses))
        wanted = {name: self.engine.parameters.trainable[name] for name in kept}
        scratch = self.engine.scratch

        def consume(call: Call | SpreadCall, output_gradient: Tensor) -> None:
            with exact_arithmetic(output_gradient.device):
                for source, form in per_sample_forms(call, output_gradient):
                    for name, own_form in _resolve(source, form, wanted):
                        kept[name].add(own_form, samples, scratch)

        recorder.deliver(self.loss_scale * losses.sum(), len(losses), consume, retain_graph=retain_graph)
        with exact_arithmetic(losses.device):
            for own in kept.values():
                own.end_pass(samples)


def find_uses(calls: list[Call | SpreadCall]) -> dict[str, list[Use]]:
    """How recorded calls use each parameter, by its name."""
    uses = defaultdict(list)
    for call in calls:
        for source in call.sources:
            for name in source.parameters:
                uses[name].append(Use.of(call, source))
    return uses


def _resolve(source: Source, form: Form, parameters: dict[str, nn.Parameter]) -> list[tuple[str, Form]]:
    """Carries the gradient of a derived tensor on to those of the parameters that it was made from."""
    names = [name for name in source.parameters if name in parameters]
    if source.is_parameter or not names:
        return [(name, form) for name in names]
    gradients = form.dense() if isinstance(form, Outer) else form.gradients
    wanted = [parameters[name] for name in names]
    if source.edge.node.name() in _WITHOUT_BATCHING:
        rows = _pull_back_one_by_one(source, gradients, wanted)
    else:
        with torch.enable_grad():
            rows = torch.autograd.grad(
                [source.edge], wanted, [gradients.to(source.dtype)], is_grads_batched=True, retain_graph=True
            )
    return [(name, Dense(gradient)) for name, gradient in zip(names, rows, strict=True)]


def _pull_back_one_by_one(source: Source, gradients: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    rows = [gradients.new_empty(len(gradients), *parameter.shape) for parameter in parameters[1:]]
    # the direction of a weight has its shape: its rows take the place of the weight's
    fits = parameters[0].shape == source.shape
    rows.insert(0, gradients if fits else gradients.new_empty(len(gradients), *parameters[0].shape))
    for sample, gradient in enumerate(gradients):
        with torch.enable_grad():
            found = torch.autograd.grad([source.edge], parameters, [gradient.to(source.dtype)], retain_graph=True)
        for own, row in zip(rows, found, strict=True):
            own[sample] = row
    return rows
