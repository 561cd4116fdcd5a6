"""Options that several commands share, each said once. All are runtime options: none changes a recipe."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tune_cifar.errors import DataError

if TYPE_CHECKING:
    from tune_cifar.record.state import SearchState, TrialState


def complete_space() -> list[str]:
    """The names that a shell offers after --space."""
    from tune_cifar.space.select import list_spaces

    return [path.stem for path in list_spaces()]


Space = Annotated[
    str,
    typer.Option(
        "--space",
        help="A name from `spaces list`, or the path of a space file.",
        rich_help_panel="What",
        autocompletion=complete_space,
    ),
]
Tier = Annotated[
    str | None,
    typer.Option(
        "--tier",
        metavar="full|cpu",
        help="Budget. Default: full with a GPU, else cpu.",
        rich_help_panel="What",
    ),
]
Trials = Annotated[
    str | None,
    typer.Option(
        "--trials",
        metavar="N",
        help="At most N trials; with --resume also +N.",
        rich_help_panel="What",
    ),
]
MaxTime = Annotated[
    str | None,
    typer.Option(
        "--max-time",
        metavar="8m",
        help="Of this launch: such as 90s, 8m, 2h.",
        rich_help_panel="What",
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Of the sampler.", rich_help_panel="What")
]
Gpus = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-trial",
        metavar="X",
        help="A fraction packs trials on a GPU.",
        rich_help_panel="How",
    ),
]
MaxConcurrent = Annotated[
    int | None,
    typer.Option(
        "--max-concurrent",
        metavar="N",
        help="Trials at once. Default: as fit.",
        rich_help_panel="How",
    ),
]
RunId = Annotated[str | None, typer.Argument(help="A run id such as NAME:7, from `leaderboard`.")]
Best = Annotated[bool, typer.Option("--best", help="The best trial of --space or --search.")]
BestSpace = Annotated[
    str | None, typer.Option("--space", help="Its newest finished search on CIFAR-10 is meant.")
]
BestSearch = Annotated[str | None, typer.Option("--search", help="A search by name.")]
RecordedDevice = Annotated[
    str | None, typer.Option("--device", metavar="cpu|cuda", help="Instead of the recorded device.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KNOB=VALUE",
        help="Pin a knob; may be given again.",
        rich_help_panel="What",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="CIFAR-10's folder, or the word `shapes` for the generated stand-in. "
        "Default: $TUNE_CIFAR_DATA, ./data, the user cache.",
        rich_help_panel="Where",
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="DIR",
        help="Run store. Default: $TUNE_CIFAR_RUNS, ./runs.",
        rich_help_panel="Where",
    ),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        metavar="URI",
        help="MLflow's address. Default: a SQLite file in the run store.",
        rich_help_panel="Where",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda",
        help="auto takes CUDA where it is.",
        rich_help_panel="How",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="auto|fp32|bf16",
        help="auto takes bf16 where the hardware multiplies it.",
        rich_help_panel="How",
    ),
]
Execution = Annotated[
    str,
    typer.Option(
        "--execution",
        metavar="eager|captured",
        help="captured keeps a training step as one CUDA graph; not yet measured on a GPU.",
        rich_help_panel="How",
    ),
]
Cpus = Annotated[
    int,
    typer.Option(
        "--cpus-per-trial", metavar="N", help="Threads of one training.", rich_help_panel="How"
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Deterministic kernels only: equal bits on one GPU too.",
        rich_help_panel="How",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse, as wrong usage, options of these parameters that stand on the command line."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"{parameter.opts[0]} {why}")


def choose_run(
    run: str | None,
    best: bool,
    space: str | None,
    search: str | None,
    storage: Path,
    data: str | None,
) -> tuple[SearchState, TrialState]:
    """The trial that a run id or --best means, with its search."""
    from tune_cifar.record.store import find_best, find_run, load_searches

    if (run is None) == (not best) or (best and space is None and search is None):
        raise typer.BadParameter("Give a run id, or --best with --space or --search.")
    state, trial = (
        find_run(storage, run)
        if run is not None
        else find_best(load_searches(storage), space, search)
    )
    if state.header.data.name == "shapes" and "shapes" not in (
        data,
        os.environ.get("TUNE_CIFAR_DATA"),
    ):
        raise DataError(
            f"{trial.run_id}: it was trained on the generated stand-in. Give --data shapes."
        )
    return state, trial
