"""Which torch calls use which parameter, seen while the model runs its ordinary forward pass.

A module is not the right unit: Whisper's encoder reads the weight of its position embedding without calling it, a
Vision Transformer adds bare parameters, T5 shares one position bias among all layers. So calls of torch functions are
watched. Each one whose arguments hold a trained parameter together with data of the batch is recorded. One that holds
parameters but no data of the batch (a reshaped bias table, a weight-normalised kernel) makes a *derived* tensor, which
still is a function of the parameters alone. The call that brings it together with data is the one recorded.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..base import UnsupportedModelError
from .attention import multi_head_attention
from .calls import Call, Saved, SavedArguments, Source, SpreadCall, is_in_place, iterate, replace, tensors_of


# these take a tensor argument for its shape or type alone
_METADATA_ONLY = frozenset({Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as})


# these return no tensors and take no part in the loss; every third call of a forward pass is one of these
_WITHOUT_TENSORS = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout")
    ]
    + [
        getattr(Tensor, name)
        for name in ("size", "dim", "stride", "numel", "is_floating_point", "is_contiguous", "__len__")
    ]
    + [torch.is_floating_point, torch.is_tensor, torch.numel]
)


# in these, row b of the result depends on row b of each argument alone, so that an argument shared by all samples may
# be spread over them first: autograd itself then delivers its gradient sample by sample
_BROADCASTING = frozenset(
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in (
        *("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__"),
        *("mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__", "__rtruediv__"),
    )
    if hasattr(owner, name)
) | {F.scaled_dot_product_attention}


# functions that torch shows as one call, written as calls that can be followed
_DECOMPOSITIONS = {F.multi_head_attention_forward: multi_head_attention}


class Recorder(TorchFunctionMode):
    """Records the calls of a forward pass run under it.

    It stays active during the backward pass too: under activation checkpointing parts of the forward pass run again
    there, and have to keep the same tensors as they did at first.

    Args:
        parameters (`dict[str, torch.nn.Parameter]`): The trained parameters, by name.
        wanted (`Collection[str]`, *optional*): Names of those whose calls are recorded; all by default.

    Attributes:
        calls (`list[Call | SpreadCall]`): What was recorded, until [`close`].
        saw_parameters (`bool`): Whether any call used a trained parameter, recorded or not.
        recomputes (`bool`): Whether parts of the forward pass ran again in the backward pass.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], wanted: Collection[str] | None = None):
        super().__init__()
        self._wanted = frozenset(parameters if wanted is None else wanted)
        self._parameters = {id(p): Source((name,), p.shape, p.dtype, tensor=p) for name, p in parameters.items()}
        self._derived = WeakTensorKeyDictionary()
        self._batched = WeakTensorKeyDictionary()
        self._anchor = torch.empty(0, requires_grad=True)
        self._hooks = []
        self._in_backward = self._has_derived = False
        self.calls: list[Call | SpreadCall] = []
        self._consumer: Callable[[Call | SpreadCall, Tensor], None] | None = None
        self.recomputes = False
        self.saw_parameters = False

    def begin(self, inputs: Mapping) -> None:
        """Everything computed from these tensors counts as data of the batch."""
        for leaf in iterate(inputs):
            if isinstance(leaf, Tensor):
                self._batched[leaf] = True

    def deliver(self, loss: Tensor, num_samples: int, consumer: Callable, *, retain_graph: bool) -> None:
        """Runs a backward pass over activations; each call goes to `consumer` with the gradient of its output."""
        for call in self.calls:
            call.num_samples = num_samples
        self._consumer = consumer
        try:
            if self.calls:
                self.gradients(loss, _last_reached([call.edge for call in self.calls]), retain_graph=retain_graph)
        finally:
            self.close()

    def gradients(self, loss: Tensor, edges: list[GradientEdge], *, retain_graph: bool) -> tuple[Tensor | None, ...]:
        """`torch.autograd.grad` for a forward pass that was recorded; to be called with the recorder active."""
        self._in_backward = True
        # by edge and not by tensor: a call with tensors would be handed to this mode and run without it
        start, one = get_gradient_edge(loss), torch.ones_like(loss)
        return torch.autograd.grad(start, edges, one, retain_graph=retain_graph, allow_unused=True)

    def __torch_function__(
        self, func: Callable, types: Collection[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _WITHOUT_TENSORS or (self._in_backward and not torch.is_grad_enabled()):
            return func(*args, **kwargs)
        sources, data = [], []
        for tensor in tensors_of(args, kwargs):
            (data if self._source(tensor) is None else sources).append(tensor)
        self.saw_parameters = self.saw_parameters or bool(sources)
        if sources and func in _DECOMPOSITIONS:
            with self:
                return _DECOMPOSITIONS[func](*args, **kwargs)
        batched = [tensor for tensor in data if self._is_batched(tensor)] if func not in _METADATA_ONLY else []
        records = bool(sources) and torch.is_grad_enabled()
        holder = None
        if records and batched and any(self._wanted.intersection(self._source(s).parameters) for s in sources):
            if self._can_spread(func, args, kwargs, sources, batched[0]):
                return self._run_spread(func, args, kwargs, sources, batched[0])
            holder = self._hold(func, args, kwargs)
        output = func(*args, **kwargs)

        made = args[0] if func is Tensor.__setitem__ else output
        for tensor in tensors_of((made,)):
            if self._source(tensor) is not None:
                self._refuse_overwritten_source(func, tensor, batched)
            elif not tensor.requires_grad:
                if batched:
                    self._batched[tensor] = True
            elif holder is not None:
                self._record(func, tensor, holder, batched)
            elif records and not batched:
                names = dict.fromkeys(name for s in sources for name in self._source(s).parameters)
                self._has_derived = True
                self._derived[tensor] = Source(tuple(names), tensor.shape, tensor.dtype, get_gradient_edge(tensor))
        return output

    def close(self) -> None:
        """Removes the hooks, which would otherwise keep the graph alive through a cycle, and forgets the calls."""
        for hook in self._hooks:
            hook.remove()
        self._consumer = None
        self.calls, self._hooks = [], []

    def _source(self, tensor: Tensor) -> Source | None:
        found = self._parameters.get(id(tensor))
        return self._derived.get(tensor) if found is None and self._has_derived else found

    def _is_batched(self, tensor: Tensor) -> bool:
        # an activation is data of the batch by definition; what needs no gradient was marked on its way from the inputs
        return tensor.requires_grad or tensor in self._batched

    def _hold(self, func, args, kwargs):
        """Keeps the arguments for the backward pass: the result that holds the tensors, and what stands for them."""
        written = args[0] if is_in_place(func) else None
        tensors, sources, batched = [], [], set()

        def keep(leaf):
            if not isinstance(leaf, Tensor):
                return leaf
            source = self._source(leaf)
            if source is not None:
                sources.append(source)
                if source.is_parameter:
                    return source
            elif self._is_batched(leaf):
                batched.add(len(tensors))
            # what the call overwrites is kept by shape alone: its own backward pass needs no value of it either
            tensors.append(leaf.detach() if leaf is not written else torch.zeros_like(leaf.detach()))
            return Saved(len(tensors) - 1, source)

        args, kwargs = replace(args, keep), replace(kwargs, keep)
        # created even where nothing will be recorded: a recomputation must keep the same tensors in the same order
        result = SavedArguments.apply(self._anchor, *tensors)
        return args, kwargs, sources, result, frozenset(batched)

    def _record(self, func, output, holder, batched) -> None:
        if self._in_backward:
            self.recomputes = True
            return
        args, kwargs, sources, result, batched = holder
        # F.linear returns a view of its product; if the model then writes into it, as SpecAugment does, autograd rebases
        # the view and its node leaves the graph, while that of the product stays
        product = output._base if output._is_view() and output._base.numel() == output.numel() else output
        device = output.device.type
        enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        autocast = torch.get_autocast_dtype(device) if enabled else None
        edge = get_gradient_edge(product)
        call = Call(func, args, kwargs, output.shape, edge, sources, autocast, holder=result, batched_indices=batched)
        self._watch(call, product)

    def _can_spread(self, func, args, kwargs, sources: list[Tensor], data: Tensor) -> bool:
        if func is torch.cat:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return dim not in (0, -data.ndim) and all(s.shape[:1] == data.shape[:1] for s in sources)
        if func not in _BROADCASTING or (args and any(args[0] is source for source in sources) and is_in_place(func)):
            return False
        return data.ndim > 0 and all(s.ndim < data.ndim or s.shape[0] in (1, data.shape[0]) for s in sources)

    def _run_spread(self, func, args, kwargs, sources: list[Tensor], data: Tensor):
        spread = {}
        for tensor in sources:
            aligned = tensor.reshape((1,) * (data.ndim - tensor.ndim) + tensor.shape)
            aligned = aligned.expand(data.shape[0], *aligned.shape[1:])
            spread[id(tensor)] = aligned.view_as(aligned)  # a node of its own, even where nothing had to be expanded
            if self._in_backward:
                self.recomputes = True
            else:
                call = SpreadCall(self._source(tensor), aligned.shape, get_gradient_edge(spread[id(tensor)]))
                self._watch(call, spread[id(tensor)])

        def fill(leaf):
            return spread.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        return func(*replace(args, fill), **replace(kwargs, fill))

    def _watch(self, call: "Call | SpreadCall", tensor: Tensor) -> None:
        self.calls.append(call)
        self._hooks.append(tensor.register_hook(lambda gradient: self._arrive(call, gradient)))

    def _arrive(self, call: Call | SpreadCall, gradient: Tensor) -> None:
        if self._consumer is None:  # a backward pass of something else through the same graph
            return
        call.restore()  # under activation checkpointing parts of the forward pass run again here, and are watched
        # a rule makes more calls than the forward pass, and each would come to this mode
        with torch._C.DisableTorchFunction():
            self._consumer(call, gradient)
        call.release()

    def _refuse_overwritten_source(self, func, tensor: Tensor, batched: list[Tensor]) -> None:
        source = self._source(tensor)
        if batched and not source.is_parameter and is_in_place(func):
            raise UnsupportedModelError(
                f"`{func.__name__}` writes data of the batch into a tensor made from {', '.join(source.parameters)}. "
                "Make that operation out of place, or set `gradient_engine` to 'loop'."
            )


def _last_reached(edges: list[GradientEdge]) -> list[GradientEdge]:
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
