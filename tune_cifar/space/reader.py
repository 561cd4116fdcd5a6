"""Checks a search-space file from its text to its last tier; the first problem is the error."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tune_cifar.errors import ConfigError, SpaceError
from tune_cifar.schema import KNOBS, TrainConfig, describe_problem, inactive_knobs, nearest_name
from tune_cifar.space.document import Document, Where, read_document
from tune_cifar.space.layout import (
    TIERS,
    Budget,
    Choices,
    Published,
    Range,
    SamplerBudget,
    Searched,
    SpaceFile,
    SpaceHeader,
    SpaceText,
    Tier,
    TierText,
    TrialBudget,
)
from tune_cifar.space.rules import (
    STRUCTURAL,
    describe_inactive,
    find_conflict,
    find_fidelity_problem,
    find_inactive,
    find_rungs_problem,
    find_value_problem,
    kind_of,
    normalise,
    parse_duration,
)


def describe_path(path: Path) -> str:
    """A file as errors name it: from the working directory where it lies below it."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else path)


def parse_space(text: str, path: Path, is_recorded: bool = False) -> SpaceFile:
    """Check the text of a space file; `path` only names it (a record keeps the text).

    Args:
        is_recorded: a search has been made of it: whether its rungs suit its fidelity is asked no more. The rule is
            younger than some records, which say nothing of a fidelity.
    """
    doc = read_document(text, describe_path(path))
    if not isinstance(doc.data, dict):
        raise doc.error((), f"names with values must be given, got {doc.data!r}.")
    try:
        raw = SpaceText.model_validate(doc.data)
    except ValidationError as exc:
        raise _translate(doc, exc) from exc
    if raw.space != path.stem:
        raise doc.error(
            ("space",), f"space = the file's name must hold, got {raw.space!r} in {path.name}."
        )
    baseline = _read_knobs(doc, ("baseline",), raw.baseline)
    search: Searched = {name: _read_entry(doc, name, entry) for name, entry in raw.search.items()}
    _check_baseline(doc, baseline, search)
    points = tuple(_read_point(doc, i, baseline, search) for i in range(len(raw.points)))
    if tuple(sorted(raw.budget)) != tuple(sorted(TIERS)):
        raise doc.error(
            ("budget",),
            f"the tiers {' and '.join(TIERS)} must be given, got {', '.join(raw.budget)}.",
        )
    tiers = {
        name: _read_tier(doc, name, entry, baseline, search, is_recorded)
        for name, entry in raw.budget.items()
    }
    header = SpaceHeader(**raw.model_dump(include=set(SpaceHeader.model_fields)))
    return SpaceFile(path, text, header, baseline, search, points, tiers)


def _translate(doc: Document, exc: ValidationError) -> SpaceError:
    """One of pydantic's problems with file and line, named by its last name, since the line says where.

    An unknown name goes first: what it was meant to be is missing then, too.
    """
    problems = exc.errors(include_url=False)
    problem = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    loc = problem["loc"]
    models: dict[str, type[BaseModel]] = (
        {"published": Published, "budget": TierText} if len(loc) > 1 else {}
    )
    model = SamplerBudget if "sampler" in loc[:-1] else models.get(str(loc[0]), SpaceText)
    last = max(i for i, part in enumerate(loc) if isinstance(part, str))
    problem["loc"] = loc[last:]
    sentence = describe_problem(problem, model)
    return doc.error(
        loc,
        sentence.replace("a valid tuple", "a list").replace(
            "a valid dictionary", "names with values"
        ),
    )


def _read_knobs(doc: Document, where: Where, values: dict[str, Any]) -> dict[str, Any]:
    """Knobs with fixed values, each checked by itself."""
    for name, value in values.items():
        if name not in KNOBS:
            raise doc.error(
                (*where, name), f"{name} is not a known knob.{nearest_name(name, KNOBS)}"
            )
        if problem := find_value_problem(name, value, name):
            raise doc.error((*where, name), problem)
    return {name: normalise(name, value) for name, value in values.items()}


def _read_entry(doc: Document, name: str, entry: dict[str, Any]) -> Range | Choices:
    """A searched knob's distribution."""
    where = ("search", name)
    if name not in KNOBS:
        raise doc.error(where, f"{name} is not a known knob.{nearest_name(name, KNOBS)}")
    if name in STRUCTURAL:
        raise doc.error(
            where,
            f"{name} must not be searched: {STRUCTURAL[name]}. Set it under baseline or in a tier.",
        )
    ranged = "choices" not in entry and kind_of(name) in (int, float)
    allowed = ("low", "high", "log", "step") if ranged else ("choices",)
    for word in entry:
        if word not in allowed:
            hint = nearest_name(word, allowed)
            raise doc.error(
                (*where, word), f"{name} must be given by {', '.join(allowed)}, got {word}.{hint}"
            )
    return _read_range(doc, name, entry) if ranged else _read_choices(doc, name, entry)


def _read_choices(doc: Document, name: str, entry: dict[str, Any]) -> Choices:
    where = ("search", name, "choices")
    values = entry.get("choices")
    if not isinstance(values, tuple):
        raise doc.error(where, f"{name}.choices must be a list, got {values!r}.")
    for i, value in enumerate(values):
        if problem := find_value_problem(name, value, name):
            raise doc.error((*where, i), problem)
    values = tuple(normalise(name, value) for value in values)
    if len(values) < 2 or len(set(values)) < len(values):
        raise doc.error(
            where, f"{name}.choices must be two or more different values, got {list(values)}."
        )
    return Choices(values)


def _read_range(doc: Document, name: str, entry: dict[str, Any]) -> Range:
    where = ("search", name)
    log = entry.get("log", False)
    if not isinstance(log, bool):
        raise doc.error((*where, "log"), f"{name}.log must be true or false, got {log!r}.")
    for word in ("low", "high"):
        if word not in entry:
            raise doc.error(where, f"{name}.{word} must be given.")
        value, at = entry[word], (*where, word)
        if log and isinstance(value, int | float) and value <= 0:
            example = "1.0e-5" if kind_of(name) is float else "1"
            raise doc.error(
                at, f"{name}.{word} > 0 must hold for log: true, got {value}. Use e.g. {example}."
            )
        if problem := find_value_problem(name, value, f"{name}.{word}"):
            raise doc.error(at, problem)
    low, high = normalise(name, entry["low"]), normalise(name, entry["high"])
    if low >= high:
        raise doc.error(where, f"{name}.low < {name}.high must hold, got {low} and {high}.")
    step = entry.get("step")
    if "step" in entry and (problem := _find_step_problem(name, step, Range(low, high, log))):
        raise doc.error((*where, "step"), f"{name}.step {problem}, got {step!r}.")
    return Range(low, high, log, step)


def _find_step_problem(name: str, step: Any, found: Range) -> str | None:
    if found.log:
        return "must not stand beside log: true"
    if (
        isinstance(step, bool)
        or not isinstance(step, int | float)
        or (kind_of(name) is int and isinstance(step, float))
    ):
        return f"must be a number of the knob's kind ({kind_of(name).__name__})"
    # At most a million steps: beyond, the remainder below would not be exact.
    if not (found.high - found.low) / 1e6 <= step <= found.high - found.low:
        return "must be positive and split high - low into at most a million parts"
    if (Decimal(str(found.high)) - Decimal(str(found.low))) % Decimal(str(step)) != 0:
        return f"must divide high - low = {found.high - found.low:g}"
    return None


def _check_baseline(doc: Document, baseline: dict[str, Any], search: Searched) -> None:
    """The baseline is a configuration, lies within the search, and nothing that is said is without effect."""
    if problem := find_conflict(baseline, {}):
        raise doc.error(("baseline",), problem)
    if problem := find_conflict(baseline, search):
        raise doc.error(("search",), f"everywhere in the search, {problem}")
    config = TrainConfig(**baseline)
    for name, entry in search.items():
        value = getattr(config, name)
        if not entry.contains(value):
            rule = f"{name}: the baseline's value must lie within the distribution ({entry})"
            raise doc.error(("search", name), f"{rule}, got {value}. The baseline is trial 0.")
    dead = find_inactive(config, search)
    for part, names in (("baseline", baseline), ("search", search)):
        for name in names:
            if name in dead:
                raise doc.error((part, name), describe_inactive(name, dead[name]))


def _read_point(
    doc: Document, index: int, baseline: dict[str, Any], search: Searched
) -> dict[str, Any]:
    where = ("points", index)
    point = _read_knobs(doc, where, doc.data["points"][index])
    for name, value in point.items():
        if name not in search:
            raise doc.error((*where, name), f"{name} must be a searched knob, got one that is not.")
        if not search[name].contains(value):
            raise doc.error(
                (*where, name),
                f"{name} must lie within its distribution ({search[name]}), got {value}.",
            )
    dead = inactive_knobs(TrainConfig(**{**baseline, **point}))
    for name in point:
        if name in dead:
            raise doc.error((*where, name), describe_inactive(name, dead[name]))
    return point


def _read_tier(
    doc: Document,
    name: str,
    entry: TierText,
    baseline: dict[str, Any],
    search: Searched,
    is_recorded: bool,
) -> Tier:
    where = ("budget", name)
    settings = _read_knobs(doc, (*where, "set"), entry.set)
    searched = entry.only if entry.only is not None else tuple(search)
    for i, knob in enumerate(searched):
        if knob not in search:
            raise doc.error(
                (*where, "only", i),
                f"{knob} must be a searched knob.{nearest_name(knob, tuple(search))}",
            )
        if knob in settings or knob in searched[:i]:
            raise doc.error(
                (*where, "only", i),
                f"{knob} must stand once in a tier, searched or set, got it twice.",
            )
    chosen = {knob: search[knob] for knob in searched}
    config = _check_tier(doc, where, {**baseline, **settings}, chosen, settings)
    problem = find_rungs_problem(entry.rungs, config.epochs)
    if problem is None and not is_recorded:
        problem = find_fidelity_problem(entry, config, chosen)
    if problem is not None:
        raise doc.error((*where, "rungs"), problem)
    try:
        seconds = parse_duration(entry.max_time) if entry.max_time is not None else None
    except ConfigError as exc:
        raise doc.error((*where, "max_time"), str(exc)) from exc
    written = entry.model_dump(include=set(TrialBudget.model_fields))
    return Tier(Budget(**written, max_time_seconds=seconds), settings, searched)


def _check_tier(
    doc: Document, where: Where, values: dict[str, Any], search: Searched, settings: dict[str, Any]
) -> TrainConfig:
    if problem := find_conflict(values, search):
        raise doc.error((*where, "set"), problem)
    config = TrainConfig(**values)
    if config.val_size == 0:
        raise doc.error(
            (*where, "set", "val_size"),
            "val_size >= 1 must hold in a search, got 0. Trials need it.",
        )
    dead = find_inactive(config, search)
    for knob in (*settings, *search):
        if knob in dead:
            raise doc.error(
                (*where, "set" if knob in settings else "only", knob),
                describe_inactive(knob, dead[knob]),
            )
    return config
