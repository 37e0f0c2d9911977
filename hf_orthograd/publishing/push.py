"""From a trainer to a folder that may be published, and from that folder to the Hub."""

import shutil
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi, get_token
from peft import PeftModel
from torch import nn
from transformers import Seq2SeqTrainingArguments
from transformers.utils import logging

from ..config import OrthoGradConfig
from ..evaluation import UnlearningReport
from ..evaluation.settings import known_class, samples_per_step
from ..validation import read_columns, row_digests
from .access import check_login, refuse_old_weights
from .card import CardOptions, write_card
from .files import (
    ADAPTER_WEIGHTS,
    PUBLIC_FOLDER,
    REPORT_FILES,
    UNRECORDED,
    git_blob_of,
    is_weights,
    published_files,
    remove_others,
    remove_paths,
    sha256_of,
)
from .history import OldWeights, files_of_models, find_weights, squash
from .patience import FAULTS, patiently
from .record import (
    Lineage,
    UnlearningRecord,
    append_record,
    commit_all,
    hashes_of,
    owner_salt,
    weights_of,
)
from .verification import verify_folder


if TYPE_CHECKING:
    from ..trainer import OrthoGradTrainer


logger = logging.get_logger(__name__)

# names of metrics that tell of nobody
_PUBLIC_METRICS = ("loss", "accuracy", "wer", "cer", "refused")
_PACKAGES = ("hf_orthograd", "torch", "transformers", "accelerate", "peft", "datasets", "huggingface_hub")


@dataclass
class Publication:
    """What a push did.

    Attributes:
        commit (`CommitInfo`): On the Hub.
        remaining (`list[OldWeights]`): Weights of earlier revisions that a tag or a pull request still holds.
    """

    commit: CommitInfo
    remaining: list[OldWeights] = field(default_factory=list)


def publish_trainer(
    trainer: "OrthoGradTrainer",
    commit_message: str = "End of training",
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    *,
    report: UnlearningReport | None = None,
    request_id: str | None = None,
    **card: Any,
) -> CommitInfo | None:
    """Writes `output_dir/public` and pushes it: all of it in one process, saving in all of them.

    Returns:
        [`~huggingface_hub.CommitInfo`]; None in all other processes.

    Raises:
        ValueError: As [`prepare_folder`] and [`publish`].
    """
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    token = token or args.hub_token

    def full_name() -> str:
        name = getattr(trainer, "hub_model_id", None) or args.hub_model_id or Path(args.output_dir).absolute().name
        return name if "/" in name else f"{check_login(HfApi(), token or get_token())}/{name}"

    repo_id = trainer.group.in_first(full_name)
    options = CardOptions(**{"repo_id": repo_id, **card})
    folder = prepare_folder(trainer, report=report, request_id=request_id, options=options)
    if not trainer.is_world_process_zero():
        return None
    return publish(
        folder,
        repo_id,
        token=token,
        private=args.hub_private_repo if private is None else private,
        revision=revision or args.hub_revision,
        commit_message=commit_message,
        squash_history=getattr(args, "squash_history", False),
    ).commit


def prepare_folder(
    trainer: "OrthoGradTrainer",
    *,
    report: UnlearningReport | None = None,
    request_id: str | None = None,
    goal: str | None = None,
    options: CardOptions | None = None,
) -> Path:
    """Writes what may be published to `output_dir/public`, and nothing else to it. Every process calls it.

    A folder that was there stays until the new one is whole. The salt of the commitments is written beside it, to
    `output_dir`, for the owner alone.

    Args:
        report ([`UnlearningReport`], *optional*): Its public edition goes with the model.
        request_id (`str`, *optional*): Published; random by default.
        goal (`str`, *optional*): "retrained" or "erased"; that of the report where there is one.
        options ([`CardOptions`], *optional*): Of the card.

    Raises:
        ValueError: A LoRA model is sharded and cannot be merged here, no weights are saved, or an adapter's base is not public.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    options = options or CardOptions()
    if isinstance(model, PeftModel) and args.merge_adapter and trainer.is_fsdp_enabled:
        raise ValueError(
            "A sharded LoRA model cannot be merged here, and an adapter alone is not published: deleting it brings back what "
            "was forgotten. Save it by `save_model()`, load it in one process with `AutoPeftModel...from_pretrained(folder, "
            "is_trainable=True)`, give it to an OrthoGradTrainer with the same arguments and sets, and call its `push_to_hub()` without training."
        )
    folder = Path(args.output_dir, PUBLIC_FOLDER)
    partial = folder.with_name(f"{PUBLIC_FOLDER}.partial")

    def begin() -> Lineage:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        # before anything is replaced: the model may come from the folder that is
        return trainer.origin.lineage()

    def finish() -> None:
        _complete(partial, trainer, model, lineage, report, (request_id, goal), options)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)

    lineage = trainer.group.in_first(begin)
    trainer.save_model(str(partial))
    trainer.group.in_first(finish)
    return folder


def _complete(
    folder: Path,
    trainer,
    model: nn.Module,
    lineage: Lineage,
    report: UnlearningReport | None,
    request: tuple[str | None, str | None],
    options: CardOptions,
) -> None:
    """Puts report, record and card beside the weights."""
    remove_others(folder)
    record = make_record(trainer, model, *request, lineage)
    record.base_model = options.finetuned_from or record.base_model
    if record.base_model is None and (folder / ADAPTER_WEIGHTS[0]).exists():
        raise ValueError(
            "`merge_adapter` is False, and the model that the adapter is for is not on the Hub: nobody could load it. Set "
            "merge_adapter=True, or name its public base by `finetuned_from`."
        )
    weights = weights_of(folder)
    if weights is None:
        raise ValueError(
            "`save_model()` saved no weights that can be published. Under FSDP set fsdp_state_dict_type to FULL_STATE_DICT; under "
            "DeepSpeed stage 3 set stage3_gather_16bit_weights_on_model_save."
        )
    remove_paths(folder, record.base_model)
    if report is not None:
        public = report.public()
        public.save(folder, page=False)  # a page is drawn anew from the report, and no record could vouch for it
        record.goal, record.report = public.goal, sha256_of(folder / REPORT_FILES[0])
    others = set(published_files(folder)) - weights.keys() - {*UNRECORDED, REPORT_FILES[0]}
    record.weights, record.files = weights, hashes_of(folder, others)
    append_record(record, lineage.earlier, folder, owner_salt(trainer.args.output_dir))
    write_card(folder, options)


def make_record(
    trainer: "OrthoGradTrainer", model: nn.Module, request_id: str | None, goal: str | None, lineage: Lineage
) -> UnlearningRecord:
    """What is known of a request from its trainer, all but the files and the report."""
    args = trainer.args
    forget = trainer.forget_dataset
    columns = read_columns(forget, trainer.per_sample_loss.model)
    samples = samples_per_step(trainer) if trainer.has_retain else 0
    return UnlearningRecord(
        request_id=request_id or trainer.origin.request_id,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        goal=goal,
        method=_method(trainer),
        training={
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "optim": str(getattr(args.optim, "value", args.optim)),
            # a model that was unlearned elsewhere, and is only published here
            "steps": trainer.state.global_step or None,
            "retain_samples_per_step": samples if trainer.state.global_step else None,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "processes": args.world_size if trainer.state.global_step else None,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else _dtype_of(model),
            "seed": args.seed,
        },
        sizes={"forget": len(forget), "retain": _length(trainer.train_dataset) if trainer.has_retain else 0},
        versions={name: version(name) for name in _PACKAGES},
        base_model=lineage.base_model,
        base_revision=lineage.base_revision,
        weights_before=lineage.weights_before,
        parameters=_count_parameters(model),
        committed_columns=None if columns is None else sorted(columns),
        commitments=commit_all(row_digests(forget, columns), owner_salt(args.output_dir)),
    )


def _method(trainer: "OrthoGradTrainer") -> dict[str, Any]:
    """Its settings, without what a user may have written of the forgotten: an answer, a metric's or a class's name."""
    inherited = {one.name for one in fields(Seq2SeqTrainingArguments)}
    names = sorted({one.name for one in fields(OrthoGradConfig)} - inherited)
    settings = {name: getattr(trainer.args, name) for name in names}
    settings["refusal_labels"] = (
        None if settings["refusal_labels"] is None else f"{len(settings['refusal_labels'])} labels"
    )
    if settings["stop_metric"] not in _PUBLIC_METRICS:
        settings["stop_metric"] = "one of the user's own"
    return {"trainer": known_class(trainer, "hf_orthograd."), **settings}


def _count_parameters(model: nn.Module) -> int:
    """As the model is once an adapter is merged; of a sharded one, too."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return sum(
        p.numel() for name, p in base.named_parameters() if "lora_" not in name and ".original_module." not in name
    )


def _dtype_of(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _length(dataset) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Publish an unlearned model",
    squash_history: bool = False,
) -> Publication:
    """Pushes a folder that [`prepare_folder`] wrote; again, after a push that failed.

    Args:
        folder, repo_id (`str`): From where to where; without an owner the repository is the user's.
        token, private, revision, commit_message: As in [`~huggingface_hub.HfApi.create_repo`] and `upload_folder`.
        squash_history (`bool`): Rewrite the branch after the push, so that no earlier revision of it holds weights.

    Returns:
        [`Publication`].

    Raises:
        ValueError: The folder is not as it was recorded; or the repository holds other weights.
        HfHubHTTPError: The Hub refused, or for a large file the client's RuntimeError; the folder is whole, and can be pushed
            again.
    """
    folder = Path(folder)
    if problems := verify_folder(folder):
        raise ValueError(f"{str(folder)!r} is not as it was recorded: {'; '.join(problems)}. Nothing was pushed.")
    names = published_files(folder)
    left = sorted(path.name for path in folder.iterdir() if path.name not in names)
    if left:
        logger.warning(f"Not published, of {str(folder)!r}: {', '.join(left)}.")
    own = {hash_of(folder / name) for name in names if is_weights(name) for hash_of in (sha256_of, git_blob_of)}
    api, branch = HfApi(), revision or "main"
    try:
        repo_id = patiently(lambda: api.create_repo(repo_id, token=token, private=private, exist_ok=True)).repo_id
        if branch != "main":
            patiently(lambda: api.create_branch(repo_id, branch=branch, token=token, exist_ok=True))
        if not squash_history:
            refuse_old_weights(repo_id, patiently(lambda: find_weights(repo_id, own, token=token)))
        # of an earlier push: what stays on the branch is loaded with the model
        stale = sorted(set(patiently(lambda: files_of_models(repo_id, branch, token=token))) - set(names))
        if stale:
            logger.warning(f"Removed from {repo_id}, as it belongs to another model: {', '.join(stale)}.")
        commit = patiently(
            lambda: api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=names,
                delete_patterns=[escape(path) for path in stale],
                commit_message=commit_message,
                revision=revision,
                token=token,
            )
        )
        if squash_history:
            patiently(lambda: squash(repo_id, branch, token=token))
            commit = _newest(commit, patiently(lambda: api.model_info(repo_id, revision=branch, token=token)).sha)
        remaining = patiently(lambda: find_weights(repo_id, own, token=token))
    except FAULTS:
        logger.error(
            f"The push to {repo_id} failed. What was to be published is whole in {str(folder)!r}: push it again by "
            f"`python -m hf_orthograd publish {folder} {repo_id}`."
        )
        raise
    for one in remaining:
        logger.warning(f"{repo_id} still holds {one}: `python -m hf_orthograd retract {repo_id} --delete_refs`.")
    return Publication(commit, remaining)


def _newest(commit: CommitInfo, oid: str) -> CommitInfo:
    """The commit, once a rewritten history has given it another name."""
    url = commit.commit_url.replace(commit.oid, oid)
    return CommitInfo(commit_url=url, commit_message=commit.commit_message, commit_description="", oid=oid)
