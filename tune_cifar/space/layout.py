"""What a search-space file holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tune_cifar.schema import Frozen

TIERS = ("full", "cpu")


class Published(Frozen):
    """What the source reported; documentation only."""

    accuracy: float = Field(ge=0.0, le=1.0)
    """A fraction."""
    measured: Annotated[str, Field(min_length=1)]
    """On which images, after which epoch, chosen how."""


class SpaceHeader(Frozen):
    """What a space is and where it comes from."""

    space: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """The file's name without its suffix."""
    source: Annotated[str, Field(min_length=1)]
    published: Published
    corrects: tuple[str, ...]
    """One sentence for each thing that the baseline does otherwise than the source."""

    def describe_published(self) -> str:
        """The published accuracy in percent and what it measured."""
        return f"{100 * self.published.accuracy:.2f} %, {self.published.measured}"


class SamplerBudget(Frozen):
    """How trials are proposed."""

    kind: Literal["tpe", "random", "qmc"]
    startup: int = Field(0, ge=0)
    """Results that TPE waits for, proposing at random, before it learns from them; TPE only."""

    @model_validator(mode="after")
    def _check_startup(self) -> SamplerBudget:
        if (self.kind == "tpe") != (self.startup > 0):
            rule = "startup >= 1 for kind tpe and no startup otherwise must hold"
            raise ValueError(f"{rule}, got kind {self.kind} and startup {self.startup}")
        return self


Fidelity = Literal["cycles", "cycles/continue", "epochs"]
FIDELITY_WORDS: dict[Fidelity, str] = {
    "cycles": "a complete cycle from scratch for each",
    "cycles/continue": "a complete cycle for each, from the weights of the one before",
    "epochs": "of one long cycle",
}


class TrialBudget(Frozen):
    """The part of a budget that file and program write alike."""

    trials: int = Field(ge=1, le=100_000)
    fidelity: Fidelity = "cycles"
    """What a trial trains up to a rung: a complete cycle of the schedule as long as the rung, from scratch; a cycle
    from the rung before, going on with its weights (`cycles/continue`); or so much of one long cycle (`epochs`)."""
    rungs: tuple[int, ...]
    """Epochs after which trials are compared; the last is the whole training."""
    reduction_factor: int = Field(ge=2, le=100)
    sampler: SamplerBudget
    seed: int = Field(ge=0, le=2**31 - 1)
    """Of the sampler; the trainings' seed is a knob."""

    @field_validator("rungs", mode="before")
    @classmethod
    def _read_rungs(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Budget(TrialBudget):
    """Which trials run and how long."""

    max_time_seconds: float | None = Field(None, gt=0.0)
    """Wall-clock limit of the whole search."""

    def describe_epochs(self) -> str:
        """`24 epochs`, those of the whole training."""
        return f"{self.rungs[-1]} epoch{'s' if self.rungs[-1] > 1 else ''}"

    def describe(self) -> str:
        """One line for people."""
        text = f"{self.trials} trials, {self.describe_epochs()} each"
        if len(self.rungs) > 1:
            text = f"{self.trials} trials, rungs at {', '.join(map(str, self.rungs))} epochs"
            text += f" ({FIDELITY_WORDS[self.fidelity]}), reduction factor {self.reduction_factor}"
        text += f", sampler {self.sampler.kind}"
        text += f" (startup {self.sampler.startup})" if self.sampler.startup else ""
        return text + (
            f", at most {self.max_time_seconds / 60:.3g} min" if self.max_time_seconds else ""
        )


class TierText(TrialBudget):
    """A tier of the budget as the file writes it."""

    max_time: str | None = None
    """See `parse_duration`."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Knobs that the tier sets otherwise than the baseline."""
    only: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The knobs that the tier searches; None is all that the file searches."""

    @model_validator(mode="after")
    def _check_learning(self) -> TierText:
        if 3 * self.sampler.startup > self.trials:
            raise ValueError(
                f"startup <= trials / 3 must hold, got startup {self.sampler.startup} and trials {self.trials}. "
                "Otherwise the search is mostly a random one"
            )
        return self


class SpaceText(SpaceHeader):
    """The whole file as written."""

    baseline: dict[str, Any]
    search: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    points: tuple[dict[str, Any], ...] = ()
    """Searched knobs with values to try right after the baseline; the others keep the baseline's value."""
    budget: dict[str, TierText]


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; every number (of the knob's kind), or every `step` from low."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values at which a rule between knobs breaks if it breaks anywhere."""
        return (self.low, self.high)

    def contains(self, value: Any) -> bool:
        """Whether Optuna could propose this number."""
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
        """As `Range.ends`; words and truth values are all of them ends."""
        if isinstance(self.values[0], bool | str):
            return self.values
        return (min(self.values), max(self.values))

    def contains(self, value: Any) -> bool:
        """Whether Optuna could propose this value."""
        return value in self.values

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


Searched = dict[str, Range | Choices]


@dataclass(frozen=True)
class Tier:
    """One checked budget of a file: how long, what it sets, what it searches."""

    budget: Budget
    settings: dict[str, Any]
    searched: tuple[str, ...]


@dataclass(frozen=True)
class SpaceFile:
    """A checked file with all its tiers."""

    path: Path
    text: str
    header: SpaceHeader
    baseline: dict[str, Any]
    """The knobs that the file states."""
    search: Searched
    points: tuple[dict[str, Any], ...]
    tiers: dict[str, Tier]
