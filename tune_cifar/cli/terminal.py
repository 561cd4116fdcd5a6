"""Where the commands print: one console for results (stdout), one for everything else (stderr)."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@functools.cache
def stdout() -> Console:
    """Results. Lines are never cut when the output is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


@functools.cache
def stderr() -> Console:
    """Notes and errors."""
    from rich.console import Console

    return Console(stderr=True, width=None if sys.stderr.isatty() else 200)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def this_command() -> str:
    """The command as the user typed it, for the record."""
    return "python -m tune_cifar " + shlex.join(sys.argv[1:])
