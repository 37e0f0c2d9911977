"""The command line: `python -m hf_orthograd`, or `hf-orthograd`."""

import sys

from .commands import run


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
