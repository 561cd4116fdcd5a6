"""The command line: each command parses, calls one function of the package and shows what came back.

Our own errors are one line on stderr and exit status 1, wrong usage exits 2, Ctrl-C 130; bugs keep their traceback.
Nothing heavy is imported before a command needs it.
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
from tune_cifar.cli.terminal import app, name_options, stderr
from tune_cifar.errors import TuneCifarError

app.command()(search.search)
app.command()(plan.plan)
app.command()(train.train)
app.command()(confirm.confirm)
app.command()(reproduce.reproduce)
app.command()(lr_range.lr_range)
app.command()(evaluate.judge)
app.command()(report.report)
app.command()(export.export)
app.command()(searches.failures)
app.command()(searches.sync)
app.command()(leaderboard.leaderboard)
app.command()(ui.ui)
app.command()(models.models)
app.command()(preview.preview)
app.add_typer(searches.app, name="searches")
app.add_typer(spaces.app, name="spaces")
app.add_typer(data.app, name="data")


def run() -> None:
    """What was typed, with our own errors as a sentence."""
    try:
        app()
    except TuneCifarError as exc:
        from rich.text import Text

        sentence = name_options(" ".join(str(exc).splitlines()))
        stderr().print(Text.assemble(("error", "bold red"), " ", sentence), soft_wrap=True)
        sys.exit(1)


def main() -> None:
    """Entry point of the console script and of `python -m tune_cifar`, which ends its process. `kill` ends a command as
    Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status: int | str | None = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else status is not None)

    # Registered first, called last: taking torch, Ray and MLflow apart would take one to two seconds more.
    atexit.register(leave)
    try:
        run()
    except SystemExit as exc:
        status = exc.code
        raise
