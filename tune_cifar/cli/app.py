"""The command line: each command parses, calls one function of the package, shows its result.

Our own errors are one line on stderr and exit status 1, wrong usage exits 2, Ctrl-C 130; bugs keep
their traceback. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys

from tune_cifar.cli import (
    confirm,
    data,
    evaluate,
    export,
    leaderboard,
    lr_range,
    models,
    plan,
    preview,
    report,
    reproduce,
    search,
    searches,
    spaces,
    train,
    ui,
)
from tune_cifar.cli.streams import Streams
from tune_cifar.cli.terminal import app, name_options, stderr
from tune_cifar.errors import TuneCifarError
from tune_cifar.record.priority import make_session_nice

COMMANDS = {
    "Search": (search.search, plan.plan, train.train, lr_range.lr_range),
    "Look": (leaderboard.leaderboard, ui.ui, report.report, models.models, preview.preview),
    "Verify": (confirm.confirm, reproduce.reproduce, evaluate.evaluate, export.export),
}
for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(spaces.app, name="spaces", rich_help_panel="Spaces and data")
app.add_typer(data.app, name="data", rich_help_panel="Spaces and data")
app.add_typer(searches.app, name="searches", rich_help_panel="Maintenance")
app.command(rich_help_panel="Maintenance")(searches.failures)
app.command(rich_help_panel="Maintenance")(searches.sync)
# Its name up to version 0.1.
app.command("judge", hidden=True, rich_help_panel="Verify")(evaluate.evaluate)


def run() -> None:
    """Run what was typed; our own errors become a sentence."""
    try:
        app()
    except TuneCifarError as exc:
        from rich.text import Text

        sentence = name_options(" ".join(str(exc).splitlines()))
        stderr().print(Text.assemble(("error", "bold red"), " ", sentence), soft_wrap=True)
        sys.exit(1)


def main() -> None:
    """Run the command line and end the process; `kill` ends a command as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    make_session_nice()
    streams = Streams(sys.argv[1:])
    status: int | str | None = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        number = status if isinstance(status, int) else int(status is not None)
        os._exit(streams.settle_status(number))

    # Registered first, so called last: tearing down torch, Ray and MLflow takes 1 to 2 s more.
    atexit.register(leave)
    try:
        run()
    except SystemExit as exc:
        status = exc.code
        raise
