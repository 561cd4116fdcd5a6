"""What the schema says about a value, a searched region, a list of rungs: each rule as a sentence or None."""

from __future__ import annotations

import itertools
import re
from typing import Any

from pydantic import ValidationError

from tune_cifar.errors import ConfigError
from tune_cifar.schema import TrainConfig, describe_problem, inactive_knobs
from tune_cifar.space.layout import Searched, TrialBudget

# Knobs that a file sets but never searches, each with the reason.
STRUCTURAL = {
    "model": "a space is about one network",
    "seed": "all trials of a search share one training seed",
    "epochs": "the rungs say how long a trial trains",
    "warm_restarts": "the rungs and the fidelity say where cycles end",
    "train_size": "scores from different training sets do not compete",
    "val_size": "scores on different validation sets do not compete",
    "augment_backend": "both backends apply the same policy",
    "milestone_fractions": "a list has no distribution; search gamma",
}
# Knobs whose value may make another one dead (schema.inactive_knobs), and knobs that a rule of TrainConfig ties together.
DECIDING = (
    *("optimizer", "schedule", "cycle_momentum", "cutout_p", "cutout_size"),
    *("shift_scale_rotate_p", "shift_limit", "scale_limit", "rotate_limit"),
)
COUPLED = ("batch_size", "base_momentum", "max_momentum")


def kind_of(name: str) -> Any:
    """The type of a knob: float, int, bool or a Literal."""
    return TrainConfig.model_fields[name].annotation


def normalise(name: str, value: Any) -> Any:
    """A checked value in the knob's own type: 1 is 1.0 for a float knob, a list is a tuple."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if kind_of(name) is float else value


def find_value_problem(name: str, value: Any, label: str) -> str | None:
    """What the schema says against one knob's value, under the given label."""
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


def find_conflict(values: dict[str, Any], search: Searched) -> str | None:
    """A knob missing from the values, or a rule between knobs that breaks somewhere in the searched region."""
    coupled = [name for name in COUPLED if name in search]
    for ends in itertools.product(*(search[name].ends for name in coupled)):
        try:
            TrainConfig(**{**values, **dict(zip(coupled, ends, strict=True))})
        except ConfigError as exc:
            return str(exc).removeprefix("configuration: ")
    return None


def find_inactive(baseline: TrainConfig, search: Searched) -> dict[str, str]:
    """The knobs that no combination of searched values brings to life, with the reason."""
    names = [name for name in DECIDING if name in search]
    combinations = itertools.product(*(search[name].ends for name in names))
    found = [
        inactive_knobs(baseline.model_copy(update=dict(zip(names, c, strict=True))))
        for c in combinations
    ]
    return {
        name: reason for name, reason in found[0].items() if all(name in dead for dead in found)
    }


def describe_inactive(name: str, reason: str) -> str:
    """The refusal of a dead knob."""
    return f"{name} must have an effect, got a dead knob: {reason}. Leave it out."


def find_rungs_problem(rungs: tuple[int, ...], epochs: int) -> str | None:
    """What is wrong with the rungs of a training of so many epochs, as a sentence."""
    if not rungs or rungs[0] < 1 or any(a >= b for a, b in itertools.pairwise(rungs)):
        return f"rungs increasing from 1 or more must hold, got {list(rungs)}."
    if rungs[-1] != epochs:
        return f"last rung = epochs must hold, got {rungs[-1]} and epochs {epochs}."
    return None


def find_fidelity_problem(
    budget: TrialBudget, baseline: TrainConfig, search: Searched
) -> str | None:
    """What is wrong with the cycles of a search that may try OneCycle, as a sentence: a score is taken after a warm-up,
    and every warm-up is longer than a step."""
    if budget.fidelity == "cycles/continue" and baseline.warm_restarts:
        return "no warm_restarts must stand beside fidelity: cycles/continue, which sets them."
    schedules = search["schedule"].ends if "schedule" in search else (baseline.schedule,)
    if "onecycle" not in schedules:
        return None
    low, high = (
        search["pct_start"].ends
        if "pct_start" in search
        else (baseline.pct_start, baseline.pct_start)
    )
    batch_size = max(search["batch_size"].ends) if "batch_size" in search else baseline.batch_size
    first, last = budget.rungs[0], budget.rungs[-1]
    if budget.fidelity == "epochs" and first < last and first <= high * last:
        return (
            f"first rung > pct_start x epochs must hold for fidelity: epochs, got {first} and {high:g} x {last}. "
            "Within the warm-up a score says nothing yet."
        )
    lengths = {"cycles": first, "epochs": last}
    shortest = lengths.get(budget.fidelity) or min(
        b - a for a, b in itertools.pairwise((0, *budget.rungs))
    )
    num_steps = shortest * -(-baseline.train_size // batch_size)
    if low * num_steps <= 1:
        return (
            f"pct_start x steps of the shortest cycle > 1 must hold, got {low:g} x {num_steps}. "
            "Raise pct_start's low, raise the first rung or lower batch_size."
        )
    return None


def parse_duration(text: str) -> float:
    """`90s`, `8m`, `1h30m` in seconds.

    Raises:
        ConfigError: for anything else, and for no time at all.
    """
    match = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", text.strip())
    seconds = (
        sum(int(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True))
        if match
        else 0
    )
    if seconds == 0:
        raise ConfigError(f"duration: a time such as 90s, 8m or 1h30m must be given, got {text!r}.")
    return float(seconds)
