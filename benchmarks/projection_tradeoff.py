"""What an approximate projection costs: residual and time against iterations, for retain sets of several kinds.

    python benchmarks/projection_tradeoff.py --dimension 10000000 --rows 32

Prints one table and writes it, with a plot, into benchmarks/results/. Each solver runs on the same vectors; the residual
is the largest |cos(projected gradient, retain gradient)|, measured afterwards in float64 on the vectors themselves.
"""

import argparse
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch

from hf_orthograd import project_orthogonal


RESULTS = Path(__file__).parent / "results"


def retain_sets(k: int, d: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows of shape (k, d), float32, by kind."""

    def independent(count: int) -> torch.Tensor:
        return torch.randn(count, d, generator=generator)

    common = independent(1)
    well = independent(k)
    return {
        "well conditioned": well,
        # samples of one task share a direction: the condition number of the Gram matrix is about 1 + 100 k
        "correlated": well + 10 * common,
        # singular values from 1 to 1e-3
        "ill conditioned": torch.linalg.qr(torch.randn(k, k, generator=generator))[0]
        @ (torch.logspace(0, -3, k)[:, None] * well),
        "duplicated": well[: k // 2].repeat(2, 1),
        "rank deficient": torch.randn(k, k // 4, generator=generator) @ well[: k // 4],
    }


def largest_cosine(projected: torch.Tensor, rows: torch.Tensor) -> float:
    products, squares = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.float64)
    for start in range(0, rows.shape[1], 1 << 20):
        block = rows[:, start : start + (1 << 20)].double()
        products += block @ projected[start : start + (1 << 20)].double()
        squares += block.square().sum(dim=1)
    return (products.abs() / squares.sqrt()).max().item() / projected.double().norm().item()


def timed(repeats: int, forget: torch.Tensor, rows: torch.Tensor, **settings) -> tuple[float, torch.Tensor]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        projected = project_orthogonal(forget, rows, **settings)
        times.append(time.perf_counter() - start)
    return statistics.median(times), projected


def measure(arguments: argparse.Namespace) -> list[tuple[str, str, int | None, float, float]]:
    """Rows of (retain set, solver, iterations, residual, seconds)."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for kind, rows in retain_sets(arguments.rows, arguments.dimension, generator).items():
        # a forget gradient that has something in common with the retain set, as real ones do
        forget = torch.randn(arguments.dimension, generator=generator)
        forget += 0.5 * forget.norm() * torch.nn.functional.normalize(rows.sum(dim=0), dim=0)
        seconds, projected = timed(arguments.repeats, forget, rows)
        results.append((kind, "exact", None, largest_cosine(projected, rows), seconds))
        for solver in ("cg", "kaczmarz"):
            for iterations in arguments.iterations:
                settings = {"solver": solver, "num_iterations": iterations, "rtol": 1e-12}
                seconds, projected = timed(arguments.repeats, forget, rows, **settings)
                results.append((kind, solver, iterations, largest_cosine(projected, rows), seconds))
                print(*results[-1], sep="\t", flush=True)
    return results


def to_markdown(results: list, arguments: argparse.Namespace) -> str:
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    lines = [
        f"# Projection: residual and time against iterations (k = {arguments.rows}, d = {arguments.dimension:,})",
        "",
        f"{date.today()}, {machine}, Python {platform.python_version()}, torch {torch.__version__}, float32 vectors, "
        f"median of {arguments.repeats}. Residual: largest |cos(projected, retain gradient)|. Time in s.",
        "",
        "| retain set | solver | " + " | ".join(str(n) for n in arguments.iterations) + " |",
        "|---" * (len(arguments.iterations) + 2) + "|",
    ]
    for kind in dict.fromkeys(row[0] for row in results):
        exact = next(row for row in results if row[:2] == (kind, "exact"))
        lines.append(f"| {kind} | exact | {exact[3]:.0e}, {exact[4]:.2f} s |" + " |" * (len(arguments.iterations) - 1))
        for solver in ("cg", "kaczmarz"):
            cells = [f"{row[3]:.0e}, {row[4]:.2f} s" for row in results if row[:2] == (kind, solver)]
            lines.append(f"| {kind} | {solver} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row[0] for row in results))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(3.4 * len(kinds), 3.6), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        for solver, marker in (("cg", "o-"), ("kaczmarz", "s-"), ("exact", "*")):
            points = [(row[4], row[3]) for row in results if row[:2] == (kind, solver)]
            axis.loglog(*zip(*points, strict=True), marker, label=solver, markersize=10 if solver == "exact" else 4)
        axis.set(title=kind, xlabel="time (s)")
    axes[0].set_ylabel("largest |cos| with a retain gradient")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=10_000_000, help="d, number of parameters")
    parser.add_argument("--rows", type=int, default=32, help="k, number of retain gradients")
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="of cg and kaczmarz")
    parser.add_argument("--repeats", type=int, default=1, help="runs per point; the median is kept")
    arguments = parser.parse_args()
    results = measure(arguments)
    RESULTS.mkdir(exist_ok=True)
    name = f"projection_tradeoff_k{arguments.rows}_d{arguments.dimension}"
    table = to_markdown(results, arguments)
    (RESULTS / f"{name}.md").write_text(table)
    plot(results, RESULTS / f"{name}.png")
    print(table)


if __name__ == "__main__":
    main()
