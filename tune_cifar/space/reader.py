"""Check a search-space file, from its text to its last tier, and change a range in it."""

from __future__ import annotations

import difflib
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tune_cifar.errors import (
    ConfigError,
    SpaceError,
    describe_problem,
    did_you_mean,
    first_problem,
)
from tune_cifar.schema import ARGUMENT, KNOBS, TrainConfig, inactive_knobs
from tune_cifar.space.document import Document, Where, read_document, set_values
from tune_cifar.space.layout import (
    OPTIONAL_TIERS,
    TIERS,
    WINDOW_FACTORS,
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
    find_replicates_problem,
    find_rungs_problem,
    find_value_problem,
    is_known,
    kind_of,
    normalise,
    parse_duration,
)


def describe_path(path: Path) -> str:
    """Return a path as errors name it: relative if it is below the working directory."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else path)


def parse_space(text: str, path: Path, is_recorded: bool = False) -> SpaceFile:
    """Check the text of a space file; the first broken rule is the error.

    Args:
        path: names the file; it is not read.
        is_recorded: whether the text is a record's (see `parse_recorded`).

    Raises:
        SpaceError: one sentence with file, line, rule, value and the nearest name.
    """
    doc = read_document(text, describe_path(path))
    if not isinstance(doc.data, dict):
        raise doc.error((), f"the file must hold names with values, got {doc.data!r}.")
    try:
        raw = SpaceText.model_validate(doc.data)
    except ValidationError as exc:
        raise _translate(doc, exc) from exc
    if raw.space != path.stem:
        sentence = f"space must be the file's name, got {raw.space!r} in {path.name}."
        raise doc.error(("space",), sentence)
    baseline = _read_knobs(doc, ("baseline",), raw.baseline)
    search: Searched = {
        name: _read_entry(doc, name, entry, baseline) for name, entry in raw.search.items()
    }
    _check_baseline(doc, baseline, search, is_recorded)
    points = tuple(_read_point(doc, i, baseline, search) for i in range(len(raw.points)))
    if not {*TIERS} <= {*raw.budget} <= {*TIERS, *OPTIONAL_TIERS}:
        rule = f"budget must hold the tiers {' and '.join(TIERS)} and may hold {OPTIONAL_TIERS[0]}"
        raise doc.error(("budget",), f"{rule}, got {', '.join(raw.budget)}.")
    tiers = {
        name: _read_tier(doc, name, entry, baseline, search, is_recorded)
        for name, entry in raw.budget.items()
    }
    header = SpaceHeader(**raw.model_dump(include=set(SpaceHeader.model_fields)))
    return SpaceFile(path, text, header, baseline, search, points, tiers)


def parse_recorded(text: str, name: str) -> SpaceFile:
    """Check the text of a space that a record holds.

    Not checked is that its rungs suit its fidelity, and that no rule between knobs breaks in the
    search: these rules are younger than some records.

    Args:
        name: the space's.

    Raises:
        SpaceError: as `parse_space`.
    """
    return parse_space(text, Path(f"{name}.yaml"), is_recorded=True)


def find_range(file: SpaceFile, knob: str) -> Range:
    """Return the range that a knob is searched in.

    Raises:
        SpaceError: when the knob is not searched, or by choices.
    """
    found = file.search.get(knob)
    if not isinstance(found, Range):
        got = "a knob that is not searched" if found is None else "choices"
        rule = f"{knob} must be searched between low and high"
        raise SpaceError(f"{describe_path(file.path)}: {rule}, got {got}.")
    return found


def set_range(file: SpaceFile, knob: str, wanted: Range) -> str:
    """Return the file's text with another range of a knob; everything else in it stays.

    Raises:
        SpaceError: as `find_range`, and when the new text breaks a rule of space files.
    """
    found = asdict(find_range(file, knob))
    changed = {word: value for word, value in asdict(wanted).items() if value != found[word]}
    text = set_values(file.text, ("search", knob), changed) if changed else file.text
    edited = parse_space(text, file.path)
    assert edited == replace(file, text=text, search={**file.search, knob: wanted})
    return text


def describe_edit(file: SpaceFile, text: str) -> str:
    """Return the change of the file as a unified diff; empty if there is none."""
    label = describe_path(file.path)
    before, after = (part.splitlines(keepends=True) for part in (file.text, text))
    return "".join(difflib.unified_diff(before, after, label, f"{label} (proposed)"))


def _translate(doc: Document, exc: ValidationError) -> SpaceError:
    """Return pydantic's first problem with file and line, and of its place the last name alone."""
    problem = first_problem(exc)
    loc = problem["loc"]
    inner: dict[str, type[BaseModel]] = {"published": Published, "budget": TierText}
    model = inner.get(str(loc[0]), SpaceText) if len(loc) > 1 else SpaceText
    if "sampler" in loc[:-1]:
        model = SamplerBudget
    last = max(i for i, part in enumerate(loc) if isinstance(part, str))
    problem["loc"] = loc[last:]
    return doc.error(loc, describe_problem(problem, model))


def _read_knobs(doc: Document, where: Where, values: dict[str, Any]) -> dict[str, Any]:
    """Return knobs with fixed values, each checked by itself."""
    for name, value in values.items():
        if is_known(name) or name == "model_args":
            problem = find_value_problem(name, value, name)
        else:
            problem = f"{name} is not a known knob.{did_you_mean(name, KNOBS)}"
        if problem is not None:
            raise doc.error((*where, name), problem)
    return {name: normalise(name, value) for name, value in values.items()}


def _read_entry(
    doc: Document, name: str, entry: dict[str, Any], baseline: dict[str, Any]
) -> Range | Choices:
    """Return a searched knob's distribution."""
    where = ("search", name)
    if name in STRUCTURAL:
        hint = "Set it under baseline or in a tier."
        raise doc.error(where, f"{name} must not be searched: {STRUCTURAL[name]}. {hint}")
    if not is_known(name):
        raise doc.error(where, f"{name} is not a known knob.{did_you_mean(name, KNOBS)}")
    kind = kind_of(name)
    if name.startswith(ARGUMENT):
        arguments = dict(baseline.get("model_args", ()))
        if name.removeprefix(ARGUMENT) not in arguments:
            hint = did_you_mean(name.removeprefix(ARGUMENT), arguments)
            raise doc.error(where, f"{name} must have a value in the baseline's model_args.{hint}")
        kind = type(arguments[name.removeprefix(ARGUMENT)])
    ranged = "choices" not in entry and kind in (int, float)
    allowed = ("low", "high", "log", "step") if ranged else ("choices",)
    for word in entry:
        if word not in allowed:
            rule = f"{name} must be given by {', '.join(allowed)}"
            raise doc.error((*where, word), f"{rule}, got {word}.{did_you_mean(word, allowed)}")
    return _read_range(doc, name, entry, kind) if ranged else _read_choices(doc, name, entry)


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
        rule = f"{name}.choices must be two or more different values"
        raise doc.error(where, f"{rule}, got {list(values)}.")
    return Choices(values)


def _read_range(doc: Document, name: str, entry: dict[str, Any], kind: type) -> Range:
    where = ("search", name)
    log = entry.get("log", False)
    if not isinstance(log, bool):
        raise doc.error((*where, "log"), f"{name}.log must be true or false, got {log!r}.")
    for word in ("low", "high"):
        if word not in entry:
            raise doc.error(where, f"{name}.{word} must be given.")
        value, at = entry[word], (*where, word)
        if log and isinstance(value, int | float) and value <= 0:
            rule = f"{name}.{word} > 0 must hold for log: true"
            example = "1.0e-5" if kind is float else "1"
            raise doc.error(at, f"{rule}, got {value}. Use e.g. {example}.")
        if problem := find_value_problem(name, value, f"{name}.{word}"):
            raise doc.error(at, problem)
        if isinstance(value, bool | str) or (kind is int and not isinstance(value, int)):
            rule = f"{name}.{word} must be a number of the knob's type ({kind.__name__})"
            raise doc.error(at, f"{rule}, got {value!r}.")
    low, high = kind(entry["low"]), kind(entry["high"])
    if low >= high:
        raise doc.error(where, f"{name}.low < {name}.high must hold, got {low} and {high}.")
    step = entry.get("step")
    if "step" in entry and (problem := _find_step_problem(kind, step, Range(low, high, log))):
        raise doc.error((*where, "step"), f"{name}.step {problem}, got {step!r}.")
    return Range(low, high, log, step)


def _find_step_problem(kind: type, step: Any, found: Range) -> str | None:
    if found.log:
        return "must not be given with log: true"
    if isinstance(step, bool) or not isinstance(step, int if kind is int else int | float):
        return f"must be a number of the knob's type ({kind.__name__})"
    # At most a million steps: beyond, the remainder below would not be exact.
    if not (found.high - found.low) / 1e6 <= step <= found.high - found.low:
        return "must be positive and split high - low into at most a million parts"
    if (Decimal(str(found.high)) - Decimal(str(found.low))) % Decimal(str(step)) != 0:
        return f"must divide high - low = {found.high - found.low:g}"
    return None


def _check_baseline(
    doc: Document, baseline: dict[str, Any], search: Searched, is_recorded: bool
) -> None:
    """Refuse a baseline that is no configuration or lies outside the search, and inactive knobs."""
    if problem := find_conflict(baseline, {}):
        raise doc.error(("baseline",), problem)
    if not is_recorded and (problem := find_conflict(baseline, search)):
        raise doc.error(("search",), f"everywhere in the search, {problem}")
    config = TrainConfig(**baseline)
    for name, entry in search.items():
        value = config.get(name)
        if not entry.contains(value):
            rule = f"{name}: the baseline's value must lie within the distribution ({entry})"
            raise doc.error(("search", name), f"{rule}, got {value}. The baseline is trial 0.")
    inactive = find_inactive(config, search)
    for part, names in (("baseline", baseline), ("search", search)):
        for name in names:
            if name in inactive:
                raise doc.error((part, name), describe_inactive(name, inactive[name]))


def _read_point(
    doc: Document, index: int, baseline: dict[str, Any], search: Searched
) -> dict[str, Any]:
    where = ("points", index)
    point = _read_knobs(doc, where, doc.data["points"][index])
    for name, value in point.items():
        if name not in search:
            raise doc.error((*where, name), f"{name} is not a searched knob.")
        if not search[name].contains(value):
            rule = f"{name} must lie within its distribution ({search[name]})"
            raise doc.error((*where, name), f"{rule}, got {value}.")
    inactive = inactive_knobs(TrainConfig(**{**baseline, **point}))
    for name in point:
        if name in inactive:
            raise doc.error((*where, name), describe_inactive(name, inactive[name]))
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
        at = (*where, "only", i)
        if knob not in search:
            raise doc.error(at, f"{knob} is not a searched knob.{did_you_mean(knob, search)}")
        if knob in settings or knob in searched[:i]:
            rule = f"{knob} must appear once in a tier, searched or set"
            raise doc.error(at, f"{rule}, got it twice.")
    chosen = {knob: search[knob] for knob in searched}
    values = {**baseline, **settings}
    if problem := find_conflict(values, {} if is_recorded else chosen):
        raise doc.error((*where, "set"), problem)
    config = TrainConfig(**values)
    _check_tier(doc, where, config, chosen, settings)
    problem = find_rungs_problem(entry.rungs, config.epochs)
    if problem is None and not is_recorded:
        problem = find_fidelity_problem(entry, config, chosen)
    if problem is not None:
        raise doc.error((*where, "rungs"), problem)
    if problem := find_replicates_problem(entry.replicates, entry.rungs, entry.fidelity):
        raise doc.error((*where, "replicates"), problem)
    try:
        seconds = parse_duration(entry.max_time) if entry.max_time is not None else None
    except ConfigError as exc:
        raise doc.error((*where, "max_time"), str(exc)) from exc
    written = entry.model_dump(include=set(TrialBudget.model_fields))
    written["window"] = entry.window or WINDOW_FACTORS * entry.reduction_factor
    written["replicates"] = max(entry.replicates.values(), default=1)
    return Tier(Budget(**written, max_time_seconds=seconds), settings, searched)


def _check_tier(
    doc: Document, where: Where, config: TrainConfig, search: Searched, settings: dict[str, Any]
) -> None:
    """Refuse a tier without validation, and inactive knobs that it sets or searches."""
    if config.val_size == 0:
        sentence = "val_size >= 1 must hold in a search, got 0. Trials are compared on it."
        raise doc.error((*where, "set", "val_size"), sentence)
    inactive = find_inactive(config, search)
    for knob in (*settings, *search):
        if knob in inactive:
            part = "set" if knob in settings else "only"
            raise doc.error((*where, part, knob), describe_inactive(knob, inactive[knob]))
