"""The commands around a published model; each is one call of a function of this package."""

import argparse


def _publish(parsed: argparse.Namespace) -> int:
    from ..publishing import publish

    done = publish(
        parsed.folder,
        parsed.repo_id,
        token=parsed.token,
        private=parsed.private,
        revision=parsed.revision,
        commit_message=parsed.commit_message,
        squash_history=parsed.squash_history,
    )
    print(f"Published: {done.commit.commit_url}")
    for one in done.remaining:
        print(f"Still there: {one}.")
    return 1 if done.remaining else 0


def _verify(parsed: argparse.Namespace) -> int:
    from ..publishing import read_salt, verify

    salt = None if parsed.salt is None else read_salt(parsed.salt)
    row = None if parsed.rows is None else _row(parsed.rows, parsed.row)
    problems = verify(parsed.model, salt=salt, row=row, revision=parsed.revision, token=parsed.token)
    for problem in problems:
        print(f"Differs: {problem}.")
    if not problems:
        told = ["files, report and chain"] + ["the seal of this salt"] * (salt is not None)
        print(f"As recorded: {', '.join(told)}{', and the row was in a request' * (row is not None)}.")
    return 1 if problems else 0


def _retract(parsed: argparse.Namespace) -> int:
    from ..publishing import retract

    done = retract(
        parsed.repo_id, branch=parsed.revision or "main", delete_refs=parsed.delete_refs, token=parsed.token
    )
    print(done)
    return 1 if done.remaining else 0


def _card(parsed: argparse.Namespace) -> int:
    from ..publishing import CardOptions, write_card

    options = CardOptions(**{name: getattr(parsed, name) for name in _CARD_OPTIONS})
    print(f"Written: {write_card(parsed.folder, options)}")
    return 0


def _row(path: str, number: int) -> dict:
    """A row, as it is stored."""
    from ..validation import stored_row
    from .rows import load_rows

    rows = load_rows(path)
    if not 0 <= number < len(rows):
        raise ValueError(f"`--row` is {number}, but {path!r} has rows 0 to {len(rows) - 1}.")
    return stored_row(rows, number)


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds "publish", "verify", "retract" and "card" to a parser's subparsers."""
    own = _command(commands, "publish", _publish, "push a folder that a run wrote", _PUBLISH)
    own.add_argument("folder", help="<output_dir>/public of a run")
    own.add_argument("repo_id", help="model on the Hub, as me/name; made if there is none")
    own.add_argument("--private", action="store_true", default=None, help="make it private, if it is made now")
    own.add_argument("--commit_message", default="Publish an unlearned model", help="of the commit")
    own.add_argument("--squash_history", action="store_true", help="rewrite the branch after the push")

    own = _command(commands, "verify", _verify, "check a model against its record", _VERIFY)
    own.add_argument("model", help="a folder, or a model on the Hub, which is downloaded")
    own.add_argument("--salt", help="the owner's file _unlearning_salt.key, to check seals and a row")
    own.add_argument("--rows", help="data set with that row: a folder of save_to_disk, a parquet or JSON file")
    own.add_argument("--row", type=int, default=0, help="number of the row, from 0")

    own = _command(commands, "retract", _retract, "take earlier weights out of a repository", _RETRACT)
    own.add_argument("repo_id", help="model on the Hub")
    own.add_argument(
        "--delete_refs", action="store_true", help="also delete tags and branches that hold other weights"
    )

    own = _command(commands, "card", _card, "write the card of a folder anew", _CARD)
    own.add_argument("folder", help="<output_dir>/public of a run, or a clone of a published model")
    for name, text in _CARD_OPTIONS.items():
        own.add_argument(f"--{name}", help=text, nargs="+" if name in ("language", "dataset_tags", "tags") else None)


def _command(commands, name: str, call, text: str, description: str) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    own = commands.add_parser(name, help=text, description=description, formatter_class=form)
    own.set_defaults(command=call)
    own.add_argument("--token", help="of the Hub; that of `hf auth login` by default")
    own.add_argument("--revision", help="branch; main by default")
    return own


_PUBLISH = """Pushes weights, processor, card, the report's public edition, figures and record: a list of names. Other files of the
folder stay. Refuses if the folder is not as recorded, or if the repository's history holds other weights."""
_VERIFY = """Checks the hash of each file that is loaded, the report, and the chain of records; with --salt also the seal of the owner, and
with --rows whether a row was in a request. Each difference is named."""
_RETRACT = """Rewrites a branch as one commit of what it holds now, so that no earlier revision of it holds weights; lists what remains
under tags and pull requests. Forks, downloads and caches are out of reach."""
_CARD = """Writes README.md from the record and the public report beside it."""
_CARD_OPTIONS = {
    "model_name": "title",
    "repo_id": "where the model will be",
    "license": "of the base model, as apache-2.0",
    "language": "as en",
    "dataset_tags": "public data sets on the Hub, as mozilla-foundation/common_voice_17_0",
    "tags": "further tags",
    "finetuned_from": "base model on the Hub; that of the record by default",
}
