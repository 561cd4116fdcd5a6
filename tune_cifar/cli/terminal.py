"""Where the commands print: one console for results (stdout), one for everything else (stderr)."""

from __future__ import annotations

import functools
import json
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from tune_cifar.errors import hide_credentials

if TYPE_CHECKING:
    from collections.abc import Collection

    from rich.console import Console

    from tune_cifar.record.state import SearchState

# Panels of `--help`, in this order.
PANELS = ("Search", "Look", "Verify", "Spaces and data", "Maintenance")


class PanelGroup(TyperGroup):
    """A group whose commands are listed by panel; typer itself lists groups after commands."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the names of the commands, panel after panel."""
        commands: dict[str, Any] = dict(self.commands)
        panels = {name: found.rich_help_panel for name, found in commands.items()}
        return sorted(panels, key=lambda name: PANELS.index(panels[name]))


# Commands are added to it by app.py.
app = typer.Typer(
    name="tune_cifar",
    cls=PanelGroup,
    help="Hyperparameter search for CIFAR-10: tuned fast, judged honestly, reproduced exactly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# A parameter in a sentence of the library, `name` or `name=value`.
PARAMETER = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")
QUOTES = "'\""
COMMAND = "python -m tune_cifar "
# Where data lie, where a search runs and what is kept of it: its record does not settle that.
LAUNCH_OPTIONS = (
    *("--data", "--tracking-uri", "--mirror", "--address", "--allow-mixed", "--gpus-per-trial"),
    *("--max-concurrent", "--keep-weights"),
)


@functools.cache
def stdout() -> Console:
    """The console for results; without a terminal no line is cut."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)


@functools.cache
def stderr() -> Console:
    """The console for notes and errors."""
    from rich.console import Console

    width = None if sys.stderr.isatty() else 200
    return Console(stderr=True, width=width, markup=False, highlight=False)


def say(text: str, console: Console | None = None, style: str | None = None) -> None:
    """Print a line for people; it breaks between words on a terminal and nowhere else."""
    console = console or stdout()
    _print(name_options(text), console, style, soft_wrap=not console.is_terminal)


def paste(text: str, console: Console | None = None) -> None:
    """Print commands to paste: never broken into lines."""
    _print(text, console or stdout(), None, soft_wrap=True)


def _print(text: str, console: Console, style: str | None, soft_wrap: bool) -> None:
    """Print text as it is: paths and messages hold brackets that rich would take for markup."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=soft_wrap)


def name_options(text: str) -> str:
    """Replace parameters, as the library names them, by the options that set them.

    `max_concurrent` becomes --max-concurrent, `device='cpu'` --device cpu and `resume=True`
    --resume. A name that no command has as an option stays.
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


def this_command() -> str:
    """The command as it was typed, without the secret of an address."""
    return COMMAND + shlex.join(map(hide_credentials, sys.argv[1:]))


def repeat_launch(state: SearchState, names: Collection[str] = LAUNCH_OPTIONS) -> str:
    """Options of a record's last command that the next one needs too; each with a space before it.

    Secrets of addresses are hidden, as in the record.

    Args:
        names: of the options that the next command has.
    """
    last = state.resumes[-1] if state.resumes else state.header
    words = last.command.removeprefix(COMMAND)
    if words == last.command:  # not typed: from a script or a notebook
        return ""
    typed, kept = shlex.split(words), list[str]()
    for word, value in zip(typed, [*typed[1:], ""], strict=True):
        name, is_joined, _ = word.partition("=")
        if name in names:
            has_value = name != "--allow-mixed" and not is_joined
            kept += [word, value] if has_value else [word]
    return "".join(f" {shlex.quote(word)}" for word in kept)


def repeat_options(**given: str | None) -> str:
    """Options that were given, for a command to type next; each with a space before it."""
    named = {name.replace("_", "-"): value for name, value in given.items() if value is not None}
    return "".join(f" --{name} {shlex.quote(value)}" for name, value in named.items())


def repeat_place(state: SearchState, data: str | None = None) -> str:
    """Options that lead to a record's run store, and to data; each with a space before it."""
    from tune_cifar.record.store import repeat_storage

    return repeat_options(data=data) + repeat_storage(state.storage)
