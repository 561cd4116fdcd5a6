"""Options that several commands share, each declared once.

All are runtime options: none changes a recipe. Those that most people need first have no panel, so
`--help` shows them on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tune_cifar.cli.terminal import say
from tune_cifar.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from tune_cifar.data.files import DataSource
    from tune_cifar.record.state import SearchState, TrialState

# Panels of `--help`, below the options that most people need first.
HARDWARE, RECORDS, SEARCHING = "Hardware", "Records and tracking", "Proposals"


def complete_space() -> list[str]:
    """The names that a shell offers after --space."""
    from tune_cifar.space.select import list_spaces

    return [path.stem for path in list_spaces()]


SPACE = typer.Option(
    "--space",
    help="A name from `spaces list`, or the path of a space file.",
    autocompletion=complete_space,
)
Space = Annotated[str, SPACE]
Tier = Annotated[
    str | None,
    typer.Option("--tier", metavar="full|cpu", help="Budget. Default: full with a GPU, else cpu."),
]
Trials = Annotated[
    str | None,
    typer.Option("--trials", metavar="N", help="At most N trials; with --resume also +N."),
]
MaxTime = Annotated[
    str | None,
    typer.Option("--max-time", metavar="8m", help="Limit of this launch: 90s, 8m, 2h."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KNOB=VALUE", help="Fix a hyperparameter. Repeatable."),
]
Name = Annotated[
    str | None, typer.Option("--name", help="Of the record. Default: made of space and time.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the record --name from its checkpoints.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="CIFAR-10's folder, or the word `shapes` for synthetic data. "
        "Default: $TUNE_CIFAR_DATA, ./data, the user cache.",
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="auto|cpu|cuda", help="auto takes CUDA where there is one."),
]
Gpus = Annotated[
    float | None,
    typer.Option("--gpus-per-trial", metavar="X", help="A fraction packs trials on a GPU."),
]

Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="auto|fp32|bf16",
        help="auto takes bf16 where the hardware multiplies it.",
        rich_help_panel=HARDWARE,
    ),
]
Execution = Annotated[
    str,
    typer.Option(
        "--execution",
        metavar="eager|captured",
        help="captured runs a training step as one CUDA graph; not yet measured on a GPU.",
        rich_help_panel=HARDWARE,
    ),
]
Cpus = Annotated[
    int,
    typer.Option(
        "--cpus-per-trial", metavar="N", help="Threads of one training.", rich_help_panel=HARDWARE
    ),
]
MaxConcurrent = Annotated[
    int | None,
    typer.Option(
        "--max-concurrent",
        metavar="N",
        help="Parallel trials. Default: as many as fit.",
        rich_help_panel=HARDWARE,
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Deterministic kernels only: equal bits on one GPU too.",
        rich_help_panel=HARDWARE,
    ),
]

Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Of the sampler.", rich_help_panel=SEARCHING),
]

AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="With --resume: although code, data or numerics have changed.",
        rich_help_panel=RECORDS,
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="DIR",
        help="Run store. Default: $TUNE_CIFAR_RUNS, ./runs.",
        rich_help_panel=RECORDS,
    ),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        metavar="URI",
        help="MLflow's address. Default: a SQLite file in the run store.",
        rich_help_panel=RECORDS,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

RunId = Annotated[str | None, typer.Argument(help="A run id such as NAME:7, from `leaderboard`.")]
Best = Annotated[bool, typer.Option("--best", help="The best trial of --space or --search.")]
BestSpace = Annotated[
    str | None, typer.Option("--space", help="With --best: its newest finished search on CIFAR-10.")
]
BestSearch = Annotated[str | None, typer.Option("--search", help="With --best: this search.")]
RecordedDevice = Annotated[
    str | None, typer.Option("--device", metavar="cpu|cuda", help="Instead of the recorded device.")
]


def refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse, as wrong usage, options of these parameters that stand on the command line."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"{parameter.opts[0]} {why}")


def check_tracking_uri(storage: Path, uri: str | None, console: Console) -> None:
    """Refuse an address that can never take an upload; say so when MLflow is away for now."""
    from tune_cifar.tracking.store import check_tracking

    if (note := check_tracking(storage, uri)) is not None:
        say(note, console, "yellow")


def choose_run(
    run: str | None, best: bool, space: str | None, search: str | None, storage: Path
) -> tuple[SearchState, TrialState]:
    """Return the trial that a run id or --best names, with its search."""
    from tune_cifar.record.store import find_best, find_run, load_searches

    if (run is None) == (not best) or (best and space is None and search is None):
        raise typer.BadParameter("Give a run id, or --best with --space or --search.")
    if run is not None:
        return find_run(storage, run)
    return find_best(load_searches(storage), space, search)


def find_recorded_data(state: SearchState, data: str | None) -> DataSource:
    """Find the data of a record: the record says which they are, --data only where they lie.

    Raises:
        ConfigError: when other data are found.
        DataError: when none are.
    """
    from tune_cifar.data.files import find_data

    wanted = state.header.data.name
    source = find_data(data or ("shapes" if wanted == "shapes" else None))
    if source.name != wanted:
        way_out = "Give its data with --data."
        raise ConfigError(
            f"{state.header.name} was trained on {wanted}, got {source.name}. {way_out}"
        )
    return source
