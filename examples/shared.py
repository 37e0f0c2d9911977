"""What the examples share: which models are compared, where they come from, and which arguments exclude each other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, load_dataset
from torch import nn

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.data import check_corpus
from hf_orthograd.evaluation import Relearning, UnlearningReport


# with any of these an example does not take its demo's settings: they are no defaults, and the help does not show them
NO_DEMO = ("--model_name_or_path", "--dataset_name", "--help", "-h")

# stopping and pushing are for unlearning alone
WITHOUT_RULE = {
    "forget_target": None,
    "retain_budget": None,
    "save_strategy": "no",
    "eval_strategy": "no",
    "push_to_hub": False,
}


@dataclass
class ComparisonArguments:
    """Where the original and the reference come from, and whether anything is unlearned at all."""

    finetune_epochs: float = field(default=0, metadata={"help": "Epochs of training on all rows first."})
    retrain: bool = field(
        default=False,
        metadata={
            "help": "Train the model without the forget set, too, as the report's reference. It must not know it yet."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Print what a step will take, and stop."})
    evaluate_only: bool = field(
        default=False,
        metadata={
            "help": "Unlearn nothing: the model is an unlearned one, which is measured. Nothing is trained or pushed then."
        },
    )
    original_name_or_path: str | None = field(
        default=None, metadata={"help": "For `--evaluate_only`: the model before it was unlearned."}
    )
    reference_name_or_path: str | None = field(
        default=None, metadata={"help": "A model retrained without the forget set, in place of `--retrain`."}
    )

    def check(self, args: OrthoGradConfig, model: str | None) -> None:
        """Raises `ValueError` where arguments exclude each other, before anything is loaded."""
        if self.retrain and self.reference_name_or_path is not None:
            raise ValueError("`--retrain` and `--reference_name_or_path` both give a reference. Pass one of them.")
        if self.retrain and not self.evaluate_only and self.finetune_epochs == 0:
            raise ValueError(
                "`--retrain` is set, but `--finetune_epochs` is 0: the reference would be the model itself. Set the epochs, and "
                "pass a model that has not seen the forget set."
            )
        if model is not None and model.startswith((".", "/")) and not Path(model).exists():
            raise ValueError(f"`--model_name_or_path` is {model}, but there is no such folder.")
        if model is not None and Path(model, "adapter_config.json").exists():
            raise ValueError(
                f"`--model_name_or_path` {model} is an adapter. Merge it into its model first: "
                "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)."
            )
        if self.original_name_or_path is not None and not self.evaluate_only:
            raise ValueError(
                "`--original_name_or_path` is for `--evaluate_only`. Unlearning starts from `--model_name_or_path`."
            )
        if not self.evaluate_only:
            return
        if model is None:
            raise ValueError("`--evaluate_only` measures an unlearned model: pass `--model_name_or_path`.")
        if list(Path(args.output_dir).glob("unlearning_report.*")):
            raise ValueError(
                f"`--output_dir` {args.output_dir} holds a report, which would be lost. Name another, as {args.output_dir}/evaluated."
            )


def compared_models(
    start: nn.Module,
    arguments: ComparisonArguments,
    train: Callable[[list[str]], nn.Module],
    load: Callable[[str], nn.Module] | None = None,
) -> tuple[nn.Module | None, nn.Module | None]:
    """The model before unlearning and the reference, trained here or loaded; None for one that is not at hand.

    Args:
        start (`torch.nn.Module`): The model that was named.
        train (`Callable`): Trains a copy of it on the named sets.
        load (`Callable`, *optional*): Loads another of its kind.
    """
    load = load or partial(type(start).from_pretrained, dtype=torch.float32)
    original, reference = start, None
    if arguments.evaluate_only:
        original = None if arguments.original_name_or_path is None else load(arguments.original_name_or_path)
    elif arguments.finetune_epochs > 0:
        original = train(["forget", "others"])
    if arguments.reference_name_or_path is not None:
        reference = load(arguments.reference_name_or_path)
    elif arguments.retrain and not arguments.evaluate_only:
        reference = train(["others"])
    return original, reference


def load_corpus(name: str, columns: dict[str, str], arguments: ComparisonArguments) -> DatasetDict:
    """Rows with splits train and test, and forget if it is a data set of its own, which has these columns by their flags."""
    if Path(name).is_file():
        raise ValueError(
            f"`--dataset_name` is the file {name}. Pass its folder, with one file for each of train and test."
        )
    corpus = load_dataset(name)
    own = {} if arguments.forget_column is None else {"--forget_column": arguments.forget_column}
    check_corpus(corpus, columns | own)
    if arguments.forget_dataset_name is not None:
        forgotten = load_dataset(arguments.forget_dataset_name)
        check_corpus(forgotten, columns, ("train",), flag="--forget_dataset_name")
        corpus["forget"] = forgotten["train"]
    return corpus


def relearning(
    trainer: OrthoGradTrainer,
    forgotten: Dataset,
    arguments: ComparisonArguments,
    *,
    steps: list[int],
    batch_size: int,
    known: Dataset | None = None,
) -> Relearning:
    """The attack of a report: on other data of the forgotten, or on the first fifth of them: does it bring back the rest?"""
    rate, measured = arguments.relearning_learning_rate, None
    if rate is None:
        trained = arguments.finetune_epochs > 0
        rate = arguments.finetune_learning_rate / 10 if trained else trainer.args.learning_rate
    if known is None:
        count = max(1, len(forgotten) // 5)
        known = forgotten.select(range(count))
        measured = forgotten.select(range(count, len(forgotten))) if len(forgotten) > count else None
    settings = {"max_steps": steps[-1], "learning_rate": rate, "batch_size": batch_size}
    return Relearning(known, trainer, steps=steps, measured=measured, **settings)


def watched_sets(measured: dict[str, Dataset], args: OrthoGradConfig, unseen: Dataset) -> dict[str, Dataset]:
    """What evaluations while unlearning are of, which the rule that ends it reads; the rest is measured in the end.

    Args:
        unseen (`datasets.Dataset`): What the model was not trained on, for `forget_target="reference"`.
    """
    found = {name: measured[name] for name in ("forget", "retain")}
    return found | ({"reference": unseen} if args.forget_target == "reference" else {})


def say_that_nothing_stops() -> None:
    PartialState().print(
        "Without a retrained model nothing says when to stop: all steps are made. To stop earlier pass `--reference_name_or_path`, or "
        "`--forget_target` with `--eval_strategy steps --eval_steps 2`."
    )


def trained_folder(output_dir: str, sets: list[str]) -> str:
    """Where a model that learned these sets is kept, with what is to be forgotten among them or without."""
    return str(Path(output_dir) / ("finetuned" if "forget" in sets else "retrained"))


def where_it_is(output_dir: str, report: UnlearningReport, arguments: ComparisonArguments) -> str:
    """The last lines of a run."""
    held, failed, unknown = (sum(check.holds is holds for check in report.checks) for holds in (True, False, None))
    lines = [f"{held} checks hold, {failed} do not, {unknown} were not measured: {output_dir}/unlearning_report.html."]
    before, after = (
        report.models[name]["forget"] if name in report.models else None for name in ("original", "unlearned")
    )
    if before is not None and before.value is not None and after.value == before.value:
        lines.append(
            f"On the forget set {report.metric} is what it was before, {before.value:.3f}: nothing was forgotten. Take more steps, or a higher "
            "`--learning_rate`."
        )
    if not arguments.evaluate_only:
        lines.append(f"The model is in {output_dir}. What may be published is in {output_dir}/public.")
    return "\n".join(lines)
