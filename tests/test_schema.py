"""TrainConfig: bounds and their messages, inactive knobs, the fingerprint; the other records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ValidationError

import tune_cifar
from tune_cifar.errors import ConfigError, describe_validation_error, did_you_mean
from tune_cifar.schema import (
    ADDED_KNOBS,
    KNOBS,
    DataInfo,
    EpochResult,
    Frozen,
    Numerics,
    TrainConfig,
    inactive_knobs,
)

# Every operation of the augmentation is on, so that every strength is active.
ONECYCLE: dict[str, Any] = (
    {"model": "s7", "optimizer": "sgd", "schedule": "onecycle", "max_lr": 0.01}
    | {"batch_size": 128, "epochs": 4, "shift_scale_rotate_p": 0.5, "shift_limit": 0.1}
    | {"scale_limit": 0.1, "rotate_limit": 30.0, "cutout_p": 0.5, "cutout_size": 8}
)
# The fewest knobs that a configuration needs.
PLAIN: dict[str, Any] = {
    "model": "s7",
    "optimizer": "sgd",
    "schedule": "constant",
    "max_lr": 0.1,
    "batch_size": 8,
    "epochs": 1,
}
BASES = {
    "onecycle": ONECYCLE,
    "onecycle_adam": {**ONECYCLE, "hflip_p": 0.3, "optimizer": "adam"},
    "onecycle_fixed_momentum": {**ONECYCLE, "cycle_momentum": False},
    "step": {**ONECYCLE, "schedule": "step"},
    "cosine": {**ONECYCLE, "schedule": "cosine"},
    "constant_adamw": {**ONECYCLE, "schedule": "constant", "optimizer": "adamw"},
    "no_warp_probability": {**ONECYCLE, "shift_scale_rotate_p": 0.0},
    "no_warp_limits": {**ONECYCLE, "shift_limit": 0.0, "scale_limit": 0.0, "rotate_limit": 0.0},
    "no_cutout_probability": {**ONECYCLE, "cutout_p": 0.0},
    "no_cutout_size": {**ONECYCLE, "cutout_size": 0},
}
# A value for each knob that no base has; changing it turns no operation on or off.
OTHER: dict[str, Any] = {
    "model": "s8",
    "dropout": 0.1,
    "optimizer": "sgd",
    "nesterov": True,
    "momentum": 0.8,
    "weight_decay": 1e-3,
    "decoupled_weight_decay": 1e-3,
    "schedule": "onecycle",
    "max_lr": 0.02,
    "pct_start": 0.2,
    "div_factor": 10.0,
    "final_div_factor": 10.0,
    "anneal_strategy": "linear",
    "cycle_momentum": False,
    "base_momentum": 0.8,
    "max_momentum": 0.9,
    "milestone_fractions": (0.25, 0.75),
    "gamma": 0.2,
    "warm_restarts": (1, 3),
    "batch_size": 64,
    "epochs": 5,
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
    "train_size": 1000,
    "val_size": 1000,
    "seed": 1,
    "augment_backend": "albumentations",
    "crop_pad": 4,
    "hflip_p": 0.5,
    "hflip_mode": "alternating",
    "shift_scale_rotate_p": 0.4,
    "shift_limit": 0.2,
    "scale_limit": 0.2,
    "rotate_limit": 20.0,
    "cutout_p": 0.4,
    "cutout_size": 12,
    "gray_p": 0.5,
}
ONECYCLE_ONLY = {"pct_start", "div_factor", "final_div_factor", "anneal_strategy", "cycle_momentum"}
CYCLED = {"base_momentum", "max_momentum"}
STEP_ONLY = {"milestone_fractions", "gamma"}
WARP = {"shift_limit", "scale_limit", "rotate_limit"}


def make_config(base: str = "onecycle", **changes: Any) -> TrainConfig:
    return TrainConfig(**{**BASES[base], **changes})


OF_ONECYCLE = {"momentum", "decoupled_weight_decay"} | STEP_ONLY
OF_ADAMW = {"weight_decay", "nesterov", "warm_restarts"}
INACTIVE = {
    "onecycle": OF_ONECYCLE,
    "onecycle_adam": OF_ONECYCLE | {"nesterov"},
    "onecycle_fixed_momentum": {"decoupled_weight_decay"} | CYCLED | STEP_ONLY,
    "step": {"decoupled_weight_decay"} | CYCLED | ONECYCLE_ONLY,
    "cosine": {"decoupled_weight_decay"} | CYCLED | ONECYCLE_ONLY | STEP_ONLY,
    "constant_adamw": CYCLED | ONECYCLE_ONLY | STEP_ONLY | OF_ADAMW,
    "no_warp_probability": OF_ONECYCLE | WARP,
    "no_warp_limits": OF_ONECYCLE | {"shift_scale_rotate_p"},
    "no_cutout_probability": OF_ONECYCLE | {"cutout_size"},
    "no_cutout_size": OF_ONECYCLE | {"cutout_p"},
}


@pytest.mark.parametrize("base", BASES)
def test_inactive_knobs_are_exactly_those_that_nothing_uses(base: str) -> None:
    without_flips = set() if base == "onecycle_adam" else {"hflip_mode"}
    assert set(inactive_knobs(make_config(base))) == INACTIVE[base] | without_flips


def test_inactive_knob_comes_with_its_reason() -> None:
    reasons = inactive_knobs(make_config())
    assert reasons["momentum"] == "OneCycle cycles momentum between base_momentum and max_momentum"
    assert inactive_knobs(make_config("step"))["pct_start"] == "schedule step is not onecycle"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", KNOBS)
def test_fingerprint_changes_with_an_active_knob_and_ignores_an_inactive_one(
    base: str, name: str
) -> None:
    before, after = make_config(base), make_config(base, **{name: OTHER[name]})
    if before == after:  # the base has the other value already
        assert name in ("optimizer", "schedule", "cycle_momentum")
    elif name in inactive_knobs(before) and name in inactive_knobs(after):
        assert after.fingerprint == before.fingerprint
    else:
        assert after.fingerprint != before.fingerprint


def test_fingerprint_is_16_hexadecimal_digits_that_outlive_a_round_trip() -> None:
    config = make_config("step")
    again = TrainConfig(**config.model_dump(mode="json"))
    assert again == config
    assert again.fingerprint == config.fingerprint
    assert len(config.fingerprint) == 16
    assert int(config.fingerprint, 16) >= 0


def test_fingerprint_of_a_known_configuration_stays_what_it_is() -> None:
    """A changed fingerprint orphans recorded runs; it needs a [results] entry in the changelog."""
    assert make_config().fingerprint == "029dfb26661d5b75"


def test_last_smaller_batch_counts_as_a_step() -> None:
    assert make_config(train_size=1000, batch_size=128).num_steps_per_epoch == 8
    assert make_config(train_size=1024, batch_size=128).num_steps_per_epoch == 8


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_lr": 0.0}, "max_lr > 0 must hold, got 0.0."),
        ({"dropout": -0.1}, "dropout >= 0 must hold, got -0.1."),
        ({"momentum": 1.0}, "momentum < 1 must hold, got 1.0."),
        ({"crop_pad": 17}, "crop_pad <= 16 must hold, got 17."),
        ({"max_lr": "1e-3"}, "max_lr: input should be a valid number, got '1e-3'."),
        ({"max_lr": float("nan")}, "max_lr: input should be a finite number, got nan."),
        ({"max_lr": True}, "max_lr: input should be a valid number, got True."),
        ({"epochs": 2.0}, "epochs: input should be a valid integer, got 2.0."),
        ({"nesterov": 1}, "nesterov: input should be a valid boolean, got 1."),
        (
            {"milestone_fractions": 0.5},
            "milestone_fractions must be a list, got 0.5.",
        ),
        (
            {"milestone_fractions": ["a"]},
            "milestone_fractions.0: input should be a valid number, got 'a'.",
        ),
        (
            {"milestone_fractions": [0.5, 0.5]},
            "milestone_fractions increasing within (0, 1) must hold, got (0.5, 0.5).",
        ),
        (
            {"milestone_fractions": [0, 0.5]},
            "milestone_fractions increasing within (0, 1) must hold, got (0.0, 0.5).",
        ),
        (
            {"milestone_fractions": [0.5, 1]},
            "milestone_fractions increasing within (0, 1) must hold, got (0.5, 1.0).",
        ),
        ({"max_rl": 0.1}, "max_rl is not a known name. Did you mean max_lr?"),
        ({"zzz": 0.1}, "zzz is not a known name."),
        (
            {"schedule": "onecylce"},
            "schedule must be 'onecycle', 'cosine', 'step' or 'constant', got 'onecylce'. "
            "Did you mean onecycle?",
        ),
        (
            {"model": "vgg"},
            "model must be 's6', 's7', 's8', 's10', 's10_postact' or your own FILE.py:NAME, "
            "got 'vgg'.",
        ),
        ({"model_args": {"width": 3}}, "model_args must be empty for s7, got width."),
        ({"model_args": [1, 2]}, "model_args must be names with values, got [1, 2]."),
        ({"model_args": ["ab", "cd"]}, "model_args must be names with values, got ['ab', 'cd']."),
        (
            {"model_args": {1: 2, "a": 3}},
            "model_args must be names with values, got {1: 2, 'a': 3}.",
        ),
        ({"model_args": 3}, "model_args must be names with values, got 3."),
        (
            {"batch_size": 128, "train_size": 100},
            "batch_size <= train_size must hold, got batch_size 128 and train_size 100.",
        ),
        (
            {"base_momentum": 0.96},
            "base_momentum <= max_momentum must hold, "
            "got base_momentum 0.96 and max_momentum 0.95.",
        ),
    ],
)
def test_broken_rule_is_one_sentence_with_rule_and_value(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**changes)
    assert str(caught.value) == f"configuration: {sentence}"


def test_an_integer_too_large_for_a_float_is_refused_as_any_other_value() -> None:
    rule = "milestone_fractions.0: input should be a valid number, got 1000"
    with pytest.raises(ConfigError, match=f"configuration: {rule}"):
        make_config(milestone_fractions=[10**400])


def test_missing_knob_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^configuration: optimizer must be given\.$"):
        TrainConfig(**{name: value for name, value in ONECYCLE.items() if name != "optimizer"})


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("dropout", (0.0, 0.9), (-1e-9, 0.91)),
        ("pct_start", (1e-6, 0.999), (0.0, 1.0)),
        ("div_factor", (1.0, 1e6), (0.99, 1.1e6)),
        ("momentum", (0.0, 0.999), (1.0,)),
        ("batch_size", (2, 45_000), (1, 50_001)),
        ("epochs", (1, 1000), (0, 1001)),
        ("label_smoothing", (0.0, 0.9), (-0.1, 0.95)),
        ("ema_decay", (0.0, 0.9999), (-0.1, 1.0)),
        ("train_size", (128, 45_000), (0,)),
        ("val_size", (1, 5000), (-1,)),
        ("seed", (0, 2**31 - 1), (-1, 2**31)),
        ("cutout_size", (0, 32), (-1,)),
        ("hflip_p", (0.0, 1.0), (-0.01, 1.01)),
    ],
)
def test_bounds_include_and_exclude_what_they_say(
    name: str, accepted: tuple[Any, ...], refused: tuple[Any, ...]
) -> None:
    for value in accepted:
        assert getattr(make_config(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(ConfigError, match=name):
            make_config(**{name: value})


def test_full_data_set_without_validation_is_a_configuration() -> None:
    config = make_config(train_size=50_000, val_size=0)
    assert config.num_steps_per_epoch == 391


def test_integer_given_for_a_real_knob_becomes_a_float() -> None:
    assert repr(make_config(max_lr=1).max_lr) == "1.0"


def test_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_config().max_lr = 1.0  # type: ignore[misc]


PACKAGE = Path(tune_cifar.__file__).parent
# What a module reads in the place of a knob.
DERIVED = {"warm_restarts": "cycle_epochs"}


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_has_a_label_and_a_module_that_reads_it(name: str) -> None:
    extra = TrainConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict) and extra["label"]
    source = (PACKAGE / f"{extra['used_by']}.py").read_text(encoding="utf-8")
    assert re.search(rf"\b{DERIVED.get(name, name)}\b", source)


def test_did_you_mean_is_silent_when_nothing_is_close() -> None:
    assert did_you_mean("max_lrr", KNOBS) == " Did you mean max_lr?"
    assert did_you_mean("qqq", KNOBS) == ""


class Inner(Frozen):
    """A record inside a record."""

    kind: Literal["a", "b"]


class Outer(Frozen):
    """The record around it."""

    inner: Inner


def test_literal_below_the_top_level_is_described_without_a_hint() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": {"kind": "x"}})
    sentence = describe_validation_error(caught.value, Outer)
    assert sentence == "inner.kind must be 'a' or 'b', got 'x'."


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"inner": {"kind": "a"', "the file must be JSON, got: EOF while parsing"),
        ('["a"]', "the file must be names with values, got ['a']."),
        ('{"inner": 3}', "inner must be names with values, got 3."),
    ],
)
def test_a_file_that_is_no_json_or_no_record_is_described(content: str, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate_json(content)
    found = describe_validation_error(caught.value, Outer)
    assert found.startswith(sentence) and content not in found


def test_epoch_result_refuses_what_json_cannot_hold() -> None:
    numbers: dict[str, Any] = dict.fromkeys(EpochResult.model_fields, 1)
    assert EpochResult(**numbers).epoch == 1
    with pytest.raises(ValidationError, match="finite"):
        EpochResult(**{**numbers, "train_loss": float("inf")})


WARP_OFF = {"shift_scale_rotate_p": 0.0, "shift_limit": 0.0, "scale_limit": 0.0}


@pytest.mark.parametrize(
    ("knobs", "off"),
    [
        ({"cutout_p": 0.0, "cutout_size": 0}, [{"cutout_size": 8}, {"cutout_p": 0.5}]),
        (
            {**WARP_OFF, "rotate_limit": 0.0},
            [{"rotate_limit": 30.0}, {"shift_scale_rotate_p": 0.5}],
        ),
    ],
)
def test_fingerprint_is_the_same_however_an_operation_is_switched_off(
    knobs: dict[str, Any], off: list[dict[str, Any]]
) -> None:
    configs = [TrainConfig(**{**PLAIN, **knobs, **change}) for change in ({}, *off)]
    assert len({config.fingerprint for config in configs}) == 1


def test_config_refuses_nesterov_without_momentum() -> None:
    with pytest.raises(ConfigError, match="momentum > 0 must hold with nesterov, got 0"):
        TrainConfig(**PLAIN, nesterov=True, momentum=0.0)


def test_config_names_the_misspelt_knob_before_the_missing_one() -> None:
    values = {name: value for name, value in PLAIN.items() if name != "max_lr"}
    with pytest.raises(ConfigError, match=r"max_l is not a known name\. Did you mean max_lr\?"):
        TrainConfig(**values, max_l=0.1)


def test_a_recipe_over_fewer_epochs_keeps_the_restarts_that_lie_within() -> None:
    config = make_config("onecycle", epochs=9, warm_restarts=[2, 5])
    assert config.warm_restarts == (2, 5), "a list, as JSON has it, is read"
    short = config.shorten(5)
    assert short == make_config("onecycle", epochs=5, warm_restarts=(2,))
    assert config.shorten(2) == make_config("onecycle", epochs=2)
    assert config.shorten(9) == config
    assert config.cycle_epochs == (2, 3, 4)
    assert make_config("onecycle", epochs=3).cycle_epochs == (3,)


@pytest.mark.parametrize("restarts", [(0,), (3, 3), (5, 2), (9,), (12,), (-1, 4)])
def test_warm_restarts_lie_in_order_before_the_last_epoch(restarts: tuple[int, ...]) -> None:
    rule = "warm_restarts increasing from 1 to below epochs must hold, got"
    with pytest.raises(ConfigError, match=rule):
        make_config("onecycle", epochs=9, warm_restarts=restarts)


@pytest.mark.parametrize("restarts", ["2", 2, (2.0,), [True]])
def test_warm_restarts_are_a_list_of_integers(restarts: Any) -> None:
    with pytest.raises(ConfigError, match="warm_restarts"):
        make_config("onecycle", epochs=9, warm_restarts=restarts)


def test_added_knobs_belong_to_the_fingerprint_where_they_are_not_at_their_default() -> None:
    assert set(ADDED_KNOBS) < set(KNOBS)
    changes: list[dict[str, Any]] = [{}, {"ema_decay": 0.99}, {"hflip_mode": "alternating"}]
    configs = [make_config(hflip_p=0.5, **change) for change in changes]
    assert len({config.fingerprint for config in configs}) == 3


def test_warm_restarts_belong_to_the_fingerprint_where_there_are_any() -> None:
    config = make_config("onecycle", epochs=9, warm_restarts=(2, 5))
    configs = (config, config.shorten(8), make_config("onecycle", epochs=9))
    assert len({config.fingerprint for config in configs}) == 3
    constant = make_config("constant_adamw", epochs=9)
    assert "warm_restarts" in inactive_knobs(constant.model_copy(update={"warm_restarts": (2,)}))


def test_figures_on_other_data_than_cifar10_carry_a_warning() -> None:
    assert DataInfo(name="cifar10", digest="d", split_hash="s").label == ""
    assert DataInfo(name="shapes", digest="d", split_hash="s").label == "NOT CIFAR-10 (shapes)"


NUMERICS: dict[str, Any] = {
    "device": "cuda",
    "device_name": "a GPU",
    "capability": "sm_80",
    "precision": "fp32",
    "memory_format": "channels_last",
    "threads": 1,
    "deterministic": True,
    "execution": "eager",
    "versions": {},
}


def test_what_an_old_record_calls_fp32_on_a_gpu_was_tf32() -> None:
    """It has no settings, and torch's default was not changed then."""
    old = Numerics(**NUMERICS)
    assert (old.precision, old.settings) == ("tf32", None)
    assert Numerics.model_validate_json(json.dumps(NUMERICS)) == old
    assert Numerics(**old.model_dump()) == old
    assert Numerics(**NUMERICS, settings={}).precision == "fp32"
    for other in ({"device": "cpu"}, {"precision": "bf16"}):
        values = NUMERICS | other
        assert Numerics(**values).precision == values["precision"]


def test_numerics_of_a_gpu_are_taken_over_as_they_are() -> None:
    today = Numerics(**NUMERICS, settings={})
    assert Numerics.model_validate(today) is today
