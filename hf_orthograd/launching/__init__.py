"""The examples, started by name and from a file of arguments."""

from .scripts import SCRIPTS, arguments_of, script_path, start


__all__ = ["SCRIPTS", "arguments_of", "script_path", "start"]
