"""The commands `unlearn`, `estimate` and `evaluate`."""

import argparse

from .scripts import SCRIPTS, arguments_of, script_path, start


_NOTE = """All other arguments are the example's: those of its head, and every field of OrthoGradConfig. `--help` after the modality lists
them. Without a model and a data set it runs its demo.

A YAML file holds the same names without dashes; the command line overrides it:

    model_name_or_path: openai/whisper-tiny.en
    forget_values: ["1088"]
    max_steps: 40"""
_UNLEARN = f"Makes a model forget, measures it, and writes report and model: the example of the modality. {_NOTE}"
_ESTIMATE = f"Says what a step will take in time and memory, and stops. {_NOTE}"
_EVALUATE = f"""Unlearns nothing: `--model_name_or_path` is a model that was unlearned, and its report is written, beside
`--original_name_or_path` and `--reference_name_or_path` where they are given. {_NOTE}"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds them to a parser's subparsers."""
    for name, summary, description, flags in (
        ("unlearn", "make a model forget, by the example of a modality", _UNLEARN, ()),
        ("estimate", "say what a step will take", _ESTIMATE, ("--dry_run", "True")),
        ("evaluate", "write the report of an unlearned model", _EVALUATE, ("--evaluate_only", "True")),
    ):
        form = argparse.RawDescriptionHelpFormatter
        parser = commands.add_parser(name, help=summary, description=description, formatter_class=form)
        parser.add_argument("modality", choices=SCRIPTS)
        parser.add_argument("--config", metavar="FILE", help="arguments as YAML")
        parser.add_argument("--num_processes", metavar="N", type=int, help="start so many processes")
        parser.add_argument("--accelerate_config", metavar="FILE", help="or those that a file of Accelerate's says")
        parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the example")
        parser.set_defaults(command=_start, flags=flags)


def _start(parsed: argparse.Namespace) -> int:
    # own options may stand among the example's
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config", default=parsed.config)
    own.add_argument("--num_processes", default=parsed.num_processes, type=int)
    own.add_argument("--accelerate_config", default=parsed.accelerate_config)
    found, arguments = own.parse_known_args(parsed.arguments)
    from_file = [] if found.config is None else arguments_of(found.config)
    return start(
        script_path(parsed.modality),
        [*from_file, *arguments, *parsed.flags],
        num_processes=found.num_processes,
        config=found.accelerate_config,
    )
