"""FSDP2: gradients are found by the whole parameters that a forward pass works with, and handed to the stored shards.

A module that is sharded gathers its parameters before it runs, into tensors that stay the same objects from step to step
and lose only their memory in between. These are what the engines differentiate by. The update is then brought to the
shards as any gradient is, by a reduce-scatter, tensor by tensor.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate

from .parameters import Parameters, known_gradients
from .process_group import ProcessGroup


@dataclass(frozen=True)
class ShardedParameters(Parameters):
    """Parameters as a forward pass works with them, beside their shards.

    Attributes:
        shards (`dict[str, torch.nn.Parameter]`): `DTensor`s, by name, of all trainable parameters.
    """

    shards: dict[str, nn.Parameter]

    @property
    def stored(self) -> dict[str, nn.Parameter]:
        return {name: self.shards[name] for name in self.projected}

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor()

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        mesh, placements = self.shards[name].device_mesh, self.shards[name].placements
        spread = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return spread.redistribute(placements=placements)

    def hand_over(self, gradients: dict[str, Tensor | None], group: ProcessGroup) -> Tensor:
        gradients, sharded = self.agreed(gradients, group), {}
        for name in list(gradients):
            gradient, shard = gradients.pop(name), self.shards[name]
            mesh = shard.device_mesh
            summed = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
            sharded[name] = summed.redistribute(placements=shard.placements)
        return known_gradients(self.shards, sharded)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """After a forward pass without a backward pass, which leaves the outermost module's parameters gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unshard(model: nn.Module, parameters: Parameters) -> ShardedParameters:
    """Finds the tensors that a sharded model's forward pass works with.

    Args:
        model (`torch.nn.Module`): After FSDP2's `fully_shard`, and after a forward pass.
        parameters ([`Parameters`]): Its trainable shards.

    Raises:
        ValueError: A parameter is trained that belongs to no sharded module.
    """
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            named = module.named_parameters(prefix=prefix, remove_duplicate=False)
            found.update((name, tensor) for name, tensor in named if not isinstance(tensor, DTensor))
            module.reshard()
    missing = [name for name in parameters.trainable if name not in found]
    if missing:
        raise ValueError(
            f"FSDP has left {', '.join(missing[:5])} out of every sharded module. Take `ignored_modules` out of "
            "`fsdp_config`, or freeze these parameters."
        )
    return ShardedParameters(
        projected={name: found[name] for name in parameters.projected},
        others={name: found[name] for name in parameters.others},
        shards=parameters.trainable,
    )
