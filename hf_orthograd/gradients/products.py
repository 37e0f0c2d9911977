"""Inner products of gradients, in the precision that the eigenvalue cut of the projection assumes."""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor
from transformers.utils import logging

from ..parallel import SampleLayout


logger = logging.get_logger(__name__)

HALF = (torch.bfloat16, torch.float16)
# float32 sums run over so many columns at most, and float64 sums over the blocks; a GPU wants many blocks
_COLUMNS, _COLUMNS_OF_GPU = 1 << 13, 1 << 10


class exact_arithmetic:  # noqa: N801: a context manager, as torch.no_grad
    """Products in the precision of their factors: no autocast, no TF32 or bfloat16 inside of float32 products.

    What the process had set is restored after. It is entered for each call of a model: a generator would cost the host as
    much as launching the products.
    """

    def __init__(self, device: torch.device):
        self._device = device

    def __enter__(self) -> None:
        kind = self._device.type
        self._rough = [
            (one, one.fp32_precision) for one in _backends(kind) if one.fp32_precision not in ("ieee", "none")
        ]
        self._had_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        self._had_grad = torch.is_grad_enabled()
        for backend, _ in self._rough:
            backend.fp32_precision = "ieee"
        if self._had_autocast:
            torch.set_autocast_enabled(kind, False)
        torch.set_grad_enabled(False)

    def __exit__(self, *_: object) -> None:
        for backend, precision in self._rough:
            backend.fp32_precision = precision
        if self._had_autocast:
            torch.set_autocast_enabled(self._device.type, True)
        torch.set_grad_enabled(self._had_grad)


def _backends(kind: str) -> tuple:
    if kind == "cuda":
        return torch.backends.cuda.matmul, torch.backends.cudnn.conv
    return (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv) if kind == "cpu" else ()


def factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors as [`multiply`] takes them: both in their half precision where that loses nothing, else in float32.

    Products of two halves are exact in float32, and a GPU's matrix units sum them there, at a multiple of its speed in float32.
    """
    if left.dtype == right.dtype and left.dtype in HALF and sums_in_float32(left.device, left.dtype):
        return left, right
    return left.float(), right.float()


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """`left @ right` in float32, of two [`factors`]: matrices, or batches of them. `out` is written to, if given."""
    if left.dtype in HALF:
        return _multiply_halves(left, right, out)
    product = torch.bmm if left.ndim == 3 else torch.mm
    return product(left, right, out=out)


def _multiply_halves(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    product = torch.bmm if left.ndim == 3 else torch.mm
    return product(left, right, torch.float32, **({} if out is None else {"out": out}))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds `left @ right` of two [`factors`] to `total`, float32, in place."""
    if left.dtype in HALF:
        total += multiply(left, right)
    elif left.ndim == 3:
        total.baddbmm_(left, right)
    else:
        total.addmm_(left, right)


def split(wide: Tensor, half: Tensor) -> list[Tensor]:
    """Float32 numbers as parts that are [`factors`] beside `half`, and add up to them but for 2^-17 of each.

    Two bfloat16 numbers hold what one rounds off: two products by matrix units take a fraction of the time of one in float32.
    float16 has too small a range for that.
    """
    if half.dtype != torch.bfloat16 or not sums_in_float32(half.device, half.dtype):
        return [wide]
    rounded = wide.to(half.dtype)
    return [rounded, (wide - rounded).to(half.dtype)]


@cache
def sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has products of half precision with sums in float32; asked once."""
    if device.type != "cuda":
        return False
    ones = torch.ones(1, 16, 16, device=device, dtype=dtype)
    try:
        torch.bmm(ones, ones, torch.float32)
    except RuntimeError as error:
        logger.warning(
            f"{device} has no products of {dtype} with sums in float32 ({str(error).splitlines()[0]}): inner products are computed from "
            "float32 copies, which takes longer."
        )
        return False
    return True


def as_rows(gradients: Tensor) -> Tensor:
    """Per-sample gradients of a parameter of any shape, or of a single number, as (k, numbers)."""
    return gradients.reshape(len(gradients), -1)


def own_memory(gradients: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Gradients that may be written into: each in memory of its own.

    autograd gives one tensor for two parameters that only ever meet in a sum, and an expanded one for a sum's parts.
    """
    seen, found = set(), []
    for gradient in gradients:
        if gradient is not None:
            storage = gradient.untyped_storage().data_ptr()
            if storage in seen or not gradient.is_contiguous():
                gradient = gradient.clone(memory_format=torch.contiguous_format)
            seen.add(storage)
        found.append(gradient)
    return found


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """float64, where the device has it: MPS does not."""
    return torch.float32 if device.type == "mps" else torch.float64


def inner_products(rows: Tensor, others: Tensor) -> Tensor:
    """Inner products of the rows of (n, P) and (m, P), shape (n, m), float64 (float32 on MPS).

    In float32 within blocks of columns and float64 over them: a float32 sum over the 2e7 entries of a vocabulary is off
    by 4e-5. Four kernels at most, however many columns there are.
    """
    # half precision would round each block's sum
    rows, others = (t.float() if t.dtype in HALF else t for t in (rows, others))
    with exact_arithmetic(rows.device):
        columns = _COLUMNS if rows.device.type == "cpu" else _COLUMNS_OF_GPU
        blocks, rest = divmod(rows.shape[1], columns)
        dtype = accumulation_dtype(rows.device)
        total = None
        if blocks:
            left, right = (t[:, : blocks * columns].unflatten(1, (blocks, columns)) for t in (rows, others))
            total = torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)).sum(dim=0, dtype=dtype)
        if rest or not blocks:
            last = (rows[:, blocks * columns :] @ others[:, blocks * columns :].T).to(dtype)
            total = last if total is None else total + last
        return total


def assemble_grams(
    products: dict[str, Tensor], forget_gradients: dict[str, list[Tensor]], layout: SampleLayout
) -> dict[str, Tensor]:
    """From what each process found to Gram matrices of `g_u` and the retain samples of all processes.

    Args:
        products (`dict[str, torch.Tensor]`): Of this process' samples with `g_u` and with the samples of all, shape
            (local, 1 + k), by parameter, or summed over all of them under the name "".
        forget_gradients (`dict[str, list[torch.Tensor]]`): Under the same names, the parts of `g_u`.
        layout ([`SampleLayout`]): The samples of all processes.

    Returns:
        `dict[str, torch.Tensor]`: Shape (1 + k, 1 + k) for each name, float64, the same in every process.
    """
    device = next(iter(products.values())).device
    rows = layout.gather_rows(torch.stack([product.to(device) for product in products.values()], dim=1))
    squared = [_squared_norm(forget_gradients[name], rows) for name in products]
    first = torch.cat((torch.stack(squared)[:, None], rows[:, :, 0].T), dim=1)
    grams = torch.cat((first[:, None], rows.transpose(0, 1)), dim=1)
    return dict(zip(products, grams.unbind(), strict=True))


def _squared_norm(gradients: list[Tensor], like: Tensor) -> Tensor:
    """A GPU converts to float64 as it reads; a CPU would copy all first, and sums blocks of float32 as [`inner_products`] does."""
    if not gradients:
        return like.new_zeros(())
    if like.device.type != "cpu":
        norms = torch._foreach_norm(gradients, 2, dtype=like.dtype)
        return torch.stack([norm.to(like.device) for norm in norms]).square().sum()
    norms, rest = [like.new_zeros(0)], []
    for gradient in gradients:
        flat = gradient.reshape(-1)
        in_blocks = len(flat) - len(flat) % _COLUMNS
        if in_blocks:
            wide = torch.promote_types(flat.dtype, torch.float32)
            norms.append(torch.linalg.vector_norm(flat[:in_blocks].view(-1, _COLUMNS), dim=1, dtype=wide))
        if in_blocks < len(flat):
            rest.append(flat[in_blocks:])
    if rest:
        norms.append(torch.stack(torch._foreach_norm(rest, 2, dtype=like.dtype)))
    return torch.cat(norms).square().sum()
