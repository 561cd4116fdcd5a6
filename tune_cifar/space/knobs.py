"""The knobs as people look them up: what each is, its values, when it has an effect, which spaces search it.

Nothing is said here a second time: words and bounds are the schema's, effects are asked of `inactive_knobs`, reasons of
`rules`, the rest of the space files.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, get_args

from tune_cifar.schema import KNOBS, TrainConfig, inactive_knobs
from tune_cifar.space.rules import DECIDING, STRUCTURAL, kind_of
from tune_cifar.space.select import list_spaces, read_space

# Of the table that KnobInfo.row makes.
COLUMNS = ("knob", "what it is", "values", "default", "read by", "has an effect", "searched in")
Combination = tuple[Any, ...]
"""A value of each DECIDING knob."""


@dataclass(frozen=True)
class KnobInfo:
    """One knob.

    Attributes:
        what: label and explanation.
        values: type and bounds, or the words.
        default: None where a file must give it.
        read_by: the room that uses it.
        effect: the settings of other knobs with which it has one; empty for always.
        spaces: names of the spaces that search it.
        not_searched: why no space may, or empty.
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
        default = "must be given" if self.default is None else json.dumps(self.default)
        searched = ", ".join(self.spaces) or (
            f"never: {self.not_searched}" if self.not_searched else "no space yet"
        )
        values = f"{self.values} ({self.unit})" if self.unit else self.values
        return (
            self.name,
            self.what,
            values,
            default,
            self.read_by,
            self.effect or "always",
            searched,
        )


def list_knobs() -> list[KnobInfo]:
    """Every knob in the schema's order.

    Raises:
        SpaceError: when one of the spaces that can be named breaks a rule.
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
    """The text below each knob in the schema's source. Pydantic would read it whenever a process starts: 15 ms."""
    (definition,) = ast.parse(inspect.getsource(TrainConfig)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in itertools.pairwise(definition.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                value=ast.Constant(value=str(text))
            ):
                found[name] = " ".join(text.split())
    return found


def _describe_values(knob: dict[str, Any]) -> str:
    """Type and bounds, of a knob in JSON schema's words."""
    if "enum" in knob:
        return ", ".join(knob["enum"])
    if knob["type"] == "boolean":
        return "true, false"
    if knob["type"] == "array":
        return f"list of {knob['items']['type']}s"
    low = f"[{knob['minimum']:g}" if "minimum" in knob else f"({knob['exclusiveMinimum']:g}"
    high = f"{knob['maximum']:.10g}]" if "maximum" in knob else f"{knob['exclusiveMaximum']:g})"
    return f"{knob['type']} in {low}, {high}"


def describe_effect(name: str) -> str:
    """The settings of the deciding knobs with which a knob changes something, as `with ...` or `unless ...`; empty for
    a knob that always does."""
    dead = _find_dead()
    alive = [combination for combination in dead if name not in dead[combination]]
    if len(alive) == len(dead):
        return ""
    for word, combinations in (("with", alive), ("unless", [c for c in dead if name in dead[c]])):
        shares = [
            {combination[place] for combination in combinations} for place in range(len(DECIDING))
        ]
        if len(combinations) == len(
            list(itertools.product(*shares))
        ):  # each setting counts by itself
            told = zip(DECIDING, shares, strict=True)
            return f"{word} " + ", ".join(
                _describe_share(knob, s) for knob, s in told if len(s) < len(_settings(knob))
            )
    return "depends on more than one rule"


@functools.cache
def _find_dead() -> dict[Combination, Collection[str]]:
    """The dead knobs of every combination."""
    base = TrainConfig(
        model="s7", optimizer="sgd", schedule="constant", max_lr=0.1, batch_size=2, epochs=1
    )
    combinations = itertools.product(*map(_settings, DECIDING))
    return {
        c: frozenset(inactive_knobs(base.model_copy(update=dict(zip(DECIDING, c, strict=True)))))
        for c in combinations
    }


def _settings(name: str) -> tuple[Any, ...]:
    """All values of a deciding knob, of a number off and on."""
    kind = kind_of(name)
    return get_args(kind) or ((True, False) if kind is bool else (0, 1))


def _describe_share(name: str, share: set[Any]) -> str:
    if kind_of(name) is bool:
        return f"{name} {str(share == {True}).lower()}"
    if get_args(kind_of(name)):
        return f"{name} {' or '.join(value for value in _settings(name) if value in share)}"
    return f"{name} {'> 0' if share == {1} else '= 0'}"
