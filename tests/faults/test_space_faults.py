"""Space files that are broken, enormous or hostile.

Each is refused quickly, in one sentence with file and line, and nothing in it is run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.builders import MINI
from tune_cifar.errors import ConfigError, SpaceError
from tune_cifar.space.document import MAX_DEPTH, MAX_SENTENCE, read_document
from tune_cifar.space.select import load_space, parse_setting, read_space

NUM_LINES = MINI.count("\n")


@pytest.fixture
def folder(workplace: Path) -> Path:
    """An empty working folder: errors name files relative to it."""
    return workplace


def refuse(folder: Path, content: str | bytes) -> str:
    """Read a file of this content, which must be refused; returns the sentence."""
    raw = content.encode() if isinstance(content, str) else content
    (folder / "mini.yaml").write_bytes(raw)
    with pytest.raises(SpaceError) as caught:
        read_space("mini.yaml")
    sentence = str(caught.value)
    assert sentence.isprintable() and len(sentence) < 2 * MAX_SENTENCE
    assert sentence[-1] in ".?"
    return sentence


# Anchors and aliases: each level is nine times as large as the one before.
LEVELS = list(zip("abcdefgh", "bcdefghi", strict=True))
BOMB = 'a: &a ["ha", "ha"]\n' + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in LEVELS
)


@pytest.mark.parametrize(
    "text",
    [BOMB, MINI.replace("max_lr: 0.01", "max_lr: &a 0.01"), "a: &a [*a]\n", "a: [&a x, &a y]\n"],
    ids=["bomb", "one value", "a list inside itself", "one anchor twice"],
)
def test_an_anchor_is_refused_before_any_alias_is_multiplied_out(folder: Path, text: str) -> None:
    line = 1 + text[: text.index("&")].count("\n")
    rule = "no anchor may be used, got &a. Write the value out."
    assert refuse(folder, text) == f"mini.yaml:{line}: {rule}"


def test_an_alias_without_an_anchor_is_refused_at_its_line(folder: Path) -> None:
    sentence = refuse(folder, MINI.replace("max_lr: 0.01", "max_lr: *lr"))
    rule = "the file must be well-formed YAML, got: found undefined alias 'lr'."
    assert sentence == f"mini.yaml:12: {rule}"


DEEP: dict[str, tuple[str, int]] = {
    "closed brackets": (MINI + "x: " + "[" * 1000 + "]" * 1000, NUM_LINES + 1),
    "open brackets": (MINI + "x: " + "[" * 100_000, NUM_LINES + 1),
    "braces": (MINI + "x: " + "{a: " * 1000 + "1" + "}" * 1000, NUM_LINES + 1),
    "dashes": ("space:\n" + "- " * 1000 + "a\n", 2),
    "question marks": ("? " * 1000 + "a\n", 1),
    "indentation": ("".join(" " * i + "a:\n" for i in range(500)), MAX_DEPTH),
}


@pytest.mark.parametrize("case", DEEP)
def test_very_deep_nesting_is_refused_without_recursion(folder: Path, case: str) -> None:
    text, line = DEEP[case]
    sentence = f"at most {MAX_DEPTH} levels of nesting are allowed, got more."
    assert refuse(folder, text) == f"mini.yaml:{line}: {sentence}"


def test_nesting_is_counted_in_values_and_allowed_up_to_the_limit() -> None:
    num_lists = MAX_DEPTH - 1
    assert read_document("[" * num_lists + "1" + "]" * num_lists, "x").data is not None
    with pytest.raises(SpaceError, match=f"x:1: at most {MAX_DEPTH} levels"):
        read_document("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH, "x")


def test_a_file_of_5_mb_is_refused_by_its_size_unread(folder: Path) -> None:
    sentence = refuse(folder, MINI + "#" * (5_000_000 - len(MINI)))
    assert sentence == "mini.yaml: size <= 256000 bytes must hold, got 5000000."


def test_a_sparse_file_of_a_terabyte_is_refused_by_its_size(folder: Path) -> None:
    with (folder / "mini.yaml").open("wb") as file:
        try:
            file.truncate(2**40)
        except OSError as exc:
            pytest.skip(f"no such file can be made here: {exc}")
    rule = r"size <= 256000 bytes must hold, got 1099511627776\."
    with pytest.raises(SpaceError, match=rf"^mini\.yaml: {rule}$"):
        read_space("mini.yaml")


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "/proc", "no\nsuch.yaml"])
def test_what_is_no_plain_file_is_not_opened(place: str) -> None:
    with pytest.raises(SpaceError, match="no such space file"):
        read_space(Path(place))


def test_a_tab_for_indentation_is_refused_at_its_line(folder: Path) -> None:
    sentence = refuse(folder, MINI.replace("  model: s7", "\tmodel: s7"))
    assert sentence == "mini.yaml:9: spaces must be used for indentation, got a tab."


def test_a_repeated_name_is_refused_with_both_lines(folder: Path) -> None:
    sentence = refuse(folder, MINI.replace("  epochs: 4\n", "  epochs: 4\n  max_lr: 0.02\n"))
    rule = "max_lr must appear once, got it again. It is in line 12 already."
    assert sentence == f"mini.yaml:15: {rule}"


def test_a_repeated_section_is_refused_with_both_lines(folder: Path) -> None:
    sentence = refuse(folder, MINI + "space: mini\n")
    rule = "space must appear once, got it again. It is in line 1 already."
    assert sentence == f"mini.yaml:{NUM_LINES + 1}: {rule}"


UNKNOWN = {
    "section": ("corrects:", "corects:", "6: corects is not a known name. Did you mean corrects?"),
    "knob": ("max_lr: 0.01", "maxlr: 0.01", "12: maxlr is not a known knob. Did you mean max_lr?"),
    "searched knob": ("max_lr: {low", "learning: {low", "18: learning is not a known knob."),
    "word of a range": (
        "high: 0.5}",
        "max: 0.5}",
        "20: pct_start must be given by low, high, log, step, got max.",
    ),
    "budget setting": (
        "trials: 9",
        "trails: 9",
        "28: trails is not a known name. Did you mean trials?",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_name_is_refused_at_its_line_with_the_nearest(folder: Path, case: str) -> None:
    old, new, sentence = UNKNOWN[case]
    assert old in MINI
    assert refuse(folder, MINI.replace(old, new, 1)) == f"mini.yaml:{sentence}"


INTEGER = "14: epochs: input should be a valid integer"
FINITE = "12: max_lr: input should be a finite number"
MODEL = "9: model must be 's6', 's7', 's8', 's10', 's10_postact' or your own FILE.py:NAME"
WRONG = {
    "text for a number": ("epochs: 4", "epochs: four", f"{INTEGER}, got 'four'."),
    "list for a number": ("epochs: 4", "epochs: [4]", f"{INTEGER}, got (4,)."),
    "truth for a number": ("epochs: 4", "epochs: true", f"{INTEGER}, got True."),
    "nothing": ("epochs: 4", "epochs:", f"{INTEGER}, got None."),
    "fraction for a count": ("epochs: 4", "epochs: 4.5", f"{INTEGER}, got 4.5."),
    "quoted number": (
        "max_lr: 0.01",
        "max_lr: '1e-2'",
        "12: max_lr: input should be a valid number, got '1e-2'.",
    ),
    "not a number": ("max_lr: 0.01", "max_lr: .nan", f"{FINITE}, got nan."),
    "infinite": ("max_lr: 0.01", "max_lr: 1e999", f"{FINITE}, got inf."),
    "number for a word": ("model: s7", "model: 7", f"{MODEL}, got 7."),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_value_of_the_wrong_type_is_refused_and_never_converted(folder: Path, case: str) -> None:
    old, new, sentence = WRONG[case]
    assert old in MINI
    assert refuse(folder, MINI.replace(old, new, 1)).startswith(f"mini.yaml:{sentence}")


@pytest.mark.parametrize(
    ("written", "value"), [("1e-3", 1e-3), ("1E-3", 1e-3), ("1.e-3", 1e-3), ("5e-1", 0.5)]
)
def test_1e_3_is_a_number(folder: Path, written: str, value: float) -> None:
    (folder / "mini.yaml").write_text(MINI.replace("max_lr: 0.01", f"max_lr: {written}"))
    assert load_space("mini.yaml").baseline.max_lr == value
    assert parse_setting(f"max_lr={written}") == ("max_lr", value)


@pytest.mark.parametrize(
    "raw", [b"\xff\xfe\x00", "space: höhe".encode("latin-1"), MINI.encode("utf-16")]
)
def test_a_file_that_is_not_utf_8_is_refused(folder: Path, raw: bytes) -> None:
    rule = "the file must be readable UTF-8 text, got: 'utf-8' codec can't"
    assert refuse(folder, raw).startswith(f"mini.yaml: {rule}")


def test_forbidden_characters_are_refused(folder: Path) -> None:
    sentence = refuse(folder, MINI.replace("a test", "a \x00 test"))
    assert sentence.startswith("mini.yaml: the file must be readable as YAML")


APPLY, NEW = "python/object/apply:os.system", "python/object/new:os.system"
HOSTILE = {
    "call": (f"!!{APPLY} ['touch ran']", f"several values ({APPLY})"),
    "new": (f"!!{NEW} ['touch ran']", f"several values ({NEW})"),
    "name": ("!!python/name:os.system ''", "'' (python/name:os.system)"),
    "module": ("!!python/module:os ''", "'' (python/module:os)"),
    "own tag": ("!touch ran", "'ran' (!touch)"),
    "binary": ("!!binary aGE=", "'aGE=' (binary)"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_tag_is_refused_at_its_line_and_nothing_is_built_or_run(folder: Path, case: str) -> None:
    text, got = HOSTILE[case]
    rule = "a value must be text, a number, true or false"
    assert refuse(folder, MINI.replace("epochs: 4", f"epochs: {text}", 1)) == (
        f"mini.yaml:14: {rule}, got {got}. Quote text."
    )
    rule = "^`settings`: epochs must be a number, a word or a list"
    with pytest.raises(ConfigError, match=rule):
        parse_setting(f"epochs={text}")
    assert [path.name for path in folder.iterdir()] == ["mini.yaml"]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (
            MINI.replace("a test", "[" + "x" * 200_000 + "]"),
            "mini.yaml:2: source: input should be a valid string, got",
        ),
        ("x" * 200_000, "mini.yaml:1: the file must hold names with values, got 'xxx"),
        (MINI + '"' + "x" * 900 + '": 1\n', f"mini.yaml:{NUM_LINES + 1}: xxx"),
        ("- \n" * 20_000, "mini.yaml:1: the file must hold names with values, got (None,"),
    ],
    ids=["a value", "a document", "a name", "a list"],
)
def test_an_enormous_value_is_cut_in_the_sentence_against_it(
    folder: Path, text: str, start: str
) -> None:
    sentence = refuse(folder, text)
    assert sentence.startswith(start) and " ... " in sentence


def test_a_name_that_would_steer_the_terminal_is_shown_escaped(folder: Path) -> None:
    sentence = refuse(folder, '"\\e[2Jwiped\\nerror": 1\n' + MINI)
    assert sentence == "mini.yaml:1: \\x1b[2Jwiped\\nerror is not a known name."


@pytest.mark.parametrize("line", ["%YAML 1.1", "%TAG ! tag:example.com,2000:", "%SPACE x"])
def test_a_directive_is_refused_at_its_line(folder: Path, line: str) -> None:
    sentence = refuse(folder, f"# mine\n{line}\n---\n{MINI}")
    assert sentence == "mini.yaml:2: no line may start with %, got a YAML directive."


def test_a_setting_of_the_command_line_has_the_same_limits() -> None:
    settings: list[Any] = ["[" * 1000, "&a 1", "*a", "{a: 1", "\t1: 2: 3", "1\n2: 3\n"]
    for text in settings:
        with pytest.raises(ConfigError) as caught:
            parse_setting(f"max_lr={text}")
        assert re.match("`settings`: ", str(caught.value)), caught.value
