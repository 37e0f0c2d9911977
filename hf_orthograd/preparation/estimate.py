"""What a step will take, counted on two samples before any step is made."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..data import Batch
from ..gradients.gram.calls import Call, SpreadCall
from ..gradients.gram.chunks import split_samples
from ..gradients.gram.engine import FORWARD_PART, find_uses
from ..gradients.gram.forms import Cost, Use, costs_of, count_cost
from ..gradients.gram.recording import Recorder
from ..gradients.gram.rules import RULES
from ..objectives import PerSampleLosses
from ..parallel import Parameters
from ..trials import preserved_modes, preserved_random_state


if TYPE_CHECKING:
    from ..trainer import OrthoGradTrainer


_GIB = 1 << 30


@dataclass(frozen=True)
class RuleCount:
    """Parameters that are treated alike.

    Attributes:
        function (`str`): The torch function that uses them.
        rule (`str`): Where their per-sample gradients come from: "own rule", "autograd" or "vmap".
        form (`str`): How inner products are taken and what is kept for the update.
        parameters (`int`): Numbers in them.
        tensors (`int`): How many tensors they are.
    """

    function: str
    rule: str
    form: str
    parameters: int
    tensors: int


@dataclass(frozen=True)
class Estimate:
    """What [`OrthoGradTrainer.estimate`] returns; `print` shows it as a table.

    Attributes:
        engine (`str`): The gradient engine that will be used.
        projected, unprojected, frozen (`int`): Numbers in the parameters under the projection, trained without it, and
            not trained.
        forget_samples, retain_samples (`int`): Per step and device.
        rules (`list[RuleCount]`): What the "gram" engine does with the parameters under projection.
        plain_memory (`int`): Bytes at the peak of a step of GradDiff, `projection="none"`: parameters, gradients,
            optimizer state and activations of both batches, without what the process holds already.
        memory (`int`): The same for a step of this run.
        relative_time (`float`): Time of a step over that of GradDiff, by counted multiplications. For "func" that is a
            lower bound: how fast torch.func vectorises a model cannot be counted.
    """

    engine: str
    projected: int
    unprojected: int
    frozen: int
    forget_samples: int
    retain_samples: int
    rules: list[RuleCount]
    plain_memory: int
    memory: int
    relative_time: float

    def __str__(self) -> str:
        lines = [
            f"parameters     {self.projected:,} under projection, {self.unprojected:,} trained without, "
            f"{self.frozen:,} frozen",
            f"a step         {self.forget_samples} forget and {self.retain_samples} retain samples, "
            f"engine {self.engine!r}",
            f"memory         {self.memory / _GIB:.2f} GiB at the peak; GradDiff {self.plain_memory / _GIB:.2f} GiB",
            f"time           {'at least ' if self.engine == 'func' else ''}{self.relative_time:.2f} x GradDiff",
        ]
        if self.rules:
            lines += [
                "",
                f"{'used by':<30}{'gradients from':<16}{'tensors':>8}{'parameters':>14}  inner products, update",
            ]
        for rule in self.rules:
            lines.append(f"{rule.function:<30}{rule.rule:<16}{rule.tensors:>8}{rule.parameters:>14,}  {rule.form}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Pass:
    """One forward and backward pass, per sample: its work, what the graph keeps, and the largest tensor it worked on."""

    multiplications: float
    activation_bytes: float
    largest_bytes: float


@dataclass(frozen=True)
class _Sampled:
    """What forward and backward passes over a few samples showed, per sample.

    Attributes:
        plain ([`_Pass`]): Of ordinary training, whose backward pass goes wherever the graph leads: from Wav2Vec2's
            adapters on through the frozen feature extractor.
        needed ([`_Pass`]): Of a backward pass that ends at the trained parameters, as those of the engines do.
        uses (`dict[str, list[Use]]`): How each parameter is used.
        functions (`dict[str, tuple[str, str]]`): The function that uses it, and where its gradients come from.
    """

    plain: "_Pass"
    needed: "_Pass"
    uses: dict[str, list[Use]]
    functions: dict[str, tuple[str, str]]


def estimate_run(trainer: "OrthoGradTrainer") -> Estimate:
    """Counts a step of a trainer, without making one.

    From forward and backward passes over two samples of each set, padded as the first batch is. Time counts the
    multiplications of matrix products alone. Activations are taken to grow with the number of samples, and the state of
    optimizers that are not known counts as nothing.

    Args:
        trainer ([`OrthoGradTrainer`]): With a forget set.

    Returns:
        [`Estimate`], which prints as a table.

    Raises:
        ValueError: There is no `forget_dataset`, or the model or samples would be refused by `train()`; what
            `precompute_ref_logits` asks of samples, `train()` alone looks at.
    """
    if trainer.forget_dataset is None:
        raise ValueError("`estimate()` needs a `forget_dataset`: without one the trainer is Trainer.")
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    # with a projection the micro-batches of a step are taken together, as chunks are
    batches = args.gradient_accumulation_steps if args.projection != "none" else 1
    num_retain = batches * args.train_batch_size if trainer.has_retain else 0
    num_forget = batches * min(args.per_device_forget_batch_size, len(trainer.forget_dataset))
    chunk_size = args.retain_chunk_size or (args.train_batch_size if batches > 1 else None)
    with preserved_random_state(), preserved_modes(model), trainer.compute_loss_context_manager():
        engine = trainer.make_gradient_engine(model)
        forget = trainer.first_batch("forget_dataset", args.per_device_forget_batch_size)
        retain = trainer.first_batch("train_dataset", args.train_batch_size)
        return estimate_step(
            model,
            engine.per_sample_losses,
            engine.parameters,
            # padded as the batch is
            split_samples([forget], 2)[0],
            split_samples([retain], 2)[0],
            engine=engine.name,
            num_forget=num_forget,
            num_retain=num_retain,
            chunk_size=chunk_size,
            optimizer_bytes=optimizer_state_bytes(args.optim.value),
            keeps_predictions=args.keeps_predictions,
            start_bytes=_start_bytes(trainer, retain),
            start_runs=not args.precompute_ref_logits,
        )


def _start_bytes(trainer: "OrthoGradTrainer", retain: Batch) -> int | None:
    """Of a model held beside the one that is trained, and of predictions found once; `None` for a copy of what is trained."""
    if trainer.ref_model is None and not trainer.args.precompute_ref_logits:
        return None
    held = sum(p.nbytes for p in trainer.ref_model.parameters()) if trainer.ref_model is not None else 0
    if not trainer.args.precompute_ref_logits:
        return held
    counted = trainer.per_sample_loss.counted(retain.inputs)
    rows = len(trainer.train_dataset) * (1.0 if counted is None else counted.sum().item() / len(counted))
    is_half = trainer.args.bf16 or trainer.args.fp16 or next(trainer.model.parameters()).dtype != torch.float32
    return held + int(rows) * (trainer.per_sample_loss.num_classes or 0) * (2 if is_half else 4)


def estimate_step(
    model: nn.Module,
    per_sample_losses: PerSampleLosses,
    parameters: Parameters,
    forget: Batch,
    retain: Batch,
    *,
    engine: str,
    num_forget: int,
    num_retain: int,
    chunk_size: int | None,
    optimizer_bytes: int,
    keeps_predictions: bool = False,
    start_bytes: int | None = None,
    start_runs: bool = True,
) -> Estimate:
    """Counts a step from a few samples of each batch, padded as the batch is.

    Args:
        model, per_sample_losses, parameters: As an engine takes them, the model in training mode.
        forget, retain ([`Batch`]): A few samples each.
        engine (`str`): "gram", "func", "loop", "mean" or "none".
        num_forget, num_retain (`int`): Samples in a step, m and k.
        chunk_size (`int`, *optional*): Retain samples that memory holds at once.
        optimizer_bytes (`int`): State of the optimizer for each trained number.
        keeps_predictions (`bool`): Whether retain samples are held by the starting model's predictions.
        start_bytes (`int`, *optional*): What those take; by default a copy of what is trained.
        start_runs (`bool`): Whether they are found at each step.
    """
    on_forget = _sample(model, per_sample_losses, parameters, forget)
    on_retain = _sample(model, per_sample_losses, parameters, retain) if num_retain else on_forget
    trained = sum(parameter.numel() for parameter in parameters.trainable.values())
    gradients = sum(parameter.nbytes for parameter in parameters.trainable.values())
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    resident, samples = model_bytes + optimizer_bytes * trained, max(num_forget, num_retain)
    both = ((num_forget, on_forget), (num_retain, on_retain))
    plain_work, plain_graph = _count_plain(both)
    # the graph is given free as the gradients come
    plain = resident + max(gradients, plain_graph) + 2 * samples * on_retain.plain.largest_bytes
    forget_graph = num_forget * on_forget.needed.activation_bytes
    needed_work = sum(number * sampled.needed.multiplications for number, sampled in both)
    working = 2 * samples * on_retain.needed.largest_bytes
    memory, work, costs = plain, plain_work, {}
    if engine == "gram":
        costs = _costs(parameters, on_retain, num_retain)
        block = costs_of(parameters.device).block_bytes
        graph, extra = _count_gram(costs, on_retain.needed, forget_graph, num_retain, chunk_size, model_bytes, block)
        memory, work = resident + gradients + graph + working, needed_work + extra
    elif engine != "none":
        graph, rows, extra = _count_rows(engine, on_retain.needed, forget_graph, num_retain, trained)
        memory, work = resident + (2 + rows) * gradients + graph + working, needed_work + extra
    if keeps_predictions:  # a forward pass, a third of both, and with a projection a backward pass of the term's own
        memory += gradients if start_bytes is None else start_bytes
        work += (start_runs + 2 * (engine != "none")) / 3 * num_retain * on_retain.needed.multiplications
    return Estimate(
        engine=engine,
        **_count_numbers(model, parameters),
        forget_samples=num_forget,
        retain_samples=num_retain,
        rules=_count_rules(parameters, on_retain, costs),
        plain_memory=round(plain),
        memory=round(memory),
        relative_time=work / plain_work,
    )


def _count_plain(both: tuple[tuple[int, "_Sampled"], ...]) -> tuple[int, int]:
    """Multiplications and the bytes of the graph of GradDiff, from the samples of both batches."""
    work = sum(number * sampled.plain.multiplications for number, sampled in both)
    return work, sum(number * sampled.plain.activation_bytes for number, sampled in both)


def _count_numbers(model: nn.Module, parameters: Parameters) -> dict[str, int]:
    sets = {"projected": parameters.projected, "unprojected": parameters.others}
    counts = {name: sum(parameter.numel() for parameter in own.values()) for name, own in sets.items()}
    total = sum(parameter.numel() for parameter in model.parameters())
    return counts | {"frozen": total - sum(counts.values())}


def _costs(parameters: Parameters, sampled: "_Sampled", num_retain: int) -> dict[str, Cost]:
    trained, scaled = parameters.trainable, {name: _scaled(uses, num_retain) for name, uses in sampled.uses.items()}
    return {name: count_cost(trained[name], uses, num_retain) for name, uses in scaled.items()}


def _count_gram(
    costs: dict[str, Cost],
    needed: "_Pass",
    forget_graph: float,
    num_retain: int,
    chunk_size: int | None,
    model_bytes: int,
    block_bytes: int,
) -> tuple[float, float]:
    """Of the "gram" engine: bytes of graphs or of what replaces them, and multiplications beside the passes."""
    kept, extra = sum(cost.kept_bytes for cost in costs.values()), 2 * sum(cost.extra for cost in costs.values())
    chunk = min(chunk_size or num_retain, num_retain)
    budget = max(model_bytes, (1 - 1 / FORWARD_PART) * kept * chunk / num_retain)
    passes = 1 if chunk == num_retain else math.ceil(kept / budget)
    if passes == 1:
        graph = max(forget_graph, chunk * needed.activation_bytes, kept)
    else:
        graph = max(forget_graph, budget + max(1, chunk // FORWARD_PART) * needed.activation_bytes)
    # further groups of a chunked batch take forward passes, shorter backward passes, and one round for the update
    again = 0 if passes == 1 else (passes - 1) * 0.5 + 1
    return graph + min(block_bytes, kept), extra + again * num_retain * needed.multiplications


def _count_rows(
    engine: str, needed: "_Pass", forget_graph: float, num_retain: int, trained: int
) -> tuple[float, int, float]:
    """Of the engines that hold whole gradients: bytes of graphs, rows held, and multiplications beside the passes."""
    rows = {"func": num_retain, "loop": num_retain, "mean": 1}[engine]
    backwards = num_retain if engine == "loop" else 1
    extra = (backwards - 1) * num_retain * needed.multiplications * 2 / 3 + 2 * (rows**2 + 2 * rows) * trained
    return max(forget_graph, num_retain * needed.activation_bytes), rows, extra


def _scaled(uses: list[Use], num_samples: int) -> list[Use]:
    return [replace(use, positions=round(use.positions * num_samples)) for use in uses]


def _sample(model: nn.Module, losses: PerSampleLosses, parameters: Parameters, batch: Batch) -> _Sampled:
    trainable = list(parameters.trainable.values())
    before = [parameter.grad for parameter in trainable]
    for parameter in trainable:
        parameter.grad = None
    recorder, inputs = Recorder(parameters.trainable), batch.inputs
    try:
        with recorder:
            recorder.begin(inputs)
            count = len(batch.losses(model, losses))
        calls = list(recorder.calls)
        recorder.close()
        # not under the recorder: what is checkpointed would have to run again under it
        plain, needed = _run(model, losses, inputs), _run(model, losses, inputs, ends=trainable)
    finally:
        recorder.close()
        for parameter, gradient in zip(trainable, before, strict=True):
            parameter.grad = gradient
    uses = {
        name: [replace(use, positions=use.positions / count) for use in own_uses]
        for name, own_uses in find_uses(calls).items()
    }
    return _Sampled(plain, needed, uses, _functions(calls))


def _run(
    model: nn.Module, losses: PerSampleLosses, inputs: Mapping, *, ends: list[nn.Parameter] | None = None
) -> _Pass:
    """Counts a forward pass, and a backward pass that ends at the tensors given."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor.detach()

    def unpack(tensor: Tensor) -> Tensor:
        nonlocal largest
        if tensor.untyped_storage()._cdata not in own:
            largest = max(largest, tensor.untyped_storage().nbytes())
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(pack, unpack):
        found = losses(model, inputs)
        # not by autograd.grad, which the counter's own hooks on inputs do not allow
        found.sum().backward(inputs=ends)
    return _Pass(counter.get_total_flops() / len(found), sum(kept.values()) / len(found), largest / len(found))


def _functions(calls: list[Call | SpreadCall]) -> dict[str, tuple[str, str]]:
    """The function that uses each parameter and where its gradients come from; several are joined by a plus."""
    found: dict[str, dict[tuple[str, str], None]] = {}
    for call in calls:
        for source in call.sources:
            if isinstance(call, SpreadCall):
                entry = ("elementwise or attention mask", "autograd")
            else:
                entry = (call.name, "own rule" if call.function in RULES else "vmap")
            for name in source.parameters:
                found.setdefault(name, {})[entry] = None
    return {
        name: tuple(" + ".join(dict.fromkeys(part)) for part in zip(*entries, strict=True))
        for name, entries in found.items()
    }


def _count_rules(parameters: Parameters, sampled: _Sampled, costs: dict[str, Cost]) -> list[RuleCount]:
    counts, tensors = Counter(), Counter()
    for name, parameter in parameters.projected.items():
        if not costs:
            continue
        function, rule = sampled.functions.get(name, ("nothing", "-"))
        key = (function, rule, _form(costs.get(name)))
        counts[key] += parameter.numel()
        tensors[key] += 1
    return [RuleCount(*key, count, tensors[key]) for key, count in counts.most_common()]


def _form(cost: Cost | None) -> str:
    if cost is None:
        return "no gradient"
    if cost.pairwise:
        return "by pairs of positions, factors kept"
    return "formed, kept" if cost.keeps_gradients else "formed in blocks, factors kept"


def optimizer_state_bytes(optim: str) -> int:
    """Bytes of optimizer state for each trained number: two moments of Adam's kin, one of Lion's, none that is not known."""
    moments = 2 if "adamw" in optim else 1 if "lion" in optim else 0
    return moments * (1 if "8bit" in optim else 4)
