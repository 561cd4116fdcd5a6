"""Options that several commands share, each declared once, and what reads or checks them.

Those that most people need first have no panel, so `--help` shows them on top.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune_cifar.cli.terminal import say, stderr, this_command
from tune_cifar.errors import ConfigError, SpaceError
from tune_cifar.record.environment import JOINS

if TYPE_CHECKING:
    from rich.console import Console

    from tune_cifar.data.files import DataSource
    from tune_cifar.record.events import Header
    from tune_cifar.record.state import SearchState, TrialState
    from tune_cifar.search.plan import SearchRequest

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
    typer.Option(
        "--tier", metavar="full|cpu|night", help="Budget. Default: full with a GPU, else cpu."
    ),
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
        help="CIFAR-10's folder, `cifar10`, `cifar100`, an imported data set, or `shapes` "
        "(synthetic). Default: $TUNE_CIFAR_DATA, ./data, the user cache.",
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="auto|cpu|cuda", help="auto takes CUDA where there is one."),
]
Gpus = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-trial",
        metavar="X",
        help="Of one GPU. By default a trial has one to itself.",
    ),
]

Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="auto|fp32|tf32|bf16",
        help="auto takes bf16 where the hardware multiplies it; tf32 is for CUDA only.",
        rich_help_panel=HARDWARE,
    ),
]
Execution = Annotated[
    str,
    typer.Option(
        "--execution",
        metavar="auto|eager|captured|compiled",
        help="captured replays a step as one CUDA graph, compiled one of torch.compile's kernels, "
        "faster after 20 s for each batch size; auto captures on a GPU.",
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


def keep_ray_access(address: str | None) -> str | None:
    """Let Ray keep its own settings of access: a cluster that is there has them, too."""
    if address is not None:
        os.environ[JOINS] = "1"
    else:  # of a notebook whose process joins one
        os.environ.pop(JOINS, None)
    return address


Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="A Ray cluster that is there, or auto: that of this machine.",
        callback=keep_ray_access,
        rich_help_panel=HARDWARE,
    ),
]
AllowMixed = Annotated[
    bool,
    typer.Option(
        "--allow-mixed",
        help="Of a cluster whose nodes give a training unlike bits, use all.",
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
Mirror = Annotated[
    str | None,
    typer.Option(
        "--mirror",
        metavar="URL",
        help="Copy the search there while it runs: s3://, gs:// or file://.",
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


def make_request(context: typer.Context, source: DataSource, **more: Any) -> SearchRequest:
    """Return the request that a command's options make: those named as its fields.

    Args:
        more: fields with other values than the options have, or without one.
    """
    from dataclasses import fields

    from tune_cifar.record.store import find_storage
    from tune_cifar.search.plan import SearchRequest

    names = [field.name for field in fields(SearchRequest)]
    given = {name: context.params[name] for name in names if name in context.params}
    given |= {"storage": find_storage(given["storage"]), "command": this_command()} | more
    given["warm_start"] = tuple(given.get("warm_start") or ())
    return SearchRequest(source=source, **given)


def refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse, as wrong usage, options of these parameters that stand on the command line."""
    for name, option in list_given(context):
        if name in names:
            raise typer.BadParameter(f"{option} {why}")


def list_given(context: typer.Context) -> list[tuple[str, str]]:
    """Return parameter and option of all that stands on the command line."""
    sources = {p: context.get_parameter_source(p.name or "") for p in context.command.params}
    return [
        (str(parameter.name), parameter.opts[0])
        for parameter, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    ]


def refuse_changed(
    context: typer.Context, header: Header, more: Mapping[str, Any] | None = None
) -> None:
    """Refuse, as wrong usage, options on the command line that differ from a record to continue.

    The command that made the record may so be typed again with --resume. The word `auto` stands
    for what was chosen then.

    Args:
        more: recorded values of the command's own parameters.
    """
    numerics = header.numerics
    recorded = {
        "tier": header.tier,
        "device": numerics.device,
        "precision": numerics.precision,
        "execution": numerics.execution,
        "cpus_per_trial": numerics.threads,
        "deterministic": numerics.deterministic,
        **(more or {}),
    }
    changed: list[str] = []
    for name, option in list_given(context):
        given = context.params[name]
        if isinstance(given, tuple):  # several values, by the oldest typer; newer ones give a list
            given = list(given)
        if name == "space":
            changed += _find_changed_space(given, header)
        elif name == "settings":
            changed += _find_changed_settings(given, header)
        elif name in recorded and given not in (recorded[name], "auto"):
            before, now = _describe(recorded[name]), _describe(given)
            changed.append(f"{option} {before}, got {now}")
    if changed:
        way_out = f"Leave out what differs: search --name {header.name} --resume."
        recorded_with = f"{header.name} is recorded with {'; '.join(changed)}"
        raise typer.BadParameter(f"{recorded_with}. {way_out}")


def _find_changed_space(given: str, header: Header) -> list[str]:
    """Return how a space, named or a file, differs from the recorded one; nothing if it does not.

    A name whose file is gone is not read: the record has its text.
    """
    from tune_cifar.space.select import read_space

    try:
        file = read_space(given)
    except SpaceError:
        if given == header.space:
            return []
        raise
    if file.header.space != header.space:
        return [f"--space {header.space}, got {given}"]
    if file.text != header.space_text:
        return [f"--space {header.space} of another text, got {file.path} as it is now"]
    return []


def _find_changed_settings(given: Iterable[str], header: Header) -> list[str]:
    """Return the hyperparameters fixed on the command line that the record has otherwise."""
    from tune_cifar.space.select import parse_setting

    changed = []
    for knob, value in dict(parse_setting(setting) for setting in given).items():
        now = list(value) if isinstance(value, tuple) else value  # JSON has no tuples
        if knob not in header.pinned:
            changed.append(f"--set {knob} unset, got {now}")
        elif (before := header.pinned[knob]) != now:
            changed.append(f"--set {knob}={before}, got {now}")
    return changed


def _describe(value: Any) -> str:
    words = {None: "unset", True: "on", False: "off"}
    if isinstance(value, list):
        return ", ".join(value)
    return words[value] if value is None or isinstance(value, bool) else str(value)


def count_kept_weights(state: SearchState) -> int:
    """Return of how many complete trials of a search the weights are on disk."""
    from tune_cifar.record.files import WEIGHTS

    complete = [trial.number for trial in state.trials.values() if trial.status == "complete"]
    return sum((state.trial_folder(number) / WEIGHTS).exists() for number in complete)


def check_tracking_uri(storage: Path, uri: str | None, console: Console) -> None:
    """Refuse an address that can never take an upload; say so when MLflow cannot be reached now."""
    from tune_cifar.tracking.store import check_tracking

    if (note := check_tracking(storage, uri)) is not None:
        say(note, console, "yellow")


def choose_run(
    run: str | None,
    best: bool,
    space: str | None,
    search: str | None,
    storage: Path,
    data: str | None = None,
) -> tuple[SearchState, TrialState]:
    """Return the trial that a run id or --best names, with its search.

    Args:
        data: as typed; --best looks for a search on it, without it for one on CIFAR-10.
    """
    from tune_cifar.data.files import find_data
    from tune_cifar.record.store import find_best, find_run, load_searches

    is_named = space is not None or search is not None
    if (run is None) != best or best != is_named:
        raise typer.BadParameter("Give a run id, or --best with --space or --search.")
    if run is not None:
        return find_run(storage, run)
    name = find_data(data).name if data and search is None else "cifar10"
    return find_best(load_searches(storage), space, search, name)


def check_out_file(path: Path) -> None:
    """Refuse an --out that cannot be a file."""
    if not path.parent.is_dir():
        raise ConfigError(f"--out: the folder must be there, got {path.parent}.")
    if path.is_dir():
        raise ConfigError(f"--out: a file must be given, got the folder {path}.")


def find_recorded_data(state: SearchState, data: str | None) -> DataSource:
    """Find the data of a record, and say so when the file of its network has changed.

    Raises:
        ConfigError, DataError: as the function of train/recorded.py.
    """
    from tune_cifar.train import recorded

    _say_changed_source(state.header)
    return recorded.find_recorded_data(state, data)


def _say_changed_source(header: Header) -> None:
    """Say so when the file of a network of one's own has another text than the recorded one."""
    file = Path(header.baseline["model"].rsplit(":", 1)[0])
    is_there = bool(header.model_source) and file.suffix == ".py" and file.is_file()
    if is_there and file.read_text(encoding="utf-8") != header.model_source:
        note = f"{file} has changed since {header.name}: the recorded text is used."
        say(note, stderr(), "yellow")
