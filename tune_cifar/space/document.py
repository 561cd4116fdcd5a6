"""YAML 1.2 read strictly, as plain data that knows its lines.

Numbers mean what they look like (1e-3 is a number, which PyYAML reads as text), a repeated name is refused (PyYAML
keeps the last one silently), and nothing that a settings file does not need is understood: anchors, tags, directives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from tune_cifar.errors import SpaceError

_TAG = "tag:yaml.org,2002:"
Where = tuple[str | int, ...]
"""The way to a part of a document: names and indices from the top."""


@dataclass
class Document:
    """Plain data (dict, tuple, str, int, float, bool, None) and the line that each part of it stands on."""

    label: str
    data: Any = None
    lines: dict[Where, int] = field(default_factory=lambda: {(): 1})

    def error(self, where: Where, sentence: str) -> SpaceError:
        """The sentence behind `label:line:`; a part that is missing has its parent's line."""
        while where not in self.lines:
            where = where[:-1]
        return SpaceError(f"{self.label}:{self.lines[where]}: {sentence}")


def read_document(text: str, label: str) -> Document:
    """Parse one document.

    Args:
        label: stands before the line in every error.

    Raises:
        SpaceError: for anything that is not plain, unambiguous YAML 1.2.
    """
    doc = Document(label)
    if directive := re.search(r"^%", text, re.MULTILINE):
        line = text.count("\n", 0, directive.start()) + 1
        raise SpaceError(f"{label}:{line}: no line may start with %, got a YAML directive.")
    try:
        yaml = YAML(typ="safe", pure=True)
        root = yaml.compose(text)
        if root is not None:
            doc.data = _build(doc, yaml, root, ())
    except MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark else 1
        raise SpaceError(f"{label}:{line}: {_describe_syntax(exc)}") from exc
    except RecursionError as exc:
        raise SpaceError(f"{label}: brackets must be nested a few levels deep, got very many.") from exc
    except (YAMLError, ValueError) as exc:  # characters that YAML forbids; a number of thousands of digits
        raise SpaceError(f"{label}: readable YAML must be given, got: {str(exc).splitlines()[0]}.") from exc
    return doc


def _describe_syntax(exc: MarkedYAMLError) -> str:
    if "'\\t'" in str(exc.problem):
        return "spaces must be used for indentation, got a tab."
    return f"well-formed YAML must be given, got: {' '.join(filter(None, (exc.context, exc.problem)))}."


def _build(doc: Document, yaml: YAML, node: Any, where: Where) -> Any:
    """A node of ruamel's graph as plain data; notes its line (a named value has its name's line)."""
    doc.lines.setdefault(where, node.start_mark.line + 1)
    kind = str(node.tag).removeprefix(_TAG)
    if node.anchor:
        raise doc.error(where, f"no anchor may be used, got &{node.anchor}. Write the value out.")
    if kind == "map":
        return _build_map(doc, yaml, node, where)
    if kind == "seq":
        return tuple(_build(doc, yaml, item, (*where, i)) for i, item in enumerate(node.value))
    if kind not in ("str", "int", "float", "bool", "null"):
        raise doc.error(where, f"text, a number, true or false must be given, got {node.value!r} ({kind}). Quote text.")
    return yaml.constructor.construct_object(node)


def _build_map(doc: Document, yaml: YAML, node: Any, where: Where) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.value:
        name, line = key.value, key.start_mark.line + 1
        if str(key.tag) != _TAG + "str" or key.anchor:
            raise SpaceError(f"{doc.label}:{line}: a plain name must stand before the colon, got another kind of key.")
        if name in found:
            first = doc.lines[(*where, name)]
            raise SpaceError(
                f"{doc.label}:{line}: {name} must stand once, got it again. It stands in line {first} already."
            )
        doc.lines[(*where, name)] = line
        found[name] = _build(doc, yaml, value, (*where, name))
    return found
