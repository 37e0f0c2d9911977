"""Which torch calls use which parameter, seen while the model runs its ordinary forward pass.

A module is not the right unit: Whisper's encoder reads the weight of its position embedding without calling it, a
Vision Transformer adds bare parameters, T5 shares one position bias among all layers. So calls of torch functions are
watched. Each one whose arguments hold a projected parameter together with data of the batch is recorded. One that
holds parameters but no data of the batch (a reshaped bias table, a weight-normalised kernel) makes a *derived* tensor:
it still is a function of the parameters alone, and the call that brings it together with data is the one recorded.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from .base import UnsupportedModelError


# these take a tensor argument for its shape or type alone
_METADATA_ONLY = frozenset({Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as})


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


@dataclass(eq=False)
class Source:
    """A tensor that is a function of parameters alone, as one call used it.

    Parameters:
        tensor (`torch.Tensor`): The parameter itself, or the derived tensor with its autograd graph.
        parameters (`tuple[str, ...]`): Names of the projected parameters it depends on.
        is_parameter (`bool`): Whether it is the parameter itself.
    """

    tensor: Tensor
    parameters: tuple[str, ...]
    is_parameter: bool


@dataclass(eq=False)
class Call:
    """One call of a torch function that brings projected parameters and data of the batch together.

    Parameters:
        function (`Callable`): The torch function or tensor method.
        args, kwargs: Its arguments with every tensor detached; sources are replaced by their [`Source`].
        shape (`torch.Size`): Shape of the tensor it returned.
        edge (`torch.autograd.graph.GradientEdge`): Where the gradient of that tensor arrives, possibly in another
            shape; the tensor itself is not kept, so that memory is what the ordinary backward pass keeps.
        forward (`Forward`): The forward pass it belongs to.
        batched (`frozenset[int]`): Ids of the detached argument tensors that hold data of the batch.
        versions (`list`): The argument tensors with their version counters at the time of the call.
        autocast (`torch.dtype`, *optional*): The type that autocast computed the call in.
    """

    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    shape: torch.Size
    edge: GradientEdge
    forward: "Forward"
    batched: frozenset[int]
    versions: list[tuple[Tensor, int]] = field(repr=False)
    autocast: torch.dtype | None = None

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", str(self.function))

    @property
    def sources(self) -> list[Source]:
        return [leaf for leaf in iterate((self.args, self.kwargs)) if isinstance(leaf, Source)]

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for source in self.sources for name in source.parameters))

    def check_unchanged(self) -> None:
        """Raises if the model overwrote an input of the call in place after the call."""
        for tensor, version in self.versions:
            if tensor._version != version:
                raise UnsupportedModelError(
                    f"An input of `{self.name}`, which uses {', '.join(self.parameters)}, was overwritten in place "
                    "later in the forward pass. Make that operation out of place, or set `gradient_engine` to 'loop'."
                )


@dataclass(eq=False)
class SpreadCall:
    """A source that was spread over the samples before an elementwise call: its gradient comes sample by sample.

    Parameters:
        source ([`Source`]): The tensor before it was spread.
        shape (`torch.Size`): Shape after, the first dimension running over the samples.
        edge (`torch.autograd.graph.GradientEdge`): Where the gradient of the spread tensor arrives.
        forward (`Forward`): The forward pass it belongs to.
    """

    source: Source
    shape: torch.Size
    edge: GradientEdge
    forward: "Forward"

    @property
    def sources(self) -> list[Source]:
        return [self.source]


@dataclass(eq=False)
class Forward:
    """One recorded forward pass.

    Parameters:
        merged (`bool`): Whether the pass makes one row of the Gram matrix, or one for each sample.
        rows (`slice`): Its rows in the Gram matrix, known after the pass.
        num_samples (`int`): Samples in the batch, known after the pass.
    """

    merged: bool
    rows: slice | None = None
    num_samples: int = 0


class Recorder(TorchFunctionMode):
    """Records the calls of forward passes run under it.

    Args:
        parameters (`dict[str, torch.nn.Parameter]`): The projected parameters, by name.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]):
        super().__init__()
        self._sources = {id(p): Source(p, (name,), True) for name, p in parameters.items()}
        self._forward: Forward | None = None
        self._hooks = []
        self.calls: list[Call | SpreadCall] = []
        self.consumer: Callable[[Call | SpreadCall, Tensor], None] | None = None

    def begin(self, inputs: Mapping, merged: bool) -> Forward:
        """Starts a forward pass over `inputs`; everything computed from their tensors counts as data of the batch."""
        self._forward = Forward(merged)
        for leaf in iterate(inputs):
            if isinstance(leaf, Tensor):
                leaf._orthograd_batched = True
        return self._forward

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        versions = None
        sources, data = [], []
        for leaf in iterate((args, kwargs)):
            if isinstance(leaf, Tensor):
                (sources if id(leaf) in self._sources else data).append(leaf)
        if not sources and not data:
            return func(*args, **kwargs)
        batched = [tensor for tensor in data if _is_batched(tensor)] if func not in _METADATA_ONLY else []
        if sources and torch.is_grad_enabled():
            if batched and self._can_spread(func, args, kwargs, sources, batched[0]):
                return self._run_spread(func, args, kwargs, sources, batched[0])
            versions = [(tensor, tensor._version) for tensor in data]
        output = func(*args, **kwargs)

        made = args[0] if func is Tensor.__setitem__ else output
        for tensor in iterate(made):
            if not isinstance(tensor, Tensor):
                continue
            if id(tensor) in self._sources:
                self._refuse_overwritten_source(func, tensor, batched)
                continue
            if not tensor.requires_grad:
                if batched:
                    tensor._orthograd_batched = True
            elif versions is not None and batched:
                self._record(func, args, kwargs, tensor, batched, versions)
            elif versions is not None:
                names = dict.fromkeys(name for s in sources for name in self._sources[id(s)].parameters)
                self._sources[id(tensor)] = Source(tensor, tuple(names), False)
        return output

    def close(self) -> None:
        """Removes the hooks, which would otherwise keep the graph alive through a cycle, and forgets the calls."""
        for hook in self._hooks:
            hook.remove()
        self.consumer = None
        self.calls, self._hooks, self._sources = [], [], {}

    def _record(self, func, args, kwargs, output, batched, versions) -> None:
        overwritten = args[0] if func is Tensor.__setitem__ or (args and output is args[0]) else None
        kept = {}

        def keep(leaf):
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in self._sources:
                return self._sources[id(leaf)]
            # overwritten by the call: autograd needs no value of it either, or its own backward would refuse
            kept[id(leaf)] = leaf.detach() if leaf is not overwritten else torch.zeros_like(leaf.detach())
            return kept[id(leaf)]

        args, kwargs = replace(args, keep), replace(kwargs, keep)
        batched = frozenset(id(kept[id(tensor)]) for tensor in batched)
        versions = [(tensor, version) for tensor, version in versions if tensor is not overwritten]
        # F.linear returns a view of its product; if the model then writes into it, as SpecAugment does, autograd rebases
        # the view and its node leaves the graph, while that of the product stays
        product = output._base if output._is_view() and output._base.numel() == output.numel() else output
        device = output.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        edge = get_gradient_edge(product)
        call = Call(func, args, kwargs, output.shape, edge, self._forward, batched, versions, autocast)
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
            call = SpreadCall(
                self._sources[id(tensor)], aligned.shape, get_gradient_edge(spread[id(tensor)]), self._forward
            )
            self._watch(call, spread[id(tensor)])

        def fill(leaf):
            return spread.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        return func(*replace(args, fill), **replace(kwargs, fill))

    def _watch(self, call: "Call | SpreadCall", tensor: Tensor) -> None:
        self.calls.append(call)
        self._hooks.append(tensor.register_hook(lambda gradient: self._deliver(call, gradient)))

    def _deliver(self, call: Call | SpreadCall, gradient: Tensor) -> None:
        if self.consumer is not None:
            self.consumer(call, gradient)

    def _refuse_overwritten_source(self, func, tensor: Tensor, batched: list[Tensor]) -> None:
        if batched and not self._sources[id(tensor)].is_parameter and is_in_place(func):
            names = ", ".join(self._sources[id(tensor)].parameters)
            raise UnsupportedModelError(
                f"`{func.__name__}` writes data of the batch into a tensor made from {names}. Make that operation out "
                "of place, or set `gradient_engine` to 'loop'."
            )


def is_in_place(func: Callable) -> bool:
    """Whether a torch function writes into its first argument."""
    name = getattr(func, "__name__", "")
    return func is Tensor.__setitem__ or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def iterate(tree: Any) -> Iterator[Any]:
    """The leaves of nested lists, tuples and mappings."""
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from iterate(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from iterate(item)
    else:
        yield tree


def replace(tree: Any, mapping: Callable[[Any], Any]) -> Any:
    """The same nesting of lists, tuples and mappings with each leaf mapped."""
    if isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        return type(tree)(replace(item, mapping) for item in tree)
    if isinstance(tree, Mapping):
        return {key: replace(item, mapping) for key, item in tree.items()}
    return mapping(tree)


def _is_batched(tensor: Tensor) -> bool:
    # an activation is data of the batch by definition; what needs no gradient was marked on its way from the inputs
    return tensor.requires_grad or getattr(tensor, "_orthograd_batched", False)
