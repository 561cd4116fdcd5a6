"""The table of knobs: what each is, its values, when it has an effect, which spaces search it.

All of it is read elsewhere: words and bounds in the schema, effects from `inactive_knobs`, reasons
in `rules`, the rest in the space files.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import math
from dataclasses import dataclass
from typing import Any, get_args

from tune_cifar.schema import KNOBS, TrainConfig, inactive_knobs
from tune_cifar.space.rules import DECIDING, STRUCTURAL, kind_of
from tune_cifar.space.select import list_spaces, read_space

# Column names of KnobInfo.row.
COLUMNS = ("knob", "what it is", "values", "default", "read by", "has an effect", "searched in")
Combination = tuple[Any, ...]
"""A value of each DECIDING knob."""


@dataclass(frozen=True)
class KnobInfo:
    """One knob.

    Attributes:
        what: label and explanation.
        values: type and bounds, or the words.
        default: None if a file must give the knob.
        read_by: the module that uses it.
        effect: the settings of other knobs with which it has one; empty for always.
        spaces: names of the spaces that search it.
        not_searched: why no space may search it, or empty.
    """

    name: str
    what: str
    values: str
    unit: str
    default: Any
    read_by: str
    effect: str
    spaces: tuple[str, ...]
    not_searched: str

    @property
    def row(self) -> tuple[str, ...]:
        """A text for each of COLUMNS."""
        values = f"{self.values} ({self.unit})" if self.unit else self.values
        default = "must be given" if self.default is None else json.dumps(self.default)
        effect = self.effect or "always"
        searched = f"never: {self.not_searched}" if self.not_searched else "no space yet"
        searched = ", ".join(self.spaces) or searched
        return (self.name, self.what, values, default, self.read_by, effect, searched)


def list_knobs() -> list[KnobInfo]:
    """Return every knob in the schema's order.

    Raises:
        SpaceError: when one of the named spaces breaks a rule.
    """
    spaces = {path.stem: read_space(path).search for path in list_spaces()}
    schema, explanations = TrainConfig.model_json_schema()["properties"], _read_explanations()
    return [
        KnobInfo(
            name=name,
            what=": ".join(filter(None, (schema[name]["label"], explanations.get(name)))),
            values=_describe_values(schema[name]),
            unit=schema[name]["unit"],
            default=schema[name].get("default"),
            read_by=schema[name]["used_by"],
            effect=describe_effect(name),
            spaces=tuple(space for space, search in spaces.items() if name in search),
            not_searched=STRUCTURAL.get(name, ""),
        )
        for name in KNOBS
    ]


def _read_explanations() -> dict[str, str]:
    """Return the text below each knob in the schema's source.

    Pydantic can do it, but it would take 15 ms of every start of a process.
    """
    (definition,) = ast.parse(inspect.getsource(TrainConfig)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in itertools.pairwise(definition.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                found[name] = " ".join(str(text).split())
    return found


def _describe_values(knob: dict[str, Any]) -> str:
    """Return type and bounds of a knob, from its JSON schema."""
    if "enum" in knob:
        return ", ".join(knob["enum"])
    if knob["type"] == "boolean":
        return "true, false"
    if knob["type"] == "array":
        return f"list of {knob['items']['type']}s"
    low = f"[{knob['minimum']:g}" if "minimum" in knob else f"({knob['exclusiveMinimum']:g}"
    if not {"maximum", "exclusiveMaximum"} & {*knob}:  # the data set has the bound
        return f"{knob['type']} >= {knob['minimum']:g}"
    high = f"{knob['maximum']:.10g}]" if "maximum" in knob else f"{knob['exclusiveMaximum']:g})"
    return f"{knob['type']} in {low}, {high}"


def describe_effect(name: str) -> str:
    """Return the settings of the deciding knobs with which a knob changes something.

    As `with ...` or `unless ...`; empty for a knob that always does.
    """
    inactive = _find_inactive()
    without = [combination for combination, names in inactive.items() if name in names]
    if not without:
        return ""
    having = [combination for combination, names in inactive.items() if name not in names]
    for word, combinations in (("with", having), ("unless", without)):
        settings = [set(column) for column in zip(*combinations, strict=True)]
        # If these are all combinations of their settings, each setting counts by itself.
        if len(combinations) == math.prod(map(len, settings)):
            parts = zip(DECIDING, settings, strict=True)
            limits = [_describe(knob, some) for knob, some in parts if some != set(_settings(knob))]
            return f"{word} {', '.join(limits)}"
    return "depends on more than one rule"


@functools.cache
def _find_inactive() -> dict[Combination, set[str]]:
    """Return the inactive knobs of every combination of the deciding knobs."""
    base = TrainConfig(
        model="s7", optimizer="sgd", schedule="constant", max_lr=0.1, batch_size=2, epochs=1
    )
    found = {}
    for combination in itertools.product(*map(_settings, DECIDING)):
        config = base.model_copy(update=dict(zip(DECIDING, combination, strict=True)))
        found[combination] = set(inactive_knobs(config))
    return found


def _settings(name: str) -> tuple[Any, ...]:
    """Return all values of a deciding knob; of a number, off and on."""
    kind = kind_of(name)
    return get_args(kind) or ((True, False) if kind is bool else (0, 1))


def _describe(name: str, some: set[Any]) -> str:
    """Return some of a deciding knob's settings in words."""
    if kind_of(name) is bool:
        return f"{name} {str(some == {True}).lower()}"
    if get_args(kind_of(name)):
        return f"{name} {' or '.join(value for value in _settings(name) if value in some)}"
    return f"{name} {'> 0' if some == {1} else '= 0'}"
