"""Rules for a value, a search and its rungs; each returns what is wrong as a sentence, or None."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from tune_cifar.dataset import CIFAR10
from tune_cifar.errors import ConfigError, describe_problem
from tune_cifar.schema import ARGUMENT, KNOBS, TrainConfig, inactive_knobs
from tune_cifar.space.layout import MAX_REPLICATES, Fidelity, Searched, TrialBudget

# Knobs that a file may set but not search, each with the reason.
STRUCTURAL = {
    "model": "a space is about one network",
    "seed": "all trials of a search share one training seed",
    "epochs": "the rungs say how long a trial trains",
    "warm_restarts": "the rungs and the fidelity say when the schedule restarts",
    "train_size": "scores from different training sets do not compete",
    "val_size": "scores on different validation sets do not compete",
    "augment_backend": "both backends apply the same policy",
    "milestone_fractions": "a list has no distribution; search gamma",
    "model_args": "its arguments are searched by name, as model_args.NAME",
}
# Knobs whose value may make another one inactive (schema.inactive_knobs).
DECIDING = (
    *("optimizer", "schedule", "cycle_momentum", "hflip_p", "cutout_p", "cutout_size"),
    *("shift_scale_rotate_p", "shift_limit", "scale_limit", "rotate_limit"),
)
# Knobs in a rule of TrainConfig between two knobs.
COUPLED = ("batch_size", "base_momentum", "max_momentum", "optimizer", "nesterov", "momentum")
# Knobs in a rule of the data alone: the widest augmentation and its pixels.
SIZED = ("crop_pad", "cutout_size")


def is_known(name: str) -> bool:
    """Return whether a name may be a knob's: one of the schema, or a network's own argument."""
    return name in KNOBS or bool(re.fullmatch(r"model_args\.[A-Za-z_]\w*", name))


def kind_of(name: str) -> Any:
    """Return the type of a knob: float, int, bool or a Literal; None of a network's own argument.

    Such a one has the type of its value in the baseline.
    """
    return None if name.startswith(ARGUMENT) else TrainConfig.model_fields[name].annotation


def normalise(name: str, value: Any) -> Any:
    """Return a checked value in the knob's own type: 1 as 1.0 for a float, a list as a tuple."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        return tuple(sorted(value.items()))
    return float(value) if kind_of(name) is float else value


def find_value_problem(name: str, value: Any, label: str) -> str | None:
    """Return the rule of the schema that a knob's value breaks; `label` stands for the knob."""
    if name.startswith(ARGUMENT):
        is_number = isinstance(value, int | float) and abs(value) <= sys.float_info.max
        fits = is_number or isinstance(value, bool | str)
        rule = f"{label} must be a number (up to {sys.float_info.max:.1e}), text, true or false"
        return None if fits else f"{rule}, got {value!r}."
    cause: BaseException | None = None
    try:
        TrainConfig(**{name: value})
    except ConfigError as exc:  # always: other knobs are missing; only this one's problem counts
        cause = exc.__cause__
    problems = cause.errors(include_url=False) if isinstance(cause, ValidationError) else []
    found = [problem for problem in problems if problem["loc"][0] == name]
    if not found:
        return None
    found[0]["loc"] = (label, *found[0]["loc"][1:])
    return describe_problem(found[0], TrainConfig)


def find_conflict(
    values: dict[str, Any],
    search: Searched,
    check: Callable[[TrainConfig], str | None] = CIFAR10.find_size_problem,
) -> str | None:
    """Return a missing knob, or a rule between knobs, or of the data, that breaks in the search.

    Args:
        check: the data's rule. The sizes of a file are CIFAR-10's, its pixels those of any data.
    """
    largest = {name: max(search[name].ends) for name in SIZED if name in search}
    values = {**values, **largest}
    coupled = [name for name in COUPLED if name in search]
    for ends in itertools.product(*(search[name].ends for name in coupled)):
        try:
            config = TrainConfig(**{**values, **dict(zip(coupled, ends, strict=True))})
        except ConfigError as exc:
            return str(exc).removeprefix("configuration: ")
        if problem := check(config):
            return problem
    return None


def find_inactive(baseline: TrainConfig, search: Searched) -> dict[str, str]:
    """Return the knobs that no combination of searched values makes active, with the reason."""
    undecided = {name: search[name] for name in DECIDING if name in search}
    found = [inactive_knobs(config) for config in _list_outcomes(baseline, undecided)]
    everywhere = set.intersection(*map(set, found))
    return {name: reason for name, reason in found[0].items() if name in everywhere}


def _list_outcomes(config: TrainConfig, undecided: Searched) -> Iterator[TrainConfig]:
    """Yield the configuration for all combinations of the undecided knobs' ends."""
    for values in itertools.product(*(found.ends for found in undecided.values())):
        yield config.model_copy(update=dict(zip(undecided, values, strict=True)))


def select_active(
    baseline: TrainConfig, params: dict[str, Any], search: Searched
) -> dict[str, Any]:
    """Return the searched values that have an effect, in the order of the search.

    Knobs that decide on others come first: one counts unless it is inactive whatever the later ones
    are. So of `cutout_p: 0` and `cutout_size: 0` the first one stays. What is left out may have the
    baseline's value: the training is the same.
    """
    undecided = {name: search[name] for name in DECIDING if name in search}
    active: dict[str, Any] = {}
    for name in list(undecided):
        outcomes = _list_outcomes(baseline.model_copy(update=active), undecided)
        if name in params and any(name not in inactive_knobs(found) for found in outcomes):
            active[name] = params[name]
        del undecided[name]
    inactive = {*inactive_knobs(baseline.model_copy(update=active)), *DECIDING}
    active |= {name: value for name, value in params.items() if name not in inactive}
    return {name: active[name] for name in search if name in active}


def describe_inactive(name: str, reason: str) -> str:
    """Return the sentence that refuses an inactive knob."""
    return f"{name} has no effect here: {reason}. Leave it out."


def find_rungs_problem(rungs: tuple[int, ...], epochs: int) -> str | None:
    """Return what is wrong with the rungs of a training of `epochs` epochs, as a sentence."""
    if not rungs or rungs[0] < 1 or any(a >= b for a, b in itertools.pairwise(rungs)):
        return f"rungs increasing from 1 or more must hold, got {list(rungs)}."
    if rungs[-1] != epochs:
        return f"last rung = epochs must hold, got {rungs[-1]} and epochs {epochs}."
    return None


def find_replicates_problem(
    replicates: dict[str, int], rungs: tuple[int, ...], fidelity: Fidelity
) -> str | None:
    """Return what is wrong with a tier's replicates, as a sentence."""
    if not replicates:
        return None
    if fidelity != "cycles":
        return f"replicates must not be given with fidelity: {fidelity}. Use cycles."
    if list(replicates) != [str(rungs[-1])]:
        got = ", ".join(replicates)
        return f"replicates must name the last rung alone, {rungs[-1]}, got {got}."
    (number,) = replicates.values()
    if not 2 <= number <= MAX_REPLICATES:
        return f"replicates must be 2 to {MAX_REPLICATES} seeds, got {number}."
    return None


def find_fidelity_problem(
    budget: TrialBudget, baseline: TrainConfig, search: Searched
) -> str | None:
    """Return what is wrong with the fidelity and the rungs of a search, as a sentence.

    Under OneCycle every score is taken after a warm-up, and every warm-up is longer than a step.
    """
    if budget.fidelity == "cycles/continue" and baseline.warm_restarts:
        return "warm_restarts must not be given with fidelity: cycles/continue, which sets them."
    schedules = search["schedule"].ends if "schedule" in search else (baseline.schedule,)
    if "onecycle" not in schedules:
        return None
    low = high = baseline.pct_start
    if "pct_start" in search:
        low, high = search["pct_start"].ends
    batch_size = max(search["batch_size"].ends) if "batch_size" in search else baseline.batch_size
    first, last = budget.rungs[0], budget.rungs[-1]
    if budget.fidelity == "epochs" and first < last and first <= high * last:
        return (
            "first rung > pct_start x epochs must hold for fidelity: epochs, "
            f"got {first} and {high:g} x {last}. Within the warm-up a score says nothing yet."
        )
    # Epochs of the shortest cycle of the learning rate.
    continued = min(end - start for start, end in itertools.pairwise((0, *budget.rungs)))
    shortest = {"cycles": first, "epochs": last, "cycles/continue": continued}[budget.fidelity]
    num_steps = shortest * -(-baseline.train_size // batch_size)
    if low * num_steps <= 1:
        return (
            f"pct_start x steps of the shortest cycle > 1 must hold, got {low:g} x {num_steps}. "
            "Raise pct_start's low, raise the first rung or lower batch_size."
        )
    return None


def parse_duration(text: str) -> float:
    """Return `90s`, `8m` or `1h30m` in seconds.

    Raises:
        ConfigError: for anything else and for zero.
    """
    match = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", text.strip())
    hours, minutes, seconds = (
        (int(digits or 0) for digits in match.groups()) if match else (0, 0, 0)
    )
    total = 3600 * hours + 60 * minutes + seconds
    if total == 0:
        raise ConfigError(f"a duration must be a time such as 90s, 8m or 1h30m, got {text!r}.")
    return float(total)
