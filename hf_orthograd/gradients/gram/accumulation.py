"""What one parameter adds to the Gram matrix, and what is kept of its gradients for the update.

Each retain sample's gradient of the parameter is formed, and multiplied with the others and with the forget gradient.
Then either the gradients are kept, or the factors they are products of, if those take less than 0.8 times the memory.
For a linear layer over T positions the k gradients take `k p q` numbers, the factors `k T (p + q)`. In a speech encoder
the gradients are smaller, in a decoder or a small image model the factors. These replace what the graph of the forward
pass gives free.
"""

import torch
from torch import Tensor, nn

from ...parallel import Parameters, SampleLayout
from ..products import accumulation_dtype, as_rows, assemble_grams, exact_arithmetic, inner_products
from .forms import Cost, Dense, Form, Outer, Use, costs_of, count_cost


# parameters of one dimension and at most so many numbers, biases and norms, are multiplied all together in the end
SMALL = 1 << 16


class ParameterGradients:
    """Collects the per-sample gradients of one parameter and takes their inner products once all have come.

    A tied weight gets several forms for the same samples, which are summed before the product.

    Args:
        parameter (`torch.nn.Parameter`): The parameter.
        forget_gradient (`torch.Tensor`, *optional*): Its `g_u`, or `None` if the forget loss does not use it.
        layout ([`SampleLayout`]): The k retain samples of this process among those of all.
        projected (`bool`): Whether inner products are wanted.
        for_update (`bool`): Whether anything is kept for the update.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        forget_gradient: Tensor | None,
        layout: SampleLayout,
        *,
        projected: bool = True,
        for_update: bool = True,
    ):
        self._parameter, self._shape, self._device = parameter, parameter.shape, parameter.device
        self._forget_gradient, self._layout = forget_gradient, layout
        self._num_samples = layout.local
        self._projected, self._for_update = projected, for_update
        self._uses: list[Use] = []
        self._cost: Cost | None = None
        self._arrived = 0
        self._new: list[Form] = []
        self._forms: list[tuple[slice, Form]] = []
        self._retain_products: list[Tensor] | None = None
        self._forget_products: list[Tensor] = []

    def begin_pass(self, uses: list[Use], num_samples: int) -> None:
        """Says how the calls of the next pass, over `num_samples` samples, use the parameter."""
        self._uses, self._arrived = uses, 0
        self._cost = count_cost(self._parameter, uses, num_samples)

    def add(self, form: Form, samples: slice, scratch: "Scratch") -> None:
        """Takes the gradients of the samples numbered `samples` at one call; with the last of all, products are taken."""
        self._new.append(form)
        self._arrived += 1
        if self._arrived < len(self._uses):
            return
        self._take_in(samples)
        # with other processes products wait for the end: all must come to them in the same order
        if samples.stop == self._num_samples and self._layout.group.is_alone and not self.is_small:
            self._take_products(scratch)

    def end_pass(self, samples: slice) -> None:
        """After a backward pass: calls that the loss does not depend on never delivered anything."""
        if self._new:
            self._take_in(samples)

    @property
    def is_small(self) -> bool:
        """Whether it is left to be multiplied with other small ones."""
        return len(self._shape) <= 1 and self._shape.numel() <= SMALL

    def products(self, scratch: "Scratch") -> tuple[list[Tensor], list[Tensor]]:
        """Inner products of this process' gradients with `g_u`, (local,), and with those of all, (local, k), as parts to add."""
        if self._retain_products is None:
            self._take_products(scratch)
        return self._forget_products, self._retain_products

    def rows(self) -> tuple[Tensor, Tensor]:
        """`g_u`, flat, (P,), and this process' gradients, (local, P), float32, zeros where nothing came."""
        forget, size = self._forget_gradient, self._shape.numel()
        first = torch.zeros(size, device=self._device) if forget is None else forget.reshape(-1).float()
        if len(self._forms) == 1 and self._forms[0][0] == slice(0, self._num_samples):
            return first, as_rows(self._forms[0][1].gradients).float()
        rows = torch.zeros(self._num_samples, size, device=self._device)
        for samples, form in self._forms:
            rows[samples] += as_rows(form.gradients)
        return first, rows

    def settle(self) -> None:
        """After the products: lets go of what the update does not need."""
        if not self._for_update:
            self.let_go()

    @property
    def are_dense(self) -> bool:
        """Whether gradients are kept and not their factors."""
        return all(isinstance(form, Dense) for _, form in self._forms)

    def begin_update(self) -> Tensor | None:
        """Memory that the update is added up in, for the taking: `g_u`, or zeros; `None` if neither loss uses it."""
        total, self._forget_gradient = self._forget_gradient, None
        if total is not None:
            return total.float().contiguous()
        return torch.zeros(self._shape, device=self._device) if self._forms else None

    def add_update(self, weights: Tensor, total: Tensor) -> None:
        """Adds `sum_i weights_i g_i` over this process' samples to a tensor of the parameter's shape."""
        for samples, form in self._forms:
            form.add_combination(weights[samples], total)

    def let_go(self) -> None:
        """Of the retain gradients, or their factors."""
        self._forms = []

    def products_with(self, tensor: Tensor) -> Tensor:
        """Inner products of this process' gradients with a tensor of the parameter's shape, (local,), float64."""
        found = torch.zeros(self._num_samples, dtype=accumulation_dtype(self._device), device=self._device)
        for samples, form in self._forms:
            found[samples] += form.inner_with(tensor.float())
        return found

    def _take_in(self, samples: slice) -> None:
        """Brings what has come of these samples into the form in which it will be kept."""
        forms, self._new = self._new, []
        all_outer = all(isinstance(form, Outer) for form in forms)
        if len(forms) == 1 and not all_outer:
            forms = [Dense(forms[0].gradients.float())]
        elif forms and (not all_outer or (self._for_update and self._cost.keeps_gradients)):
            forms = [Dense(self._sum_dense(forms))]
        self._forms += [(samples, form) for form in forms]

    def _sum_dense(self, forms: list[Form]) -> Tensor:
        total = None
        for form in forms:
            if total is None:
                # not in the memory of gradients that another parameter may have got, too
                total = form.dense() if isinstance(form, Outer) else form.gradients.float().clone()
            elif isinstance(form, Outer):
                form.add_rows(0, self._shape[0], total, overwrite=False)
            else:
                total = total + form.gradients
        return total

    def _take_products(self, scratch: "Scratch") -> None:
        self._retain_products = []
        if self._projected and (self._forms or not self._layout.group.is_alone):
            self._multiply(scratch)
        self.settle()

    def _multiply(self, scratch: "Scratch") -> None:
        forget = None if self._forget_gradient is None else self._forget_gradient.float()
        alone = self._layout.group.is_alone
        if alone and len(self._forms) == 1 and isinstance(self._forms[0][1], Dense):
            self._add_products(self._forms[0][1].gradients, forget)
        elif alone and self._cost.pairwise and all(isinstance(form, Outer) for _, form in self._forms):
            self._add_pairwise(forget)
        else:
            # gradients that stay factors, come from several forward passes, or travel, are formed in blocks along the
            # first dimension, all samples together
            length = self._shape[0] if self._shape else 1
            block_bytes = 4 * self._layout.total * max(1, self._shape.numel() // length)
            step = max(1, costs_of(self._device).block_bytes // block_bytes)
            for start in range(0, length, step):
                stop = min(start + step, length)
                # `g_u` stands in the first row: one reading of the block gives both kinds of products
                block = scratch.view(self._device, 1 + self._num_samples, stop - start, *self._shape[1:])
                self._form_rows(block[1:], start, stop)
                if forget is None:
                    block[0].zero_()
                else:
                    block[0].copy_(forget.view(length, *self._shape[1:])[start:stop])
                self._add_block(as_rows(block))

    def _form_rows(self, rows: Tensor, start: int, stop: int) -> None:
        at_once = bool(self._forms) and self._forms[0][0] == slice(0, self._num_samples)
        if not at_once:
            rows.zero_()
        for i, (samples, form) in enumerate(self._forms):
            form.add_rows(start, stop, rows[samples], overwrite=at_once and i == 0)

    def _add_block(self, block: Tensor) -> None:
        rows = block[1:]
        others = block if self._layout.group.is_alone else torch.cat((block[:1], self._layout.gather_rows(rows)))
        products = inner_products(rows, others)
        self._forget_products.append(products[:, 0])
        self._retain_products.append(products[:, 1:])

    def _add_products(self, gradients: Tensor, forget: Tensor | None) -> None:
        rows = as_rows(gradients).float()
        self._retain_products.append(inner_products(rows, self._layout.gather_rows(rows)))
        if forget is not None:
            self._forget_products.append(inner_products(rows, forget.reshape(1, -1))[:, 0])

    def _add_pairwise(self, forget: Tensor | None) -> None:
        dtype, size = accumulation_dtype(self._device), self._num_samples
        if len(self._forms) == 1:
            form = self._forms[0][1]
            self._retain_products.append(form.inner(form).to(dtype))
            if forget is not None:
                self._forget_products.append(form.inner_with(forget).to(dtype))
            return
        products = torch.zeros(size, 1 + size, dtype=dtype, device=self._device)
        for i, (samples, form) in enumerate(self._forms):
            for other_samples, other in self._forms[: i + 1]:
                block = form.inner(other).to(dtype)
                products[samples, 1 + other_samples.start : 1 + other_samples.stop] += block
                if other is not form:
                    products[other_samples, 1 + samples.start : 1 + samples.stop] += block.T
            if forget is not None:
                products[samples, 0] += form.inner_with(forget).to(dtype)
        self._forget_products.append(products[:, 0])
        self._retain_products.append(products[:, 1:])


class Scratch:
    """Memory that blocks of gradients are formed in: fresh pages for each block would cost as much as the products."""

    def __init__(self):
        self._memory: dict[torch.device, Tensor] = {}

    def view(self, device: torch.device, *shape: int) -> Tensor:
        numbers = torch.Size(shape).numel()
        memory = self._memory.get(device)
        if memory is None or len(memory) < numbers:
            # a GPU's allocator keeps what was let go; on a CPU the size at first is that for good
            least = costs_of(device).block_bytes // 4 if device.type == "cpu" else 0
            memory = self._memory[device] = torch.empty(max(numbers, least), device=device)
        return memory[:numbers].view(shape)


class Products:
    """Adds up the inner products of a step, parameter by parameter or over all of them.

    Args:
        parameters ([`Parameters`]): Of which those that are projected count.
        forget_gradients (`dict[str, torch.Tensor]`): `g_u`, by parameter, where the forget loss uses it.
        layout ([`SampleLayout`]): The samples of all processes.
        per_parameter (`bool`): Whether the Gram matrix of each parameter is wanted, and not only their sum.

    Attributes:
        joined (`tuple[dict[str, int], torch.Tensor]`, *optional*): The small parameters of the last group with how many numbers
            each has, and all their gradients side by side, (local, sum of the numbers).
    """

    def __init__(
        self, parameters: Parameters, forget_gradients: dict[str, Tensor], layout: SampleLayout, per_parameter: bool
    ):
        self._parameters, self._forget_gradients = parameters, forget_gradients
        self._layout, self._per_parameter = layout, per_parameter
        self._parts: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self.joined: tuple[dict[str, int], Tensor] | None = None

    def take(self, kept: dict[str, ParameterGradients], scratch: "Scratch") -> None:
        """Takes the products of a group of parameters, of all samples."""
        projected = {name: own for name, own in kept.items() if name in self._parameters.projected}
        with exact_arithmetic(self._parameters.device):
            small = {} if self._per_parameter else {name: own for name, own in projected.items() if own.is_small}
            for name, own in projected.items():
                if name not in small:
                    self._add(name if self._per_parameter else "", *own.products(scratch))
            if small:
                forget, rows = zip(*(own.rows() for own in small.values()), strict=True)
                joined = torch.cat(rows, dim=1)
                everyone = self._layout.gather_rows(joined)
                with_forget = inner_products(joined, torch.cat(forget)[None])[:, 0]
                self._add("", [with_forget], [inner_products(joined, everyone)])
                for own in small.values():
                    own.settle()
                self.joined = dict(zip(small, (row.shape[1] for row in rows), strict=True)), joined

    def _add(self, name: str, forget: list[Tensor], retain: list[Tensor]) -> None:
        own = self._parts.setdefault(name, ([], []))
        own[0].extend(forget)
        own[1].extend(retain)

    def grams(self) -> dict[str, Tensor]:
        """See [`assemble_grams`]."""
        device, layout = self._parameters.device, self._layout
        empty = torch.zeros(layout.local, 1 + layout.total, dtype=accumulation_dtype(device), device=device)
        products = {}
        for name, (forget, retain) in self._parts.items():
            first, others = (_sum(parts, like) for parts, like in ((forget, empty[:, 0]), (retain, empty[:, 1:])))
            products[name] = torch.cat((first[:, None], others), dim=1)
        forgets = {
            name: self._forget_gradients[name] for name in self._parameters.projected if name in self._forget_gradients
        }
        if self._per_parameter:
            parts = {name: [forgets[name]] if name in forgets else [] for name in products}
        else:
            parts = {"": list(forgets.values())}
        return assemble_grams(products, parts, layout)


def _sum(parts: list[Tensor], empty: Tensor) -> Tensor:
    return torch.stack([part.to(empty.device) for part in parts]).sum(dim=0) if parts else empty
