"""Find space files and take one tier, with a command line's pins and Optuna's distributions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_cifar.dataset import CIFAR10, DataDescription
from tune_cifar.errors import ConfigError, SpaceError, did_you_mean
from tune_cifar.schema import ARGUMENT, KNOBS, TrainConfig
from tune_cifar.space.document import read_document
from tune_cifar.space.layout import (
    MAX_TRIALS,
    Budget,
    Choices,
    Range,
    Searched,
    SpaceFile,
    SpaceHeader,
)
from tune_cifar.space.reader import describe_path, parse_space
from tune_cifar.space.rules import (
    describe_inactive,
    find_conflict,
    find_fidelity_problem,
    find_inactive,
    find_value_problem,
    is_known,
    normalise,
    select_active,
)

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MAX_BYTES = 256_000
# The space files of an installed package; a checkout has them beside the package.
PACKAGED = Path(__file__).parents[1] / "search_spaces"


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
    """Trials right after the baseline; each names every searched knob."""
    budget: Budget
    pinned: dict[str, Any]
    dropped: dict[str, str]
    """Knobs that are not searched because the pins make them inactive, with the reason."""
    obstacle: str | None
    """Why the pins leave nothing that can be searched; the baseline can still be trained."""
    model_source: str = ""
    """Text of the file that defines a network of the user's own, once it has been read."""

    @property
    def baseline_params(self) -> dict[str, Any]:
        """The baseline's values of the searched knobs."""
        return {name: self.baseline.get(name) for name in self.distributions}

    def config(self, params: dict[str, Any]) -> TrainConfig:
        """Return the training configuration of a proposal.

        Raises:
            ConfigError: when the proposal breaks a rule of the schema.
        """
        return TrainConfig(**{**self.baseline.model_dump(), **params})

    def select_active(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return a proposal without the knobs that its other values make inactive."""
        search = {name: read_distribution(found) for name, found in self.distributions.items()}
        return select_active(self.baseline, params, search)

    def describe_distributions(self) -> dict[str, str]:
        """Return Optuna's own JSON of every searched knob."""
        from optuna.distributions import distribution_to_json

        return {name: distribution_to_json(found) for name, found in self.distributions.items()}

    def check_searchable(self) -> None:
        """Refuse a search that the pins make impossible.

        Raises:
            ConfigError: with the obstacle.
        """
        if self.obstacle is not None:
            raise ConfigError(self.obstacle)

    def limit(
        self,
        trials: int | None = None,
        max_time_seconds: float | None = None,
        target: float | None = None,
        patience: int | None = None,
    ) -> SearchSpace:
        """Return the space with other limits of the search, see Budget; None keeps what is there.

        The sampler's startup stays: a search of fewer trials is a random one.

        Raises:
            ConfigError: for a limit out of its bounds, and when nothing can be searched.
        """
        self.check_searchable()
        if trials is not None and trials < 1:
            raise ConfigError(f"`trials` >= 1 must hold, got {trials}.")
        if trials is not None and trials > MAX_TRIALS:
            raise ConfigError(f"`trials` <= {MAX_TRIALS} must hold, got {trials}.")
        if target is not None and not 0 < target <= 1:
            raise ConfigError(f"`target` must be a fraction, 0 < target <= 1, got {target:g}.")
        if patience is not None and patience < 1:
            raise ConfigError(f"`patience` >= 1 must hold, got {patience}.")
        limits = {
            "trials": trials,
            "max_time_seconds": max_time_seconds,
            "target": target,
            "patience": patience,
        }
        update = {name: value for name, value in limits.items() if value is not None}
        return replace(self, budget=self.budget.model_copy(update=update))


def select_tier(
    file: SpaceFile,
    tier: str,
    pinned: dict[str, Any] | None = None,
    data: DataDescription | None = CIFAR10,
) -> SearchSpace:
    """Take one tier, with pinned knobs: they override baseline, tier and points, unsearched.

    Searched knobs that the pins make inactive are dropped. A pinned `epochs` becomes the last rung;
    earlier rungs stay if they are smaller. A file's sizes are CIFAR-10's: of data with other sizes
    all images are taken, as if pinned, unless the tier names fewer or a pin names a size.

    Args:
        data: None for a recorded space, which was checked before.

    Raises:
        SpaceError: for an unknown tier.
        ConfigError: for a pin that is unknown, out of range, inactive or in conflict with the
            baseline.
    """
    if tier not in file.tiers:
        *others, last = file.tiers
        rule = f"`tier` must be {', '.join(others)} or {last}"
        raise SpaceError(f"{rule}, got {tier!r}.{did_you_mean(tier, file.tiers)}")
    chosen = file.tiers[tier]
    pins = {name: _read_pin(name, value) for name, value in (pinned or {}).items()}
    for name, size in _list_other_sizes(data or CIFAR10).items():
        if chosen.settings.get(name, size) >= size:
            pins.setdefault(name, size)
    unpinned = {name: file.search[name] for name in chosen.searched if name not in pins}
    _check_arguments(file, pins)
    settings = {**file.baseline, **chosen.settings}
    baseline, inactive = _apply_pins(settings, pins, unpinned, data)
    search = {name: entry for name, entry in unpinned.items() if name not in inactive}
    earlier = tuple(rung for rung in chosen.budget.rungs[:-1] if rung < baseline.epochs)
    budget = chosen.budget.model_copy(update={"rungs": (*earlier, baseline.epochs)})
    obstacle = _find_obstacle(baseline, search, budget, data)
    # A pinned warm_restarts stays: a single training obeys it, a search has an obstacle.
    if budget.fidelity == "cycles/continue" and "warm_restarts" not in pins:
        baseline = baseline.model_copy(update={"warm_restarts": earlier})
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
        dropped={name: inactive[name] for name in unpinned if name in inactive},
        obstacle=obstacle,
    )


def list_spaces() -> list[Path]:
    """Return the space files that can be named, each name once, s7 before s10."""

    def natural(path: Path) -> list[tuple[int, str]]:
        parts = filter(None, re.split(r"(\d+)", path.stem))
        return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

    found: dict[str, Path] = {}
    for folder in (Path("search_spaces"), PACKAGED, PACKAGED.parents[1] / "search_spaces"):
        for path in folder.glob("*.yaml"):
            found.setdefault(path.stem, path)
    return sorted(found.values(), key=natural)


def find_space(name_or_path: str | Path) -> Path:
    """Return the file of a path or a name.

    A name is looked up in ./search_spaces, in the package and in the checkout beside it.

    Raises:
        SpaceError: when there is no such file, with the nearest name.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith((".yaml", ".yml")):
        if not Path(text).is_file():
            raise SpaceError(f"{text}: no such space file. `spaces list` shows the named ones.")
        return Path(text)
    known = {path.stem: path for path in list_spaces()}
    if text not in known:
        hint = did_you_mean(text, known) or f" Known: {', '.join(known)}."
        raise SpaceError(f"no search space named {text!r}.{hint}")
    return known[text]


def load_header(name_or_path: str | Path) -> SpaceHeader:
    """Read a space's source and published result, without Optuna.

    Raises:
        SpaceError: as `read_space`.
    """
    return read_space(name_or_path).header


def load_space(
    name_or_path: str | Path,
    tier: str = "full",
    pinned: dict[str, Any] | None = None,
    data: DataDescription = CIFAR10,
) -> SearchSpace:
    """Read, check and select: see `read_space` and `select_tier`."""
    return select_tier(read_space(name_or_path), tier, pinned, data)


def read_space(name_or_path: str | Path) -> SpaceFile:
    """Read and check a space file with all its tiers.

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
        raise SpaceError(f"{label}: the file must be readable UTF-8 text, got: {exc}.") from exc
    if size > MAX_BYTES:
        raise SpaceError(f"{label}: size <= {MAX_BYTES} bytes must hold, got {size}.")
    return parse_space(text, path)


def parse_setting(text: str) -> tuple[str, Any]:
    """Read `max_lr=1e-3` as a name and a value, a YAML 1.2 scalar or list.

    Raises:
        ConfigError: for an unknown knob or an unreadable value.
    """
    name, equals, written = text.partition("=")
    if not equals:
        raise ConfigError(f"`settings` must be NAME=VALUE, got {text!r}.")
    try:
        value = read_document(written, name).data
    except SpaceError as exc:
        rule = f"{name} must be a number, a word or a list"
        raise ConfigError(f"`settings`: {rule}, got {written!r}.") from exc
    return name, _read_pin(name, value)


def make_distributions(search: Searched) -> dict[str, BaseDistribution]:
    """Return Optuna's distributions, in the file's order."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, BaseDistribution] = {}
    for name, entry in search.items():
        if isinstance(entry, Choices):
            made[name] = CategoricalDistribution(entry.values)
        elif isinstance(entry.low, int) and isinstance(entry.high, int):
            made[name] = IntDistribution(
                int(entry.low), int(entry.high), log=entry.log, step=int(entry.step or 1)
            )
        else:
            made[name] = FloatDistribution(entry.low, entry.high, log=entry.log, step=entry.step)
    return made


def describe_distribution(distribution: BaseDistribution) -> str:
    """Return a distribution in the words of the file."""
    return str(read_distribution(distribution))


def read_distribution(distribution: BaseDistribution) -> Range | Choices:
    """Return what `make_distributions` made a distribution from."""
    found: Any = distribution
    if hasattr(found, "choices"):
        return Choices(found.choices)
    every_integer = isinstance(found.step, int) and found.step == 1
    return Range(found.low, found.high, found.log, None if every_integer else found.step)


def _read_pin(name: str, value: Any) -> Any:
    if not is_known(name):
        hint = did_you_mean(name, KNOBS)
        raise ConfigError(f"`settings`: {name!r} is not a known knob.{hint}")
    if problem := find_value_problem(name, value, name):
        raise ConfigError(f"`settings`: {problem}")
    return normalise(name, value)


def _get_rule(data: DataDescription | None) -> Callable[[TrainConfig], str | None]:
    return data.find_problem if data is not None else lambda config: None


def _check_arguments(file: SpaceFile, pins: dict[str, Any]) -> None:
    """Refuse a pinned argument of the network that the baseline does not name."""
    known = [f"{ARGUMENT}{name}" for name, _ in file.baseline.get("model_args", ())]
    for name in pins:
        if name.startswith(ARGUMENT) and name not in known:
            rule = f"{name} must have a value in the baseline's model_args"
            raise ConfigError(f"`settings`: {rule}.{did_you_mean(name, known)}")


def _list_other_sizes(data: DataDescription) -> dict[str, int]:
    """Return the sizes of all images; none for data with as many images as CIFAR-10."""
    if (data.num_train, data.num_val) == (CIFAR10.num_train, CIFAR10.num_val):
        return {}
    return {"train_size": data.num_train, "val_size": data.num_val}


def _apply_pins(
    values: dict[str, Any], pins: dict[str, Any], search: Searched, data: DataDescription | None
) -> tuple[TrainConfig, dict[str, str]]:
    """Return the pinned baseline, and the knobs that are inactive in all of the search."""
    if problem := find_conflict({**values, **pins}, {}, _get_rule(data)):
        where = hint = ""
        if data is not None and _list_other_sizes(data):
            where = f" on {data.name}"
            hint = f" All images are train_size={data.num_train} and val_size={data.num_val}."
        raise ConfigError(f"`settings`{where}: {problem}{hint}")
    baseline = TrainConfig(**{**values, **pins})
    inactive = find_inactive(baseline, search)
    for name in pins:
        if name in inactive:
            raise ConfigError(f"`settings`: {describe_inactive(name, inactive[name])}")
    return baseline, inactive


def _find_obstacle(
    baseline: TrainConfig, search: Searched, budget: Budget, data: DataDescription | None
) -> str | None:
    """Return why a search is impossible, as a sentence."""
    if not search:
        return "`settings` must leave a searched knob, got none. Use `train` for a single training."
    if baseline.val_size == 0:
        return "`settings`: val_size >= 1 must hold in a search, got 0. Trials are compared on it."
    if problem := find_conflict(baseline.model_dump(), search, _get_rule(data)):
        return f"`settings`: everywhere in the search, {problem} Pin the other knob too."
    if problem := find_fidelity_problem(budget, baseline, search):
        return f"`settings`: {problem}"
    return None


def _complete_points(
    points: Iterable[dict[str, Any]], baseline: TrainConfig, search: Searched
) -> tuple[dict[str, Any], ...]:
    """Return the points over exactly the searched knobs, without repeats and the baseline."""
    seen = [{name: baseline.get(name) for name in search}]
    for point in points:
        searched = {name: value for name, value in point.items() if name in search}
        complete = {**seen[0], **searched}
        if complete not in seen:
            seen.append(complete)
    return tuple(seen[1:])
