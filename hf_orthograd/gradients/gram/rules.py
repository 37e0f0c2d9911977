"""Rules for the torch functions that hold most parameters, and how a user adds one.

A rule turns a recorded call and the gradient of its output into one form for each of its sources: the per-sample
gradients themselves ([`Dense`]), or factors whose products they are ([`Outer`]). From factors inner products can be
had without ever forming a gradient of the size of the vocabulary. Calls without a rule go to the general one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import UnsupportedModelError
from .calls import Call, Source, SpreadCall
from .forms import Dense, Form, Outer
from .general import general_rule


Forms = list[tuple[Source, Form]]
# maps a call and the gradient of its output to forms, or to None where the rule does not cover the call
Rule = Callable[[Call, Tensor], Forms | None]

RULES: dict[Callable, Rule] = {}


def register_rule(*functions: Callable) -> Callable[[Rule], Rule]:
    """Registers a rule for torch functions, in place of the general one.

    The rule gets a [`Call`] and the gradient of its output, whose first dimension runs over the samples (possibly
    times windows or positions, sample by sample). It returns a [`Dense`] or [`Outer`] form for each [`Source`] among
    the call's arguments, or `None` to leave this call to the general rule. A form's memory is given away: it may be
    written over. It runs without torch function modes: tensors that it makes need a device of their own, not
    `torch.set_default_device`'s.
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def per_sample_forms(call: Call | SpreadCall, gradient: Tensor) -> Forms:
    """The per-sample gradients of a call's sources, given the gradient that arrived at its edge."""
    if isinstance(call, SpreadCall):
        return [(call.source, Dense(_gather_spread(call, gradient)))]
    if not call.shape or call.shape[0] % call.num_samples:
        raise UnsupportedModelError(
            f"`{call.name}`, which uses {', '.join(call.parameters)}, returns shape {tuple(call.shape)} for a batch of "
            f"{call.num_samples}: its first dimension does not run over the samples. Set `gradient_engine` to 'loop'."
        )
    gradient = gradient.reshape(call.shape)
    rule = RULES.get(call.function)
    forms = rule(call, gradient) if rule is not None else None
    return forms if forms is not None else general_rule(call, gradient)


def _gather_spread(call: SpreadCall, gradient: Tensor) -> Tensor:
    """From the gradient of a source spread over the samples, (samples * r, ...), to rows of the source's shape."""
    shape, samples = call.source.shape, call.num_samples
    if len(shape) == gradient.ndim and shape[0] == gradient.shape[0] != 1:
        # the source runs over the samples itself, as an expanded class token does: each sample has its own rows of it
        rows = gradient.new_zeros(samples, *shape)
        own = gradient.unflatten(0, (samples, -1))
        for sample in range(samples):
            rows[sample].unflatten(0, (samples, -1))[sample] = own[sample]
        return rows
    return gradient.reshape(samples, -1, *gradient.shape[1:]).sum(dim=1).reshape(samples, *shape)


def by_sample(tensor: Tensor, call: Call) -> Tensor:
    """Reshapes (samples * r, ..., q) to (samples, T, q)."""
    return tensor.reshape(call.num_samples, -1, tensor.shape[-1])


def _arguments(call: Call, names: str, **defaults: Any) -> dict[str, Any]:
    return {**defaults, **dict(zip(names.split(), call.args, strict=False)), **call.kwargs}


def _is_matrix(argument: object) -> bool:
    return isinstance(argument, Source) and len(argument.shape) == 2


def _is_bad_matrix(argument: object) -> bool:
    return isinstance(argument, Source) and len(argument.shape) != 2


@register_rule(F.linear)
def linear_rule(call: Call, output_gradient: Tensor) -> Forms | None:
    arguments = _arguments(call, "input weight bias", bias=None)
    features, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    if isinstance(features, Source) or _is_bad_matrix(weight):
        return None
    gradient = by_sample(output_gradient, call)
    forms = []
    if isinstance(weight, Source):
        forms.append((weight, Outer(gradient, by_sample(call.as_computed(features), call), weight.shape)))
    if isinstance(bias, Source):
        forms.append((bias, Dense(gradient.sum(dim=1, dtype=torch.float32))))
    return forms


@register_rule(torch.addmm)
def addmm_rule(call: Call, output_gradient: Tensor) -> Forms | None:
    """`torch.addmm(bias, input, weight)`, the Conv1D of GPT-2: the weight is (in, out)."""
    if call.kwargs or len(call.args) != 3:
        return None
    bias, features, weight = call.args
    if isinstance(features, Source) or _is_bad_matrix(weight):
        return None
    gradient = by_sample(output_gradient, call)
    forms = []
    if isinstance(weight, Source):
        forms.append((weight, Outer(by_sample(call.as_computed(features), call), gradient, weight.shape)))
    if isinstance(bias, Source):
        forms.append((bias, Dense(gradient.sum(dim=1, dtype=torch.float32).view(-1, *bias.shape))))
    return forms


@register_rule(F.embedding)
def embedding_rule(call: Call, output_gradient: Tensor) -> Forms | None:
    names = "input weight padding_idx max_norm norm_type scale_grad_by_freq"
    arguments = _arguments(call, names, padding_idx=None, scale_grad_by_freq=False)
    indices, weight, padding = arguments["input"], arguments["weight"], arguments["padding_idx"]
    if not _is_matrix(weight) or arguments["scale_grad_by_freq"]:
        return None
    gradient = by_sample(output_gradient, call)
    rows = indices.reshape(gradient.shape[:2])
    if padding is not None and padding >= 0:
        gradient = gradient.masked_fill((rows == padding)[..., None], 0)
    return [(weight, Outer(rows, gradient, weight.shape))]


_CONVOLUTION_WEIGHT = {
    F.conv1d: torch.nn.grad.conv1d_weight,
    F.conv2d: torch.nn.grad.conv2d_weight,
    F.conv3d: torch.nn.grad.conv3d_weight,
}


@register_rule(*_CONVOLUTION_WEIGHT)
def convolution_rule(call: Call, output_gradient: Tensor) -> Forms | None:
    """Sample by sample: each is a matrix product large enough, and a vectorised backward pass is slower here."""
    names = "input weight bias stride padding dilation groups"
    arguments = _arguments(call, names, bias=None, stride=1, padding=0, dilation=1, groups=1)
    features, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    if isinstance(features, Source) or isinstance(arguments["padding"], str) or features.ndim != output_gradient.ndim:
        return None
    forms = []
    if isinstance(weight, Source):
        geometry = {name: arguments[name] for name in ("stride", "padding", "dilation", "groups")}
        features, output_gradient = features.float(), output_gradient.float()
        windows = features.shape[0] // call.num_samples
        rows = features.new_empty(call.num_samples, *weight.shape)
        for sample, own in enumerate(features.split(windows)):
            gradient = output_gradient[sample * windows : (sample + 1) * windows]
            rows[sample] = _CONVOLUTION_WEIGHT[call.function](own, weight.shape, gradient, **geometry)
        forms.append((weight, Dense(rows)))
    if isinstance(bias, Source):
        gradient = by_sample(output_gradient.flatten(2).transpose(1, 2), call)
        forms.append((bias, Dense(gradient.sum(dim=1, dtype=torch.float32))))
    return forms


def _affine_forms(call: Call, weight, bias, normalised: Callable[[], Tensor], gradient: Tensor) -> Forms:
    """Of `weight * normalised + bias`, the parameters running over the last dimensions."""
    forms = []
    for source, rows in ((weight, lambda: gradient * normalised()), (bias, lambda: gradient)):
        if isinstance(source, Source):
            by_position = rows().reshape(call.num_samples, -1, *source.shape)
            forms.append((source, Dense(by_position.sum(dim=1, dtype=torch.float32))))
    return forms


@register_rule(F.layer_norm)
def layer_norm_rule(call: Call, output_gradient: Tensor) -> Forms | None:
    arguments = _arguments(call, "input normalized_shape weight bias eps", weight=None, bias=None, eps=1e-5)
    features = arguments["input"]
    if isinstance(features, Source):
        return None
    return _affine_forms(
        call,
        arguments["weight"],
        arguments["bias"],
        lambda: F.layer_norm(features.float(), arguments["normalized_shape"], eps=arguments["eps"]),
        output_gradient.float(),
    )


@register_rule(F.rms_norm)
def rms_norm_rule(call: Call, output_gradient: Tensor) -> Forms | None:
    arguments = _arguments(call, "input normalized_shape weight eps", weight=None, eps=None)
    features = arguments["input"]
    if isinstance(features, Source):
        return None
    # the default epsilon depends on the type: normalise in that of the call
    normalise = lambda: F.rms_norm(features, arguments["normalized_shape"], eps=arguments["eps"]).float()  # noqa: E731
    return _affine_forms(call, arguments["weight"], None, normalise, output_gradient.float())


@register_rule(F.group_norm)
def group_norm_rule(call: Call, output_gradient: Tensor) -> Forms | None:
    arguments = _arguments(call, "input num_groups weight bias eps", weight=None, bias=None, eps=1e-5)
    features = arguments["input"]
    if isinstance(features, Source):
        return None
    normalise = lambda: F.group_norm(features.float(), arguments["num_groups"], eps=arguments["eps"])  # noqa: E731
    return _affine_forms(
        call,
        arguments["weight"],
        arguments["bias"],
        lambda: normalise().movedim(1, -1),
        output_gradient.float().movedim(1, -1),
    )
