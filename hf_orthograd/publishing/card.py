"""The model card: what was removed, how, what holds and what nobody tried. Never whose data it was."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.models.auto import modeling_auto as auto

from ..evaluation.quality import Quality
from ..evaluation.reporting import NOT_MEASURED, UnlearningReport, show
from .files import ADAPTER_WEIGHTS, CARD_NAME, FIGURES, REPORT_FILES
from .record import UnlearningRecord, load_records


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"

_TASKS = (
    ("automatic-speech-recognition", auto.MODEL_FOR_CTC_MAPPING_NAMES),
    ("automatic-speech-recognition", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
    ("image-classification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ("audio-classification", auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
    ("video-classification", auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES),
    ("text-classification", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ("token-classification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ("image-text-to-text", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ("text-generation", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ("fill-mask", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
)

# these answer no prompt that could call up what was learned by heart
_WITHOUT_PROMPTS = {task for task, _ in _TASKS if task not in ("image-text-to-text", "text-generation", "fill-mask")}

_SETS = {
    "forget": "forgotten data",
    "forget_unseen": "unseen data of the forgotten kind",
    "forget_reworded": "forgotten data in other words",
    "retain": "retained data",
    "test": "test data",
}

# what an attacker may do, and how a report shows that it was tried
_ATTACKS = (
    ("rounding the weights to 8 bits", lambda report: _rounded(report, "int8")),
    ("rounding the weights to 4 bits", lambda report: _rounded(report, "int4")),
    ("fine-tuning on related data (relearning)", lambda report: bool(report.relearning)),
    ("membership inference by loss", lambda report: "unlearned" in report.membership),
    ("membership inference with shadow models (U-LiRA)", lambda report: False),
    ("telling the data from the difference to the model before", lambda report: False),
)
_ATTACKS_ON_TEXT = (("extraction of training data by prompting", lambda report: False),)


@dataclass
class CardOptions:
    """What a card says beside what was recorded and measured; the first nine are those of Trainer's `create_model_card`.

    Args:
        language, license, tags: As in [`~huggingface_hub.ModelCardData`].
        model_name (`str`, *optional*): The card's title; the repository's name by default.
        finetuned_from (`str`, *optional*): The base model on the Hub; by default that of the record.
        tasks (`str` or `list[str]`, *optional*): The Hub's name of the task; found from the model's class by default.
        dataset_tags (`str` or `list[str]`, *optional*): Public data sets on the Hub, by their ids.
        dataset, dataset_args (`str` or `list[str]`, *optional*): Their names in the text.
        repo_id (`str`, *optional*): Where the model will be, for the snippet that loads it.
    """

    language: str | list[str] | None = None
    license: str | None = None
    tags: str | list[str] | None = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: str | list[str] | None = None
    dataset_tags: str | list[str] | None = None
    dataset: str | list[str] | None = None
    dataset_args: str | list[str] | None = None
    repo_id: str | None = None


def find_task(architectures: Sequence[str] | None) -> str | None:
    """The Hub's pipeline tag of a model, from the class in its configuration."""
    for task, names in _TASKS:
        if set(architectures or ()) & _class_names(names):
            return task
    return None


def make_card(
    records: list[UnlearningRecord],
    report: UnlearningReport | None,
    options: CardOptions,
    *,
    architectures: Sequence[str] | None = None,
    is_adapter: bool = False,
    figures: Sequence[str] = (),
) -> ModelCard:
    """The card of the newest request.

    Args:
        records (`list[UnlearningRecord]`): All requests, the oldest first; at least one.
        report ([`UnlearningReport`], *optional*): Its public edition. Without one the card says "not measured".
        architectures (`Sequence[str]`, *optional*): Of the model's configuration.
        is_adapter (`bool`): Whether an adapter is published, and not a whole model.
        figures (`Sequence[str]`): Files beside the card.

    Raises:
        ValueError: There is no record, or the report is the owner's.
    """
    if not records:
        raise ValueError("There is no record of a request, which the card is made of.")
    if report is not None and report.audience != "everyone":
        raise ValueError("The report is the owner's, with names and per-sample losses: pass `report.public()`.")
    record, task = records[-1], next(iter(_listed(options.tasks)), None) or find_task(architectures)
    base = options.finetuned_from or record.base_model
    name = options.model_name or (options.repo_id or "unlearned model").split("/")[-1]
    attacks = _ATTACKS if task in _WITHOUT_PROMPTS else _ATTACKS + _ATTACKS_ON_TEXT
    tried = [(what, report is not None and was_run(report)) for what, was_run in attacks]
    return ModelCard.from_template(
        _metadata(options, report, name=name, base=base, task=task, is_adapter=is_adapter),
        template_path=str(TEMPLATE),
        name=name,
        repo_id=options.repo_id or "<this repository>",
        base=base,
        task=task,
        record=record,
        earlier=records[:-1],
        report=report,
        kind=next(iter(architectures or ()), None),
        changes=[] if report is None else _changes(report),
        checks=[] if report is None else [_check_row(check) for check in report.checks],
        **{name: _named(report, holds) for name, holds in (("holding", True), ("failing", False), ("unknown", None))},
        qualities=[] if report is None else _quality_rows(report),
        set_names=[] if report is None else _set_heads(report),
        retrained=report is not None and "reference" in report.models,
        answers_prompts=task not in _WITHOUT_PROMPTS,
        reworded=report is not None and "forget_reworded" in report.models["unlearned"],
        costs=[] if report is None else [(w, n, show(v)) for w, own in report.cost.items() for n, v in own.items()],
        attacks_run=[what for what, was_run in tried if was_run],
        attacks_not_run=[what for what, was_run in tried if not was_run],
        data_sets=[*_listed(options.dataset), *_listed(options.dataset_args)],
        is_adapter=is_adapter,
        refuses=record.method["forget_loss"] == "refusal",
        figures=list(figures),
        not_measured=NOT_MEASURED,
    )


def _metadata(
    options: CardOptions,
    report: UnlearningReport | None,
    *,
    name: str,
    base: str | None,
    task: str | None,
    is_adapter: bool,
) -> ModelCardData:
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if is_adapter else "finetune",
        library_name="peft" if is_adapter else "transformers",
        license=options.license,
        language=options.language,
        datasets=options.dataset_tags,
        pipeline_tag=task,
        tags=list(dict.fromkeys(["machine-unlearning", "hf-orthograd", *_listed(options.tags)])),
        metrics=None if report is None or report.metric is None else [report.metric],
        model_name=name,
        eval_results=_results(report, task),
    )


def write_card(folder: str | Path, options: CardOptions) -> Path:
    """Makes the card of a published folder from what lies in it, and writes it there; whole, or not at all.

    Raises:
        ValueError: The folder has no record.
        OSError: It cannot be written, as on a full disk; a card that was there stays.
    """
    folder = Path(folder)
    report = UnlearningReport.load(folder) if (folder / REPORT_FILES[0]).exists() else None
    config = folder / "config.json"
    card = make_card(
        load_records(folder),
        report,
        options,
        architectures=_architectures(config) if config.exists() else None,
        is_adapter=(folder / ADAPTER_WEIGHTS[0]).exists(),
        figures=[name for name in FIGURES if (folder / name).exists()],
    )
    partial, path = folder / f"{CARD_NAME}.partial", folder / CARD_NAME
    try:
        card.save(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _architectures(config: Path) -> list[str] | None:
    return json.loads(config.read_text()).get("architectures")


def _class_names(names) -> set[str]:
    found: set[str] = set()
    for value in names.values():
        found |= {value} if isinstance(value, str) else set(value)
    return found


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _rounded(report: UnlearningReport, name: str) -> bool:
    return any(model.startswith(f"unlearned, {name}") for model in report.models)


def _results(report: UnlearningReport | None, task: str | None) -> list[EvalResult] | None:
    """The report's numbers on the unlearned model, for the metadata; exact, not as the tables round them."""
    if report is None:
        return None
    found = []
    for name, quality in report.models["unlearned"].items():
        place = {
            "task_type": task or "other",
            "dataset_type": name,
            "dataset_name": f"{_SETS.get(name, name)} (not public)",
        }
        if quality.value is not None:
            found.append(EvalResult(metric_type=report.metric, metric_value=quality.value, **place))
        found.append(EvalResult(metric_type="loss", metric_value=quality.loss, **place))
    return found


def _named(report: UnlearningReport | None, holds: bool | None) -> list[str]:
    """The checks that turned out so, by name; those that were judged with the numbers that decided."""
    found = [] if report is None else [check for check in report.checks if check.holds is holds]
    if holds is None:
        return [check.name for check in found]
    return [f"{check.name} ({show(check.value)} against {show(check.compared_with)})" for check in found]


def _check_row(check) -> tuple[str, ...]:
    holds = {True: "yes", False: "**no**", None: NOT_MEASURED}[check.holds]
    return check.name, show(check.value), show(check.compared_with), check.rule, holds


def _quality_rows(report: UnlearningReport) -> list[tuple[str, list[str]]]:
    """One row for each model: before, now, never trained on it, and these after an attack."""
    names = {"original": "before", "unlearned": "this model", "reference": "retrained without the data"}
    attacked = [name for name in report.models if name not in names]
    names |= {name: ", ".join([names.get(name.split(", ")[0], name), *name.split(", ")[1:]]) for name in attacked}
    sets = list(report.models["unlearned"])
    return [
        (shown, [_cell(report.models[model].get(name)) for name in sets])
        for model, shown in names.items()
        if model in report.models
    ]


def _changes(report: UnlearningReport) -> list[str]:
    """What the first screen says: from before to now."""
    before, now = report.models.get("original", {}), report.models["unlearned"]
    both = [name for name in ("forget", "forget_unseen", "forget_reworded", "test") if name in before and name in now]
    return [f"on {_SETS[name]} from {_number(before[name])} to {_number(now[name])}" for name in both]


def _number(quality: Quality) -> str:
    return f"{quality.loss if quality.value is None else quality.value:.3f}"


def _set_heads(report: UnlearningReport) -> list[str]:
    return [f"{_SETS.get(name, name)} ({one.size})" for name, one in report.models["unlearned"].items()]


def _cell(quality: Quality | None) -> str:
    if quality is None:
        return NOT_MEASURED
    if quality.value is None:
        return f"loss {quality.loss:.3f}"
    if quality.interval is None:
        return f"{quality.value:.3f}"
    return f"{quality.value:.3f} [{quality.interval[0]:.3f}, {quality.interval[1]:.3f}]"
