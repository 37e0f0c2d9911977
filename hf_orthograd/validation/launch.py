"""How a run is launched, and what of its model is trained."""

import os

import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import logging

from ..annotations import TrainDataset
from ..config import OrthoGradConfig
from ..parallel import Parameters


logger = logging.get_logger(__name__)

# below it the projection gained little in the ablations; Trainer's default batch lies below (docs/choosing_settings.md)
FEW_RETAIN_SAMPLES = 16


def check_arguments(args: OrthoGradConfig) -> None:
    """Refuses what Trainer offers and an unlearning step cannot keep, or should not: to be called before Trainer acts on it.

    Raises:
        ValueError: The message names what is not supported, and what to do.
    """
    # the second is the first's name in transformers before 5.18
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    activation_kwargs = next((vars(args)[name] for name in names if vars(args).get(name)), {})
    _refuse(
        {
            "`push_to_hub` with hub_strategy="
            f"{str(args.hub_strategy.value)!r} (set it to 'end': half-unlearned weights, or an adapter that is merged later, would "
            "stay in the repository's history)": args.push_to_hub and args.hub_strategy.value != "end",
            "`label_smoothing_factor`": args.label_smoothing_factor != 0,
            "reentrant activation checkpointing (set activation_checkpointing_kwargs={'use_reentrant': False})": (
                bool(activation_kwargs.get("use_reentrant"))
            ),
            "an optimizer that steps inside of the backward pass (take one that steps after it, as 'adamw_torch', in place of "
            f"optim={str(args.optim.value)!r})": "lomo" in args.optim.value or "layerwise" in args.optim.value,
        }
    )


def check_launch(args: OrthoGradConfig, state: AcceleratorState, model: nn.Module) -> None:
    """Refuses launches under which the update would not be the one the configuration names.

    Args:
        args ([`OrthoGradConfig`]): The configuration.
        state (`accelerate.state.AcceleratorState`): Knows what the launcher has set, too.
        model (`torch.nn.Module`): The model, unwrapped.

    Raises:
        ValueError: The message names what is not supported, and what to do.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > 1 and args.world_size == 1:
        raise ValueError(
            f"The launcher started {launched} processes, but this one knows of no other: each would train by itself, and write into the same "
            "folder. Without a GPU set `use_cpu` to True."
        )
    fsdp, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    parallelism = getattr(state, "parallelism_config", None)
    zero_stage = None if deepspeed is None else deepspeed.zero_stage
    compiled = isinstance(model, torch._dynamo.OptimizedModule) or args.torch_compile
    refusals = {
        "`fsdp` of version 1 (set fsdp_config={'version': 2})": fsdp is not None and fsdp.fsdp_version != 2,
        "`fsdp` with `retain_chunk_size` (leave one out)": fsdp is not None and args.retain_chunk_size is not None,
        "`deepspeed` with ZeRO stage 3 (use stage 2, or `fsdp`)": zero_stage == 3,
        "`deepspeed` with `fp16` (use `bf16`)": deepspeed is not None and args.fp16,
        "`deepspeed` with projection_target='update' (DeepSpeed's step cannot be corrected: use `fsdp`)": (
            deepspeed is not None and args.projection_target == "update"
        ),
        "torch.nn.DataParallel (set CUDA_VISIBLE_DEVICES to one device)": args.n_gpu > 1,
        "a compiled model (leave `torch_compile` and `torch.compile` out: gradients of single samples are found by watching "
        "the calls of the model's own forward pass)": compiled,
        "tensor, context or sequence parallelism (use `fsdp` of version 2)": parallelism is not None
        and any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")),
        "a model spread over several devices by `device_map` (use `fsdp` of version 2)": (
            len(set((getattr(model, "hf_device_map", None) or {}).values()) - {"cpu", "disk"}) > 1
        ),
        "a dynamically quantised model, whose linear layers have no gradients (take the model before quantisation)": any(
            type(module).__module__.startswith("torch.ao.nn.quantized") for module in model.modules()
        ),
        "prompt learning (use LoRA: virtual tokens shift the labels that losses are taken at)": (
            isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        ),
    }
    _refuse(refusals)


def _refuse(refusals: dict[str, bool]) -> None:
    for feature, refused in refusals.items():
        if refused:
            raise ValueError(f"Unlearning with a `forget_dataset` does not support {feature}.")


def check_steps(args: OrthoGradConfig, batch_size: int, retain: TrainDataset) -> None:
    """Says so if a step protects few retain samples, or fewer than were asked for, or if a rule that ends the run comes too late.

    Args:
        args ([`OrthoGradConfig`]): The configuration.
        batch_size (`int`): Retain samples per process and micro-batch.
        retain (`torch.utils.data.Dataset`): The retain set.
    """
    has_rule = args.forget_target is not None or args.retain_budget is not None
    if has_rule and args.eval_strategy == "steps" and 0 < args.max_steps <= args.eval_steps:
        logger.warning(
            f"`eval_steps` is {args.eval_steps:g} and `max_steps` {args.max_steps}: `forget_target` and `retain_budget` are looked at once, in the "
            "end, when the run may be far beyond them. Set `eval_steps` to 1 or 2."
        )
    length = len(retain) if hasattr(retain, "__len__") else None
    number = batch_size * args.gradient_accumulation_steps * args.world_size
    if length is not None and length < number:
        logger.warning(
            f"A step was to protect {number} retain samples, but `train_dataset` has {length}: it protects these."
        )
    if args.projection == "orthogonal" and number < min(FEW_RETAIN_SAMPLES, length or FEW_RETAIN_SAMPLES):
        logger.warning(
            f"Each step protects the gradients of only {number} retain samples. With fewer than {FEW_RETAIN_SAMPLES} the "
            "projection gained little in the library's studies. Raise `per_device_train_batch_size`, or "
            "`gradient_accumulation_steps`, which gives the same projection in less memory.",
        )


def find_parameters(model: nn.Module, args: OrthoGradConfig) -> Parameters:
    """Splits the trainable parameters into those under the projection and the others.

    Raises:
        ValueError: None is trainable, or none belongs to LoRA where only LoRA is to be projected.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no trainable parameter: every `requires_grad` is False. An adapter "
            "loaded for inference needs `is_trainable=True`."
        )
    if args.projection_parameters == "trainable":
        return Parameters(projected=trainable, others={})
    lora = {name: parameter for name, parameter in trainable.items() if "lora_" in name}
    if not lora:
        raise ValueError(
            "`projection_parameters` is 'lora', but `model` has no trainable LoRA parameter. Wrap it with "
            "`peft.get_peft_model`, or set projection_parameters='trainable'."
        )
    return Parameters(projected=lora, others={name: p for name, p in trainable.items() if name not in lora})


def warn_of_half_precision(parameters: Parameters) -> None:
    """Says so if parameters are held in half precision, which small updates do not reach."""
    halves = [p.dtype for p in parameters.trainable.values() if p.dtype in (torch.bfloat16, torch.float16)]
    if halves:
        logger.warning(
            f"{len(halves)} trainable parameters are held in {str(halves[0]).removeprefix('torch.')}, which rounds away an "
            "update that is small beside the weight: at small learning rates most of it is lost. Load the model with "
            "dtype=torch.float32 and set `bf16=True`, which computes in half precision."
        )


def freeze_batch_norm(model: nn.Module) -> None:
    """Puts BatchNorm layers into evaluation mode: their running statistics stay, and samples are not coupled."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def check_batch_norm(model: nn.Module) -> None:
    """Raises if a BatchNorm layer of a model in training mode couples the samples of a batch."""
    coupled = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if coupled:
        raise ValueError(
            f"BatchNorm in training mode couples the samples of a batch ({coupled[0]} and {len(coupled) - 1} more), so "
            "that per-sample gradients do not exist. Set `freeze_batch_norm=True` to keep its running statistics fixed."
        )
