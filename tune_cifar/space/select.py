"""From a checked file to one tier of it, with a command line's pins and Optuna's distributions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_cifar.errors import ConfigError, SpaceError
from tune_cifar.schema import KNOBS, TrainConfig, nearest_name
from tune_cifar.space.document import read_document
from tune_cifar.space.layout import TIERS, Budget, Choices, Range, Searched, SpaceFile, SpaceHeader
from tune_cifar.space.reader import describe_path, parse_space
from tune_cifar.space.rules import (
    describe_inactive,
    find_conflict,
    find_fidelity_problem,
    find_inactive,
    find_value_problem,
    kind_of,
    normalise,
)

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MAX_BYTES = 256_000


@dataclass(frozen=True)
class SearchSpace:
    """One tier of a space file, with the pins of a command line, ready to be searched."""

    name: str
    path: Path
    text: str
    header: SpaceHeader
    tier: str
    baseline: TrainConfig
    """Trial 0."""
    distributions: dict[str, BaseDistribution]
    points: tuple[dict[str, Any], ...]
    """Tried right after the baseline; each names every searched knob."""
    budget: Budget
    pinned: dict[str, Any]
    dropped: dict[str, str]
    """Searched knobs that the pins made dead, with the reason: they are not searched."""
    obstacle: str | None
    """Why the pins leave nothing that can be searched; the baseline can be trained all the same."""

    @property
    def baseline_params(self) -> dict[str, Any]:
        """The baseline's values of the searched knobs."""
        return {name: getattr(self.baseline, name) for name in self.distributions}

    def config(self, params: dict[str, Any]) -> TrainConfig:
        """The training that a proposal stands for.

        Raises:
            ConfigError: when the proposal breaks a rule of the schema.
        """
        return TrainConfig(**{**self.baseline.model_dump(), **params})

    def describe_distributions(self) -> dict[str, str]:
        """Per searched knob, Optuna's own JSON."""
        from optuna.distributions import distribution_to_json

        return {name: distribution_to_json(found) for name, found in self.distributions.items()}

    def check_searchable(self) -> None:
        """Refuse a search that the pins made impossible.

        Raises:
            ConfigError: with the obstacle.
        """
        if self.obstacle is not None:
            raise ConfigError(self.obstacle)

    def limit(
        self, trials: int | None = None, max_time_seconds: float | None = None
    ) -> SearchSpace:
        """The same space for a search of so many trials and so much time; None keeps what the file says.

        The sampler's startup stays: a search cut below it is a random one, as asked for.

        Raises:
            ConfigError: for less than one trial, and when nothing can be searched.
        """
        self.check_searchable()
        if trials is not None and trials < 1:
            raise ConfigError(f"--trials: a number >= 1 must be given, got {trials}.")
        limits = {"trials": trials, "max_time_seconds": max_time_seconds}
        update = {name: value for name, value in limits.items() if value is not None}
        return replace(self, budget=self.budget.model_copy(update=update))


def select_tier(file: SpaceFile, tier: str, pinned: dict[str, Any] | None = None) -> SearchSpace:
    """One tier with pinned knobs: a pin overrides baseline, tier and points and is not searched.

    Searched knobs that the pins make dead are dropped. A pinned `epochs` becomes the last rung; rungs that it does not
    exceed are cut.

    Raises:
        SpaceError: for an unknown tier.
        ConfigError: for a pin that is unknown, out of range, dead or in conflict with the baseline.
    """
    if tier not in file.tiers:
        raise SpaceError(
            f"tier: {' or '.join(TIERS)} must be given, got {tier!r}.{nearest_name(tier, TIERS)}"
        )
    chosen, pins = (
        file.tiers[tier],
        {name: _read_pin(name, value) for name, value in (pinned or {}).items()},
    )
    wanted = {name: file.search[name] for name in chosen.searched if name not in pins}
    baseline, dead = _apply_pins({**file.baseline, **chosen.settings}, pins, wanted)
    search = {name: entry for name, entry in wanted.items() if name not in dead}
    rungs = (
        *(rung for rung in chosen.budget.rungs[:-1] if rung < baseline.epochs),
        baseline.epochs,
    )
    budget = chosen.budget.model_copy(update={"rungs": rungs})
    obstacle = _find_obstacle(baseline, search, budget)
    if (
        budget.fidelity == "cycles/continue" and "warm_restarts" not in pins
    ):  # a pin stands: `train` obeys it
        baseline = baseline.model_copy(update={"warm_restarts": rungs[:-1]})
    return SearchSpace(
        name=file.header.space,
        path=file.path,
        text=file.text,
        header=file.header,
        tier=tier,
        baseline=baseline,
        distributions=make_distributions(search),
        points=_complete_points(file.points, baseline, search),
        budget=budget,
        pinned=pins,
        dropped={name: dead[name] for name in wanted if name in dead},
        obstacle=obstacle,
    )


def list_spaces() -> list[Path]:
    """The space files that can be named, each name once, s7 before s10."""

    def natural(path: Path) -> list[tuple[int, str]]:
        return [
            (int(part), "") if part.isdigit() else (-1, part)
            for part in re.split(r"(\d+)", path.stem)
            if part
        ]

    found: dict[str, Path] = {}
    for folder in _space_folders():
        for path in folder.glob("*.yaml"):
            found.setdefault(path.stem, path)
    return sorted(found.values(), key=natural)


def find_space(name_or_path: str | Path) -> Path:
    """A path as it is; a name in ./search_spaces, then in the package, then in the checkout beside it.

    Raises:
        SpaceError: when there is no such file, with the nearest name.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith((".yaml", ".yml")):
        if not Path(text).is_file():
            raise SpaceError(
                f"{text}: a space file must exist there, got none. `spaces list` shows the named ones."
            )
        return Path(text)
    known = {path.stem: path for path in list_spaces()}
    if text not in known:
        hint = nearest_name(text, tuple(known)) or f" Known: {', '.join(known)}."
        raise SpaceError(f"space: a known name or a path must be given, got {text!r}.{hint}")
    return known[text]


def load_header(name_or_path: str | Path) -> SpaceHeader:
    """Source and published result of a checked space, without Optuna.

    Raises:
        SpaceError: as `read_space`.
    """
    return read_space(name_or_path).header


def load_space(
    name_or_path: str | Path, tier: str = "full", pinned: dict[str, Any] | None = None
) -> SearchSpace:
    """Read, check and select: see `read_space` and `select_tier`."""
    return select_tier(read_space(name_or_path), tier, pinned)


def read_space(name_or_path: str | Path) -> SpaceFile:
    """Read and check a whole space file, every tier of it.

    Raises:
        SpaceError: one sentence with file, line, rule, value and the nearest name.
    """
    path = find_space(name_or_path)
    label = describe_path(path)
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= MAX_BYTES else b""
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise SpaceError(f"{label}: a readable UTF-8 text must be given, got: {exc}.") from exc
    if size > MAX_BYTES:
        raise SpaceError(f"{label}: at most {MAX_BYTES} bytes must hold, got {size}.")
    return parse_space(text, path)


def parse_setting(text: str) -> tuple[str, Any]:
    """`max_lr=1e-3` as name and value; the value is a YAML 1.2 scalar or list.

    Raises:
        ConfigError: for an unknown knob or an unreadable value.
    """
    name, equals, written = text.partition("=")
    if not equals:
        raise ConfigError(f"--set: NAME=VALUE must be given, got {text!r}.")
    try:
        value = read_document(written, "--set").data
    except SpaceError as exc:
        raise ConfigError(
            f"--set {name}: a number, a word or a list must be given, got {written!r}."
        ) from exc
    return name, _read_pin(name, value)


def make_distributions(search: Searched) -> dict[str, BaseDistribution]:
    """Optuna's own objects, in the file's order."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, BaseDistribution] = {}
    for name, entry in search.items():
        if isinstance(entry, Choices):
            made[name] = CategoricalDistribution(entry.values)
        elif kind_of(name) is int:
            made[name] = IntDistribution(
                int(entry.low), int(entry.high), log=entry.log, step=int(entry.step or 1)
            )
        else:
            made[name] = FloatDistribution(entry.low, entry.high, log=entry.log, step=entry.step)
    return made


def describe_distribution(distribution: BaseDistribution) -> str:
    """A distribution in the words of the file."""
    found: Any = distribution
    if hasattr(found, "choices"):
        return str(Choices(found.choices))
    every_integer = isinstance(found.step, int) and found.step == 1
    return str(Range(found.low, found.high, found.log, None if every_integer else found.step))


def _space_folders() -> Iterable[Path]:
    package = Path(__file__).parents[1]
    return (Path("search_spaces"), package / "search_spaces", package.parent / "search_spaces")


def _read_pin(name: str, value: Any) -> Any:
    if name not in KNOBS:
        raise ConfigError(f"--set: {name!r} is not a known knob.{nearest_name(name, KNOBS)}")
    if problem := find_value_problem(name, value, name):
        raise ConfigError(f"--set: {problem}")
    return normalise(name, value)


def _apply_pins(
    values: dict[str, Any], pins: dict[str, Any], search: Searched
) -> tuple[TrainConfig, dict[str, str]]:
    """The pinned baseline, and the knobs that are dead everywhere in what is left of the search."""
    if problem := find_conflict({**values, **pins}, {}):
        raise ConfigError(f"--set: {problem}")
    baseline = TrainConfig(**{**values, **pins})
    dead = find_inactive(baseline, search)
    for name in pins:
        if name in dead:
            raise ConfigError(f"--set: {describe_inactive(name, dead[name])}")
    return baseline, dead


def _find_obstacle(baseline: TrainConfig, search: Searched, budget: Budget) -> str | None:
    if not search:
        return "--set: at least one searched knob must be left, got none. Use `train` for a single training."
    if baseline.val_size == 0:
        return "--set: val_size >= 1 must hold in a search, got 0. Trials are compared on it."
    if problem := find_conflict(baseline.model_dump(), search):
        return f"--set: everywhere in the search, {problem} Pin the other knob too."
    if problem := find_fidelity_problem(budget, baseline, search):
        return f"--set: {problem}"
    return None


def _complete_points(
    points: Iterable[dict[str, Any]], baseline: TrainConfig, search: Searched
) -> tuple[dict[str, Any], ...]:
    """The points over exactly the searched knobs; what is then equal to the baseline or to another is left out."""
    seen = [{name: getattr(baseline, name) for name in search}]
    for point in points:
        complete = {**seen[0], **{name: value for name, value in point.items() if name in search}}
        if complete not in seen:
            seen.append(complete)
    return tuple(seen[1:])
