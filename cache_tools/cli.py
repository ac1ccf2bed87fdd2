"""The command `fd3d-cache`, see `cache_tools.commands`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fd3d.errors import exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return exit_code(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    # This takes seconds; Ctrl-C meanwhile must end like any other.
    from cache_tools.commands import run

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
