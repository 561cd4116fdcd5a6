"""Changes one searched knob's range in the text of a space file; everything else in it stays as it stands."""

from __future__ import annotations

import codecs
import difflib
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from tune_cifar.errors import SpaceError
from tune_cifar.space.document import read_document
from tune_cifar.space.layout import Range, SpaceFile
from tune_cifar.space.reader import describe_path, parse_space

PACKAGED = Path(__file__).parents[1] / "search_spaces"


def check_editable(file: SpaceFile, knob: str) -> None:
    """Refuse what `edit_range` could not edit.

    Raises:
        SpaceError: the knob is not searched between two numbers on one line, or the file is the installed package's.
    """
    label = describe_path(file.path)
    if file.path.resolve().is_relative_to(PACKAGED.resolve()):
        hint = (
            f"Copy it into ./search_spaces, which is looked in first: cp {file.path} search_spaces/"
        )
        raise SpaceError(
            f"{label}: a space file of your own must be given to edit, got the package's copy. {hint}"
        )
    if not isinstance(file.search.get(knob), Range):
        got = "choices" if knob in file.search else "a knob that is not searched"
        raise SpaceError(f"{label}: {knob} must be searched between low and high, got {got}.")
    _split_entry(file, knob)


def edit_range(file: SpaceFile, knob: str, wanted: Range) -> str:
    """The file's text with another range of a knob on the line where it stands under `search`.

    Raises:
        SpaceError: as `check_editable`, and when the new text breaks a rule of space files.
    """
    check_editable(file, knob)
    lines, index, (before, after) = _split_entry(file, knob)
    log = ", log: true" if wanted.log else ""
    lines[index] = (
        f"{before}{{low: {_write_number(wanted.low)}, high: {_write_number(wanted.high)}{log}}}{after}"
    )
    text = "".join(lines)
    edited = parse_space(text, file.path)
    search = {**file.search, knob: wanted}
    assert edited == replace(file, text=text, search=search), "nothing but the range changes"
    return text


def describe_edit(file: SpaceFile, text: str) -> str:
    """The change as a unified diff; empty when there is none."""
    label = describe_path(file.path)
    before, after = (part.splitlines(keepends=True) for part in (file.text, text))
    return "".join(difflib.unified_diff(before, after, label, f"{label} (proposed)"))


def write_space(file: SpaceFile, text: str) -> None:
    """Put the new text in the file's place, whole or not at all.

    Raises:
        SpaceError: the file is no longer as it was read, or the disk does not take it.
    """
    path, label = file.path.resolve(), describe_path(file.path)
    new = path.with_name(f".{path.name}.{uuid4().hex[:8]}.new")
    try:
        raw = path.read_bytes()
        encoding = "utf-8-sig" if raw.startswith(codecs.BOM_UTF8) else "utf-8"
        if raw != file.text.encode(encoding):
            raise SpaceError(
                f"{label}: the file must be as it was read, got a changed one. Try again."
            )
        try:
            with new.open("wb") as out:
                out.write(text.encode(encoding))
                out.flush()
                os.fsync(out.fileno())
            shutil.copymode(path, new)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as exc:
        raise SpaceError(f"{label}: the file must be writable, got {exc.strerror!r}.") from exc


def _split_entry(file: SpaceFile, knob: str) -> tuple[list[str], int, tuple[str, str]]:
    """All lines, the index of the one that holds the knob's range, and what stands on it before and after the braces.

    Raises:
        SpaceError: when the range is not in braces on one line.
    """
    label = describe_path(file.path)
    line = read_document(file.text, label).lines["search", knob]
    lines = file.text.splitlines(keepends=True)
    found = re.fullmatch(
        rf"(\s*{knob}\s*:\s*)\{{[^{{}}#]*\}}(\s*(?:#.*)?)", lines[line - 1], re.DOTALL
    )
    if found is None:
        rule = f"{knob} must be given as {knob}: {{low: ..., high: ..., log: true}} on one line to be edited"
        raise SpaceError(f"{label}:{line}: {rule}, got another form.")
    return lines, line - 1, (found[1], found[2])


def _write_number(value: float) -> str:
    """As the space files write it: 5.2e-4, and 0.0 and from 0.1 on 0.52, 1.0, 100.0."""
    if value == 0 or value >= 0.1:
        return repr(value)
    texts = (f"{value:.{digits}e}" for digits in range(1, 17))
    mantissa, exponent = next(text for text in texts if float(text) == value).split("e")
    return f"{mantissa}e{int(exponent)}"
