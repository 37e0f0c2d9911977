"""The two forms of the per-sample gradients of one parameter at one call: written out, or as factors whose products they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..products import add_product, as_rows, factors, inner_products, multiply, split


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
        m, other_steps, _ = other.right.shape
        own_right, other_right = factors(self.right, other.right)
        other_right = other_right.flatten(0, 1).T
        rows = []
        for left, right in zip(self.left, own_right, strict=True):
            products = multiply(right, other_right)
            products *= _left_products(left, other.left)
            rows.append(products.view(-1, m, other_steps).sum(dim=(0, 2)))
        return torch.stack(rows)

    def inner_with(self, matrix: Tensor) -> Tensor:
        """Inner products with one matrix of shape (p, q), shape (n,): `sum_t left_t^T matrix right_t`."""
        if self.is_one_hot:
            return (matrix[self.left] * self.right.float()).sum(dim=(1, 2))
        rights = self.right.flatten(0, 1)
        products = sum(multiply(*factors(rights, part.T)) for part in split(matrix, rights))
        return (products.view(self.left.shape) * self.left.float()).sum(dim=(1, 2))

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
    """Inner products of one sample's left factors with all others, shape (T, n' T'); a one-hot factor only picks."""
    if left.is_floating_point() and other.is_floating_point():
        return multiply(*factors(left, other.flatten(0, 1).T))
    if left.is_floating_point():
        return left.float()[:, other.flatten()]
    if other.is_floating_point():
        return other.float().flatten(0, 1)[:, left].T
    return left[:, None] == other.flatten()[None, :]


Form = Dense | Outer
