"""What a report says of the run that made the model."""

from transformers import Trainer

from ..callbacks import StoppingRule, find_callback
from ..config import OrthoGradConfig


def run_settings(trainer: Trainer) -> dict[str, str | float | int | None]:
    """Method, batches, optimizer and how the run ended, of any Trainer; nothing if it made no step.

    No value says anything of the forget set but its method: "ended" has no numbers.
    """
    args, state = trainer.args, trainer.state
    if not state.global_step:
        return {}
    processes = args.gradient_accumulation_steps * args.world_size
    found: dict[str, str | float | int | None] = {"trainer": type(trainer).__name__}
    if isinstance(args, OrthoGradConfig):
        names = ("projection", "projection_target", "forget_loss", "retain_loss", "alpha")
        found |= {name: getattr(args, name) for name in names}
        found["forget_samples_per_step"] = args.per_device_forget_batch_size * processes
        found["retain_samples_per_step"] = args.train_batch_size * processes
    else:
        found["samples_per_step"] = args.train_batch_size * processes
    found["samples_at_hand"] = _length(trainer.train_dataset)
    found |= {"learning_rate": args.learning_rate, "optim": str(getattr(args.optim, "value", args.optim))}
    found |= {"precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "that of the weights", "seed": args.seed}
    return found | {"ended": _end(trainer)}


def _end(trainer: Trainer) -> str:
    rule = find_callback(trainer.callback_handler, StoppingRule)
    if rule is not None and rule.outcome is not None:
        return rule.outcome
    return "all steps were made" if trainer.state.global_step >= trainer.state.max_steps else "before the last step"


def _length(dataset) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None
