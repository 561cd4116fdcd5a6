"""A complete space file for a network of one's own, to start from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

HEAD = """\
# Search space of {reference}. Format: search_spaces/README.md. Every line may be changed.
# `python -m tune_cifar spaces check FILE` says what is wrong in it.
space: {name}
source: a network of my own

baseline:  # trial 0: every gain is measured against it
  model: {reference}
{arguments}{dropout}  optimizer: sgd
  nesterov: true
  weight_decay: 5.0e-4
  schedule: onecycle
  max_lr: {max_lr}  # {why}
  pct_start: 0.3
  div_factor: 25.0
  final_div_factor: 1.0e+4
  batch_size: 128
  epochs: 24
  label_smoothing: 0.0
  train_size: 45000  # sizes are CIFAR-10's; with --data all images are taken
  val_size: 5000
  seed: 0
  crop_pad: 4
  hflip_p: 0.5

search:
  max_lr: {{low: {low}, high: {high}, log: true}}
{searched}  weight_decay: {{low: 0.0, high: 2.0e-3}}
  pct_start: {{low: 0.05, high: 0.5}}
  label_smoothing: {{low: 0.0, high: 0.2}}
  batch_size: {{choices: [64, 128, 256]}}
  crop_pad: {{low: 0, high: 6}}
  hflip_p: {{low: 0.0, high: 0.5}}

points:  # tried right after the baseline: what was good for the five networks of this package
{points}
budget:
  full:  # with a GPU
    trials: 60
    rungs: [3, 8, 24]
    reduction_factor: 3
    sampler: {{kind: gp, startup: 15}}
    seed: 0
  cpu:  # minutes on two cores
    trials: 100  # max_time ends the search before
    rungs: [1, 3]
    reduction_factor: 3
    sampler: {{kind: gp, startup: 8}}
    seed: 0
    max_time: 8m
    set: {{epochs: 3, train_size: 6000, val_size: 1000}}
    only: [max_lr, {only}pct_start, weight_decay]
  night:  # hours on two cores
    trials: 27
    rungs: [1, 3, 8]
    reduction_factor: 3
    sampler: {{kind: gp, startup: 9}}
    seed: 0
    set: {{epochs: 8}}
"""
# Bests of the five systems' searches where every network has the hyperparameter.
POINTS = (
    {"weight_decay": 5.0e-4, "label_smoothing": 0.1},
    {"weight_decay": 0.0, "pct_start": 0.2},
)


def make_space_text(
    reference: str,
    name: str,
    takes_dropout: bool,
    arguments: Iterable[tuple[str, str, Any]],
    measured_lr: float | None = None,
) -> str:
    """Return the text of a space file.

    Args:
        arguments: name, kind (int, float, bool or str) and default of each further argument of the
            constructor; a default of None becomes a line to fill in. One of inf or nan, which a
            file cannot hold, stays the constructor's.
        measured_lr: from an LR range test; None takes a usual value.
    """
    given = [argument for argument in arguments if not _is_endless(argument[2])]
    lines = [f"    {arg}: {_write(default)}" for arg, _, default in given if default is not None]
    missing = [f"    {arg}: FILL IN  # {kind}" for arg, kind, default in given if default is None]
    text = "".join(f"{line}\n" for line in [*lines, *missing])
    max_lr = measured_lr or 0.1
    searched = "".join(_suggest(*argument) for argument in given)
    dropout = "  dropout: {low: 0.0, high: 0.3}\n" if takes_dropout else ""
    return HEAD.format(
        reference=reference,
        name=name,
        arguments=f"  model_args:\n{text}" if given else "",
        dropout="  dropout: 0.0\n" if takes_dropout else "",
        max_lr=_write(max_lr),
        why="from an LR range test" if measured_lr else "usual; `--measure` runs an LR range test",
        low=_write(_round(max_lr / 20)),
        high=_write(min(100.0, _round(max_lr * 10))),
        searched=dropout + searched,
        points="".join(f"  - {_write_map(point)}\n" for point in POINTS),
        only="dropout, " if takes_dropout else "",
    )


def _is_endless(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _suggest(name: str, kind: str, default: Any) -> str:
    """Return a line that searches an argument, as a comment: only its author knows its range."""
    if kind == "bool":
        wanted = "{choices: [false, true]}"
    elif kind == "str" or default is None:
        wanted = "{choices: [" + (_write(default) if default is not None else "A") + ", B]}"
    elif kind == "int":
        low, high = max(1, default // 2), max(2, default * 2)
        wanted = f"{{low: {low}, high: {high}}}"
    else:
        wanted = (
            f"{{low: {_write(_round(default / 2))}, high: {_write(_round(default * 2) or 1.0)}}}"
        )
    return f"  # model_args.{name}: {wanted}\n"


def _round(value: float) -> float:
    """Return a number with two digits."""
    return float(f"{value:.2g}")


def _write(value: Any) -> str:
    """Return a value as YAML 1.2 has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = repr(value)
        if "e" in text and "." not in text:  # 1e-05
            mantissa, exponent = text.split("e")
            return f"{mantissa}.0e{int(exponent)}"
        return text if math.isfinite(value) else "0.0"
    if isinstance(value, str):
        return f'"{value}"'
    return str(value)


def _write_map(values: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {_write(value)}" for name, value in values.items()) + "}"
