"""Every error that a user can meet, each one sentence: `where: rule, got value. Hint.`

TuneCifarError
├── ConfigError        a training configuration or a runtime option breaks a rule
├── SpaceError         a search-space file breaks a rule (file, line, rule, nearest name)
├── DataError          CIFAR-10 is missing, truncated, altered or cannot be downloaded
├── CheckpointError    a checkpoint is damaged or belongs to another configuration
│   └── DiskFullError  the disk is full: no checkpoint or weights could be written
├── RecordError        a search's record cannot be read, or a name is taken or unknown
│   ├── NameTakenError     a record of the name exists already
│   └── RenamedError       the folder of a record has another name than the record
├── TrackingError      MLflow cannot be reached or refuses
├── ExportError        an exported file does not compute what the network computes
└── Diverged           the loss is nan or inf: a result of a trial, not a fault of the program
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

# Pydantic's types of broken bounds: the key of the bound in the problem's context, and its sign.
_BOUNDS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}
# Pydantic's types of values that are no collection, and what they must be.
_COLLECTIONS = {
    "tuple_type": "a list",
    "dict_type": "names with values",
    "model_type": "names with values",
}


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ` Did you mean X?` for the closest of the names, or an empty text if none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def hide_credentials(text: str) -> str:
    """Replace `user:password@` (or `token@`) in every address of a text by `***@`.

    So are a password that is not escaped (`user:pass/word@`) and one that stands after a `?`.
    """
    text = re.sub(r"(?<=://)[^/\s]\S*@", "***@", text)
    return re.sub(r"(?i)(?<=[?&])((?:password|passwd|pwd|token)=)[^&\s'\"]+", r"\1***", text)


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first problem of a pydantic error as a sentence."""
    return describe_problem(first_problem(error), model)


def first_problem(error: ValidationError) -> ErrorDetails:
    """Return an unknown name before all else: often it is a missing name misspelt."""
    problems = error.errors(include_url=False)
    return min(problems, key=lambda problem: problem["type"] != "extra_forbidden")


def describe_problem(problem: ErrorDetails, model: type[BaseModel]) -> str:
    """Return one pydantic problem as a sentence: `max_lr > 0 must hold, got -1.`"""
    where = ".".join(str(part) for part in problem["loc"]) or "the file"
    context, got = problem.get("ctx", {}), problem["input"]
    kind = problem["type"]
    if kind == "extra_forbidden":
        return f"{where} is not a known name.{did_you_mean(where, model.model_fields)}"
    if kind == "missing":
        return f"{where} must be given."
    if kind == "json_invalid":
        return f"{where} must be JSON, got: {context['error']}."
    if kind == "too_short":
        return f"{where} must not be empty."
    if kind in _COLLECTIONS:
        return f"{where} must be {_COLLECTIONS[kind]}, got {got!r}."
    if kind == "value_error":
        sentence = str(context["error"])
        return sentence if sentence.endswith((".", "?")) else f"{sentence}."
    if kind in _BOUNDS:
        key, sign = _BOUNDS[kind]
        bound = context[key] if isinstance(context[key], int) else f"{context[key]:g}"
        return f"{where} {sign} {bound} must hold, got {got!r}."
    if kind == "literal_error":
        field = model.model_fields.get(where)
        options = get_args(field.annotation) if field is not None else ()
        hint = did_you_mean(str(got), map(str, options))
        return f"{where} must be {context['expected']}, got {got!r}.{hint}"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {got!r}."


class TuneCifarError(Exception):
    """Base of all errors that the command line shows as one sentence with exit status 1."""


class ConfigError(TuneCifarError):
    """A training configuration or a runtime option breaks a rule."""


class SpaceError(TuneCifarError):
    """A search-space file breaks a rule."""


class DataError(TuneCifarError):
    """The data set is missing, truncated, altered or cannot be downloaded."""


class CheckpointError(TuneCifarError):
    """A checkpoint is damaged or belongs to another configuration."""


class DiskFullError(CheckpointError):
    """The disk is full: no checkpoint or weights could be written."""


class RecordError(TuneCifarError):
    """A search's record cannot be read, or a search's name is taken or unknown."""


class NameTakenError(RecordError):
    """A record of the name exists already."""


class RenamedError(RecordError):
    """The folder of a record has another name than the record: it was renamed or copied."""


class TrackingError(TuneCifarError):
    """The MLflow store cannot be reached or refuses."""


class ExportError(TuneCifarError):
    """An exported file does not compute what the network computes."""


class Diverged(TuneCifarError):  # noqa: N818  (a result of a trial, not a fault)
    """The training loss was nan or inf.

    Attributes:
        epoch: the epoch in which it happened, from 1.
        step: the optimizer step in which it happened, from 1 at the start of the training.
    """

    def __init__(self, epoch: int, step: int) -> None:
        super().__init__(
            "training: the loss must be finite, "
            f"got nan or inf at epoch {epoch}, step {step}. Lower max_lr."
        )
        self.epoch = epoch
        self.step = step

    def __reduce__(self) -> tuple[type[Diverged], tuple[int, int]]:
        return (Diverged, (self.epoch, self.step))
