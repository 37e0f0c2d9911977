"""The two forms of the per-sample gradients of one parameter at one call, written out or as factors, and what each costs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..products import HALF, add_product, as_rows, factors, inner_products, multiply, split, sums_in_float32
from .calls import Call, Source, SpreadCall


# inner products of pairs of positions that are held at once, twice: as many as a CPU's cache takes; of a GPU, 64 MiB of each
_PAIRS, _PAIRS_OF_GPU = 1 << 17, 1 << 24


@dataclass
class Dense:
    """Gradients of n samples, shape (n, *parameter.shape)."""

    gradients: Tensor

    def add_rows(self, start: int, stop: int, out: Tensor, *, overwrite: bool) -> None:
        """Adds entries `start` to `stop` along the first dimension of every gradient to `out`, shape (n, stop - start, *rest), or writes them over it."""
        entries = self.gradients.view(len(out), -1, *out.shape[2:])[:, start:stop]
        out.copy_(entries) if overwrite else out.add_(entries)

    def inner_with(self, tensor: Tensor) -> Tensor:
        """Inner products with one tensor of the parameter's shape, shape (n,)."""
        return inner_products(as_rows(self.gradients).float(), tensor.reshape(1, -1))[:, 0]

    def add_combination(self, weights: Tensor, total: Tensor) -> None:
        """Adds `sum_i weights_i gradient_i` to `total`, of the parameter's shape, in place."""
        rows = as_rows(self.gradients)
        total.view(-1).add_(weights.to(rows.dtype) @ rows)


@dataclass
class Outer:
    """Gradients of a matrix of shape (p, q) as sums of outer products over T positions: `sum_t left_t right_t^T`.

    Attributes:
        left (`torch.Tensor`): Shape (n, T, p), or (n, T) with integers when each `left_t` has a single one.
        right (`torch.Tensor`): Shape (n, T, q).
        shape (`torch.Size`): (p, q).
    """

    left: Tensor
    right: Tensor
    shape: torch.Size

    @property
    def is_one_hot(self) -> bool:
        return not self.left.is_floating_point()

    def add_rows(self, start: int, stop: int, out: Tensor, *, overwrite: bool) -> None:
        """Adds rows `start` to `stop` of every gradient to `out`, (n, stop - start, q), or writes them over it."""
        if not self.is_one_hot:
            left, right = factors(self.left[..., start:stop].transpose(1, 2), self.right)
            multiply(left, right, out) if overwrite else add_product(out, left, right)
            return
        if overwrite:
            out.zero_()
        index, right = self.left, self.right.float()
        if (start, stop) != (0, self.shape[0]):
            # entries outside add nothing to entry 0: to look them up would make the device wait
            inside = (index >= start) & (index < stop)
            index, right = torch.where(inside, index - start, 0), right * inside[..., None]
        offsets = (stop - start) * torch.arange(len(index), device=index.device)[:, None]
        out.view(-1, out.shape[-1]).index_add_(0, (index + offsets).flatten(), right.flatten(0, 1))

    def dense(self) -> Tensor:
        """The gradients, shape (n, p, q)."""
        gradients = self.right.new_empty(len(self.right), *self.shape, dtype=torch.float32)
        self.add_rows(0, self.shape[0], gradients, overwrite=True)
        return gradients

    def inner(self, other: "Outer") -> Tensor:
        """Inner products of the gradients of both, shape (n, n'): `sum_ts (left_t . left'_s) (right_t . right'_s)`."""
        (n, steps, _), (m, other_steps, _) = self.right.shape, other.right.shape
        own_right, other_right = factors(self.right, other.right)
        other_right = other_right.flatten(0, 1).T
        limit = _PAIRS if self.right.device.type == "cpu" else _PAIRS_OF_GPU
        together = min(n, max(1, limit // max(1, steps * m * other_steps)))

        def of_some(left: Tensor, right: Tensor) -> Tensor:
            products = multiply(right.flatten(0, 1), other_right)
            products.mul_(_left_products(left.flatten(0, 1), other.left))
            return products.view(len(left), steps, m, other_steps).sum(dim=(1, 3))

        if together == n:
            return of_some(self.left, own_right)
        return torch.cat([*map(of_some, self.left.split(together), own_right.split(together))])

    def inner_with(self, matrix: Tensor) -> Tensor:
        """Inner products with one matrix of shape (p, q), shape (n,): `sum_t left_t^T matrix right_t`."""
        if self.is_one_hot:
            return (matrix[self.left] * self.right.float()).sum(dim=(1, 2))
        rights = self.right.flatten(0, 1)
        first, *rest = (multiply(*factors(rights, part.T)) for part in split(matrix, rights))
        for further in rest:
            first.add_(further)
        return first.view(self.left.shape).mul_(self.left).sum(dim=(1, 2))

    def add_combination(self, weights: Tensor, total: Tensor) -> None:
        """Adds `sum_i weights_i gradient_i` to `total`, (p, q), in place."""
        weights = weights.float().view(-1, 1, 1)
        if self.is_one_hot:
            total.index_add_(0, self.left.flatten(), (self.right.float() * weights).flatten(0, 1))
            return
        left, right = self.left.flatten(0, 1), self.right.flatten(0, 1)
        if left.shape[-1] < right.shape[-1]:  # weigh the smaller factor
            weighted = (self.left.float() * weights).flatten(0, 1)
            pairs = [(part, right) for part in split(weighted, right)]
        else:
            weighted = (self.right.float() * weights).flatten(0, 1)
            pairs = [(left, part) for part in split(weighted, left)]
        for one, other in pairs:
            add_product(total, *factors(one.T, other))


def _left_products(left: Tensor, other: Tensor) -> Tensor:
    """Inner products of some left factors, (t, p) or (t,), with all others, shape (t, n' T'); a one-hot factor only picks."""
    if left.is_floating_point() and other.is_floating_point():
        return multiply(*factors(left, other.flatten(0, 1).T))
    if left.is_floating_point():
        return left.float()[:, other.flatten()]
    if other.is_floating_point():
        return other.float().flatten(0, 1)[:, left].T
    return left[:, None] == other.flatten()[None, :]


Form = Dense | Outer


# the rules for these functions give factors; of an embedding the left ones are one-hot
FACTORED = frozenset({F.linear, torch.addmm, F.embedding})
ONE_HOT = frozenset({F.embedding})
# gradients may take so many times the memory of their factors, which the update has to multiply out once more
_ROOM_FOR_GRADIENTS = 1.25


@dataclass(frozen=True)
class DeviceCosts:
    """How long things take on a device, as multiples of one multiplication within a product of factors.

    Attributes:
        memory (`int`): Writing or reading one number of a large tensor, which is slower than arithmetic.
        gradient_product (`int`): One multiplication within a product of gradients, which are float32.
        block_bytes (`int`): Gradients that are not kept are formed in blocks of so many bytes, in the same memory again and again.
    """

    memory: int
    gradient_product: int
    block_bytes: int


_CPU = DeviceCosts(memory=8, gradient_product=1, block_bytes=1 << 26)
# of an H200, in round numbers: 4 TB/s, 800 TFLOP/s by matrix units in half precision, 60 in float32; each block takes some launches
_GPU = DeviceCosts(memory=28, gradient_product=1, block_bytes=1 << 28)
_GPU_HALVES = DeviceCosts(memory=370, gradient_product=13, block_bytes=1 << 28)


def costs_of(device: torch.device, half: torch.dtype | None = None) -> DeviceCosts:
    """Of a device, for factors in half precision, where it multiplies them as they are, or in float32."""
    if device.type in ("cpu", "meta"):
        return _CPU
    return _GPU if half is None or not sums_in_float32(device, half) else _GPU_HALVES


@dataclass(frozen=True)
class Use:
    """How one call uses a parameter.

    Attributes:
        positions (`int`): Rows of the matrix that the call's output is, over all samples.
        factors (`bool`): Whether the rules give factors of the gradient and not the gradient itself.
        one_hot (`bool`): Whether the left factors are one-hot: gradients are only gathered, and so are products.
        half (`torch.dtype`, *optional*): The half precision that the factors are in, if they are.
    """

    positions: int
    factors: bool
    one_hot: bool
    half: torch.dtype | None = None

    @classmethod
    def of(cls, call: Call | SpreadCall, source: Source) -> "Use":
        factors = source.is_parameter and isinstance(call, Call) and call.function in FACTORED
        if not factors:
            return cls(0, False, False)
        one_hot = call.function in ONE_HOT  # which autocast leaves alone
        computed = source.dtype if one_hot or call.autocast is None else call.autocast
        return cls(call.positions, len(source.shape) == 2, one_hot, computed if computed in HALF else None)


@dataclass(frozen=True)
class Cost:
    """What was counted before a parameter's inner products were taken, over all samples.

    Attributes:
        pairwise (`bool`): Whether inner products come from pairs of positions, without any gradient being formed.
        keeps_gradients (`bool`): Whether the gradients are kept for the update, or their factors.
        kept_bytes (`int`): Memory of what is kept.
        extra (`int`): Multiplications beside those of forming each gradient once, which any backward pass does.
    """

    pairwise: bool
    keeps_gradients: bool
    kept_bytes: int
    extra: int


def count_cost(parameter: Tensor, uses: list[Use], num_samples: int) -> Cost:
    """Chooses between forms by counting multiplications and bytes.

    Args:
        parameter (`torch.Tensor`): For its shape and device.
        uses (`list[Use]`): By the calls of one forward pass.
        num_samples (`int`): Number k of retain samples.
    """
    kinds = {use.half for use in uses}
    numbers, costs = parameter.numel(), costs_of(parameter.device, kinds.pop() if len(kinds) == 1 else None)
    multiplied = (costs.gradient_product * num_samples**2 + costs.memory * num_samples * (1 + len(uses))) * numbers
    dense_bytes = 4 * num_samples * numbers
    if not uses or not all(use.factors for use in uses):
        return Cost(False, True, dense_bytes, multiplied + num_samples * numbers)
    p, q = parameter.shape
    formed = sum(use.positions * q * (1 if use.one_hot else p) for use in uses)
    pairs = sum(
        use.positions * other.positions * (q + 2 * costs.memory + (0 if use.one_hot or other.one_hot else p))
        for i, use in enumerate(uses)
        for other in uses[: i + 1]
    )
    factor_bytes = 4 * sum(use.positions * (q + (2 if use.one_hot else p)) for use in uses)
    # by pairs, the products with the forget gradient cost as much as forming the gradients would
    if pairs < multiplied:
        return Cost(True, False, factor_bytes, pairs + formed)
    if dense_bytes <= _ROOM_FOR_GRADIENTS * factor_bytes:
        return Cost(False, True, dense_bytes, multiplied + num_samples * numbers)
    return Cost(False, False, factor_bytes, multiplied + formed)
