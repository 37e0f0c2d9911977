"""The command line. What is slow to import is imported by the command that needs it: help and a mistyped command answer at once."""

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Sequence

from . import launching, publishing, requests


__all__ = ["make_parser", "run"]

_DESCRIPTION = """Makes a model forget, and does what follows: publishing, checking, and the next request.

    hf-orthograd unlearn speech
    hf-orthograd unlearn text --config run.yaml --max_steps 40
    hf-orthograd estimate image --config run.yaml
    hf-orthograd evaluate text --config run.yaml --model_name_or_path out --output_dir out/evaluated

A run writes what may be published to <output_dir>/public: weights, card, the report's public edition and a record of the
request. Look at it, then publish it, and have anyone check it:

    hf-orthograd publish out/public me/whisper-tiny-unlearned
    hf-orthograd verify me/whisper-tiny-unlearned

A model that remembers was pushed long ago: push the unlearned one over it, and take the old revisions away:

    hf-orthograd publish out/public me/whisper-tiny --squash_history
    hf-orthograd retract me/whisper-tiny --delete_refs

Requests keep coming: a folder holds a model's history of them, one command takes one in, another carries out what is pending:

    hf-orthograd requests begin history openai/whisper-tiny
    hf-orthograd requests add history --forget rows.parquet
    hf-orthograd requests run history --trainer train.py:make_trainer

Exit codes: 0, done and in order; 1, something differs, is still there or was found; 2, wrong arguments, refused or failed. Of
`unlearn`, `estimate` and `evaluate` it is that of the example."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command` of what it parsed takes it, and returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("hf-orthograd", description=_DESCRIPTION, formatter_class=form)
    commands = parser.add_subparsers(
        title="commands",
        required=True,
        metavar="unlearn | estimate | evaluate | publish | verify | retract | card | requests",
    )
    launching.add_commands(commands)
    publishing.add_commands(commands)
    requests.add_commands(commands)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; what went wrong is said on stderr, in one line unless it is unforeseen."""
    parser = make_parser()
    if importlib.util.find_spec("argcomplete"):  # of the extra `completion`; does nothing unless the shell asks
        import argcomplete

        argcomplete.autocomplete(parser)
    parsed = parser.parse_args(arguments)
    try:
        return parsed.command(parsed)
    except Exception as error:
        from ..publishing.patience import FAULTS

        if isinstance(error, (ValueError, FloatingPointError, *FAULTS)):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        else:  # Python would exit with 1, which says that something differs
            traceback.print_exc()
        return 2
