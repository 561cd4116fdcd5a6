"""A network of one's own in a space: its arguments, and the file to start from."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from tune_cifar.errors import ConfigError, SpaceError
from tune_cifar.schema import TrainConfig, fold_arguments
from tune_cifar.space.layout import Choices, Range
from tune_cifar.space.reader import parse_space
from tune_cifar.space.select import SearchSpace, parse_setting, select_tier
from tune_cifar.space.template import make_space_text

ARGUMENTS: list[tuple[str, str, Any]] = [
    ("width", "int", 16),
    ("scale", "float", 1e-5),
    ("deep", "bool", False),
    ("kind", "str", "relu"),
]
SEARCHED = """\
  model_args.width: {low: 8, high: 32, step: 8}
  model_args.scale: {low: 1.0e-6, high: 1, log: true}
  model_args.deep: {choices: [false, true]}
  model_args.kind: {choices: ["relu", "gelu"]}
"""


def make_text(searched: str = SEARCHED) -> str:
    text = make_space_text("wide.py:WideNet", "wide", True, ARGUMENTS)
    return text.replace("search:\n", f"search:\n{searched}")


def load(text: str, pins: dict[str, Any] | None = None, tier: str = "full") -> SearchSpace:
    return select_tier(parse_space(text, Path("wide.yaml")), tier, pins)


@pytest.mark.parametrize("takes_dropout", [True, False])
@pytest.mark.parametrize("arguments", [[], ARGUMENTS])
@pytest.mark.parametrize("measured", [None, 0.0123])
def test_the_file_to_start_from_is_sound_in_every_tier(
    takes_dropout: bool, arguments: list[Any], measured: float | None
) -> None:
    text = make_space_text("a.b:make", "make", takes_dropout, arguments, measured)
    for tier in ("full", "cpu", "night"):
        space = select_tier(parse_space(text, Path("make.yaml")), tier)
        assert space.obstacle is None and space.baseline.max_lr == (measured or 0.1)
        assert ("dropout" in space.distributions) == takes_dropout
        assert len(space.baseline.arguments) == len(arguments)
        assert len(space.points) == (1 if tier == "cpu" else 2)
    assert space.header.describe_published() == ""


def test_each_argument_has_a_line_that_would_search_it() -> None:
    text = make_space_text("wide.py:WideNet", "wide", True, ARGUMENTS)
    lines = [line.strip()[2:] for line in text.splitlines() if "# model_args." in line]
    assert lines[0] == "model_args.width: {low: 8, high: 32}"
    assert lines[2] == "model_args.deep: {choices: [false, true]}"
    for line in lines:
        uncommented = text.replace(f"# {line}", line).replace(", B]", ', "B"]')
        assert len(load(uncommented).distributions) == len(load(text).distributions) + 1


def test_an_argument_without_a_default_is_to_be_filled_in() -> None:
    text = make_space_text("wide.py:WideNet", "wide", False, [("depth", "int", None)])
    assert "    depth: FILL IN  # int\n" in text
    assert "# model_args.depth: {choices: [A, B]}" in text


def test_a_default_that_no_file_can_hold_stays_the_constructors() -> None:
    more: list[tuple[str, str, Any]] = [("limit", "float", math.inf), ("fill", "float", math.nan)]
    text = make_space_text("wide.py:WideNet", "wide", True, [*ARGUMENTS, *more])
    assert text == make_space_text("wide.py:WideNet", "wide", True, ARGUMENTS)
    assert "model_args:" not in make_space_text("wide.py:WideNet", "wide", True, more)


def test_arguments_are_searched_by_their_own_types() -> None:
    file = parse_space(make_text(), Path("wide.yaml"))
    assert file.search["model_args.width"] == Range(8, 32, step=8)
    assert file.search["model_args.scale"] == Range(1e-6, 1.0, log=True)
    assert file.search["model_args.kind"] == Choices(("relu", "gelu"))
    space = load(make_text())
    kinds = {name: type(found).__name__ for name, found in space.distributions.items()}
    assert kinds["model_args.width"] == "IntDistribution"
    assert kinds["model_args.scale"] == "FloatDistribution"
    assert space.baseline_params["model_args.kind"] == "relu"
    assert space.config({"model_args.width": 24}).get("model_args.width") == 24


def test_arguments_are_pinned_and_set_like_any_other() -> None:
    space = load(make_text(), {"model_args.width": 24})
    assert space.baseline.arguments["model_args.width"] == 24
    assert "model_args.width" not in space.distributions
    text = make_text("").replace("set: {epochs: 8}", "set: {epochs: 8, model_args.width: 32}")
    assert load(text, tier="night").baseline.get("model_args.width") == 32
    assert parse_setting("model_args.kind=gelu") == ("model_args.kind", "gelu")
    with pytest.raises(ConfigError, match=r"Did you mean model_args.width\?"):
        load(make_text(), {"model_args.widht": 24})
    rule = "model_args.width must be a number (up to 1.8e+308), text, true or false"
    with pytest.raises(ConfigError, match=re.escape(f"{rule}, got [1].")):
        load(make_text(), {"model_args.width": [1]})
    with pytest.raises(ConfigError, match=re.escape(f"{rule}, got {10**400}.")):
        parse_setting(f"model_args.width={10**400}")


@pytest.mark.parametrize("written", ["[1, 2]", "[ab, cd]", "3"])
def test_arguments_that_are_no_names_with_values_are_refused_with_their_line(written: str) -> None:
    text = make_space_text("wide.py:WideNet", "wide", True, [("width", "int", 16)])
    text = text.replace("  model_args:\n    width: 16\n", f"  model_args: {written}\n")
    line = 1 + text.splitlines().index(f"  model_args: {written}")
    with pytest.raises(SpaceError) as caught:
        load(text)
    rule = f"wide.yaml:{line}: model_args must be names with values, got "
    assert str(caught.value).startswith(rule) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("searched", "sentence"),
    [
        (
            "  model_args.widht: {low: 8, high: 32}\n",
            "model_args.widht must have a value in the baseline's model_args. Did you mean width?",
        ),
        (
            "  model_args.width: {low: 8.5, high: 32}\n",
            "model_args.width.low must be a number of the knob's type (int), got 8.5.",
        ),
        (
            "  model_args.width: {low: wide, high: 32}\n",
            "model_args.width.low must be a number of the knob's type (int), got 'wide'.",
        ),
        ("  model_args: {low: 8, high: 32}\n", "model_args must not be searched: its arguments"),
        (
            "  model_args.width: {low: 32, high: 64}\n",
            "model_args.width: the baseline's value must lie within the distribution",
        ),
    ],
)
def test_a_searched_argument_that_breaks_a_rule_is_named_with_its_line(
    searched: str, sentence: str
) -> None:
    text = make_text(searched)
    line = 1 + text.splitlines().index(searched.splitlines()[0])
    with pytest.raises(SpaceError) as caught:
        load(text)
    assert str(caught.value).startswith(f"wide.yaml:{line}: {sentence}")


def test_arguments_belong_to_a_network_of_ones_own(tmp_path: Path) -> None:
    text = make_text().replace("model: wide.py:WideNet", "model: s7")
    with pytest.raises(SpaceError, match="model_args must be empty for s7, got deep, kind"):
        load(text)


def test_named_arguments_are_folded_into_the_config() -> None:
    values = {"max_lr": 0.1, "model_args": {"a": 1}, "model_args.b": 2.5, "model_args.a": 3}
    assert fold_arguments(values) == {"max_lr": 0.1, "model_args": {"a": 3, "b": 2.5}}
    usual = {"optimizer": "sgd", "schedule": "constant", "max_lr": 0.1, "batch_size": 8}
    own = TrainConfig(model="pkg.nets:Net", epochs=1, **usual, **{"model_args.b": 2.5})
    assert TrainConfig(**own.model_dump(mode="json")) == own
    assert own.is_own and own.get("max_lr") == 0.1
    with pytest.raises(ConfigError, match="model_args"):
        TrainConfig(model="pkg.nets:Net", epochs=1, model_args=3, **usual)
