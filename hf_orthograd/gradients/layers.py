"""Per-sample gradients of single calls: rules for the torch functions that hold most parameters, one for the rest.

A rule turns a recorded call and the gradient of its output into one piece for each of its sources: the per-sample
gradients themselves ([`Dense`]), or factors whose products they are ([`Outer`]), from which inner products can be had
without ever forming a gradient of the size of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import UnsupportedModelError
from .recording import Call, Source, SpreadCall, is_in_place, iterate, replace


@dataclass
class Dense:
    """Gradients of n rows, shape (n, *parameter.shape)."""

    gradients: Tensor


@dataclass
class Outer:
    """Gradients of a matrix of shape (p, q) as sums of outer products over T positions: `sum_t left_t right_t^T`.

    Parameters:
        left (`torch.Tensor`): Shape (n, T, p), or (n, T) with integers when each `left_t` has a single one.
        right (`torch.Tensor`): Shape (n, T, q).
        shape (`torch.Size`): (p, q).
    """

    left: Tensor
    right: Tensor
    shape: torch.Size

    def dense(self) -> Tensor:
        """The gradients, shape (n, p, q)."""
        right = self.right.float()
        if self.left.is_floating_point():
            return torch.bmm(self.left.float().transpose(1, 2), right)
        rows = right.shape[0]
        gradients = right.new_zeros(rows * self.shape[0], self.shape[1])
        offsets = torch.arange(rows, device=right.device)[:, None] * self.shape[0]
        gradients.index_add_(0, (self.left + offsets).flatten(), right.flatten(0, 1))
        return gradients.view(rows, *self.shape)

    def inner(self, other: "Outer") -> Tensor:
        """Inner products of the rows of both, shape (n, n'), by `sum_ts (left_t . left'_s) (right_t . right'_s)`."""
        n, steps, _ = self.right.shape
        m, other_steps, _ = other.right.shape
        products = self.right.float().flatten(0, 1) @ other.right.float().flatten(0, 1).T
        products = products * _left_products(self.left, other.left)
        return products.view(n, steps, m, other_steps).sum(dim=(1, 3))


def _left_products(left: Tensor, other: Tensor) -> Tensor:
    """Inner products of the left factors, shape (n T, n' T'); a one-hot factor only picks."""
    if left.is_floating_point() and other.is_floating_point():
        return left.float().flatten(0, 1) @ other.float().flatten(0, 1).T
    if left.is_floating_point():
        return left.float().flatten(0, 1)[:, other.flatten()]
    if other.is_floating_point():
        return other.float().flatten(0, 1)[:, left.flatten()].T
    return left.flatten()[:, None] == other.flatten()[None, :]


Piece = Dense | Outer
# maps a call and the gradient of its output to pieces, or to None where the rule does not cover the call
Rule = Callable[[Call, Tensor], list[tuple[Source, Piece]] | None]

RULES: dict[Callable, Rule] = {}


def register_rule(*functions: Callable) -> Callable[[Rule], Rule]:
    """Registers a rule for torch functions, in place of the general one.

    The rule gets a [`Call`] and the gradient of its output, whose first dimension runs over the samples (possibly
    times windows or positions, sample by sample), and returns a [`Dense`] or [`Outer`] piece for each [`Source`] among
    the call's arguments, or `None` to leave this call to the general rule. With `call.forward.merged` the pieces have
    one row, the sum over the samples.
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def per_sample_pieces(call: Call | SpreadCall, gradient: Tensor) -> list[tuple[Source, Piece]]:
    """The per-sample gradients of a call's sources, given the gradient that arrived at its edge."""
    if isinstance(call, SpreadCall):
        return [(call.source, Dense(_gather_spread(call, gradient)))]
    call.check_unchanged()
    samples = call.forward.num_samples
    if not call.shape or call.shape[0] % samples:
        raise UnsupportedModelError(
            f"`{call.name}`, which uses {', '.join(call.parameters)}, returns shape {tuple(call.shape)} for a batch of "
            f"{samples}: its first dimension does not run over the samples. Set `gradient_engine` to 'loop'."
        )
    gradient = gradient.reshape(call.shape)
    rule = RULES.get(call.function)
    pieces = rule(call, gradient) if rule is not None else None
    return pieces if pieces is not None else general_rule(call, gradient)


def _gather_spread(call: SpreadCall, gradient: Tensor) -> Tensor:
    """From the gradient of a source spread over the samples, (samples * r, ...), to rows of the source's shape."""
    source, samples = call.source.tensor, call.forward.num_samples
    rows = 1 if call.forward.merged else samples
    if source.ndim == gradient.ndim and source.shape[0] == gradient.shape[0] != 1:
        # the source runs over the samples itself, as an expanded class token does: each sample has its own rows of it
        owner = torch.arange(gradient.shape[0], device=gradient.device) * rows // gradient.shape[0]
        own = torch.nn.functional.one_hot(owner, rows).T.to(gradient)
        return own.view(rows, -1, *(1,) * (gradient.ndim - 1)) * gradient
    return gradient.reshape(rows, -1, *gradient.shape[1:]).sum(dim=1).reshape(rows, *source.shape)


def by_row(tensor: Tensor, call: Call) -> Tensor:
    """Reshapes (samples * r, ..., q) to (n, T, q), n being 1 where the pass makes one row."""
    rows = 1 if call.forward.merged else call.forward.num_samples
    return tensor.reshape(rows, -1, tensor.shape[-1])


def _is_matrix_parameter(argument: object) -> bool:
    return isinstance(argument, Source) and argument.is_parameter and argument.tensor.ndim == 2


@register_rule(F.linear)
def linear_rule(call: Call, output_gradient: Tensor) -> list[tuple[Source, Piece]] | None:
    arguments = {**dict(zip(("input", "weight", "bias"), call.args, strict=False)), **call.kwargs}
    features, weight, bias = arguments["input"], arguments["weight"], arguments.get("bias")
    if isinstance(features, Source) or (isinstance(weight, Source) and not _is_matrix_parameter(weight)):
        return None
    gradient = by_row(output_gradient, call)
    pieces = []
    if isinstance(weight, Source):
        pieces.append((weight, Outer(gradient, by_row(features, call), weight.tensor.shape)))
    if isinstance(bias, Source):
        pieces.append((bias, Dense(gradient.float().sum(dim=1))))
    return pieces


@register_rule(torch.addmm)
def addmm_rule(call: Call, output_gradient: Tensor) -> list[tuple[Source, Piece]] | None:
    """`torch.addmm(bias, input, weight)`, the Conv1D of GPT-2: the weight is (in, out)."""
    if call.kwargs or len(call.args) != 3:
        return None
    bias, features, weight = call.args
    if isinstance(features, Source) or (isinstance(weight, Source) and not _is_matrix_parameter(weight)):
        return None
    gradient = by_row(output_gradient, call)
    pieces = []
    if isinstance(weight, Source):
        pieces.append((weight, Outer(by_row(features, call), gradient, weight.tensor.shape)))
    if isinstance(bias, Source):
        pieces.append((bias, Dense(gradient.float().sum(dim=1).view(-1, *bias.tensor.shape))))
    return pieces


@register_rule(F.embedding)
def embedding_rule(call: Call, output_gradient: Tensor) -> list[tuple[Source, Piece]] | None:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
    arguments = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    indices, weight, padding = arguments["input"], arguments["weight"], arguments.get("padding_idx")
    if not _is_matrix_parameter(weight) or arguments.get("scale_grad_by_freq"):
        return None
    gradient = by_row(output_gradient, call)
    rows = indices.reshape(gradient.shape[:2])
    if padding is not None and padding >= 0:
        gradient = gradient.masked_fill((rows == padding)[..., None], 0)
    return [(weight, Outer(rows, gradient, weight.tensor.shape))]


@register_rule(F.conv1d, F.conv2d)
def convolution_rule(call: Call, output_gradient: Tensor) -> list[tuple[Source, Piece]] | None:
    """The patches under the kernel take the place of a linear layer's input; vectorised backward passes are slow here."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    arguments = {**defaults, **dict(zip(names, call.args, strict=False)), **call.kwargs}
    features, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    if isinstance(features, Source) or not isinstance(weight, Source):
        return None
    if arguments["groups"] != 1 or isinstance(arguments["padding"], str) or features.ndim != weight.tensor.ndim:
        return None
    dimensions = features.ndim - 2

    def in_two_dimensions(value: int | tuple, neutral: int) -> tuple[int, int]:
        values = value if isinstance(value, (tuple, list)) else (value,) * dimensions
        values = tuple(values) * (dimensions if len(values) == 1 else 1)
        return values if dimensions == 2 else (neutral, values[0])

    patches = F.unfold(
        features.to(output_gradient.dtype).unsqueeze(2) if dimensions == 1 else features.to(output_gradient.dtype),
        in_two_dimensions(tuple(weight.tensor.shape[2:]), 1),
        dilation=in_two_dimensions(arguments["dilation"], 1),
        padding=in_two_dimensions(arguments["padding"], 0),
        stride=in_two_dimensions(arguments["stride"], 1),
    )
    gradient = by_row(output_gradient.flatten(2).transpose(1, 2), call)
    outer = Outer(gradient, by_row(patches.transpose(1, 2), call), torch.Size((gradient.shape[2], patches.shape[1])))
    pieces: list[tuple[Source, Piece]] = [(weight, Dense(outer.dense().view(-1, *weight.tensor.shape)))]
    if isinstance(bias, Source):
        pieces.append((bias, Dense(gradient.float().sum(dim=1))))
    return pieces


def general_rule(call: Call, output_gradient: Tensor) -> list[tuple[Source, Piece]]:
    """Any call: the function is run again for its sources alone and differentiated sample by sample."""
    sources = call.sources
    tensors = tuple(source.tensor.detach() for source in sources)
    if call.forward.merged or call.forward.num_samples == 1:
        gradients = [gradient[None] for gradient in _pull_back(call, tensors, {}, output_gradient)]
    elif _has_ambiguous_arguments(call):
        gradients = _masked_pull_back(call, tensors, output_gradient)
    else:
        gradients = _vectorised_pull_back(call, tensors, output_gradient)
    return [(source, Dense(gradient)) for source, gradient in zip(sources, gradients, strict=True)]


def _has_ambiguous_arguments(call: Call) -> bool:
    """Whether something beside the data of the batch may run over the samples too, or the call writes in place.

    Such an argument (a class token expanded over the batch, say) may not be handed whole to the function of one sample.
    """
    if is_in_place(call.function):
        return True
    leaves = [leaf.tensor if isinstance(leaf, Source) else leaf for leaf in iterate((call.args, call.kwargs))]
    others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) not in call.batched]
    same_length = any(t.ndim == len(call.shape) and t.shape[0] == call.shape[0] for t in others)
    batched = [leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) in call.batched]
    return same_length or any(t.ndim == 0 or t.shape[0] != call.shape[0] for t in batched)


def _pull_back(call: Call, tensors: tuple[Tensor, ...], samples: dict[int, Tensor], gradient: Tensor):
    """Vector-Jacobian product of the call with respect to its sources, its data replaced by id from `samples`."""

    def run(*values: Tensor) -> Tensor:
        remaining = iter(values)

        def fill(leaf):
            if isinstance(leaf, Source):
                return next(remaining)
            return samples.get(id(leaf), leaf)

        args, kwargs = replace(call.args, fill), replace(call.kwargs, fill)
        if call.function is Tensor.__setitem__:
            target = args[0].clone()
            target[args[1]] = args[2]
            return target
        if is_in_place(call.function):
            args = (args[0].clone(), *args[1:])
        return call.function(*args, **kwargs)

    with torch.autocast(gradient.device.type, call.autocast, enabled=call.autocast is not None, cache_enabled=False):
        output, pull_back = torch.func.vjp(run, *tensors)
    return pull_back(gradient.to(output.dtype))


def _vectorised_pull_back(call: Call, tensors: tuple[Tensor, ...], output_gradient: Tensor) -> tuple[Tensor, ...]:
    samples = call.forward.num_samples

    def split(tensor: Tensor) -> Tensor:
        return tensor.reshape(samples, -1, *tensor.shape[1:])

    leaves = iterate((call.args, call.kwargs))
    batched = {id(leaf): split(leaf) for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) in call.batched}
    return torch.func.vmap(lambda data, gradient: _pull_back(call, tensors, data, gradient))(
        batched, split(output_gradient)
    )


def _masked_pull_back(call: Call, tensors: tuple[Tensor, ...], output_gradient: Tensor) -> list[Tensor]:
    """One product for each sample over the whole batch, with the gradient of the other samples' outputs set to zero."""
    length = call.shape[0] // call.forward.num_samples
    rows = []
    for start in range(0, call.shape[0], length):
        masked = torch.zeros_like(output_gradient)
        masked[start : start + length] = output_gradient[start : start + length]
        rows.append(_pull_back(call, tensors, {}, masked))
    return [torch.stack(gradients) for gradients in zip(*rows, strict=True)]
