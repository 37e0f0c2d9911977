import math

import pytest
import torch

from hf_orthograd import project_orthogonal
from hf_orthograd.projection import solve_projection, solve_projections


def gram_of(forget, rows):
    stacked = torch.cat([forget[None], rows]).double()
    return stacked @ stacked.T


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("solver", ["exact", "cg", "kaczmarz"])
def test_known_answer(solver):
    forget = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows = torch.tensor([[2.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    expected = torch.tensor([0.0, 0.0, 3.0, 4.0])
    torch.testing.assert_close(project_orthogonal(forget, rows, solver=solver, rtol=1e-9), expected)
    projection = solve_projection(gram_of(forget, rows), solver=solver)
    torch.testing.assert_close(forget - projection.coefficients.float() @ rows, expected, atol=1e-5, rtol=0)
    assert projection.kept_signal == pytest.approx(5 / math.sqrt(30), abs=1e-5)
    assert projection.rank == (2 if solver == "exact" else None)
    assert projection.residual < 1e-5


@pytest.mark.parametrize("solver", ["exact", "cg", "kaczmarz"])
def test_duplicates_zero_rows_and_scales_remove_only_the_span(solver, generator):
    forget, rows = torch.randn(50, generator=generator), torch.randn(4, 50, generator=generator)
    expected = project_orthogonal(forget, rows)
    messy = torch.cat([rows, rows[:2], torch.zeros(3, 50), 1e-4 * rows[2:], 1e4 * rows[:1]])
    # scaled copies are duplicates up to float32 rounding: a tolerance below that would chase the rounding
    torch.testing.assert_close(project_orthogonal(forget, messy, solver=solver), expected, atol=1e-5, rtol=0)
    assert solve_projection(gram_of(forget, messy), solver="exact").rank == 4


def test_eight_duplicates_remove_one_dimension(generator):
    forget, row = torch.randn(20, generator=generator), torch.randn(1, 20, generator=generator)
    torch.testing.assert_close(
        project_orthogonal(forget, row.repeat(8, 1)), project_orthogonal(forget, row), atol=1e-6, rtol=0
    )


def test_more_rows_than_dimensions_leave_nothing(generator):
    forget, rows = torch.randn(6, generator=generator), torch.randn(9, 6, generator=generator)
    assert project_orthogonal(forget, rows).norm() < 1e-6
    projection = solve_projection(gram_of(forget, rows))
    assert projection.rank == 6
    assert projection.kept_signal < 1e-3
    assert projection.residual == 0.0


@pytest.mark.parametrize("k", [0, 1, 7])
def test_orthogonal_idempotent_and_linear(k, generator):
    forget, other = torch.randn(2, 100, generator=generator)
    rows = torch.randn(k, 100, generator=generator)
    projected = project_orthogonal(forget, rows)
    assert (rows @ projected).abs().max().item() < 1e-4 if k else torch.equal(projected, forget)
    torch.testing.assert_close(project_orthogonal(projected, rows), projected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        project_orthogonal(3 * forget + other, rows),
        3 * projected + project_orthogonal(other, rows),
        atol=1e-5,
        rtol=0,
    )


def test_exact_agrees_with_qr_in_float64_on_ill_conditioned_rows(generator):
    basis, _ = torch.linalg.qr(torch.randn(200, 6, generator=generator, dtype=torch.float64))
    rows = torch.logspace(0, -6, 6, dtype=torch.float64)[:, None] * basis.T
    rows = torch.randn(6, 6, generator=generator, dtype=torch.float64) @ rows
    forget = torch.randn(200, generator=generator, dtype=torch.float64)
    expected = forget - basis @ (basis.T @ forget)
    # float64 leaves 2e-16 x the square of a condition above 1e6; how much of that shows, processors round otherwise
    torch.testing.assert_close(project_orthogonal(forget, rows), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", ["cg", "kaczmarz"])
def test_iterations_bound_the_work_and_more_are_better(solver, generator):
    forget = torch.randn(300, generator=generator)
    rows = torch.randn(12, 300, generator=generator) + 1.0  # correlated: one iteration cannot be enough
    residuals = [
        (rows @ project_orthogonal(forget, rows, solver=solver, num_iterations=n, rtol=1e-12)).norm()
        for n in (1, 4, 12)
    ]
    assert residuals[0] > 2 * residuals[1] > 4 * residuals[2]


def test_forget_gradient_inside_the_span_or_zero():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert project_orthogonal(torch.tensor([2.0, 3.0]), rows).norm() < 1e-6
    zero = solve_projection(gram_of(torch.zeros(2), rows))
    assert (zero.kept_signal, zero.rank, zero.residual) == (0.0, 2, 0.0)


def test_not_finite_stays_not_finite():
    gram = torch.eye(3)
    gram[1, 2] = gram[2, 1] = math.inf
    projection = solve_projection(gram)
    assert torch.isnan(projection.coefficients).all()
    assert math.isnan(projection.kept_signal)


def test_per_tensor_summary_is_that_of_the_joined_vector(generator):
    tensors = {name: torch.randn(5, size, generator=generator) for name, size in (("a", 30), ("b", 3))}
    grams = {name: gram_of(rows[0], rows[1:]) for name, rows in tensors.items()}
    summary = solve_projections(grams)
    each = zip(tensors.values(), summary.coefficients, strict=True)
    kept = [rows[0] - coefficients.float() @ rows[1:] for rows, coefficients in each]
    assert kept[1].norm() < 1e-5  # a tensor with no more entries than rows loses all of its signal
    total = torch.cat([rows[0] for rows in tensors.values()]).norm()
    assert summary.kept_signal == pytest.approx((torch.cat(kept).norm() / total).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"solver": "qr"}, "'qr'"),
        ({"solver": "cg", "num_iterations": 0}, "0"),
        ({"num_iterations": 3}, "no iterations"),
        ({"rtol": 2.0}, "2.0"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        project_orthogonal(torch.ones(2), torch.ones(1, 2), **settings)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(2,\) and \(1, 3\)"):
        project_orthogonal(torch.ones(2), torch.ones(1, 3))


@pytest.mark.parametrize("solver", ["exact", "cg", "kaczmarz"])
def test_sums_run_in_float64(solver):
    """float32 rows of which one is a million times the others: in float32 sums the small one would be lost."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 2000, generator=generator) * torch.tensor([1e3, 1e-3, 1.0, 1.0])[:, None]
    forget = torch.randn(2000, generator=generator) + rows.sum(0)
    found = project_orthogonal(forget, rows, solver=solver, rtol=1e-10).double()
    cosines = (rows.double() @ found) / rows.double().norm(dim=1) / found.norm()
    assert cosines.abs().max() < 1e-6
