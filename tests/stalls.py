"""Counts, on a CPU, what would make an accelerator wait in a step, and how many kernels the step launches.

Tensors count as being on the device unless the code brought them to the host itself, by `Tensor.cpu()` and its like: from
there on what is computed of them alone is the host's. Reading a device tensor's value (`item`, `tolist`, truth, a slice by
it) and operations whose result's size depends on values make a device wait.
"""

from collections import Counter

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary


_TO_HOST = {Tensor.cpu, Tensor.numpy}
_READ = {
    *(Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
    *(Tensor.nonzero, torch.nonzero, torch.masked_select, Tensor.masked_select, torch.unique, Tensor.unique),
}
# these make no kernel
_VIEWS = {
    *(
        "alias",
        "as_strided",
        "detach",
        "expand",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
    ),
    *("transpose", "unbind", "unsafe_split", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "lift_fresh"),
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
}


def _leaves(tree):
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _leaves(item)
    elif isinstance(tree, dict):
        yield from _leaves(list(tree.values()))
    elif isinstance(tree, Tensor):
        yield tree


def _name(argument):
    return argument if isinstance(argument, str) else None


class CountStalls(TorchFunctionMode):
    """Counts by name what would stall; `kernels` is how many operations were dispatched on device tensors."""

    def __init__(self):
        super().__init__()
        self.stalls, self.kernels, self.by_name = Counter(), 0, Counter()
        self._on_host = WeakTensorKeyDictionary()
        self._allowed = 0

    def __enter__(self):
        self._dispatch = _Kernels(self)
        self._dispatch.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._dispatch.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = list(_leaves((args, kwargs)))
        hosted = bool(tensors) and all(tensor in self._on_host for tensor in tensors)
        # by its name the host is meant, by a `torch.device` that of other tensors, which on a CPU is the same
        to_host = func in _TO_HOST or (func is Tensor.to and "cpu" in (*map(_name, args[1:2]), kwargs.get("device")))
        if (func in _READ or to_host) and not hosted:
            self.stalls[getattr(func, "__name__", str(func))] += 1
        # what the host does, and what was counted here, is not counted once more below
        self._allowed += hosted or func in _READ or to_host
        try:
            output = func(*args, **kwargs)
        finally:
            self._allowed -= hosted or func in _READ or to_host
        if to_host and isinstance(output, Tensor) and output is args[0]:
            output = output.detach().clone()
        if hosted or to_host:
            moved = (
                func is Tensor.to
                and not to_host
                and kwargs.get("device", args[1] if len(args) > 1 else None) is not None
            )
            for tensor in [] if moved else _leaves(output):
                self._on_host[tensor] = True
        return output


class _Kernels(TorchDispatchMode):
    """Sees what autograd and C++ do as well."""

    def __init__(self, owner: CountStalls):
        super().__init__()
        self._owner = owner

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not self._owner._allowed:
            if name not in _VIEWS:
                self._owner.kernels += 1
                self._owner.by_name[name] += 1
            if name in ("_local_scalar_dense", "nonzero", "masked_select"):
                self._owner.stalls[name] += 1
        return func(*args, **(kwargs or {}))
