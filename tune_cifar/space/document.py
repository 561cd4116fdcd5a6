"""YAML 1.2 read strictly, as plain data with line numbers.

Numbers mean what they look like (1e-3 is a number, which PyYAML reads as text), a repeated name is
refused (PyYAML keeps the last one silently), and so is what a settings file does not need: anchors,
tags, directives, deep nesting. (`read_space` limits the size.)
"""

from __future__ import annotations

import io
import re
import sys
import textwrap
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from tune_cifar.errors import SpaceError

_TAG = "tag:yaml.org,2002:"
Where = tuple[str | int, ...]
"""The path to a part of a document: names and indices from the top."""

# Levels of nesting. A space file needs 6: document, budget, tier, set, a list, its items.
MAX_DEPTH = 10
# Characters of a sentence that are shown: a file may hold a value of any length.
MAX_SENTENCE = 500


@dataclass
class Document:
    """Plain data (dict, tuple, str, int, float, bool, None) and the line number of each part."""

    label: str
    data: Any = None
    lines: dict[Where, int] = field(default_factory=lambda: {(): 1})

    def error(self, where: Where, sentence: str) -> SpaceError:
        """Return the error `label:line: sentence`; a missing part has its parent's line."""
        while where not in self.lines:
            where = where[:-1]
        return make_error(self.label, self.lines[where], sentence)


def make_error(label: str, line: int, sentence: str) -> SpaceError:
    """Return the error `label:line: sentence`.

    A quoted part of the file can neither flood nor control the terminal: a long sentence is cut in
    its middle, and what is not printable is escaped.
    """
    if len(sentence) > MAX_SENTENCE:
        sentence = f"{sentence[: MAX_SENTENCE // 2]} ... {sentence[-MAX_SENTENCE // 2 :]}"
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in sentence)
    return SpaceError(f"{label}:{line}: {shown}")


def read_document(text: str, label: str) -> Document:
    """Parse one document.

    Args:
        label: names the file in every error.

    Raises:
        SpaceError: for anything that is not plain, unambiguous YAML 1.2.
    """
    doc = Document(label)
    if directive := re.search(r"^%", text, re.MULTILINE):
        line = text.count("\n", 0, directive.start()) + 1
        raise SpaceError(f"{label}:{line}: no line may start with %, got a YAML directive.")
    try:
        yaml = YAML(typ="safe", pure=True)
        yaml.max_depth = MAX_DEPTH
        yaml.composer.warn_double_anchors = False  # a refusal follows anyway
        root = yaml.compose(text)
        if root is not None:
            doc.data = _build(doc, yaml, root, ())
    except MaxDepthExceededError as exc:
        line = exc.problem_mark.line + 1
        sentence = f"at most {MAX_DEPTH} levels of nesting are allowed, got more."
        raise make_error(label, line, sentence) from exc
    except MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark else 1
        raise make_error(label, line, _describe_syntax(exc)) from exc
    except (YAMLError, ValueError) as exc:  # forbidden characters; a number of thousands of digits
        reason = str(exc).splitlines()[0]
        raise SpaceError(f"{label}: the file must be readable as YAML, got: {reason}.") from exc
    return doc


def set_values(text: str, where: Where, values: dict[str, Any]) -> str:
    """Return the text of a document with other numbers or truth values in the map at `where`.

    ruamel's round trip writes that map alone, so every other character of the text stays, and so
    do the map's order, style, comments (but those inside braces) and other values.

    Args:
        text: a document that `read_document` has read.
        where: the names that lead to the map.
        values: by name; None removes a name.
    """
    node = YAML().compose(text)
    for name in where:
        node = next(value for key, value in node.value if key.value == name)
    start, column = node.start_mark.index, node.start_mark.column
    # A map in block style ends with its last value; the mark at its own end lies behind comments.
    end = (node if node.flow_style else node.value[-1][1]).end_mark.index
    old = text[start:end].replace("\r\n", "\n")
    part = YAML().compose(textwrap.dedent(" " * column + old))
    # Nodes keep the text of a number; ruamel's numbers would be rounded after 16 digits.
    entries = {key.value: (key, value) for key, value in part.value}
    for name, value in values.items():
        if value is None:
            entries.pop(name, None)
            continue
        new = YAML().compose(_write(value))
        if name in entries:
            entries[name][1].value, entries[name][1].tag = new.value, new.tag
        else:
            entries[name] = (YAML().compose(name), new)
    part.value = list(entries.values())
    yaml, out = YAML(), io.StringIO()
    yaml.width = sys.maxsize
    yaml.serialize(part, out)
    written = textwrap.indent(out.getvalue().strip("\n"), " " * column).strip(" ")
    if "\r\n" in text:
        written = written.replace("\n", "\r\n")
    return text[:start] + written + text[end:]


def _write(value: float | bool) -> str:
    """Return a value as the space files write it: true, 5.2e-4, from 0.1 on 0.52, 1.0 or 100.0."""
    if not isinstance(value, float):
        return str(value).lower()
    if value == 0 or value >= 0.1:
        return repr(value)
    texts = (f"{value:.{digits}e}" for digits in range(1, 17))
    mantissa, exponent = next(text for text in texts if float(text) == value).split("e")
    return f"{mantissa}e{int(exponent)}"


def _describe_syntax(exc: MarkedYAMLError) -> str:
    if "'\\t'" in str(exc.problem):
        return "spaces must be used for indentation, got a tab."
    reason = " ".join(filter(None, (exc.context, exc.problem)))
    return f"the file must be well-formed YAML, got: {reason}."


def _build(doc: Document, yaml: YAML, node: Any, where: Where) -> Any:
    """Return a node of ruamel's graph as plain data, and note its line or that of its name."""
    doc.lines.setdefault(where, node.start_mark.line + 1)
    kind = str(node.tag).removeprefix(_TAG)
    if node.anchor:
        raise doc.error(where, f"no anchor may be used, got &{node.anchor}. Write the value out.")
    if kind == "map":
        return _build_map(doc, yaml, node, where)
    if kind == "seq":
        return tuple(_build(doc, yaml, item, (*where, i)) for i, item in enumerate(node.value))
    if kind not in ("str", "int", "float", "bool", "null"):
        got = repr(node.value) if isinstance(node.value, str) else "several values"
        sentence = f"a value must be text, a number, true or false, got {got} ({kind}). Quote text."
        raise doc.error(where, sentence)
    return yaml.constructor.construct_object(node)


def _build_map(doc: Document, yaml: YAML, node: Any, where: Where) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.value:
        name, line = key.value, key.start_mark.line + 1
        if str(key.tag) not in (f"{_TAG}str", f"{_TAG}int") or key.anchor:
            sentence = "the name before a colon must be plain text, got another kind of key."
            raise make_error(doc.label, line, sentence)
        if name in found:
            first = doc.lines[(*where, name)]
            sentence = f"{name} must appear once, got it again. It is in line {first} already."
            raise make_error(doc.label, line, sentence)
        doc.lines[(*where, name)] = line
        found[name] = _build(doc, yaml, value, (*where, name))
    return found
