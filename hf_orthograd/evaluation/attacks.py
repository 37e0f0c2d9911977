"""What somebody may do to a published model to bring back what it forgot."""

import copy
import os
from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.training_args import OptimizerNames
from transformers.utils import ModelOutput, logging

from ..annotations import AnyDataset, NumItems
from ..trials import preserved_random_state
from .measure import loss_function


logger = logging.get_logger(__name__)


class Attack(Protocol):
    """Turns a model into the attacked model and leaves the given one as it is; `name` is its row in the report."""

    name: str

    def __call__(self, model: nn.Module) -> nn.Module: ...


class Quantization:
    """Rounds the weights of linear, convolution and embedding layers, and of experts, to integers, symmetrically around zero.

    Unlearning that moved a weight by less than half a step of the grid may vanish (arXiv 2410.16454). An adapter is merged first,
    as by `save_model()` where `merge_adapter` is not False. Biases, norms, single vectors, and matrices by another name than
    `weight` keep their precision, as in common 4-bit formats. A scale is of a row, the last dimension: an output channel, but of
    experts that are stored with their inputs first.

    Args:
        bits (`int`): Of the integers.
        group_size (`int`, *optional*): How many neighbouring weights of an output channel share a scale; the whole
            channel by default, and where this does not divide it, of which a warning tells.
        name (`str`, *optional*): Its row in the report; "int4" and so on by default.

    Raises:
        ValueError: Fewer than 2 or more than 16 bits.
    """

    def __init__(self, bits: int, group_size: int | None = None, name: str | None = None):
        if not 2 <= bits <= 16:
            raise ValueError(f"`bits` must lie between 2 and 16, but is {bits}.")
        self.bits, self.group_size, self._whole = bits, group_size, 0
        self.name = name or f"int{bits}"

    def __call__(self, model: nn.Module) -> nn.Module:
        attacked, self._whole = _as_published(model), 0
        for module in list(attacked.modules()):
            # as by weight norm: rounded is what is computed with
            if parametrize.is_parametrized(module) and set(module.parametrizations) == {"weight"}:
                _make_plain(module)
        with torch.no_grad():
            for weight, module in _weights(attacked):
                if isinstance(module, Conv1D):
                    weight.copy_(self._round(weight.T).T)
                else:
                    by_channel = weight.flatten(1) if isinstance(module, _ConvNd) else weight.flatten(0, -2)
                    weight.copy_(self._round(by_channel).reshape(weight.shape))
        if self._whole:
            logger.warning(
                f"{self.name}: `group_size` is {self.group_size}, which does not divide the rows of {self._whole} weights. Each row of "
                "these has one scale."
            )
        return attacked

    def _round(self, weight: Tensor) -> Tensor:
        """Each row of (n, m) by a scale of its own, or each group in it."""
        rows = weight.float()
        if self.group_size is not None and rows.shape[1] % self.group_size:
            self._whole += 1
        elif self.group_size is not None:
            rows = rows.reshape(-1, self.group_size)
        largest = 2 ** (self.bits - 1) - 1
        scale = rows.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / largest
        zeros = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
        rounded = torch.fake_quantize_per_channel_affine(rows, scale, zeros, 0, -largest, largest)
        return rounded.reshape(weight.shape).to(weight.dtype)


def _make_plain(module: nn.Module) -> None:
    """Has a copied module keep the weight itself. torch's own function would take it from the class, which the original shares."""
    weight = nn.Parameter(module.weight.detach())
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.register_parameter("weight", weight)


def _weights(model: nn.Module) -> list[tuple[Tensor, nn.Module]]:
    """Weights that formats of few bits round, each once, with the module that has it: matrices, kernels, and experts in one tensor."""
    found = {
        id(parameter): (parameter, module)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point()
        and (name == "weight" and parameter.ndim > 1 or parameter.ndim == 3 and len(parameter) > 1)
    }
    return list(found.values())


def _as_published(model: nn.Module) -> nn.Module:
    """A copy with an adapter merged into it; a prompt, which is no part of any weight, stays beside them."""
    attacked = copy.deepcopy(model)
    merges = isinstance(attacked, PeftModel) and not attacked.active_peft_config.is_prompt_learning
    return attacked.merge_and_unload() if merges else attacked


class DetachAdapter:
    """Takes off a LoRA adapter that was published unmerged, which undoes whatever it holds.

    Of a model without an adapter, as `save_model()` writes it, nothing can be taken off: it stays as it is.
    """

    name = "adapter detached"

    def __call__(self, model: nn.Module) -> nn.Module:
        attacked = copy.deepcopy(model)
        return attacked.unload() if isinstance(attacked, PeftModel) else attacked


class Relearning:
    """Fine-tunes the model, by the plain Trainer, on data that may lead back to what was forgotten.

    AdamW at a constant learning rate, on all parameters, with the loss of the unlearning run: an adapter is merged first.

    Args:
        dataset (`torch.utils.data.Dataset` or `datasets.Dataset`): Other data of the forgotten source, or unrelated data.
        trainer ([`~transformers.Trainer`]): Whose collator, precision, device and seed are used.
        max_steps (`int`): Steps of the attacker.
        learning_rate (`float`): Of the attacker.
        batch_size (`int`, *optional*): Per device; the trainer's by default.
        steps (`Collection[int]`, *optional*): Steps after which the report takes the model's measure; `max_steps` alone
            by default.
        measured (`Dataset`, *optional*): Forgotten data that the curve is of, in place of all of "forget": where the attacker
            has a part of that, the rest.
        name (`str`, *optional*): Its row in the report.

    Raises:
        ValueError: `max_steps` is below 1, one of `steps` lies beyond it, or `measured` is empty.
    """

    def __init__(
        self,
        dataset: AnyDataset,
        trainer: Trainer,
        *,
        max_steps: int,
        learning_rate: float,
        batch_size: int | None = None,
        steps: Collection[int] = (),
        measured: AnyDataset | None = None,
        name: str = "relearning",
    ):
        self.steps = sorted({*steps, max_steps})
        if self.steps[0] < 1 or self.steps[-1] > max_steps:
            raise ValueError(f"`steps` {self.steps} must lie between 1 and `max_steps`, which is {max_steps}.")
        if measured is not None and len(measured) == 0:
            raise ValueError("`measured` is empty: leave it out, or keep some of the forgotten from the attacker.")
        self.name, self.measured, self._dataset, self._trainer = name, measured, dataset, trainer
        # new arguments would reset the process state that the trainer at hand rests on
        self._args = copy.copy(trainer.args)
        settings = {
            "output_dir": os.path.join(trainer.args.output_dir, "relearning"),
            "max_steps": max_steps,
            "optim": OptimizerNames.ADAMW_TORCH,
            "optim_args": None,
            "optim_target_modules": None,
            "weight_decay": 0.0,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "per_device_train_batch_size": batch_size or trainer.args.per_device_train_batch_size,
            "gradient_accumulation_steps": 1,
            "dataloader_drop_last": False,
            "eval_strategy": "no",
            "eval_on_start": False,
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "push_to_hub": False,
            "report_to": [],
        }
        for setting, value in settings.items():
            setattr(self._args, setting, value)

    def __call__(self, model: nn.Module, observe: Callable[[int, nn.Module], None] | None = None) -> nn.Module:
        """`observe(step, model)` is called after each of `steps`."""
        attacked = _as_published(model)
        for parameter in attacked.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        own_loss = loss_function(self._trainer)
        with preserved_random_state():  # Trainer sets the seed when it is made
            trainer = Trainer(
                attacked,
                self._args,
                train_dataset=self._dataset,
                data_collator=self._trainer.data_collator,
                processing_class=self._trainer.processing_class,
                compute_loss_func=None if own_loss is None else _MeanLoss(own_loss),
                callbacks=[] if observe is None else [_Observer(self.steps, observe)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model)


class _MeanLoss:
    """The user's loss as Trainer wants it, one number, whether it gives one for each sample or for the batch."""

    def __init__(self, loss: Callable):
        self._loss = loss

    def __call__(self, outputs: ModelOutput, labels: Tensor, num_items_in_batch: NumItems = None) -> Tensor:
        return self._loss(outputs, labels, num_items_in_batch=None).mean()


class _Observer(TrainerCallback):
    def __init__(self, steps: Collection[int], observe: Callable[[int, nn.Module], None]):
        self._steps, self._observe = steps, observe

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step in self._steps:
            self._observe(state.global_step, model)
