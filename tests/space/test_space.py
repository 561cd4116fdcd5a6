"""Search-space files: reading, refusals and their sentences, pins, the shipped files, changes."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    json_to_distribution,
)

from tests.builders import MINI
from tune_cifar.dataset import CIFAR10
from tune_cifar.errors import ConfigError, SpaceError
from tune_cifar.schema import ADDED_KNOBS, KNOBS, TrainConfig, inactive_knobs
from tune_cifar.space import overview
from tune_cifar.space.layout import TIERS, Budget, Choices, Range, Searched
from tune_cifar.space.overview import describe_effect, list_knobs
from tune_cifar.space.reader import (
    describe_edit,
    find_range,
    parse_recorded,
    parse_space,
    set_range,
)
from tune_cifar.space.rules import (
    COUPLED,
    DECIDING,
    STRUCTURAL,
    find_inactive,
    find_value_problem,
    parse_duration,
    select_active,
)
from tune_cifar.space.select import (
    describe_distribution,
    find_space,
    list_spaces,
    load_header,
    load_space,
    parse_setting,
    read_space,
    select_tier,
)

FOLDER = Path(__file__).parents[2] / "search_spaces"
SHIPPED = ["s6", "s7", "s8", "s10", "s10_postact", "smoke"]


def parse(text: str) -> Any:
    return parse_space(text, Path("mini.yaml"))


def refuse(text: str) -> str:
    with pytest.raises(SpaceError) as caught:
        parse(text)
    return str(caught.value)


# --- what is read


def test_file_becomes_header_baseline_distributions_and_budget() -> None:
    space = select_tier(parse(MINI), "full")
    assert space.name == "mini"
    assert space.text == MINI
    assert space.header.source == "a test"
    assert space.header.describe_published() == "50.00 %, nothing"
    assert space.baseline == TrainConfig(
        model="s7",
        optimizer="sgd",
        schedule="constant",
        max_lr=0.01,
        batch_size=128,
        epochs=4,
        cutout_p=0.5,
        cutout_size=8,
    )
    assert space.distributions == {
        "max_lr": FloatDistribution(1e-4, 1.0, log=True),
        "schedule": CategoricalDistribution(["constant", "onecycle"]),
        "pct_start": FloatDistribution(0.1, 0.5),
        "cutout_size": IntDistribution(4, 16, step=2),
        "weight_decay": CategoricalDistribution([0.0, 1e-4]),
    }
    assert space.budget == Budget(
        trials=9,
        rungs=(2, 4),
        reduction_factor=3,
        window=9,
        sampler={"kind": "tpe", "startup": 3},  # type: ignore[arg-type]
        seed=0,
    )
    assert space.pinned == {}
    assert space.dropped == {}


def write_replicates(written: str, fidelity: str = "cycles") -> str:
    """MINI whose tier full has replicates."""
    first = "  full:\n"
    return MINI.replace(first, f"{first}    fidelity: {fidelity}\n    replicates: {written}\n")


def test_a_tier_may_train_the_last_rung_under_several_seeds() -> None:
    file = parse(write_replicates("{4: 3}"))
    space = select_tier(file, "full")
    assert space.budget.replicates == 3 and "3 seeds at the last rung" in space.budget.describe()
    assert select_tier(file, "full", {"epochs": 3}).budget.replicates == 3
    assert select_tier(file, "cpu").budget.replicates == 1


@pytest.mark.parametrize(
    ("written", "fidelity", "sentence"),
    [
        ("{2: 3}", "cycles", "replicates must name the last rung alone, 4, got 2."),
        ("{2: 3, 4: 3}", "cycles", "replicates must name the last rung alone, 4, got 2, 4."),
        ("{4: 1}", "cycles", "replicates must be 2 to 10 seeds, got 1."),
        (
            "{4: 3}",
            "cycles/continue",
            "replicates must not be given with fidelity: cycles/continue. Use cycles.",
        ),
        ("{4: many}", "cycles", "4: input should be a valid integer, got 'many'."),
    ],
)
def test_replicates_elsewhere_are_refused(written: str, fidelity: str, sentence: str) -> None:
    assert refuse(write_replicates(written, fidelity)).endswith(sentence)


def test_tier_sets_and_restricts() -> None:
    space = select_tier(parse(MINI), "cpu")
    assert list(space.distributions) == ["max_lr", "cutout_size"]
    config = space.baseline
    assert (config.epochs, config.train_size, config.label_smoothing) == (2, 500, 0.0)
    assert space.budget.max_time_seconds == 90.0
    assert space.budget.sampler.kind == "random"


def test_points_are_completed_by_the_baseline() -> None:
    space = select_tier(parse(MINI), "full")
    rest = {"cutout_size": 8, "weight_decay": 0.0}
    assert space.points == (
        {"max_lr": 0.1, "schedule": "constant", "pct_start": 0.3, **rest},
        {"max_lr": 0.1, "schedule": "onecycle", "pct_start": 0.2, **rest},
    )


def test_points_that_a_tier_makes_equal_are_tried_once() -> None:
    assert select_tier(parse(MINI), "cpu").points == ({"max_lr": 0.1, "cutout_size": 8},)


def test_points_that_equal_the_baseline_are_left_out() -> None:
    text = MINI.replace("  - {max_lr: 0.1}\n", "  - {max_lr: 0.01}\n")
    assert len(select_tier(parse(text), "full").points) == 1


def test_points_may_be_absent() -> None:
    text = re.sub(r"points:\n.*\n.*\n", "", MINI)
    assert select_tier(parse(text), "full").points == ()


def test_proposal_becomes_a_configuration() -> None:
    space = select_tier(parse(MINI), "full")
    assert space.config({"max_lr": 0.2}) == space.baseline.model_copy(update={"max_lr": 0.2})
    assert space.config(space.baseline_params) == space.baseline
    with pytest.raises(ConfigError, match="Did you mean max_lr"):
        space.config({"max_rl": 0.2})


def test_proposal_keeps_milestones_of_the_baseline() -> None:
    space = load_space("s6")
    assert space.config({"dropout": 0.2}).milestone_fractions == (0.375, 0.75)


def test_distributions_survive_a_record() -> None:
    space = load_space("s8")
    texts = space.describe_distributions()
    again = {name: json_to_distribution(text) for name, text in texts.items()}
    assert again == space.distributions


def test_budget_survives_a_record() -> None:
    budget = load_space("s8", "cpu").budget
    assert Budget(**budget.model_dump(mode="json")) == budget


def test_distributions_are_described_in_the_words_of_the_file() -> None:
    distributions = select_tier(parse(MINI), "full").distributions
    assert [describe_distribution(found) for found in distributions.values()] == [
        "0.0001 to 1, log",
        "constant, onecycle",
        "0.1 to 0.5",
        "4 to 16, step 2",
        "0.0, 0.0001",
    ]
    assert describe_distribution(IntDistribution(1, 8)) == "1 to 8"


@pytest.mark.parametrize(("epochs", "words"), [(1, "1 epoch each"), (2, "2 epochs each")])
def test_a_budget_of_one_rung_is_described_by_its_epochs(epochs: int, words: str) -> None:
    budget = select_tier(parse(MINI), "cpu", {"epochs": epochs}).budget
    budget = budget.model_copy(update={"rungs": (epochs,)})
    assert budget.describe() == f"8 trials, {words}, sampler random, at most 1.5 min"


def test_budget_is_described_in_one_line() -> None:
    file = parse(MINI)
    full, cpu = (select_tier(file, tier).budget.describe() for tier in TIERS)
    rungs = "epochs (a complete training from scratch for each), reduction factor"
    assert full == f"9 trials, rungs at 2, 4 {rungs} 3, sampler tpe (startup 3)"
    assert cpu == f"8 trials, rungs at 1, 2 {rungs} 2, sampler random, at most 1.5 min"


@pytest.mark.parametrize(("seconds", "words"), [(86_400.0, "1440"), (100.0, "1.67"), (1.0, "0.02")])
def test_a_time_limit_is_described_in_minutes(seconds: float, words: str) -> None:
    budget = select_tier(parse(MINI), "cpu").budget
    budget = budget.model_copy(update={"max_time_seconds": seconds})
    assert budget.describe().endswith(f", at most {words} min")


def test_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "mini.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINI.encode())
    assert read_space(path).header.space == "mini"


# --- what is refused

RANGE = "{low: 0.1, high: 0.5}"
RUNGS = "rungs: [2, 4]"
CYCLE = f"fidelity: cycle\n    {RUNGS}"
# A text of MINI, its replacement, and the sentence, which names the line of the replacement.
REFUSALS = {
    "unknown_section": ("points:", "pionts:", "pionts is not a known name. Did you mean points?"),
    "missing_section": ("source: a test\n", "", "source must be given."),
    "other_name": (
        "space: mini",
        "space: maxi",
        "space must be the file's name, got 'maxi' in mini.yaml.",
    ),
    "accuracy_in_percent": ("accuracy: 0.5", "accuracy: 50", "accuracy <= 1 must hold, got 50."),
    "unknown_in_published": (
        "measured:",
        "mesured:",
        "mesured is not a known name. Did you mean measured?",
    ),
    "not_a_map": (
        "  - Nothing.",
        "  Nothing.",
        "corrects must be a list, got 'Nothing.'.",
    ),
    "baseline_unknown": (
        "  max_lr: 0.01",
        "  max_rl: 0.01",
        "max_rl is not a known knob. Did you mean max_lr?",
    ),
    "baseline_range": ("epochs: 4", "epochs: 0", "epochs >= 1 must hold, got 0."),
    "baseline_text": (
        "max_lr: 0.01",
        "max_lr: '0.01'",
        "max_lr: input should be a valid number, got '0.01'.",
    ),
    "baseline_word": ("model: s7", "model: s77", "model must be .* got 's77'. Did you mean s7?"),
    "baseline_inactive": (
        "epochs: 4",
        "epochs: 4\n  gamma: 0.1",
        "gamma has no effect here: schedule",
    ),
    "search_unknown": (
        "  pct_start:",
        "  pct_strat:",
        "pct_strat is not a known knob. Did you mean pct_start?",
    ),
    "search_structural": (
        "  pct_start:",
        "  epochs:",
        "epochs must not be searched: the rungs say how long a trial",
    ),
    "search_inactive": (
        "  pct_start:",
        "  momentum: {low: 0.1, high: 0.99}\n  gamma: {low: 0.1, high: 0.5}\n  pct_start:",
        "gamma has no effect here: schedule constant is not step. Leave it out.",
    ),
    "search_empty_entry": (RANGE, "{}", "pct_start.low must be given."),
    "search_high_missing": (RANGE, "{low: 0.1}", "pct_start.high must be given."),
    "search_not_an_entry": (RANGE, "0.1", "pct_start must be names with values, got 0.1."),
    "log_from_zero": (
        "{low: 1.0e-4, high: 1, log: true}",
        "{low: 0.0, high: 1, log: true}",
        "max_lr.low > 0 must hold for log: true, got 0.0. Use e.g. 1.0e-5.",
    ),
    "log_from_zero_integer": (
        "{low: 4, high: 16, step: 2}",
        "{low: 0, high: 16, log: true}",
        "cutout_size.low > 0 must hold for log: true, got 0. Use e.g. 1.",
    ),
    "log_word": ("log: true", "log: yes", "max_lr.log must be true or false, got 'yes'."),
    "low_above_high": (RANGE, "{low: 0.5, high: 0.1}", "pct_start.low < pct_start.high must hold"),
    "low_equals_high": (RANGE, "{low: 0.5, high: 0.5}", "must hold, got 0.5 and 0.5."),
    "low_out_of_bounds": (RANGE, "{low: 0.0, high: 0.5}", "pct_start.low > 0 must hold, got 0.0."),
    "high_out_of_bounds": (RANGE, "{low: 0.1, high: 1}", "pct_start.high < 1 must hold, got 1."),
    "high_infinite": (RANGE, "{low: 0.1, high: .inf}", "pct_start.high: input should be a finite"),
    "low_text": (RANGE, "{low: a, high: 0.5}", "pct_start.low: input should be a valid number"),
    "low_of_an_integer": (
        "{low: 4,",
        "{low: 4.0,",
        "cutout_size.low: input should be a valid integer, got 4.0.",
    ),
    "word_misspelt": (
        "high: 0.5}",
        "hihg: 0.5}",
        "pct_start must be given by low, high, log, step, got hihg. Did",
    ),
    "low_and_choices": (
        "[0, 1e-4]}",
        "[0, 1e-4], low: 0}",
        "weight_decay must be given by choices, got low.",
    ),
    "range_of_words": (
        "{choices: [constant, onecycle]}",
        "{low: 0, high: 1}",
        "schedule must be given by choices, got",
    ),
    "step_zero": (
        "step: 2}",
        "step: 0}",
        "cutout_size.step must be positive and split high - low .* got 0.",
    ),
    "step_tiny": (
        "high: 0.5}",
        "high: 0.5, step: 1e-40}",
        "pct_start.step must be positive and split high - low",
    ),
    "step_too_long": (
        "step: 2}",
        "step: 13}",
        "cutout_size.step must be positive and split high - low",
    ),
    "step_uneven": ("step: 2}", "step: 5}", "cutout_size.step must divide high - low = 12, got 5."),
    "step_real": (
        "step: 2}",
        "step: 2.0}",
        "cutout_size.step must be a number of the knob's type (int), got 2.0.",
    ),
    "step_truth": (
        "step: 2}",
        "step: true}",
        "cutout_size.step must be a number of the knob's type (int), got True.",
    ),
    "step_null": (
        "step: 2}",
        "step: }",
        "cutout_size.step must be a number of the knob's type (int), got None.",
    ),
    "step_and_log": (
        "log: true}",
        "log: true, step: 2}",
        "max_lr.step must not be given with log: true, got 2.",
    ),
    "choices_scalar": ("[0, 1e-4]", "0", "weight_decay.choices must be a list, got 0."),
    "choices_single": (
        "[0, 1e-4]",
        "[0]",
        "weight_decay.choices must be two or more different values, got [0.0].",
    ),
    "choices_twice": (
        "[0, 1e-4]",
        "[0, 0.0]",
        "must be two or more different values, got [0.0, 0.0].",
    ),
    "choices_out_of_bounds": ("[0, 1e-4]", "[0, 2]", "weight_decay <= 1 must hold, got 2."),
    "choices_word": (
        "onecycle]",
        "onecylce]",
        "schedule must be .* got 'onecylce'. Did you mean onecycle?",
    ),
    "baseline_outside": (
        RANGE,
        "{low: 0.4, high: 0.5}",
        "pct_start: the baseline's value must lie within the distribution (0.4 to 0.5), got 0.3.",
    ),
    "baseline_between_steps": (
        "{low: 4, high: 16,",
        "{low: 5, high: 15,",
        "got 8. The baseline is trial 0.",
    ),
    "baseline_not_chosen": (
        "[0, 1e-4]",
        "[1e-5, 1e-4]",
        "within the distribution (1e-05, 0.0001), got 0.0.",
    ),
    "coupled": (
        "  pct_start:",
        "  batch_size: {low: 64, high: 45001}\n  pct_start:",
        "everywhere in the search, batch_size <= train_size must hold, got batch_size 45001",
    ),
    "coupled_momentum": (
        "  pct_start:",
        "  nesterov: {choices: [false, true]}\n  momentum: {low: 0.0, high: 0.95}\n  pct_start:",
        "everywhere in the search, momentum > 0 must hold with nesterov, got 0.",
    ),
    "tier_not_a_map": (
        MINI[MINI.index("    trials: 9") : MINI.index("  cpu:")],
        "    - 9\n",
        "full must be names with values, got (9,).",
    ),
    "search_empty": (
        MINI[MINI.index("  max_lr: {") : MINI.index("points:")],
        "  {}\n",
        "search must not be empty.",
    ),
    "point_unknown": (
        "- {max_lr: 0.1}",
        "- {max_rl: 0.1}",
        "max_rl is not a known knob. Did you mean max_lr?",
    ),
    "point_unsearched": ("- {max_lr: 0.1}", "- {dropout: 0.1}", "dropout is not a searched knob."),
    "point_range": (
        "- {max_lr: 0.1}",
        "- {max_lr: 2}",
        "max_lr must lie within its distribution (0.0001 to 1, log), got",
    ),
    "point_bounds": ("- {max_lr: 0.1}", "- {max_lr: -2}", "max_lr > 0 must hold, got -2."),
    "point_inactive": (
        "- {max_lr: 0.1}",
        "- {pct_start: 0.2}",
        "pct_start has no effect here: schedule",
    ),
    "tier_unknown": (
        "  cpu:",
        "  gpu:",
        "budget must hold the tiers full and cpu and may hold night, got full, gpu.",
    ),
    "budget_unknown": (
        "trials: 9",
        "trails: 9",
        "trails is not a known name. Did you mean trials?",
    ),
    "budget_internal": (
        "max_time: 90s",
        "max_time_seconds: 90",
        "max_time_seconds is not a known name. Did you mean max_t",
    ),
    "trials_zero": ("trials: 9", "trials: 0", "trials >= 1 must hold, got 0."),
    "rungs_type": (RUNGS, "rungs: [2, 4.0]", "rungs.1: input should be a valid integer, got 4.0."),
    "rungs_order": (
        RUNGS,
        "rungs: [4, 2]",
        "rungs increasing from 1 or more must hold, got [4, 2].",
    ),
    "rungs_end": (RUNGS, "rungs: [2, 5]", "last rung = epochs must hold, got 5 and epochs 4."),
    "fidelity_unknown": (
        RUNGS,
        CYCLE,
        "fidelity must be 'cycles', 'cycles/continue' or 'epochs', got 'cycle'. "
        "Did you mean cycles?",
    ),
    "rung_in_the_warm_up": (
        RUNGS,
        f"{RUNGS}\n    fidelity: epochs",
        "first rung > pct_start x epochs must hold for fidelity: epochs, got 2 and 0.5 x 4. "
        "Within the warm-up",
    ),
    "factor_one": (
        "reduction_factor: 3",
        "reduction_factor: 1",
        "reduction_factor >= 2 must hold, got 1.",
    ),
    "sampler_kind": (
        "kind: tpe",
        "kind: tpa",
        "kind must be 'tpe', 'gp', 'random' or 'qmc', got 'tpa'. Did you mean tpe?",
    ),
    "sampler_unknown": (
        "startup: 3",
        "start: 3",
        "start is not a known name. Did you mean startup?",
    ),
    "startup_missing": (
        "{kind: tpe, startup: 3}",
        "{kind: tpe}",
        "startup >= 1 for kind tpe .* got kind tpe and startup 0.",
    ),
    "startup_idle": (
        "{kind: random}",
        "{kind: random, startup: 1}",
        "got kind random and startup 1.",
    ),
    "startup_long": (
        "startup: 3",
        "startup: 4",
        "startup <= trials / 3 must hold, got startup 4 and trials 9. Otherwise",
    ),
    "max_time": (
        "max_time: 90s",
        "max_time: 90",
        "max_time: input should be a valid string, got 90.",
    ),
    "max_time_word": (
        "max_time: 90s",
        "max_time: soon",
        "a duration must be a time such as 90s, 8m or 1h30m, got 's",
    ),
    "set_unknown": ("{epochs: 2", "{epochz: 2", "epochz is not a known knob. Did you mean epochs?"),
    "set_inactive": (
        "label_smoothing: 0}",
        "gamma: 0.5}",
        "gamma has no effect here: schedule constant",
    ),
    "set_conflict": (
        "train_size: 500",
        "train_size: 100",
        "batch_size <= train_size must hold, got batch_size 128 and",
    ),
    "set_no_validation": (
        "train_size: 500",
        "train_size: 50000, val_size: 0",
        "val_size >= 1 must hold in a search, got 0",
    ),
    "set_searched": (
        "{epochs: 2",
        "{max_lr: 0.1, epochs: 2",
        "max_lr must appear once in a tier, searched or set, got it",
    ),
    "only_twice": (
        "[max_lr, cut",
        "[max_lr, max_lr, cut",
        "max_lr must appear once in a tier, searched or set, got it twice",
    ),
    "only_unknown": (
        "only: [max_lr",
        "only: [max_rl",
        "max_rl is not a searched knob. Did you mean max_lr?",
    ),
    "only_empty": (
        "only: [max_lr, cutout_size]",
        "only: []",
        "only must not be empty.",
    ),
    "only_inactive": (
        "only: [max_lr",
        "only: [pct_start",
        "pct_start has no effect here: schedule constant",
    ),
    "tab": ("  model: s7", "\tmodel: s7", "spaces must be used for indentation, got a tab."),
    "bracket": (
        "[constant, onecycle]",
        "[constant, onecycle",
        "the file must be well-formed YAML, got: while parsing",
    ),
    "twice": (
        "epochs: 4",
        "epochs: 4\n  model: s8",
        "model must appear once, got it again. It is in line 9 already.",
    ),
    "anchor": (
        "max_lr: 0.01",
        "max_lr: &lr 0.01",
        "no anchor may be used, got &lr. Write the value out.",
    ),
    "alias": (
        "max_lr: 0.01",
        "max_lr: *lr",
        "the file must be well-formed YAML, got: found undefined alias 'lr'.",
    ),
    "tag": (
        "max_lr: 0.01",
        "max_lr: !lr 0.01",
        "a value must be text, a number, true or false, got '0.01' (!lr).",
    ),
    "date": ("source: a test", "source: 2021-01-01", "got '2021-01-01' (timestamp). Quote text."),
    "key_number": ("epochs: 4", "4: 4", "4 is not a known knob."),
    "key_truth": (
        "epochs: 4",
        "true: 4",
        "the name before a colon must be plain text, got another kind of key.",
    ),
    "key_anchor": (
        "epochs: 4",
        "&e epochs: 4",
        "the name before a colon must be plain text, got another kind of key.",
    ),
    "merge": (
        "epochs: 4",
        "<<: {a: 4}",
        "the name before a colon must be plain text, got another kind of key.",
    ),
    "directive": (
        "space: mini",
        "%YAML 1.1\n---\nspace: mini",
        "no line may start with %, got a YAML directive.",
    ),
    "second_document": (
        "points:",
        "---\npoints:",
        "the file must be well-formed YAML, got: expected a single document",
    ),
}
# Lines between the first replaced character and the line that the error names.
OTHER_LINE = (
    {"baseline_inactive": 1, "search_inactive": 1, "twice": 1, "set_searched": 1}
    | {"missing_section": -1, "not_a_map": -1, "search_empty": -1, "tier_not_a_map": -1}
    | {"coupled": -3, "coupled_momentum": -3, "startup_long": -4, "tier_unknown": -7}
)


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_names_file_line_and_rule(case: str) -> None:
    old, new, sentence = REFUSALS[case]
    assert old in MINI
    text = MINI.replace(old, new, 1)
    start = MINI.index(old)
    line = 1 + text.count("\n", 0, start) + OTHER_LINE.get(case, 0)
    line = 1 if case == "missing_section" else line
    message = refuse(text)
    pattern = ".*".join(re.escape(part) for part in sentence.split(".*"))
    assert re.match(f"mini\\.yaml:{line}: .*{pattern}", message), message


def test_point_without_momentum_is_refused_with_nesterov_unless_it_is_recorded() -> None:
    text = MINI.replace("epochs: 4\n", "epochs: 4\n  nesterov: true\n", 1)
    text = text.replace("points:\n", "  momentum: {low: 0.0, high: 0.95}\npoints:\n")
    rule = "everywhere in the search, momentum > 0 must hold with nesterov, got 0."
    for written in (text, text.replace("{max_lr: 0.1}", "{max_lr: 0.1, momentum: 0.0}")):
        assert refuse(written) == f"mini.yaml:18: {rule}"
    assert "momentum" in parse_recorded(text, "mini").search  # the rule is younger than records


@pytest.mark.parametrize("text", ["", "# nothing\n", "just words", "- a\n- b\n", "null"])
def test_file_that_is_no_map_is_refused(text: str) -> None:
    assert "the file must hold names with values" in refuse(text)


def test_missing_knob_of_the_baseline_has_the_line_of_its_section() -> None:
    assert refuse(MINI.replace("  optimizer: sgd\n", "")) == "mini.yaml:8: optimizer must be given."


def test_control_characters_are_refused() -> None:
    assert refuse("space: \x00\n").startswith("mini.yaml: the file must be readable as YAML, got: ")


def test_number_of_thousands_of_digits_is_refused() -> None:
    text = MINI.replace("epochs: 4", f"epochs: {'9' * 5000}", 1)
    assert "the file must be readable as YAML" in refuse(text)


def test_brackets_nested_very_deep_are_refused() -> None:
    sentence = "at most 10 levels of nesting are allowed, got more."
    assert refuse("a: " + "[" * 1500) == f"mini.yaml:1: {sentence}"


@settings(max_examples=60)
@given(
    st.integers(0, len(MINI)),
    st.text(st.sampled_from(list("{}[]:,#&*!|>%@\t\n -0a'\"")), max_size=4),
)
def test_damaged_file_is_read_or_refused_in_one_sentence(position: int, text: str) -> None:
    try:
        parse(MINI[:position] + text + MINI[position:])
    except SpaceError as exc:
        assert str(exc).startswith("mini.yaml")
        assert "\n" not in str(exc)


def test_file_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mini.yaml"
    path.write_text(MINI + "#" * 256_000)
    rule = r"size <= 256000 bytes must hold, got 256\d\d\d\."
    with pytest.raises(SpaceError, match=rf"mini\.yaml: {rule}"):
        read_space(path)


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mini.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpaceError, match="the file must be readable UTF-8 text"):
        read_space(path)


# --- finding


def test_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for missing in (str(tmp_path / "no.yaml"), tmp_path / "no.yaml", tmp_path):
        with pytest.raises(SpaceError, match="no such space file"):
            find_space(missing)


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(SpaceError, match=r"no search space named 's11'\. Did you mean s10\?$"):
        find_space("s11")
    known = r"Known: .*s6, s7, s8, s10, s10_postact, smoke\."
    with pytest.raises(SpaceError, match=rf"no search space named 'resnet'\. {known}$"):
        find_space("resnet")


def test_names_are_listed_in_natural_order(workplace: Path) -> None:
    assert [path.stem for path in list_spaces()] == SHIPPED


def test_folder_here_comes_before_the_package(workplace: Path) -> None:
    (workplace / "search_spaces").mkdir()
    own = workplace / "search_spaces" / "s7.yaml"
    own.write_text(MINI.replace("space: mini", "space: s7"))
    assert find_space("s7").resolve() == own.resolve()
    assert load_header("s7").source == "a test"
    assert find_space("s8").parent == FOLDER


def test_error_names_the_file_from_the_working_directory(workplace: Path) -> None:
    (workplace / "mini.yaml").write_text(MINI.replace("epochs: 4", "epochs: 0", 1))
    for path in ("mini.yaml", str(workplace / "mini.yaml")):
        with pytest.raises(SpaceError, match=r"^mini\.yaml:14: epochs >= 1 must hold, got 0\.$"):
            load_space(path)
    with pytest.raises(SpaceError, match=f"^{re.escape(str(FOLDER))}"):
        parse_space("", FOLDER / "s7.yaml")


def test_unknown_tier_is_refused() -> None:
    with pytest.raises(
        SpaceError, match=r"^`tier` must be full, cpu or night, got 'ful'\. Did you mean full\?$"
    ):
        load_space("s7", "ful")


def test_listing_and_checking_all_spaces_needs_no_optuna() -> None:
    code = (
        "import sys; from tune_cifar.space.select import list_spaces, load_header\n"
        "assert [load_header(path).space for path in list_spaces()]\n"
        "heavy = {'optuna', 'torch', 'ray', 'mlflow', 'pandas', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=FOLDER.parent, env=os.environ, timeout=60
    )


# --- pins


def test_pin_overrides_baseline_tier_and_points_and_is_not_searched() -> None:
    space = select_tier(
        parse(MINI), "cpu", {"max_lr": 1, "train_size": 600, "batch_size": 32, "val_size": 100}
    )
    assert repr(space.baseline.max_lr) == "1.0"
    config = space.baseline
    assert (config.train_size, config.batch_size, config.val_size) == (600, 32, 100)
    assert list(space.distributions) == ["cutout_size"]
    assert space.points == ()
    assert space.pinned == {"max_lr": 1.0, "train_size": 600, "batch_size": 32, "val_size": 100}
    assert space.config({"cutout_size": 4}).max_lr == 1.0


def test_pin_may_lie_outside_the_searched_range() -> None:
    assert select_tier(parse(MINI), "full", {"max_lr": 50.0}).baseline.max_lr == 50.0


def test_pin_drops_the_searched_knobs_that_it_makes_inactive() -> None:
    space = select_tier(parse(MINI), "full", {"schedule": "constant", "cutout_p": 0})
    assert list(space.distributions) == ["max_lr", "weight_decay"]
    assert space.dropped == {
        "pct_start": "schedule constant is not onecycle",
        "cutout_size": "cutout_p is 0",
    }
    assert all(list(point) == ["max_lr", "weight_decay"] for point in space.points)


def test_pin_may_make_knobs_active() -> None:
    space = select_tier(
        parse(MINI), "full", {"schedule": "step", "gamma": 0.5, "milestone_fractions": [0.25, 0.5]}
    )
    assert (space.baseline.gamma, space.baseline.milestone_fractions) == (0.5, (0.25, 0.5))
    assert list(space.dropped) == ["pct_start"]


@pytest.mark.parametrize(
    ("epochs", "rungs"),
    [(1, (1,)), (3, (3,)), (8, (3, 8)), (9, (3, 8, 9)), (24, (3, 8, 24)), (40, (3, 8, 40))],
)
def test_pinned_epochs_become_the_last_rung(epochs: int, rungs: tuple[int, ...]) -> None:
    space = load_space("s10", "full", {"epochs": epochs})
    assert space.baseline.epochs == epochs
    assert space.budget.rungs == rungs


@pytest.mark.parametrize(
    ("fidelity", "restarts"), [("cycles", ()), ("cycles/continue", (1, 3)), ("epochs", ())]
)
def test_continued_cycles_are_warm_restarts_of_every_trial(
    fidelity: str, restarts: tuple[int, ...]
) -> None:
    text = MINI.replace("rungs: [2, 4]", f"rungs: [1, 3, 4]\n    fidelity: {fidelity}")
    text = text.replace("pct_start: {low: 0.1, high: 0.5}", "pct_start: {choices: [0.1, 0.2, 0.3]}")
    text = text.replace("rungs: [1, 3, 4]", "rungs: [2, 3, 4]") if fidelity == "epochs" else text
    space = select_tier(parse(text), "full")
    assert space.baseline.warm_restarts == restarts
    assert space.config({"max_lr": 0.5}).warm_restarts == restarts
    assert space.budget.fidelity == fidelity
    assert select_tier(parse(text), "full", {"epochs": 3}).baseline.warm_restarts == restarts[:1]


def test_cycles_too_short_for_a_warm_up_are_refused_before_a_trial_is() -> None:
    """A tenth of a cycle's steps must be more than one: 16 steps are enough, 9 are not."""
    load_space("smoke", "cpu", {"train_size": 320}).check_searchable()
    space = load_space("smoke", "cpu", {"train_size": 180})
    with pytest.raises(ConfigError) as caught:
        space.check_searchable()
    assert str(caught.value) == (
        "`settings`: pct_start x steps of the shortest cycle > 1 must hold, got 0.1 x 9. "
        "Raise pct_start's low, raise the first rung or lower batch_size."
    )
    without_warm_up = {"train_size": 180, "schedule": "constant"}
    load_space("smoke", "cpu", without_warm_up).check_searchable()


def test_pinned_warm_restarts_are_refused_where_the_rungs_set_them() -> None:
    text = MINI.replace("rungs: [2, 4]", "rungs: [2, 4]\n    fidelity: cycles/continue")
    pins = {"schedule": "onecycle", "warm_restarts": [1]}
    space = select_tier(parse(text), "full", pins)
    rule = "warm_restarts must not be given with fidelity: cycles/continue"
    with pytest.raises(ConfigError, match=f"`settings`: {rule}"):
        space.check_searchable()
    assert space.baseline.warm_restarts == (1,), "a single training obeys the pin"
    assert select_tier(parse(MINI), "full", pins).baseline.warm_restarts == (1,)


def test_rungs_of_a_recorded_text_need_not_suit_its_fidelity() -> None:
    text = MINI.replace("rungs: [2, 4]", "rungs: [1, 4]\n    fidelity: epochs")
    with pytest.raises(SpaceError, match="first rung > pct_start x epochs must hold for fidelity"):
        parse(text)
    assert parse_recorded(text, "mini").tiers["full"].budget.rungs == (1, 4)
    text = MINI.replace("rungs: [2, 4]", "rungs: [2, 5]")
    with pytest.raises(SpaceError, match="last rung = epochs must hold, got 5 and epochs 4"):
        parse_recorded(text, "mini")


@pytest.mark.parametrize(
    ("pins", "sentence"),
    [
        ({"max_rl": 1}, "'max_rl' is not a known knob. Did you mean max_lr?"),
        ({"max_lr": 0}, "max_lr > 0 must hold, got 0."),
        ({"max_lr": "fast"}, "max_lr: input should be a valid number, got 'fast'."),
        ({"max_lr": None}, "max_lr: input should be a valid number, got None."),
        ({"gamma": 0.5}, "gamma has no effect here: schedule constant is not step. Leave it out."),
        (
            {"schedule": "constant", "pct_start": 0.5},
            "pct_start has no effect here: schedule constant is not onecycle. Leave it out.",
        ),
        (
            {"train_size": 100},
            "batch_size <= train_size must hold, got batch_size 128 and train_size 100.",
        ),
    ],
)
def test_impossible_pin_is_refused(pins: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select_tier(parse(MINI), "full", pins)
    assert str(caught.value) == f"`settings`: {sentence}"


@pytest.mark.parametrize(
    ("name", "pins", "sentence"),
    [
        (
            "s10",
            {"train_size": 50_000, "val_size": 0},
            "val_size >= 1 must hold in a search, got 0. Trials",
        ),
        (
            "s7",
            {"train_size": 200},
            "everywhere in the search, batch_size <= train_size must hold, got batch_size 256",
        ),
        (
            "s7",
            {"base_momentum": 0.95},
            "everywhere in the search, base_momentum <= max_momentum must hold",
        ),
    ],
)
def test_pins_that_forbid_a_search_still_give_a_training(
    name: str, pins: dict[str, Any], sentence: str
) -> None:
    space = load_space(name, "full", pins)
    assert all(getattr(space.baseline, knob) == value for knob, value in pins.items())
    for refused in (space.check_searchable, space.limit):
        with pytest.raises(ConfigError, match=re.escape(f"`settings`: {sentence}")):
            refused()


def test_pinning_every_searched_knob_leaves_a_training() -> None:
    space = load_space("smoke", "cpu", load_space("smoke").baseline_params)
    assert space.distributions == {}
    with pytest.raises(ConfigError, match="`settings` must leave a searched knob, got none"):
        space.check_searchable()


def test_limits_of_a_command_line_override_the_budget() -> None:
    space = load_space("s7", "cpu")
    assert space.limit() == space
    limited = space.limit(trials=3, max_time_seconds=30.0)
    assert (limited.budget.trials, limited.budget.max_time_seconds) == (3, 30.0)
    assert limited.budget.sampler == space.budget.sampler
    with pytest.raises(ConfigError, match=r"`trials` >= 1 must hold, got 0\."):
        space.limit(trials=0)


def test_goals_of_a_command_line_stand_in_the_budget_and_its_description() -> None:
    space = load_space("s7", "cpu").limit(target=0.605, patience=20)
    assert (space.budget.target, space.budget.patience) == (0.605, 20)
    assert space.budget.describe().endswith(", until 60.5 %, until 20 trials bring no gain")
    for target in (0.0, 1.1, 90.0):
        with pytest.raises(ConfigError, match=r"`target` must be a fraction, 0 < target <= 1"):
            space.limit(target=target)
    with pytest.raises(ConfigError, match=r"`patience` >= 1 must hold, got 0\."):
        space.limit(patience=0)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("max_lr=1e-3", "max_lr", 0.001),
        ("max_lr=1", "max_lr", 1.0),
        ("epochs=4", "epochs", 4),
        ("nesterov=true", "nesterov", True),
        ("schedule= onecycle", "schedule", "onecycle"),
        ("milestone_fractions=[0.25, 0.5]", "milestone_fractions", (0.25, 0.5)),
    ],
)
def test_setting_is_parsed_as_yaml(text: str, name: str, value: Any) -> None:
    found = parse_setting(text)
    assert found == (name, value)
    assert type(found[1]) is type(value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("max_lr", "`settings` must be NAME=VALUE, got 'max_lr'."),
        ("max_lr=[1", "`settings`: max_lr must be a number, a word or a list, got '[1'."),
        ("max_lr=", "`settings`: max_lr: input should be a valid number, got None."),
        ("max_rl=1", "`settings`: 'max_rl' is not a known knob. Did you mean max_lr?"),
        ("nesterov=yes", "`settings`: nesterov: input should be a valid boolean, got 'yes'."),
    ],
)
def test_unreadable_setting_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_setting(text)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("8m", 480), ("1h30m", 5400), (" 1h1m1s ", 3661)]
)
def test_duration_is_parsed(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "0s", "8 m", "-1s", "1.5h", "1m1h", "9999999s"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a duration must be a time such as"):
        parse_duration(text)


# --- rules


def test_range_contains_what_optuna_could_propose() -> None:
    stepped = Range(4, 16, step=3)
    assert [value for value in range(20) if stepped.contains(value)] == [4, 7, 10, 13, 16]
    assert Range(0.1, 0.4, step=0.1).contains(0.30000000000000004)
    assert Range(0.0, 1.0).contains(1.0)
    assert not Range(0.0, 1.0).contains(1.01)


def test_ends_of_choices_are_all_words_or_the_outermost_numbers() -> None:
    assert Choices(("a", "b", "c")).ends == ("a", "b", "c")
    assert Choices((True, False)).ends == (True, False)
    assert Choices((256, 64, 128)).ends == (64, 256)


def test_deciding_knobs_are_all_whose_value_makes_another_one_inactive() -> None:
    values: dict[str, tuple[Any, ...]] = {
        "optimizer": ("sgd", "adam", "adamw"),
        "schedule": ("onecycle", "cosine", "step", "constant"),
        "cycle_momentum": (True, False),
        "augment_backend": ("batched", "albumentations"),
        "nesterov": (True, False),
        "anneal_strategy": ("cos", "linear"),
    }
    full: dict[str, Any] = dict.fromkeys(("crop_pad", "cutout_size"), 8)
    full |= {knob: 0.5 for knob in KNOBS if knob.endswith(("_p", "_limit"))}
    base = load_space("s7").baseline.model_copy(update=full)
    bare = base.model_copy(update={"shift_limit": 0.0, "scale_limit": 0.0, "rotate_limit": 0.0})
    deciding = set()
    for knob, start in itertools.product(set(KNOBS) - {"milestone_fractions"}, (base, bare)):
        configs = [start.model_copy(update={knob: value}) for value in values.get(knob, (0, 0.5))]
        if len({frozenset(set(inactive_knobs(config)) - {knob}) for config in configs}) > 1:
            deciding.add(knob)
    assert deciding == set(DECIDING)


def test_coupled_knobs_are_those_that_searching_can_make_invalid() -> None:
    """Values that each knob allows by itself, in configurations without slack."""
    tight = load_space("s7").baseline.model_copy(
        update={"train_size": 128, "batch_size": 128, "base_momentum": 0.5, "max_momentum": 0.5}
        | {"schedule": "constant", "nesterov": True}
    )
    bases: tuple[dict[str, Any], ...] = (
        {},
        {"nesterov": False, "momentum": 0.0},
        {"optimizer": "adam", "momentum": 0.0},
    )
    coupled = set()
    values = (0, 1e-3, 0.5, 0.899, 1, 8, 129, 1000, True, "sgd")
    for base, knob, value in itertools.product(bases, set(KNOBS) - set(STRUCTURAL), values):
        if find_value_problem(knob, value, knob) is None:
            try:
                TrainConfig(**{**tight.model_dump(), **base, knob: value})
            except ConfigError:
                coupled.add(knob)
    assert coupled == set(COUPLED)


# --- the files that we ship


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_baseline_states_exactly_the_knobs_that_can_have_an_effect(name: str) -> None:
    file = read_space(name)
    without_effect = {*find_inactive(TrainConfig(**file.baseline), file.search), *ADDED_KNOBS}
    assert set(file.baseline) == set(KNOBS) - without_effect


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "smoke"])
def test_shipped_cpu_tier_searches_the_few_knobs_that_a_short_budget_can_tell_apart(
    name: str,
) -> None:
    space = load_space(name, "cpu")
    few = {"max_lr", "dropout", "pct_start", "div_factor", "final_div_factor"}
    if name in ("s6", "s8"):  # what their third point changes, and the batch
        few |= {"schedule", "weight_decay", "batch_size"}
        few |= {"crop_pad", "shift_scale_rotate_p", "cutout_p"}
    assert set(space.distributions) == few
    config = space.baseline
    assert (config.epochs, config.batch_size) == (3, 128)
    train_sizes = {"s10": 1500, "s10_postact": 1500, "s6": 4000}  # 20 trials in 8 minutes
    assert (config.train_size, config.val_size) == (train_sizes.get(name, 6000), 1000)
    assert space.budget.rungs == (1, 3)
    assert space.budget.max_time_seconds is not None
    assert 300 <= space.budget.max_time_seconds <= 480


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "smoke"])
def test_shipped_full_tier_compares_complete_cycles_on_all_images(name: str) -> None:
    space = load_space(name, "full")
    assert (space.baseline.train_size, space.baseline.val_size) == (45_000, 5_000)
    budget = space.budget
    assert (budget.fidelity, budget.reduction_factor, len(budget.rungs)) == ("cycles", 3, 3)
    assert all(2 < later / earlier < 4 for earlier, later in itertools.pairwise(budget.rungs))
    kinds = "max_lr dropout pct_start weight_decay batch_size label_smoothing cutout_size hflip_p"
    assert set(kinds.split()) <= set(space.distributions)


@pytest.mark.parametrize("tier", TIERS)
def test_smoke_space_trains_next_to_nothing(tier: str) -> None:
    space = load_space("smoke", tier)
    assert space.budget.trials * space.baseline.epochs * space.baseline.train_size <= 20_000
    assert space.baseline.val_size == 500


WARP_S6 = {"shift_scale_rotate_p": 0.5, "shift_limit": 0.0625, "scale_limit": 0.1} | {
    "rotate_limit": 45.0,
    "gray_p": 0.0,
}
S6 = (
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "batch_size": 128, "epochs": 40}
    | {"schedule": "step", "max_lr": 0.032, "milestone_fractions": (15 / 40, 30 / 40)}
    | {"gamma": 0.1, "dropout": 0.1, "hflip_p": 0.5, "cutout_p": 0.5, "cutout_size": 8}
    | WARP_S6
)
S7 = (
    {"optimizer": "sgd", "weight_decay": 0.0, "batch_size": 128, "epochs": 60, "dropout": 0.01}
    | {"schedule": "onecycle", "max_lr": 0.015, "pct_start": 0.3, "div_factor": 25.0}
    | {"final_div_factor": 1e4, "anneal_strategy": "cos", "cycle_momentum": True}
    | {"base_momentum": 0.85, "max_momentum": 0.95, "hflip_p": 0.3, "shift_scale_rotate_p": 0.5}
    | {"shift_limit": 0.1, "scale_limit": 0.1, "rotate_limit": 30.0, "cutout_p": 0.5}
    | {"cutout_size": 16, "gray_p": 0.5, "crop_pad": 0}
)
S8 = (
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "batch_size": 128, "epochs": 40}
    | {"schedule": "constant", "max_lr": 0.01, "dropout": 0.0, "hflip_p": 0.5}
    | {"cutout_p": 0.5, "cutout_size": 16}
    | WARP_S6
)
S10 = (
    {"optimizer": "adam", "weight_decay": 1e-2, "batch_size": 512, "epochs": 24, "dropout": 0.0}
    | {"schedule": "onecycle", "max_lr": 5.21e-4, "pct_start": 0.2, "div_factor": 100.0}
    | {"final_div_factor": 100.0, "anneal_strategy": "cos", "base_momentum": 0.85}
    | {"max_momentum": 0.95, "crop_pad": 4, "hflip_p": 0.5, "cutout_p": 0.5, "cutout_size": 8}
    | {"shift_scale_rotate_p": 0.0, "gray_p": 0.0}
)


@pytest.mark.parametrize(
    ("name", "published", "expected"),
    [
        ("s6", 0.7954, S6),
        ("s7", 0.9045, S7),
        ("s8", 0.8180, S8),
        ("s10", 0.9307, S10),
        ("s10_postact", 0.7886, S10),
    ],
)
def test_shipped_baseline_is_the_table_of_the_source_systems(
    name: str, published: float, expected: dict[str, Any]
) -> None:
    space = load_space(name)
    values = space.baseline.model_dump()
    assert {knob: values[knob] for knob in expected} == expected
    config = space.baseline
    assert (config.model, config.label_smoothing, config.seed) == (name, 0.0, 0)
    assert space.header.published.accuracy == published
    assert space.header.corrects


def test_readme_shows_a_file_that_would_be_read() -> None:
    """The example of the README, with MINI's baseline for its ellipsis, is a space file."""
    readme = (FOLDER / "README.md").read_text()
    example = readme.split("```yaml\n")[1].split("```")[0]
    text = example.replace(
        "  # ... every knob that has an effect\n",
        "  schedule: constant\n  max_lr: 5.21e-4\n  batch_size: 128\n  epochs: 24\n  crop_pad: 4\n",
    )
    assert text != example
    space = select_tier(parse_space(text, Path("mine.yaml")), "cpu")
    assert list(space.distributions) == ["max_lr", "schedule"]


# --- what there is to set


@pytest.mark.parametrize(
    ("knob", "effect"),
    [
        ("max_lr", ""),
        ("nesterov", "with optimizer sgd"),
        ("weight_decay", "with optimizer sgd or adam"),
        ("max_momentum", "with schedule onecycle, cycle_momentum true"),
        ("momentum", "unless schedule onecycle, cycle_momentum true"),
        ("cutout_p", "with cutout_size > 0"),
        ("shift_scale_rotate_p", "unless shift_limit = 0, scale_limit = 0, rotate_limit = 0"),
    ],
)
def test_a_knob_is_listed_with_what_gives_it_an_effect(knob: str, effect: str) -> None:
    assert describe_effect(knob) == effect


def test_an_effect_that_is_no_list_of_settings_is_not_listed_as_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find_inactive(config: TrainConfig) -> dict[str, str]:
        return {"momentum": "why"} if (config.optimizer == "sgd") == config.cycle_momentum else {}

    monkeypatch.setattr(overview, "inactive_knobs", find_inactive)
    monkeypatch.setattr(overview, "_find_inactive", overview._find_inactive.__wrapped__)
    assert describe_effect("momentum") == "depends on more than one rule"


def test_knobs_are_listed_in_the_schemas_words() -> None:
    found = {knob.name: knob for knob in list_knobs()}
    assert tuple(found) == KNOBS
    assert "depends on more than one rule" not in {knob.effect for knob in found.values()}
    assert found["max_lr"].row == (
        "max_lr",
        "max LR: Highest learning rate of the schedule: OneCycle's peak, the start of the others.",
        "number in (0, 100]",
        "must be given",
        "train/optim",
        "always",
        ", ".join(SHIPPED),
    )
    rows = {name: knob.row for name, knob in found.items()}
    assert rows["crop_pad"][2:4] == ("integer in [0, 16] (px)", "0")
    assert rows["nesterov"][2:4] == ("true, false", "false")
    assert rows["optimizer"][1:3] == ("optimizer", "sgd, adam, adamw")
    assert rows["warm_restarts"][3] == "[]"
    assert rows["seed"][-1] == "never: all trials of a search share one training seed"
    assert rows["gamma"][-1] == "no space yet"
    assert "s7" in found["gray_p"].spaces and "s8" not in found["gray_p"].spaces


def test_a_sentence_about_an_enormous_value_is_cut_in_its_middle(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text("x" * 5000, encoding="utf-8")
    rule = "the file must hold names with values"
    with pytest.raises(SpaceError, match=rf"long\.yaml:1: {rule}, got 'x+ \.\.\. x+'") as caught:
        read_space(tmp_path / "long.yaml")
    assert len(str(caught.value)) < 700


# --- changing a range


@pytest.fixture
def mini(workplace: Path) -> Path:
    path = workplace / "mini.yaml"
    path.write_text(MINI)
    return path


MAX_LR = "  max_lr: {low: 1.0e-4, high: 1, log: true}\n"
WIDER = Range(1.25e-5, 2.0, log=True)


def change(line: str) -> tuple[str, str]:
    """Set max_lr to WIDER in MINI with another entry of max_lr; return both texts."""
    text = MINI.replace(MAX_LR, line)
    return text, set_range(parse(text), "max_lr", WIDER)


def test_a_changed_range_changes_its_own_line_only() -> None:
    text, edited = change(MAX_LR.replace("\n", "  # a {comment}\n"))
    assert edited == text.replace("{low: 1.0e-4, high: 1,", "{low: 1.25e-5, high: 2.0,")
    assert parse(edited).search["max_lr"] == WIDER


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "smoke"])
def test_a_changed_range_is_one_line_of_a_shipped_file(name: str) -> None:
    file = read_space(name)
    diff = describe_edit(file, set_range(file, "max_lr", WIDER))
    changed = [line for line in diff.splitlines() if re.match("[+-] ", line)]
    assert len(changed) == 2
    assert changed[1] == "+  max_lr: {low: 1.25e-5, high: 2.0, log: true}"


BLOCK = """  max_lr:  # found by hand
      low: 1.0e-4   # low
      # between
      high: 1
      log: true # end

"""


def test_a_range_over_several_lines_keeps_its_form_and_its_comments() -> None:
    text, edited = change(BLOCK)
    expected = text.replace("1.0e-4   # low", "1.25e-5  # low").replace("high: 1\n", "high: 2.0\n")
    assert edited == expected


@pytest.mark.parametrize("line", [MAX_LR, BLOCK], ids=["braces", "block"])
def test_line_ends_stay_those_of_the_file(line: str) -> None:
    text, edited = change(line)
    file = parse(text.replace("\n", "\r\n"))
    assert set_range(file, "max_lr", WIDER) == edited.replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "max_lr:   { high: 1, low: 1.0e-4 }  # x",
            "max_lr:   {high: 2.0, low: 1.25e-5, log: true}  # x",
        ),
        (
            "max_lr: {low: 0.01, high: 1.0, step: 0.09}",
            "max_lr: {low: 1.25e-5, high: 2.0, log: true}",
        ),
        (
            "max_lr: {step: 0.09, low: 0.01, high: 1.0}",
            "max_lr: {low: 1.25e-5, high: 2.0, log: true}",
        ),
        (
            "max_lr:\n    high: 1\n    low: 1.0e-4",
            "max_lr:\n    high: 2.0\n    low: 1.25e-5\n    log: true",
        ),
        ("max_lr: {low: 1.0e-4,\n    high: 1}", "max_lr: {low: 1.25e-5, high: 2.0, log: true}"),
    ],
)
def test_a_range_is_changed_in_any_form(before: str, after: str) -> None:
    text, edited = change(f"  {before}\n")
    assert edited == text.replace(before, after)


def test_a_range_is_changed_in_a_search_within_braces() -> None:
    entry, more = "{low: 1.0e-4, high: 1, log: true}", "{low: 0.0, high: 0.5}"
    start, end = MINI.index("search:"), MINI.index("budget:")
    text = f"{MINI[:start]}search: {{max_lr: {entry},\n  dropout: {more}}}\n{MINI[end:]}"
    text = text.replace("only: [max_lr, cutout_size]", "only: [max_lr]")
    edited = set_range(parse(text), "max_lr", WIDER)
    assert edited == text.replace(entry, "{low: 1.25e-5, high: 2.0, log: true}")


def test_what_stays_keeps_every_digit() -> None:
    text = MINI.replace("low: 1.0e-4", "low: 6.093367075230155e-4")
    edited = set_range(parse(text), "max_lr", Range(6.093367075230155e-4, 0.5, log=True))
    assert edited == text.replace("high: 1, log", "high: 0.5, log")


@settings(max_examples=40)
@given(st.floats(1e-12, 0.005), st.floats(0.2, 100.0))
def test_any_number_can_be_written(low: float, high: float) -> None:
    file = parse(MINI)
    wanted = Range(low, high, log=True)
    assert parse(set_range(file, "max_lr", wanted)).search["max_lr"] == wanted


def test_a_change_is_shown_as_a_diff_and_none_as_nothing(mini: Path) -> None:
    file = read_space(mini)
    assert set_range(file, "max_lr", Range(1e-4, 1.0, log=True)) == MINI
    assert describe_edit(file, MINI) == ""
    text = set_range(file, "max_lr", Range(1e-3, 1.0, log=True))
    changed = [line for line in describe_edit(file, text).splitlines() if line[0] in "+-"]
    assert changed == [
        "--- mini.yaml",
        "+++ mini.yaml (proposed)",
        "-  max_lr: {low: 1.0e-4, high: 1, log: true}",
        "+  max_lr: {low: 1.0e-3, high: 1, log: true}",
    ]


def test_a_range_that_is_not_logarithmic_is_written_without_the_word() -> None:
    text = set_range(parse(MINI), "pct_start", Range(0.2, 0.45))
    assert "  pct_start: {low: 0.2, high: 0.45}\n" in text


def test_a_change_that_breaks_a_rule_of_the_file_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"^mini.yaml:\d+: max_lr: the baseline's value must lie"):
        set_range(parse(MINI), "max_lr", Range(0.1, 1.0, log=True))


@pytest.mark.parametrize(
    ("knob", "got"), [("dropout", "a knob that is not searched"), ("schedule", "choices")]
)
def test_only_a_range_can_be_changed(knob: str, got: str) -> None:
    sentence = f"mini.yaml: {knob} must be searched between low and high, got {got}."
    with pytest.raises(SpaceError, match=f"^{sentence}$"):
        find_range(parse(MINI), knob)
    with pytest.raises(SpaceError, match=f"^{sentence}$"):
        set_range(parse(MINI), knob, WIDER)


# Every deciding knob with the values that matter, and the knobs that they decide on.
CONDITIONS: dict[str, tuple[Any, ...]] = {
    "pct_start": (0.1, 0.4),
    "momentum": (0.5, 0.8),
    "cutout_size": (0, 8),
    "optimizer": ("sgd", "adam", "adamw"),
    "schedule": ("constant", "step", "onecycle"),
    "cycle_momentum": (False, True),
    "cutout_p": (0.0, 0.5),
    "shift_scale_rotate_p": (0.0, 0.5),
    "shift_limit": (0.0, 0.1),
    "scale_limit": (0.0, 0.1),
    "rotate_limit": (0.0, 10.0),
    "base_momentum": (0.7, 0.8),
    "gamma": (0.1, 0.5),
    "nesterov": (False, True),
    "weight_decay": (0.0, 0.1),
    "decoupled_weight_decay": (0.0, 0.1),
}


@settings(max_examples=50)
@given(data=st.data())
def test_without_inactive_knobs_a_proposal_is_the_same_training(data: Any) -> None:
    values = st.fixed_dictionaries(
        {name: st.sampled_from(found) for name, found in CONDITIONS.items()}
    )
    base, params = data.draw(values), data.draw(values)
    names = data.draw(st.sets(st.sampled_from(sorted(CONDITIONS))))
    baseline = TrainConfig(**{**dict(load_space("s8").baseline), **base})
    search: Searched = {name: Choices(CONDITIONS[name]) for name in CONDITIONS if name in names}
    params = {name: params[name] for name in search}
    full = baseline.model_copy(update=params)
    active = select_active(baseline, params, search)
    assert list(active.items()) == [item for item in params.items() if item[0] in active]
    found = baseline.model_copy(update=active)
    assert found.fingerprint == full.fingerprint
    assert set(params) - set(active) <= set(inactive_knobs(found))
    # A knob that stays is active, unless it was settled before the one that overrules it.
    assert set(active) & set(inactive_knobs(found)) <= set(DECIDING)
    assert select_active(baseline, active, search) == active


def test_of_two_knobs_that_switch_an_operation_off_the_first_stays() -> None:
    search: Searched = {"cutout_p": Range(0.0, 1.0), "cutout_size": Choices((0, 8))}
    baseline = load_space("s8").baseline

    def select(p: float, size: int) -> dict[str, Any]:
        return select_active(baseline, {"cutout_p": p, "cutout_size": size}, search)

    assert select(0.0, 0) == select(0.0, 8) == {"cutout_p": 0.0}
    assert select(0.5, 0) == {"cutout_p": 0.5, "cutout_size": 0}
    assert select(0.5, 8) == {"cutout_p": 0.5, "cutout_size": 8}


def test_a_proposal_of_a_space_is_left_with_what_is_active() -> None:
    space = load_space("s8", "cpu")
    rest = {"max_lr": 0.1, "dropout": 0.0}
    shape = {"pct_start": 0.2, "div_factor": 10.0, "final_div_factor": 10.0}
    for schedule, expected in (("constant", rest), ("onecycle", rest | shape)):
        params = {"schedule": schedule, **rest, **shape}
        assert space.select_active(params) == {"schedule": schedule, **expected}


def test_a_limit_beyond_the_most_trials_of_a_search_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`trials` <= 100000 must hold, got 100001\."):
        load_space("smoke", "cpu").limit(100_001)


# Other data than CIFAR-10

PETS = CIFAR10.model_copy(
    update={"name": "pets", "num_train": 900, "num_val": 100, "class_names": ("cat", "dog")}
)


def test_sizes_of_a_file_mean_all_images_of_other_data_unless_tier_or_pin_name_fewer() -> None:
    full = load_space("s7", "full", {"batch_size": 32}, PETS)
    assert (full.baseline.train_size, full.baseline.val_size) == (900, 100)
    assert full.pinned == {"batch_size": 32, "train_size": 900, "val_size": 100}
    some = load_space("s7", "full", {"batch_size": 32, "train_size": 500}, PETS)
    assert (some.baseline.train_size, some.baseline.val_size) == (500, 100)
    assert load_space("s7", "cpu", None, PETS).pinned == {"train_size": 900, "val_size": 100}
    many = PETS.model_copy(update={"num_train": 9_000})
    few = load_space("s7", "cpu", None, many)
    assert few.baseline.train_size == 6_000 and few.pinned == {"val_size": 100}
    # As many images as CIFAR-10 has, as CIFAR-100: the file's sizes stay.
    alike = CIFAR10.model_copy(update={"name": "cifar100"})
    assert load_space("s7", "full", None, alike).pinned == {}
    assert load_space("s7", "full").pinned == {}


def test_a_size_that_is_too_large_for_the_data_is_refused_with_the_largest_that_fits() -> None:
    with pytest.raises(ConfigError) as caught:
        load_space("s7", "cpu", {"val_size": 1000}, PETS)
    problem = "val_size <= 100 must hold, got 1000."
    hint = "All images are train_size=900 and val_size=100."
    assert str(caught.value) == f"`settings` on pets: {problem} {hint}"
    with pytest.raises(ConfigError, match=r"on pets: train_size <= 900 or .* got 901"):
        load_space("s7", "cpu", {"train_size": 901, "val_size": 50}, PETS)


def test_a_search_that_would_cut_larger_holes_than_the_images_is_refused() -> None:
    tiny = PETS.model_copy(update={"side": 16})
    space = load_space("s7", "full", {"batch_size": 32}, tiny)
    assert space.obstacle is not None and "cutout_size <= 16 must hold, got 20" in space.obstacle


def test_a_recorded_space_is_restored_without_its_data() -> None:
    file = read_space("s7")
    pins = {"batch_size": 32, "train_size": 900, "val_size": 100, "cutout_size": 40}
    space = select_tier(file, "full", pins, None)
    assert space.baseline.cutout_size == 40 and space.pinned == pins
