"""What a report says of the run that made the model."""

from transformers import Trainer

from ..callbacks import StoppingRule, find_callback
from ..config import OrthoGradConfig
from ..data.streams import forget_batch_size


def run_settings(trainer: Trainer) -> dict[str, str | float | int | None]:
    """Method, batches, optimizer and how the run ended, of any Trainer; nothing if it made no step.

    None of it tells of what was forgotten: "ended" has no numbers, and a class of the user's own is given by the one it is made of,
    also where an optimizer was handed over.
    """
    args, state = trainer.args, trainer.state
    if not state.global_step:
        return {}
    name = known_class(trainer, "hf_orthograd.", "transformers.")
    found: dict[str, str | float | int | None] = {"trainer": name}
    forget, has_retain = getattr(trainer, "forget_dataset", None), getattr(trainer, "has_retain", True)
    if name == "OrthoGradTrainer":  # a baseline's own loss takes the place of these
        own = ("projection", "projection_target", "forget_loss", "retain_loss", "alpha")
        found |= {setting: getattr(args, setting) for setting in own}
    if isinstance(args, OrthoGradConfig) and forget is not None:
        per_device = forget_batch_size(args, trainer._train_batch_size)
        micro_batches = args.gradient_accumulation_steps * args.world_size
        found["forget_samples_per_step"] = min(per_device, _length(forget) or per_device) * micro_batches
        found["retain_samples_per_step"] = samples_per_step(trainer) if has_retain else 0
    else:
        found["samples_per_step"] = samples_per_step(trainer)
    found["samples_at_hand"] = _length(trainer.train_dataset) if has_retain else 0
    found |= _optimizer(trainer)
    found |= {"precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "that of the weights", "seed": args.seed}
    return found | {"ended": _end(trainer)}


def samples_per_step(trainer: Trainer) -> int:
    """Of the train set, on all devices, as the steps took them: `auto_find_batch_size` may have made batches smaller, or there are fewer."""
    args, at_hand = trainer.args, _length(trainer.train_dataset)
    read = (trainer._train_batch_size or args.train_batch_size) * args.gradient_accumulation_steps * args.world_size
    return min(read, at_hand or read)


def _optimizer(trainer: Trainer) -> dict[str, str | float]:
    """As the arguments say, unless an optimizer was handed over that has another class or rate."""
    args, optimizer = trainer.args, getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    found = {"learning_rate": args.learning_rate, "optim": str(getattr(args.optim, "value", args.optim))}
    if trainer.is_deepspeed_enabled or not getattr(optimizer, "param_groups", None):  # one of its own, or let go since
        return found
    group = optimizer.param_groups[0]
    found["learning_rate"] = float(group.get("initial_lr", group["lr"]))  # before the scheduler
    if not isinstance(optimizer, trainer.get_optimizer_cls_and_kwargs(args, trainer.model)[0]):
        found["optim"] = known_class(optimizer, "torch.")
    return found


def known_class(one: object, *known: str) -> str:
    """The first of its classes that is from one of these packages."""
    return next((of.__name__ for of in type(one).__mro__ if of.__module__.startswith(known)), "another one")


def _end(trainer: Trainer) -> str:
    rule = find_callback(trainer.callback_handler, StoppingRule)
    if rule is not None and rule.outcome is not None:
        return rule.outcome
    return "all steps were made" if trainer.state.global_step >= trainer.state.max_steps else "before the last step"


def _length(dataset) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None
