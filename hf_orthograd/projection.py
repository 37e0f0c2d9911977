"""From inner products to the projection: which combination of retain gradients to take out of the forget gradient.

The retain gradients are the rows of G, shape (k, d), the forget gradient is g_u, shape (d,). The projected gradient is
`g_u - G^T c` where `c` solves `(G G^T) c = G g_u` (arXiv 2503.02312, Algorithm 1, with a QR factorisation of G^T).
Only inner products enter `c`, so it can be found without holding the gradients.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


SOLVERS = ("exact", "cg", "kaczmarz")
DEFAULT_ITERATIONS = {"cg": 100, "kaczmarz": 100}
DEFAULT_ITERATIVE_RTOL = 1e-6

# float64 working copies of explicit vectors are made for this many columns at a time
_COLUMNS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Projection:
    """The solution of one projection, for k retain rows.

    Attributes:
        coefficients (`torch.Tensor`): Shape (k,), float64, on the CPU. The projected gradient is `g_u - sum_i coefficients[i] * g_i`.
            Where each tensor is projected alone, shape (number of tensors, k).
        kept_signal (`float`): `||g_perp|| / ||g_u||`, in [0, 1]; 0 when the forget gradient is zero.
        rank (`int`, *optional*): Number of independent retain directions, by the eigenvalue cut of the solver "exact"; the
            iterative ones find no eigenvalues.
        residual (`float`): Largest `|cos(g_perp, g_i)|` over the retain rows, computed from the same inner products.
    """

    coefficients: Tensor
    kept_signal: float
    rank: int | None
    residual: float

    @property
    def metrics(self) -> dict[str, float]:
        """What there is to log of it; nothing of an overflow."""
        found = {"kept_signal": self.kept_signal, "projection_rank": self.rank, "projection_residual": self.residual}
        return {name: value for name, value in found.items() if value is not None and math.isfinite(self.kept_signal)}


@dataclass(frozen=True)
class UpdateWeights:
    """With which weights gradients add up to an update (arXiv 2503.02312, equation 5).

    Attributes:
        forget (`float`): Of the forget gradient: -(1 - alpha), which ascends it.
        retain_mean (`float`): Of the mean of the retain gradients, for parameters without a projection: alpha.
        projected (`dict[str, torch.Tensor]`): For each projected parameter, those of its k retain gradients, shape (k,):
            alpha / k + (1 - alpha) c_i, as the projection takes `sum_i c_i g_i` out of what is ascended.
        retain_term (`float`): Of the gradient of a retain term that is not the losses' mean: alpha, which then has left both
            entries above.
    """

    forget: float
    retain_mean: float
    projected: dict[str, Tensor]
    retain_term: float = 0.0


def update_weights(
    alpha: float,
    projection: "Projection | None",
    names: Iterable[str],
    *,
    device: torch.device | None = None,
    has_term: bool = False,
) -> UpdateWeights:
    """The weights of `alpha * mean_i g_i - (1 - alpha) * g_perp`.

    Args:
        alpha (`float`): Weight of the retain mean, in [0, 1].
        projection ([`Projection`], *optional*): None where nothing is projected.
        names (`Iterable[str]`): The projected parameters.
        device (`torch.device`, *optional*): Where the weights are needed; they go there in one piece.
        has_term (`bool`): Whether a retain term of its own takes the place of the losses' mean.
    """
    of_mean, of_term = (0.0, alpha) if has_term else (alpha, 0.0)
    if projection is None:
        return UpdateWeights(-(1 - alpha), of_mean, {}, of_term)
    coefficients = projection.coefficients
    weights = (of_mean / coefficients.shape[-1] + (1 - alpha) * coefficients).float().to(device)
    names = list(names)
    each = weights.unbind() if weights.ndim == 2 else [weights] * len(names)
    return UpdateWeights(-(1 - alpha), of_mean, dict(zip(names, each, strict=True)), of_term)


def check_solver(solver: str, num_iterations: int | None, rtol: float | None) -> None:
    """Raises `ValueError` naming the offending argument and its value."""
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {', '.join(SOLVERS)}, but is {solver!r}.")
    if num_iterations is not None and num_iterations < 1:
        raise ValueError(f"`num_iterations` must be at least 1, but is {num_iterations}.")
    if num_iterations is not None and solver == "exact":
        raise ValueError(
            f"`num_iterations` is {num_iterations}, but the solver 'exact' has no iterations: use 'cg' or 'kaczmarz'."
        )
    if rtol is not None and not 0 < rtol < 1:
        raise ValueError(f"`rtol` must lie strictly between 0 and 1, but is {rtol}.")


def solve_projection(
    gram: Tensor,
    *,
    solver: str = "exact",
    num_iterations: int | None = None,
    rtol: float | None = None,
    input_precision: float = torch.finfo(torch.float32).eps,
) -> Projection:
    """Solves for the projection from a Gram matrix.

    Args:
        gram (`torch.Tensor`): Shape (1 + k, 1 + k). Inner products of [forget gradient; k retain gradients], symmetric.
        solver (`str`): "exact" (eigenvalues in float64), "cg" (conjugate gradients) or "kaczmarz" (row-action sweeps).
        num_iterations (`int`, *optional*): Most iterations (cg) or sweeps (kaczmarz).
        rtol (`float`, *optional*): For "exact", eigenvalues below `rtol` times the largest count as zero; by default k
            times `input_precision`. For the iterative solvers, the tolerance on `||residual|| / ||G g_u||` at which
            they stop.
        input_precision (`float`): Relative error of the entries of `gram`; that of float32 products by default.

    Returns:
        [`Projection`]. A matrix that is not finite gives coefficients that are NaN: a gradient scaler then sees the
        overflow and skips the step, where a finite answer would hide it.
    """
    check_solver(solver, num_iterations, rtol)
    gram = gram.detach().to("cpu", torch.float64)  # k numbers: one transfer, and no device without float64 matters
    k = gram.shape[0] - 1
    if not torch.isfinite(gram).all():
        return Projection(gram.new_full((k,), math.nan), math.nan, None, math.nan)

    # columns may be scaled freely: with unit rows the eigenvalue cut does not depend on the scale of a sample's loss
    norms = gram.diagonal().clamp_min(0).sqrt()
    forget_norm = norms[0].item()
    scale = torch.where(norms[1:] > 0, 1 / norms[1:], 0)
    system = gram[1:, 1:] * scale * scale[:, None]
    target = gram[1:, 0] * scale

    rank = None
    if solver == "exact":
        solution, rank = _solve_by_eigenvalues(system, target, max(k, 1) * input_precision if rtol is None else rtol)
    elif solver == "cg":
        solution = conjugate_gradients(lambda v: system @ v, target, num_iterations, rtol)
    else:
        solution = _kaczmarz_on_gram(system, target, num_iterations, rtol)

    remainder = target - system @ solution  # <g_i, g_perp> / ||g_i||
    kept_squared = gram[0, 0] - target @ solution - remainder @ solution
    kept_norm = kept_squared.clamp_min(0).sqrt().item()
    # g_perp below the rounding error of the products has no direction left to speak of
    measurable = kept_norm > math.sqrt(input_precision) * forget_norm and k > 0
    return Projection(
        coefficients=solution * scale,
        kept_signal=kept_norm / forget_norm if forget_norm > 0 else 0.0,
        rank=rank,
        residual=remainder.abs().max().item() / kept_norm if measurable else 0.0,
    )


def _solve_by_eigenvalues(system: Tensor, target: Tensor, cut: float) -> tuple[Tensor, int]:
    """The least-norm solution over eigenvalues above `cut` times the largest, and how many they are."""
    if not len(system):
        return target, 0
    eigenvalues, eigenvectors = torch.linalg.eigh(system)
    independent = eigenvalues > cut * eigenvalues[-1].clamp_min(0)
    basis = eigenvectors[:, independent]
    return basis @ ((basis.T @ target) / eigenvalues[independent]), int(independent.sum())


def solve_projections(grams: dict[str, Tensor], **settings: Any) -> Projection:
    """Solves for all parameters as one vector, or for each tensor alone.

    Args:
        grams (`dict[str, torch.Tensor]`): Gram matrices, shape (1 + k, 1 + k), on the CPU: one, over all parameters, or that
            of each.
        settings: Passed to [`solve_projection`].

    Returns:
        [`Projection`]; of several matrices the coefficients of each, kept signal of the whole gradient, largest rank and
        largest residual.
    """
    projections = [solve_projection(gram, **settings) for gram in grams.values()]
    if len(projections) == 1:
        return projections[0]
    squared = [gram[0, 0].item() for gram in grams.values()]
    kept = sum(projection.kept_signal**2 * own for projection, own in zip(projections, squared, strict=True))
    if not math.isfinite(kept):
        kept, squared = math.nan, [1.0]
    return Projection(
        coefficients=torch.stack([projection.coefficients for projection in projections]),
        kept_signal=math.sqrt(kept / sum(squared)) if sum(squared) > 0 else 0.0,
        rank=max((projection.rank for projection in projections if projection.rank is not None), default=None),
        residual=max(projection.residual for projection in projections),
    )


def project_orthogonal(
    forget_gradient: Tensor,
    retain_gradients: Tensor,
    *,
    solver: str = "exact",
    num_iterations: int | None = None,
    rtol: float | None = None,
) -> Tensor:
    """Projects a gradient onto the orthogonal complement of the span of others (arXiv 2503.02312, Algorithm 1).

    Duplicated rows, zero rows and more rows than dimensions (k > d) are handled: only directions that are in the span
    are removed, each once.

    Args:
        forget_gradient (`torch.Tensor`): Shape (d,).
        retain_gradients (`torch.Tensor`): Shape (k, d); k = 0 returns the forget gradient.
        solver (`str`): "exact" forms the k x k Gram matrix once, 2 k^2 d operations. "cg" and "kaczmarz" touch the rows
            only, 4 k d operations an iteration or sweep, and are exact in the limit.
        num_iterations (`int`, *optional*): Most iterations of "cg" or sweeps of "kaczmarz"; 100 by default.
        rtol (`float`, *optional*): See [`solve_projection`]; for "exact" the default is 10 k times the float64 epsilon.

    Returns:
        `torch.Tensor` of shape (d,), in the dtype and on the device of `forget_gradient`. Sums run in float64.

    Raises:
        ValueError: Shapes that do not fit, an unknown solver, or a setting out of its range.
    """
    check_solver(solver, num_iterations, rtol)
    if (
        forget_gradient.ndim != 1
        or retain_gradients.ndim != 2
        or retain_gradients.shape[1] != forget_gradient.shape[0]
    ):
        raise ValueError(
            "`forget_gradient` must have shape (d,) and `retain_gradients` shape (k, d), but they have shapes "
            f"{tuple(forget_gradient.shape)} and {tuple(retain_gradients.shape)}."
        )
    k = retain_gradients.shape[0]
    if k == 0:
        return forget_gradient.clone()
    if solver == "kaczmarz":
        return _kaczmarz_on_rows(forget_gradient, retain_gradients, num_iterations, rtol)
    if solver == "cg":
        coefficients = _conjugate_gradients_on_rows(forget_gradient, retain_gradients, num_iterations, rtol)
        return _subtract_combination(forget_gradient, retain_gradients, coefficients)
    return _project_exactly(forget_gradient, retain_gradients, rtol)


def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor], target: Tensor, num_iterations: int | None, rtol: float | None
) -> Tensor:
    """Solves `A x = target` for a positive semi-definite A known by its products (Hestenes and Stiefel, 1952).

    Args:
        multiply (`Callable`): Maps a vector of shape (k,) to A times it.
        target (`torch.Tensor`): Shape (k,), in the range of A, as `G g_u` is for `A = G G^T`.
        num_iterations (`int`, *optional*): Most iterations; 100 by default.
        rtol (`float`, *optional*): Stops at `||target - A x|| <= rtol ||target||`; 1e-6 by default.

    Returns:
        `torch.Tensor` of shape (k,).
    """
    num_iterations = num_iterations or DEFAULT_ITERATIONS["cg"]
    tolerance = (rtol or DEFAULT_ITERATIVE_RTOL) * target.norm()
    solution = torch.zeros_like(target)
    remainder, direction = target.clone(), target.clone()
    squared = remainder @ remainder
    for _ in range(num_iterations):
        if squared.sqrt() <= tolerance:
            break
        product = multiply(direction)
        step = squared / (direction @ product)
        solution = solution + step * direction
        remainder = remainder - step * product
        previous, squared = squared, remainder @ remainder
        direction = remainder + (squared / previous) * direction
    return solution


def _kaczmarz_on_gram(system: Tensor, target: Tensor, num_iterations: int | None, rtol: float | None) -> Tensor:
    """Sweeps over the rows, taking the component along each out in turn: Gauss-Seidel on the Gram system."""
    tolerance = (rtol or DEFAULT_ITERATIVE_RTOL) * target.norm()
    solution = torch.zeros_like(target)
    for _ in range(num_iterations or DEFAULT_ITERATIONS["kaczmarz"]):
        for i in range(len(target)):
            if system[i, i] > 0:
                solution[i] += (target[i] - system[i] @ solution) / system[i, i]
        if (target - system @ solution).norm() <= tolerance:
            break
    return solution


def _kaczmarz_on_rows(forget_gradient: Tensor, rows: Tensor, num_iterations: int | None, rtol: float | None) -> Tensor:
    """The same sweeps on the vectors: each step is one Gram-Schmidt step against a row as it is, not orthonormalised."""
    norms = _norms(rows)
    used = [i for i in range(len(rows)) if norms[i] > 0]
    projected = forget_gradient.to(torch.float64)
    target = _products(rows, projected)[used] / norms[used]
    for _ in range(num_iterations or DEFAULT_ITERATIONS["kaczmarz"]):
        for i in used:
            row = rows[i].to(torch.float64)
            projected = torch.sub(projected, row, alpha=((row @ projected) / norms[i] ** 2).item())
        if (_products(rows, projected)[used] / norms[used]).norm() <= (rtol or DEFAULT_ITERATIVE_RTOL) * target.norm():
            break
    return projected.to(forget_gradient.dtype)


def _project_exactly(forget_gradient: Tensor, rows: Tensor, rtol: float | None) -> Tensor:
    k = rows.shape[0]
    system = rows.new_zeros((k, k), dtype=torch.float64)
    for columns in _column_slices(rows.shape[1]):
        block = rows[:, columns].to(torch.float64)
        system += block @ block.T
    gram = rows.new_zeros((1 + k, 1 + k), dtype=torch.float64)
    gram[1:, 1:] = system
    projected = forget_gradient
    # the Gram matrix squares the condition number; a second pass takes out what rounding left along weak directions, as
    # repeated Gram-Schmidt does
    for _ in range(2):
        gram[0, 1:] = gram[1:, 0] = _products(rows, projected)
        gram[0, 0] = projected.to(torch.float64).square().sum()
        precision = 10 * torch.finfo(torch.float64).eps
        coefficients = solve_projection(gram, rtol=rtol, input_precision=precision).coefficients
        projected = _subtract_combination(projected, rows, coefficients)
    return projected


def _norms(rows: Tensor) -> Tensor:
    slices = _column_slices(rows.shape[1])
    return sum(rows[:, columns].to(torch.float64).square().sum(dim=1) for columns in slices).sqrt()


def _products(rows: Tensor, vector: Tensor) -> Tensor:
    """Inner products of each row with a vector, shape (k,), summed in float64."""
    slices = _column_slices(rows.shape[1])
    return sum(rows[:, columns].to(torch.float64) @ vector[columns].to(torch.float64) for columns in slices)


def _conjugate_gradients_on_rows(
    forget_gradient: Tensor, rows: Tensor, num_iterations: int | None, rtol: float | None
) -> Tensor:
    norms = _norms(rows)
    scale = torch.where(norms > 0, 1 / norms, 0)

    def multiply(vector: Tensor) -> Tensor:
        # in float64: the recurrence does not notice rounding and would go on past what float32 can reach
        result = torch.zeros_like(vector)
        for columns in _column_slices(rows.shape[1]):
            block = rows[:, columns].to(torch.float64)
            result += block @ (block.T @ (vector * scale))
        return scale * result

    return scale * conjugate_gradients(multiply, scale * _products(rows, forget_gradient), num_iterations, rtol)


def _subtract_combination(forget_gradient: Tensor, rows: Tensor, coefficients: Tensor) -> Tensor:
    projected = torch.empty_like(forget_gradient)
    coefficients = coefficients.to(rows.device)
    for columns in _column_slices(forget_gradient.shape[0]):
        combination = coefficients @ rows[:, columns].to(torch.float64)
        projected[columns] = (forget_gradient[columns].to(torch.float64) - combination).to(projected.dtype)
    return projected


def _column_slices(length: int) -> list[slice]:
    return [slice(start, start + _COLUMNS_AT_ONCE) for start in range(0, length, _COLUMNS_AT_ONCE)]
