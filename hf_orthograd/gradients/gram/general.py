"""The rule for every call without one of its own: run it again for its sources alone, differentiate sample by sample."""

import torch
from torch import Tensor

from .calls import Call, Source, is_in_place, iterate, replace
from .forms import Dense


def general_rule(call: Call, output_gradient: Tensor) -> list[tuple[Source, Dense]]:
    """Per-sample gradients of any call whose first output dimension runs over the samples."""
    tensors = tuple(source.tensor.detach() for source in call.sources)
    if call.num_samples == 1:
        gradients = [gradient[None] for gradient in _pull_back(call, tensors, {}, output_gradient)]
    elif _has_ambiguous_arguments(call):
        gradients = _masked_pull_back(call, tensors, output_gradient)
    else:
        gradients = _vectorised_pull_back(call, tensors, output_gradient)
    return [(source, Dense(gradient)) for source, gradient in zip(call.sources, gradients, strict=True)]


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
    samples = call.num_samples

    def split(tensor: Tensor) -> Tensor:
        return tensor.reshape(samples, -1, *tensor.shape[1:])

    leaves = iterate((call.args, call.kwargs))
    batched = {id(leaf): split(leaf) for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) in call.batched}
    return torch.func.vmap(lambda data, gradient: _pull_back(call, tensors, data, gradient))(
        batched, split(output_gradient)
    )


def _masked_pull_back(call: Call, tensors: tuple[Tensor, ...], output_gradient: Tensor) -> list[Tensor]:
    """One product for each sample over the whole batch, with the gradient of the other samples' outputs set to zero."""
    length = call.shape[0] // call.num_samples
    rows = []
    for start in range(0, call.shape[0], length):
        masked = torch.zeros_like(output_gradient)
        masked[start : start + length] = output_gradient[start : start + length]
        rows.append(_pull_back(call, tensors, {}, masked))
    return [torch.stack(gradients) for gradients in zip(*rows, strict=True)]
