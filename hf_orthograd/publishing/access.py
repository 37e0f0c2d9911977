"""Whether a push can succeed, before a run of hours."""

from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from transformers import TrainingArguments

from .files import REPORT_FILES
from .history import OldWeights, find_weights
from .patience import patiently
from .record import SALT_NAME


def check_access(args: TrainingArguments, unlearns: bool = True) -> None:
    """Checks that what training ends in can be pushed, if it is to be: login, permission, the repository's history.

    Raises:
        ValueError: The repository holds other weights; or without unlearning, as [`refuse_owner_files`].
        PermissionError: Offline, no token, one that is not valid, or one that may only read.
    """
    if not args.push_to_hub or args.process_index > 0:  # the first process pushes
        return
    if not unlearns:
        return refuse_owner_files(args.output_dir)
    api, token = HfApi(), args.hub_token or get_token()
    user = check_login(api, token)
    if not getattr(args, "squash_history", False):
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        name = name if "/" in name else f"{user}/{name}"
        refuse_old_weights(name, patiently(lambda: find_weights(name, token=token)))


def check_login(api: HfApi, token: str | None) -> str:
    """The user's name.

    Raises:
        PermissionError: Offline, no token, one that is not valid, or one that may only read.
    """
    if is_offline_mode():
        raise PermissionError(
            "`push_to_hub` is True, but HF_HUB_OFFLINE is set. Unset it, or leave `push_to_hub` out."
        )
    if token is None:
        raise PermissionError(
            "`push_to_hub` is True, but there is no token. Log in with `hf auth login`, or set `hub_token` or HF_TOKEN."
        )
    try:
        user = patiently(lambda: api.whoami(token=token))
    except HfHubHTTPError as error:
        raise PermissionError(f"`push_to_hub` is True, but the Hub did not take the token: {error}") from error
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PermissionError(
            "`push_to_hub` is True, but the token may only read. Make one that may write, in the Hub's settings."
        )
    return user["name"]


def refuse_old_weights(repo_id: str, found: list[OldWeights]) -> None:
    """Refuses to push where earlier revisions would go on to hold a model that remembers.

    Raises:
        ValueError: There are some; the message lists them and the ways out.
    """
    if not found:
        return
    listed = "; ".join(map(str, found[:5])) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
    adapter = any("adapter" in one.path for one in found)
    raise ValueError(
        f"{repo_id} holds weights that would stay in its history: {listed}. "
        + ("Merged weights minus a public adapter give the original back. " if adapter else "")
        + "Push to another repository (`hub_model_id`), or set squash_history=True to have the branch rewritten after the push. "
        "Tags and pull requests keep theirs: `python -m hf_orthograd retract --delete_refs` deletes tags."
    )


def refuse_owner_files(folder: str) -> None:
    """Refuses to have a plain Trainer push a folder in which a model was unlearned: it pushes whatever lies there.

    Raises:
        ValueError: It holds the salt, or the owner's report.
    """
    found = [path.name for path in (Path(folder, SALT_NAME), Path(folder, REPORT_FILES[0])) if path.exists()]
    if found:
        raise ValueError(
            f"`output_dir` {folder!r} holds {' and '.join(found)}, which are for the owner alone, and Trainer would push the folder "
            "whole. Push what an unlearning run wrote to its folder `public`, or train in another folder."
        )
