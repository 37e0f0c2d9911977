"""What one parameter adds to the Gram matrix, and what is kept of its gradients for the update.

Each retain sample's gradient of the parameter is formed, multiplied with the others and with the forget gradient, and
then kept in whichever form is smaller: the gradients themselves, or the factors they are products of. For a linear layer
over T positions the k gradients take `k p q` numbers, the factors `k T (p + q)`; in a speech encoder the gradients are
smaller, in a decoder or a small image model the factors, which replace what the graph of the forward pass gives free.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import inner_products
from .calls import Call, Source
from .pieces import Dense, Outer, Piece


# what writing or reading one number of a large tensor costs, in multiplications: memory is slower than arithmetic
_MEMORY_COST = 8
# gradients that are not kept are formed in blocks of so many bytes, in the same memory again and again
BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class Cost:
    """What was counted before a parameter's inner products were taken, over all samples.

    Parameters:
        pairwise (`bool`): Whether inner products come from pairs of positions, without any gradient being formed.
        keeps_gradients (`bool`): Whether the gradients are kept for the update, or their factors.
        kept_bytes (`int`): Memory of what is kept.
        multiplications (`int`): For the inner products and the update together.
    """

    pairwise: bool
    keeps_gradients: bool
    kept_bytes: int
    multiplications: int


def count_cost(shape: torch.Size, calls: list[tuple[Call, Source]], num_samples: int) -> Cost:
    """Chooses between forms by counting multiplications and bytes.

    Args:
        shape (`torch.Size`): Of the parameter.
        calls (`list[tuple[Call, Source]]`): Those that use it, and as what.
        num_samples (`int`): Number k of retain samples.
    """
    numbers = shape.numel()
    formed = (num_samples**2 + _MEMORY_COST * num_samples * (1 + len(calls))) * numbers
    dense_bytes = 4 * num_samples * numbers
    if len(shape) != 2 or not all(has_factors(call, source) for call, source in calls):
        return Cost(False, True, dense_bytes, formed + num_samples * numbers)
    p, q = shape
    # an embedding's left factors are one-hot: its gradients are only gathered, and so are its products
    factors = [(call.positions, call.function is F.embedding) for call, _ in calls]
    products = sum(positions * q * (1 if one_hot else p) for positions, one_hot in factors)
    pairwise = products + sum(
        positions * others * (q + 2 * _MEMORY_COST + (0 if one_hot or other_one_hot else p))
        for i, (positions, one_hot) in enumerate(factors)
        for others, other_one_hot in factors[: i + 1]
    )
    formed += products
    factor_bytes = 4 * sum(positions * (q + (2 if one_hot else p)) for positions, one_hot in factors)
    if pairwise < formed:
        return Cost(True, False, factor_bytes, pairwise + products)
    keeps_gradients = dense_bytes <= factor_bytes
    update = num_samples * numbers if keeps_gradients else products
    return Cost(False, keeps_gradients, min(dense_bytes, factor_bytes), formed + update)


def has_factors(call: Call, source: Source) -> bool:
    """Whether the rules give factors of this source's gradient and not the gradient itself."""
    return source.is_parameter and len(source.shape) == 2 and call.function in (F.linear, torch.addmm, F.embedding)


class ParameterShare:
    """Collects the pieces of one parameter and adds up its inner products once all have come.

    A tied weight has several pieces, which belong to the same samples and are summed before the product.

    Args:
        parameter (`torch.nn.Parameter`): The parameter.
        forget_gradient (`torch.Tensor`, *optional*): Its `g_u`, or `None` if the forget loss does not use it.
        num_samples (`int`): Number k of retain samples.
        projected (`bool`): Whether inner products are wanted.
        keeps (`bool`): Whether anything is kept for the update.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        forget_gradient: Tensor | None,
        num_samples: int,
        *,
        projected: bool,
        keeps: bool,
    ):
        self._shape, self._device = parameter.shape, parameter.device
        self._forget_gradient, self._num_samples = forget_gradient, num_samples
        self._projected, self._keeps = projected, keeps
        self._calls: list[tuple[Call, Source]] = []
        self._arrived = 0
        self._cost: Cost | None = None
        self._pieces: list[Piece] = []
        self._gram: Tensor | None = None

    def expect(self, call: Call, source: Source) -> None:
        self._calls.append((call, source))

    def add(self, piece: Piece, scratch: "Scratch") -> None:
        if self._cost is None:
            self._cost = count_cost(self._shape, self._calls, self._num_samples)
        self._pieces.append(piece)
        self._arrived += 1
        if self._arrived == len(self._calls):
            self._settle(scratch)

    def gram(self, scratch: "Scratch") -> Tensor:
        """Shape (1 + k, 1 + k), float64. Calls that the loss does not depend on never delivered anything."""
        if self._gram is None:
            self._settle(scratch)
        return self._gram

    def gradient(self, forget_weight: float, weights: Tensor) -> Tensor | None:
        """`forget_weight * g_u + sum_i weights_i g_i`, in the memory of `g_u`; `None` if neither loss uses it."""
        total, self._forget_gradient = self._forget_gradient, None
        if total is not None:
            total = total.contiguous().mul_(forget_weight)
        elif self._pieces:
            total = torch.zeros(self._shape, device=self._device)
        for piece in self._pieces:
            piece.add_combination(weights, total)
        self._pieces = []
        return total

    def _settle(self, scratch: "Scratch") -> None:
        size = 1 + self._num_samples
        self._gram = torch.zeros(size, size, dtype=torch.float64, device=self._device)
        if self._pieces:
            self._reduce_pieces(scratch)
        if self._projected and self._forget_gradient is not None:
            flat = self._forget_gradient.reshape(1, -1).float()
            self._gram[0, 0] = inner_products(flat, flat)[0, 0]
        if not self._keeps:
            self._pieces = []

    def _reduce_pieces(self, scratch: "Scratch") -> None:
        all_outer = all(isinstance(piece, Outer) for piece in self._pieces)
        if not all_outer or (self._keeps and self._cost.keeps_gradients):
            self._pieces = [Dense(self._sum_dense())]
        if not self._projected:
            return
        forget = None if self._forget_gradient is None else self._forget_gradient.float()
        if isinstance(self._pieces[0], Dense):
            self._add_products(self._pieces[0].gradients, forget)
        elif self._cost.pairwise:
            self._add_pairwise(forget)
        else:
            p, q = self._shape
            step = max(1, BLOCK_BYTES // (4 * self._num_samples * q))
            for start in range(0, p, step):
                stop = min(start + step, p)
                rows = scratch.view(self._device, self._num_samples, stop - start, q)
                for i, piece in enumerate(self._pieces):
                    piece.add_rows(start, stop, rows, overwrite=i == 0)
                self._add_products(rows, None if forget is None else forget[start:stop])

    def _sum_dense(self) -> Tensor:
        total = None
        for piece in self._pieces:
            if total is None:
                total = piece.dense() if isinstance(piece, Outer) else piece.gradients.float()
            elif isinstance(piece, Outer):
                piece.add_rows(0, self._shape[0], total, overwrite=False)
            else:
                total = total + piece.gradients
        return total

    def _add_products(self, gradients: Tensor, forget: Tensor | None) -> None:
        rows = gradients.flatten(1).float()
        self._gram[1:, 1:] += inner_products(rows, rows)
        if forget is not None:
            self._add_forget_row(inner_products(rows, forget.reshape(1, -1))[:, 0])

    def _add_pairwise(self, forget: Tensor | None) -> None:
        for i, piece in enumerate(self._pieces):
            for other in self._pieces[: i + 1]:
                block = piece.inner(other).double()
                self._gram[1:, 1:] += block if piece is other else block + block.T
            if forget is not None:
                self._add_forget_row(piece.inner_with_matrix(forget).double())

    def _add_forget_row(self, products: Tensor) -> None:
        self._gram[0, 1:] += products
        self._gram[1:, 0] += products


class Scratch:
    """Memory that blocks of gradients are formed in: fresh pages for each block would cost as much as the products."""

    def __init__(self):
        self._memory: dict[torch.device, Tensor] = {}

    def view(self, device: torch.device, *shape: int) -> Tensor:
        numbers = torch.Size(shape).numel()
        memory = self._memory.get(device)
        if memory is None or len(memory) < numbers:
            memory = self._memory[device] = torch.empty(max(numbers, BLOCK_BYTES // 4), device=device)
        return memory[:numbers].view(shape)
