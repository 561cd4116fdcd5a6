"""YAML 1.2 read strictly, as plain data that knows its lines.

Numbers mean what they look like (1e-3 is a number, which PyYAML reads as text), a repeated name is refused (PyYAML
keeps the last one silently), and nothing that a settings file does not need is understood: anchors, tags, directives,
deep nesting. (`read_space` limits the size.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from tune_cifar.errors import SpaceError

_TAG = "tag:yaml.org,2002:"
Where = tuple[str | int, ...]
"""The way to a part of a document: names and indices from the top."""

# Values inside values. A space file needs 6: document, budget, tier, set, a list, its items.
MAX_DEPTH = 10
# What is shown of a sentence: a file may hold a value of any length.
MAX_SENTENCE = 500


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
        return make_error(self.label, self.lines[where], sentence)


def make_error(label: str, line: int, sentence: str) -> SpaceError:
    """The sentence behind `label:line:`. A quoted part of the file cannot flood or steer the terminal: the sentence is
    cut, and what does not print is escaped."""
    if len(sentence) > MAX_SENTENCE:
        sentence = f"{sentence[: MAX_SENTENCE // 2]} ... {sentence[-MAX_SENTENCE // 2 :]}"
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in sentence)
    return SpaceError(f"{label}:{line}: {shown}")


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
        yaml.max_depth = MAX_DEPTH
        yaml.composer.warn_double_anchors = False  # a refusal follows anyway
        root = yaml.compose(text)
        if root is not None:
            doc.data = _build(doc, yaml, root, ())
    except MaxDepthExceededError as exc:
        line = exc.problem_mark.line + 1
        raise make_error(
            label, line, f"at most {MAX_DEPTH} values inside each other must hold, got more."
        ) from exc
    except MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark else 1
        raise make_error(label, line, _describe_syntax(exc)) from exc
    except (
        YAMLError,
        ValueError,
    ) as exc:  # characters that YAML forbids; a number of thousands of digits
        raise SpaceError(
            f"{label}: readable YAML must be given, got: {str(exc).splitlines()[0]}."
        ) from exc
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
        got = repr(node.value) if isinstance(node.value, str) else "several values"
        raise doc.error(
            where, f"text, a number, true or false must be given, got {got} ({kind}). Quote text."
        )
    return yaml.constructor.construct_object(node)


def _build_map(doc: Document, yaml: YAML, node: Any, where: Where) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.value:
        name, line = key.value, key.start_mark.line + 1
        if str(key.tag) != _TAG + "str" or key.anchor:
            sentence = "a plain name must stand before the colon, got another kind of key."
            raise make_error(doc.label, line, sentence)
        if name in found:
            first = doc.lines[(*where, name)]
            sentence = f"{name} must stand once, got it again. It stands in line {first} already."
            raise make_error(doc.label, line, sentence)
        doc.lines[(*where, name)] = line
        found[name] = _build(doc, yaml, value, (*where, name))
    return found
