"""Where the commands print: one console for results (stdout), one for everything else (stderr)."""

from __future__ import annotations

import functools
import json
import re
import shlex
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

from tune_cifar.errors import hide_credentials

if TYPE_CHECKING:
    from rich.console import Console

# Commands are added to it by app.py.
app = typer.Typer(
    name="tune_cifar",
    help="Hyperparameter search for CIFAR-10: every recipe corrected, searched fast, judged honestly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# A parameter in a sentence of the library, `name` or `name=value`.
PARAMETER = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")
QUOTES = "'\""


@functools.cache
def stdout() -> Console:
    """Results. Brackets are taken literally (paths and messages hold some); without a terminal no line is cut."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)


@functools.cache
def stderr() -> Console:
    """Notes and errors."""
    from rich.console import Console

    return Console(
        stderr=True, width=None if sys.stderr.isatty() else 200, markup=False, highlight=False
    )


def say(text: str, console: Console | None = None, style: str | None = None) -> None:
    """Print a line for people, on stdout by default; on a terminal it breaks between words, elsewhere never."""
    console = console or stdout()
    console.print(name_options(text), style=style, soft_wrap=not console.is_terminal)


def name_options(text: str) -> str:
    """Replace parameters, as the library names them, by the options that set them.

    `max_concurrent` becomes --max-concurrent, `device='cpu'` becomes --device cpu and `resume=True` --resume; a name
    that no command has as an option stays.
    """

    def replace(match: re.Match[str]) -> str:
        name, value = match.groups()
        option = _list_options().get(name)
        if option is None:
            return match[0]
        return option if value in (None, "True") else f"{option} {value.strip(QUOTES)}"

    return PARAMETER.sub(replace, text) if "`" in text else text


@functools.cache
def _list_options() -> dict[str, str]:
    """The option of every parameter of every command."""
    from typer.main import get_command

    found: dict[str, str] = {}
    commands = [get_command(app)]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            if parameter.param_type_name == "option":
                found.setdefault(str(parameter.name), parameter.opts[0])
    return found


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
