"""The methods that the studies compare, and one run of one of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import transformers
from retain_memory import RetainMemoryTrainer
from torch import nn
from torch.utils.data import DataLoader

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.baselines import (
    BASELINES,
    BadTeacherTrainer,
    OnpoTrainer,
    RandomLabelTrainer,
    RmuTrainer,
    ScrubTrainer,
    UndialTrainer,
    dampen_synapses,
)
from hf_orthograd.evaluation import Quantization, Relearning, evaluate_unlearning, membership_inference


@dataclass
class Method:
    """A row of a study's table.

    Attributes:
        label (`str`): As the table calls it.
        config (`dict`): What it sets in [`OrthoGradConfig`].
        trainer (`Callable`): Its class.
        rule (`bool`): Whether it ends by the study's stopping rule. A method with a schedule of its own does not.
        steps (`int`): How many times the study's steps it takes.
        compared (`bool`): Whether studies take it where they do not name their methods.
    """

    label: str
    config: dict = field(default_factory=lambda: {"projection": "none"})
    trainer: Callable = OrthoGradTrainer
    rule: bool = True
    steps: int = 1
    compared: bool = True


def _salun(*args, **kwargs) -> RandomLabelTrainer:
    return RandomLabelTrainer(*args, saliency=0.5, **kwargs)


METHODS = {
    "finetune": Method("fine-tuning on the retain set", BASELINES["finetune"], rule=False),
    "gradient_ascent": Method("gradient ascent", BASELINES["gradient_ascent"]),
    "graddiff": Method("GradDiff", BASELINES["graddiff"]),
    "npo": Method("NPO", BASELINES["npo"]),
    "simnpo": Method("SimNPO", BASELINES["simnpo"]),
    "mean_projection": Method("mean projection", BASELINES["mean_projection"]),
    # a pair of its alternating steps sees as many samples as one step of the others
    "scrub": Method("SCRUB", trainer=ScrubTrainer, rule=False, steps=2),
    "bad_teacher": Method("Bad Teacher", trainer=BadTeacherTrainer),
    "undial": Method("UNDIAL", trainer=UndialTrainer, compared=False),
    "rmu": Method("RMU", trainer=RmuTrainer, compared=False),
    "onpo": Method("ONPO", trainer=OnpoTrainer, compared=False),
    "random_labels": Method("random labels", trainer=RandomLabelTrainer),
    "salun": Method("SalUn", trainer=_salun),
    "ssd": Method("SSD", rule=False),
    "orthograd": Method("OrthoGrad, ascent", BASELINES["orthograd"]),
    "orthograd_update": Method(
        "OrthoGrad, ascent, update corrected", BASELINES["orthograd"] | {"projection_target": "update"}
    ),
    "orthograd_npo": Method("OrthoGrad + NPO (default)", BASELINES["orthograd_npo"]),
    "npo_kl": Method("NPO, kl", BASELINES["npo"] | {"retain_loss": "kl"}, compared=False),
    "orthograd_npo_kl": Method(
        "OrthoGrad + NPO, kl", BASELINES["orthograd_npo"] | {"retain_loss": "kl"}, compared=False
    ),
    "orthograd_memory": Method(
        "OrthoGrad, ascent, with a retain memory", BASELINES["orthograd"], trainer=RetainMemoryTrainer, compared=False
    ),
}


@dataclass
class Bench:
    """What is the same for all runs of a study.

    Attributes:
        config (`dict`): Batch sizes, steps, the stopping rule.
        rule (`tuple[str, ...]`): Which entries of it are the stopping rule.
        shared (`dict`): Collator, `compute_metrics` and so on, for each trainer.
        metric: Of the report.
        measured (`dict[str, str]`): Sets that are measured, from their names in reports to those in the study.
        evaluated (`dict[str, str]`): The same for sets that the stopping rule evaluates.
        before_measuring (`dict`): Entries of the arguments that change after training.
    """

    config: dict
    rule: tuple[str, ...]
    shared: dict
    metric: object
    measured: dict[str, str]
    evaluated: dict[str, str]
    before_measuring: dict = field(default_factory=dict)

    def args(self, method: Method, setting: float, seed: int, extra: dict | None = None) -> OrthoGradConfig:
        chosen = {name: value for name, value in self.config.items() if method.rule or name not in self.rule}
        chosen |= {**method.config, **(extra or {})}
        chosen["max_steps"] = chosen["max_steps"] * method.steps
        return OrthoGradConfig(
            learning_rate=setting,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            save_strategy="no",
            logging_steps=1000,
            monitor_steps=0,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            **chosen,
        )


def unlearn(
    bench: Bench, name: str, setting: float, model: nn.Module, sets: dict, seed: int, extra: dict | None = None
) -> tuple[OrthoGradTrainer, dict]:
    """Unlearns with one method and setting; returns the trainer and what the run took.

    Args:
        setting (`float`): The learning rate; of SSD, which has none, the paper's alpha.
        extra (`dict`, *optional*): Further entries of the configuration.
    """
    method = METHODS[name]
    transformers.set_seed(seed)
    args = bench.args(method, setting if name != "ssd" else 1e-5, seed, extra)
    evaluated = {of: sets[source] for of, source in bench.evaluated.items()} if args.eval_strategy != "no" else None
    sources = {"train_dataset": sets["retain"], "forget_dataset": sets["forget"], "eval_dataset": evaluated}
    trainer = method.trainer(model, args, **sources, **bench.shared)
    started = time.perf_counter()
    failed = None
    if name == "ssd":
        # nearly all training data is retained: what is at hand of it stands for all
        batches = [_batches(trainer, sets[of]) for of in ("forget", "retain")]
        dampen_synapses(trainer.model, *batches, selection=setting)
    else:
        try:
            trainer.train()
        except FloatingPointError as error:
            failed = str(error)
    seconds = time.perf_counter() - started
    record = {"method": name, "setting": setting, "seed": seed, "extra": extra or {}, "failed": failed}
    return trainer, record | {"seconds": seconds, "steps": trainer.state.global_step}


def measure_model(bench: Bench, trainer, sets: dict, attacks: Callable | None = None) -> dict:
    """Numbers of the trainer's model, of which the tables are made."""
    for name, value in bench.before_measuring.items():
        setattr(trainer.args, name, value)
    report = evaluate_unlearning(
        trainer,
        attacks=attacks(trainer) if attacks is not None else (),
        datasets={name: sets[source] for name, source in bench.measured.items() if source in sets},
        metric=bench.metric,
    )
    record = {
        "quality": {name: [one.value, one.loss] for name, one in report.models["unlearned"].items()},
        "interval": {name: one.interval for name, one in report.models["unlearned"].items()},
        "auc": {name: one.auc for name, one in report.membership["unlearned"].items()},
        "forget_losses": [round(loss, 4) for loss in report.losses["unlearned"]["forget"]],
    }
    losses = (np.array(report.losses["unlearned"][name]) for name in ("forget", "validation"))
    record["auc"]["validation"] = membership_inference(*losses).auc
    for attack in ("int8", "int4"):
        if f"unlearned, {attack}" in report.models:
            attacked = report.models[f"unlearned, {attack}"]
            record[attack] = {name: [one.value, one.loss] for name, one in attacked.items()}
    for attack, curves in report.relearning.items():
        record[attack] = [[point.step, point.value, point.loss] for point in curves["unlearned"]]
    return record


def attacks_of(dataset, bits: tuple[int, ...] = (8, 4), **relearning) -> Callable:
    """The studies' attacks: rounding to int8 by channel and int4 in groups of 64, and fine-tuning on `dataset`."""
    rounded = [Quantization(each, {4: 64}.get(each)) for each in bits]
    return lambda trainer: [*rounded, Relearning(dataset, trainer, **relearning)]


def _batches(trainer, rows) -> list:
    return list(DataLoader(rows, batch_size=50, collate_fn=trainer.data_collator))
