"""The contents of a search-space file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tune_cifar.schema import MAX_SEED, Frozen

TIERS = ("full", "cpu")
"""Those that every file has."""
OPTIONAL_TIERS = ("night",)
MAX_TRIALS = 100_000
WINDOW_FACTORS = 3
MAX_REPLICATES = 10


class Published(Frozen):
    """Result that the source reported; documentation only."""

    accuracy: float = Field(ge=0.0, le=1.0)
    """A fraction."""
    measured: Annotated[str, Field(min_length=1)]
    """Which images, after which epoch, how chosen."""


class SpaceHeader(Frozen):
    """Name and source of a space."""

    space: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """The file's name without its suffix."""
    source: Annotated[str, Field(min_length=1)]
    published: Published | None = None
    """None of a network that nobody has published."""
    corrects: tuple[str, ...] = ()
    """One sentence for each difference between the baseline and the source."""

    def describe_published(self) -> str:
        """Return the published accuracy in percent and what it measured; empty without one."""
        if self.published is None:
            return ""
        return f"{100 * self.published.accuracy:.2f} %, {self.published.measured}"


class SamplerBudget(Frozen):
    """Sampler of the trials."""

    kind: Literal["tpe", "gp", "random", "qmc"]
    startup: int = Field(0, ge=0)
    """Ended trials with which TPE or the Gaussian process starts; until then it is at random."""

    @model_validator(mode="after")
    def _check_startup(self) -> SamplerBudget:
        if (self.kind in ("tpe", "gp")) != (self.startup > 0):
            rule = "startup >= 1 for kind tpe or gp and no startup otherwise must hold"
            raise ValueError(f"{rule}, got kind {self.kind} and startup {self.startup}")
        return self


Fidelity = Literal["cycles", "cycles/continue", "epochs"]
FIDELITY_WORDS: dict[Fidelity, str] = {
    "cycles": "a complete training from scratch for each",
    "cycles/continue": "a complete schedule for each, from the weights of the one before",
    "epochs": "of one long training",
}


class TrialBudget(Frozen):
    """The part of a budget that the file writes as the program has it."""

    trials: int = Field(ge=1, le=MAX_TRIALS)
    fidelity: Fidelity = "cycles"
    """What a trial trains up to a rung: a complete schedule over the rung's epochs, from scratch
    (`cycles`); a complete schedule from the rung before, with its weights (`cycles/continue`); or
    that part of one schedule over all epochs (`epochs`)."""
    rungs: tuple[int, ...]
    """Epochs after which trials are compared; the last is the full training."""
    reduction_factor: int = Field(ge=2, le=100)
    window: int | None = Field(None, ge=2)
    """Scores at a rung that a trial is compared with: the last that arrived, its own included.
    None in a file: WINDOW_FACTORS times the reduction factor; in an old record: all of them."""
    sampler: SamplerBudget
    seed: int = Field(ge=0, le=MAX_SEED)
    """The sampler's; the trainings' seed is a knob."""

    @field_validator("rungs", mode="before")
    @classmethod
    def _read_rungs(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Budget(TrialBudget):
    """Trials of a search and their epochs."""

    max_time_seconds: float | None = Field(None, gt=0.0)
    """Wall-clock limit of the search."""
    target: float | None = Field(None, gt=0.0, le=1.0)
    """val_acc of a complete trial after which no further trial starts."""
    patience: int | None = Field(None, ge=1)
    """Ended trials without a gain after which no further trial starts."""
    replicates: int = Field(1, ge=1, le=MAX_REPLICATES)
    """Seeds under which a trial trains at the last rung; its score there is their mean."""

    def describe_epochs(self) -> str:
        """Return the epochs of a full training in words: `24 epochs`."""
        return f"{self.rungs[-1]} epoch{'s' if self.rungs[-1] > 1 else ''}"

    def describe(self) -> str:
        """Return the budget in one line for people."""
        text = f"{self.trials} trials, {self.describe_epochs()} each"
        if len(self.rungs) > 1:
            text = f"{self.trials} trials, rungs at {', '.join(map(str, self.rungs))} epochs"
            text += f" ({FIDELITY_WORDS[self.fidelity]}), reduction factor {self.reduction_factor}"
        if self.replicates > 1:
            text += f", {self.replicates} seeds at the last rung"
        text += f", sampler {self.sampler.kind}"
        if self.sampler.startup:
            text += f" (startup {self.sampler.startup})"
        if self.max_time_seconds:
            text += f", at most {round(self.max_time_seconds / 60, 2):g} min"
        if self.target is not None:
            text += f", until {100 * self.target:g} %"
        if self.patience is not None:
            text += f", until {self.patience} trials bring no gain"
        return text


class TierText(TrialBudget):
    """A tier of the budget as the file writes it."""

    max_time: str | None = None
    """See `parse_duration`."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Knobs whose value in the tier is not the baseline's."""
    only: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The knobs that the tier searches; None: all that the file searches."""
    replicates: dict[str, int] = Field(default_factory=dict)
    """By rung, the seeds under which a trial trains there; only the last rung may be named."""

    @model_validator(mode="after")
    def _check_learning(self) -> TierText:
        if 3 * self.sampler.startup > self.trials:
            raise ValueError(
                f"startup <= trials / 3 must hold, got startup {self.sampler.startup} and "
                f"trials {self.trials}. Otherwise the search is mostly a random one"
            )
        return self


class SpaceText(SpaceHeader):
    """The file as written."""

    baseline: dict[str, Any]
    search: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    points: tuple[dict[str, Any], ...] = ()
    """Values of searched knobs to try right after the baseline; the others are the baseline's."""
    budget: dict[str, TierText]


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included: all of the knob's type, or every `step` from low."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values at which a rule between knobs breaks if it breaks anywhere in the range."""
        return (self.low, self.high)

    def contains(self, value: Any) -> bool:
        """Return whether Optuna could propose this number."""
        steps = (value - self.low) / (self.step or math.inf)
        return bool(self.low <= value <= self.high and abs(steps - round(steps)) < 1e-8)

    def __str__(self) -> str:
        step = f", step {self.step:g}" if self.step else ""
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}{step}"


@dataclass(frozen=True)
class Choices:
    """Values without an order."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        """As `Range.ends`; of words and truth values, all."""
        if isinstance(self.values[0], bool | str):
            return self.values
        return (min(self.values), max(self.values))

    def contains(self, value: Any) -> bool:
        """Return whether Optuna could propose this value."""
        return value in self.values

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


Searched = dict[str, Range | Choices]


@dataclass(frozen=True)
class Tier:
    """One checked tier of a file: its budget, the knobs that it sets and those that it searches."""

    budget: Budget
    settings: dict[str, Any]
    searched: tuple[str, ...]


@dataclass(frozen=True)
class SpaceFile:
    """A checked space file with all its tiers."""

    path: Path
    text: str
    header: SpaceHeader
    baseline: dict[str, Any]
    """The knobs that the file states."""
    search: Searched
    points: tuple[dict[str, Any], ...]
    tiers: dict[str, Tier]
