"""From a trainer to a folder that may be published, and from that folder to the Hub."""

import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from peft import PeftModel
from torch import nn
from transformers import Seq2SeqTrainingArguments
from transformers.utils import logging

from ..config import OrthoGradConfig
from ..evaluation import UnlearningReport
from ..validation import read_columns, row_digests
from .access import check_login, refuse_old_weights
from .card import CardOptions, write_card
from .files import (
    ADAPTER_WEIGHTS,
    ANY_WEIGHTS,
    FIGURES,
    REPORT_FILES,
    git_blob_of,
    hub_name,
    is_weights,
    published_files,
    remove_others,
    remove_paths,
    sha256_of,
)
from .history import OldWeights, find_weights, squash
from .record import UnlearningRecord, append_record, commit_all, hashes_of, load_records, owner_salt
from .verification import verify_folder


logger = logging.get_logger(__name__)

PUBLIC_FOLDER = "public"
_PACKAGES = ("hf_orthograd", "torch", "transformers", "accelerate", "peft", "datasets", "huggingface_hub")
_TRIES = 5
Result = TypeVar("Result")


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
    trainer,
    commit_message: str = "End of training",
    token: str | None = None,
    revision: str | None = None,
    *,
    report: UnlearningReport | None = None,
    request_id: str | None = None,
    private: bool | None = None,
    **card,
) -> Publication | None:
    """Writes `output_dir/public` and pushes it: all of it in one process, saving in all of them.

    Returns:
        [`Publication`]; None in all other processes.

    Raises:
        ValueError: As [`prepare_folder`] and [`publish`].
    """
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    repo_id = getattr(trainer, "hub_model_id", None) or args.hub_model_id or Path(args.output_dir).absolute().name
    if "/" not in repo_id and trainer.is_world_process_zero():
        repo_id = f"{check_login(HfApi(), token or args.hub_token or get_token())}/{repo_id}"
    options = CardOptions(**{"repo_id": repo_id, **card})
    folder = prepare_folder(trainer, report=report, request_id=request_id, options=options)
    if not trainer.is_world_process_zero():
        return None
    return publish(
        folder,
        repo_id,
        token=token or args.hub_token,
        private=args.hub_private_repo if private is None else private,
        revision=revision or args.hub_revision,
        commit_message=commit_message,
        squash_history=getattr(args, "squash_history", False),
    )


def prepare_folder(
    trainer,
    *,
    report: UnlearningReport | None = None,
    request_id: str | None = None,
    options: CardOptions | None = None,
) -> Path:
    """Writes what may be published to `output_dir/public`, and nothing else to it. Every process calls it.

    The salt of the commitments is written beside it, to `output_dir`, for the owner alone.

    Raises:
        ValueError: A LoRA model is sharded and cannot be merged here, or an adapter's base is not public.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    options = options or CardOptions()
    if isinstance(model, PeftModel) and args.merge_adapter and trainer.is_fsdp_enabled:
        raise ValueError(
            "A sharded LoRA model cannot be merged here, and an adapter alone is not published: deleting it brings back what "
            "was forgotten. Save it by `save_model()`, load it in one process with `AutoPeftModel...from_pretrained`, give it to "
            "an OrthoGradTrainer with the same arguments and sets, and call its `push_to_hub()` without training."
        )
    folder = Path(args.output_dir, PUBLIC_FOLDER)
    if trainer.is_world_process_zero():
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        remove_others(folder)
        source = getattr(getattr(model, "config", None), "_name_or_path", None)
        earlier = load_records(source) if source and Path(source).is_dir() else []
        record = make_record(trainer, model, request_id, earlier)
        record.base_model = options.finetuned_from or record.base_model
        if record.base_model is None and (folder / ADAPTER_WEIGHTS[0]).exists():
            raise ValueError(
                "`merge_adapter` is False, and the model that the adapter is for is not on the Hub: nobody could load it. Set "
                "merge_adapter=True, or name its public base by `finetuned_from`."
            )
        remove_paths(folder, record.base_model)
        _write_report(folder, record, report)
        record.weights = hashes_of(folder, filter(is_weights, published_files(folder)))
        append_record(record, earlier, folder)
        write_card(folder, options)
    return folder


def _write_report(folder: Path, record: UnlearningRecord, report: UnlearningReport | None) -> None:
    if report is None:
        return
    public = report.public()
    public.save(folder)
    record.goal, record.report = public.goal, sha256_of(folder / REPORT_FILES[0])


def make_record(trainer, model, request_id: str | None, earlier: list[UnlearningRecord]) -> UnlearningRecord:
    """What is known of a request from its trainer, all but the weights and the report."""
    args, config = trainer.args, getattr(model, "config", None)
    source = getattr(config, "_name_or_path", None)
    own = {one.name for one in fields(OrthoGradConfig)} - {one.name for one in fields(Seq2SeqTrainingArguments)}
    forget = trainer.forget_dataset
    columns = read_columns(forget, trainer.per_sample_loss.model)
    return UnlearningRecord(
        request_id=request_id or uuid.uuid4().hex,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        goal=None,
        method={"trainer": type(trainer).__name__} | {name: getattr(args, name) for name in sorted(own)},
        training={
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "optim": str(getattr(args.optim, "value", args.optim)),
            "steps": trainer.state.global_step,
            "retain_samples_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "processes": args.world_size,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else _dtype_of(model),
            "seed": args.seed,
        },
        sizes={"forget": len(forget), "retain": _length(trainer.train_dataset) if trainer.has_retain else 0},
        versions={name: version(name) for name in _PACKAGES},
        base_model=hub_name(source) or (earlier[-1].base_model if earlier else None),
        base_revision=getattr(config, "_commit_hash", None) or (earlier[-1].base_revision if earlier else None),
        weights_before=_weights_of(source),
        committed_columns=None if columns is None else sorted(columns),
        commitments=commit_all(row_digests(forget, columns), owner_salt(args.output_dir)),
    )


def _dtype_of(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _length(dataset) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _weights_of(source: str | None) -> dict[str, str] | None:
    """Hashes of the files of weights in a folder that a model was loaded from."""
    if not source or not Path(source).is_dir():
        return None
    return hashes_of(Path(source), filter(is_weights, published_files(source))) or None


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
        squash_history (`bool`): Rewrite the branch after the push, so that no earlier revision of it holds weights.

    Raises:
        ValueError: The folder is not as it was recorded; or the repository holds other weights.
        HfHubHTTPError: The Hub refused; the folder is whole, and can be pushed again.
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
        repo_id = _patiently(lambda: api.create_repo(repo_id, token=token, private=private, exist_ok=True)).repo_id
        if branch != "main":
            _patiently(lambda: api.create_branch(repo_id, branch=branch, token=token, exist_ok=True))
        if not squash_history:
            refuse_old_weights(repo_id, _patiently(lambda: find_weights(repo_id, own, token=token)))
        commit = _patiently(
            lambda: api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=names,
                # of an earlier push: a merged model beside an adapter would be loaded with it
                delete_patterns=[*ANY_WEIGHTS, "adapter_config.json", *REPORT_FILES, *FIGURES],
                commit_message=commit_message,
                revision=revision,
                token=token,
            )
        )
        if squash_history:
            _patiently(lambda: squash(repo_id, branch, token=token))
        remaining = _patiently(lambda: find_weights(repo_id, own, token=token))
    except HTTPError:
        logger.error(
            f"The push to {repo_id} failed. What was to be published is whole in {str(folder)!r}: push it again by "
            f"`python -m hf_orthograd publish {folder} {repo_id}`."
        )
        raise
    for one in remaining:
        logger.warning(f"{repo_id} still holds {one}: `python -m hf_orthograd retract {repo_id} --delete_refs`.")
    return Publication(commit, remaining)


def _patiently(call: Callable[[], Result]) -> Result:
    """Calls again after a fault that passes: a lost connection, a timeout, a server that is overloaded or down."""
    for tries in range(1, _TRIES + 1):
        try:
            return call()
        except HTTPError as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            passes = status is None or status in (408, 429) or status >= 500
            if not passes or tries == _TRIES:
                raise
            seconds = 2 ** (tries - 1)
            logger.warning(f"The Hub did not answer as it should ({error}). Trying again in {seconds} s.")
            time.sleep(seconds)
    raise AssertionError("unreachable")
