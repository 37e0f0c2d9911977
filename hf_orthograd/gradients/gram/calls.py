"""What is kept of a torch call until the backward pass comes to it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import CheckpointError

from ..base import UnsupportedModelError


# most arguments beside tensors; to look for tensors in them would take longer than the call
_PLAIN = frozenset({bool, float, int, str, type(None), slice, torch.dtype, torch.device, torch.Size})


@dataclass(eq=False)
class Source:
    """A tensor that is a function of parameters alone.

    Attributes:
        parameters (`tuple[str, ...]`): Names of the trained parameters it depends on.
        shape (`torch.Size`): Its shape.
        dtype (`torch.dtype`): Its type.
        edge (`torch.autograd.graph.GradientEdge`, *optional*): Where its own gradient arrives; `None` for a parameter.
        tensor (`torch.Tensor`, *optional*): The parameter; for a derived tensor its detached value, there only while
            a rule works on the call that used it.
    """

    parameters: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype
    edge: GradientEdge | None = None
    tensor: Tensor | None = None

    @property
    def is_parameter(self) -> bool:
        return self.edge is None


@dataclass(eq=False)
class Saved:
    """Stands for a tensor among a call's arguments until the call's turn comes in the backward pass."""

    index: int
    source: Source | None = None


class SavedArguments(torch.autograd.Function):
    """Keeps tensors as autograd keeps its own: checkpointing recomputes them, offloading moves them."""

    @staticmethod
    def forward(ctx: FunctionCtx, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> NoReturn:
        raise AssertionError("unreachable: nothing depends on the result")


@dataclass(eq=False)
class Call:
    """One call of a torch function that brings trained parameters and data of the batch together.

    Attributes:
        function (`Callable`): The torch function or tensor method.
        args, kwargs: Its arguments; while a rule works on it, tensors are detached and sources are [`Source`]s.
        shape (`torch.Size`): Shape of the tensor it returned.
        edge (`torch.autograd.graph.GradientEdge`): Where the gradient of that tensor arrives, possibly in another
            shape; the tensor itself is not kept, so that memory is what the ordinary backward pass keeps.
        sources (`list[Source]`): The sources among its arguments.
        num_samples (`int`): Samples in the batch, known after the forward pass.
        batched (`frozenset[int]`): Ids of the argument tensors that hold data of the batch.
        autocast (`torch.dtype`, *optional*): The type that autocast computed the call in.
        holder (`torch.Tensor`, *optional*): The result of [`SavedArguments`], whose node keeps the tensors until [`restore`].
            Up to torch 2.11 the node lets go of them with its result.
        batched_indices (`frozenset[int]`): Which of them hold data of the batch.
    """

    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    shape: torch.Size
    edge: GradientEdge
    sources: list[Source]
    autocast: torch.dtype | None = None
    num_samples: int = 0
    batched: frozenset[int] = frozenset()
    holder: Tensor | None = field(default=None, repr=False)
    batched_indices: frozenset[int] = field(default=frozenset(), repr=False)

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", str(self.function))

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for source in self.sources for name in source.parameters))

    def as_computed(self, tensor: Tensor) -> Tensor:
        """An argument of real numbers, of any shape, in the type in which the call computed with it."""
        return tensor if self.autocast is None else tensor.to(self.autocast)

    @property
    def positions(self) -> int:
        """Rows of the matrix that its output would be, over all samples."""
        return self.shape.numel() // self.shape[-1] if self.shape else 1

    def restore(self) -> None:
        """Puts the tensors back among the arguments and lets go of them elsewhere."""
        try:
            tensors = self.holder.grad_fn.saved_tensors
        except (torch.OutOfMemoryError, torch.AcceleratorError, CheckpointError):
            raise
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"An input of `{self.name}`, which uses {', '.join(self.parameters)}, is no longer what it was: was it "
                f"overwritten in place later in the forward pass? ({str(error).splitlines()[0]}) Make that operation "
                "out of place, or set `gradient_engine` to 'loop'."
            ) from error
        self.holder = None

        def fill(leaf):
            if not isinstance(leaf, Saved):
                return leaf
            if leaf.source is None:
                return tensors[leaf.index]
            leaf.source.tensor = tensors[leaf.index]
            return leaf.source

        self.args, self.kwargs = replace(self.args, fill), replace(self.kwargs, fill)
        self.batched = frozenset(id(tensors[index]) for index in self.batched_indices)

    def release(self) -> None:
        """Lets go of every tensor."""
        self.holder, self.args, self.kwargs = None, (), {}
        for source in self.sources:
            if not source.is_parameter:
                source.tensor = None


@dataclass(eq=False)
class SpreadCall:
    """A source that was spread over the samples before an elementwise call: its gradient comes sample by sample.

    Attributes:
        source ([`Source`]): The tensor before it was spread.
        shape (`torch.Size`): Shape after, the first dimension running over the samples.
        edge (`torch.autograd.graph.GradientEdge`): Where the gradient of the spread tensor arrives.
        num_samples (`int`): Samples in the batch, known after the forward pass.
    """

    source: Source
    shape: torch.Size
    edge: GradientEdge
    num_samples: int = 0

    @property
    def sources(self) -> list[Source]:
        return [self.source]

    def restore(self) -> None:
        """Nothing is kept of it."""

    release = restore


def is_in_place(func: Callable) -> bool:
    """Whether a torch function writes into its first argument."""
    name = getattr(func, "__name__", "")
    return func is Tensor.__setitem__ or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def tensors_of(args: tuple, kwargs: Mapping = MappingProxyType({})) -> list[Tensor]:
    """The tensors among a call's arguments, in order; those in lists, tuples and mappings, too."""
    found = []
    for leaf in (*args, *kwargs.values()):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif type(leaf) not in _PLAIN:
            found += [inner for inner in iterate(leaf) if isinstance(inner, Tensor)]
    return found


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
