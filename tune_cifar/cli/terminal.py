"""Where the commands print: one console for results (stdout), one for everything else (stderr)."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tune_cifar.errors import hide_credentials

if TYPE_CHECKING:
    from rich.console import Console


@functools.cache
def stdout() -> Console:
    """Results. Brackets are taken literally (paths and messages hold some); without a terminal no line is cut."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)


@functools.cache
def stderr() -> Console:
    """Notes and errors."""
    from rich.console import Console

    return Console(stderr=True, width=None if sys.stderr.isatty() else 200, markup=False, highlight=False)


def say(text: str, console: Console | None = None, style: str | None = None) -> None:
    """A line for people, on stdout by default; on a terminal it breaks between words, elsewhere never."""
    console = console or stdout()
    console.print(text, style=style, soft_wrap=not console.is_terminal)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def this_command(more: Iterable[str] = ()) -> str:
    """The command as the user typed it, for the record, with more words at its end and without an address's secret."""
    return "python -m tune_cifar " + shlex.join(map(hide_credentials, [*sys.argv[1:], *more]))


def repeat_options(**given: str | None) -> str:
    """The options that the user gave, as a further command must repeat them; each with a space before it."""
    named = {name.replace("_", "-"): value for name, value in given.items() if value is not None}
    return "".join(f" --{name} {shlex.quote(value)}" for name, value in named.items())
