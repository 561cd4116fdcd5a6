"""The LR range test: curves with known answers, the sweep, its files, MLflow and the command."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.builders import FEW_IMAGES, SHAPES, invoke, make_config, refuse, train_here
from tests.faults.disks import limit_file_size
from tune_cifar.cli.lr_range import _propose, _write
from tune_cifar.data.load import TrainVal, load_train_val
from tune_cifar.errors import ConfigError, SpaceError, TrackingError
from tune_cifar.report.lr_range import make_report, make_report_folder, save_report
from tune_cifar.report.plots.lr_range import save_lr_range
from tune_cifar.schema import Numerics, TrainConfig
from tune_cifar.space.layout import Range
from tune_cifar.space.select import load_space, read_space
from tune_cifar.tracking.lr_range import upload_lr_range
from tune_cifar.train import step as step_module
from tune_cifar.train.lr_range import (
    DIVERGENCE_FACTOR,
    ESTIMATORS,
    Estimate,
    Summary,
    Sweep,
    find_minimum_tenth,
    find_steepest,
    find_valley,
    fit_curve,
    follow_sweep,
    make_lrs,
    propose_range,
    run_sweeps,
    smooth,
    summarise,
)
from tune_cifar.train.step import CapturedStep
from tune_cifar.train.trainer import Trainer

LRS = make_lrs(1e-6, 10.0, 200)
# Of the bowl below, from its formula: where it falls fastest, where a tenth of the fall is done,
# and where it is lowest.
STEEPEST, FIRST, LOWEST = 1e-3, 10 ** (-3 - 0.25 * math.log(9)), 10**-1.5

Curve = Callable[[float], float]


def bowl(lr: float, steepest: float = -3.0, blow_up: float = 0.0, depth: float = 1.0) -> float:
    """A logistic fall by `depth` at 10**steepest and an exponential blow-up at 10**blow_up.

    Both are in log10 of the learning rate. With depth 1 the loss is lowest half way between them.
    """
    x = math.log10(lr)
    fallen = depth / (1 + math.exp(-(x - steepest) / 0.25))
    return 2.3 - fallen + math.exp(min(50.0, (x - blow_up) / 0.25))


def fall(lr: float) -> float:
    """A fall without an end: the loss never rises again."""
    return bowl(lr, blow_up=99.0)


def sweep_over(
    curve: Curve, seed: int = 0, noise: float = 0.0, lrs: tuple[float, ...] = LRS
) -> Sweep:
    rng = np.random.default_rng(seed)
    return follow_sweep(seed, lrs, (curve(lr) + noise * rng.normal() for lr in lrs))


def estimate(curve: Curve) -> dict[str, Estimate]:
    fitted = fit_curve(sweep_over(curve))
    return {name: find(fitted) for name, find in ESTIMATORS.items()}


def summarise_over(*curves: Curve, noise: float = 0.0) -> Summary:
    sweeps = (sweep_over(curve, seed, noise) for seed, curve in enumerate(curves))
    return summarise([fit_curve(sweep) for sweep in sweeps])


def within(value: float | None, factor: float, known: float) -> bool:
    return value is not None and max(value / known, known / value) <= factor


# Smoothing


def test_smoothing_gives_a_straight_line_back_also_at_its_ends() -> None:
    log_lrs = np.log10(LRS)
    smoothed, slopes = smooth(log_lrs, 2 - 0.3 * log_lrs)
    assert smoothed == pytest.approx(2 - 0.3 * log_lrs, abs=1e-9)
    assert slopes == pytest.approx(-0.3, abs=1e-9)


def test_smoothing_moves_neither_a_symmetric_dip_nor_the_middle_of_a_symmetric_fall() -> None:
    log_lrs = np.linspace(-6, 1, 201)
    dip, _ = smooth(log_lrs, -np.exp(-0.5 * ((log_lrs + 2.5) / 0.3) ** 2))
    assert log_lrs[dip.argmin()] == pytest.approx(-2.5)
    assert dip[::-1] == pytest.approx(dip)
    _, slopes = smooth(log_lrs, -np.tanh((log_lrs + 2.5) / 0.3))
    assert log_lrs[slopes.argmin()] == pytest.approx(-2.5)


def test_smoothing_many_steps_takes_little_memory_and_gives_the_same_values() -> None:
    """All weights at once would take 288 MB, several times."""
    log_lrs = np.linspace(-6, 1, 6000)
    losses = np.random.default_rng(0).normal(size=len(log_lrs)) - np.tanh(log_lrs)
    tracemalloc.start()
    try:
        smoothed, slopes = smooth(log_lrs, losses)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert smoothed.shape == slopes.shape == log_lrs.shape
    for start in (0, 150, 3000, 5900):  # within the first part, over its end, within the last
        places = slice(start, start + 50)
        known = smooth(log_lrs, losses, log_lrs[places])
        assert smoothed[places] == pytest.approx(known[0], abs=1e-12)
        assert slopes[places] == pytest.approx(known[1], abs=1e-12)


def test_smoothing_averages_noise_away() -> None:
    log_lrs, noise = np.log10(LRS), np.random.default_rng(0).normal(size=len(LRS))
    smoothed, _ = smooth(log_lrs, noise)
    step = log_lrs[1] - log_lrs[0]
    known = math.sqrt(step / (2 * math.sqrt(math.pi) * 0.2))  # of a Gaussian mean
    assert smoothed[30:-30].std() == pytest.approx(known, rel=0.3)


# Following a sweep


def test_a_sweep_that_never_diverges_is_taken_to_its_end() -> None:
    sweep = sweep_over(fall)
    assert (sweep.lrs, sweep.diverged_at, len(sweep.losses)) == (LRS, None, len(LRS))


def test_a_sweep_stops_training_once_its_smoothed_loss_is_a_multiple_of_its_lowest() -> None:
    trained = []

    def train() -> Iterator[float]:
        for lr in LRS:
            trained.append(lr)
            yield bowl(lr)

    sweep = follow_sweep(0, LRS, train())
    assert sweep.diverged_at == sweep.lrs[-1] == trained[-1] < LRS[-1]
    # The bowl's lowest loss is near 1.3.
    assert sweep.losses[-1] > DIVERGENCE_FACTOR * 1.3 > sweep.losses[-4]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_sweep_as_a_measurement(value: float) -> None:
    losses = [2.3, 2.2, value, 2.1]
    assert follow_sweep(7, LRS, losses) == Sweep(7, LRS[:2], (2.3, 2.2), diverged_at=LRS[2])


def test_a_single_high_loss_does_not_end_a_sweep() -> None:
    assert sweep_over(lambda lr: 6.0 if lr == LRS[80] else fall(lr)).diverged_at is None


# The estimators, on curves with known answers


def test_the_estimators_find_the_known_places_of_a_bowl() -> None:
    found = estimate(bowl)
    assert within(found["steepest"].lr, 1.05, STEEPEST)
    assert within(found["valley"].lr, 1.2, math.sqrt(FIRST * LOWEST))
    assert within(found["minimum/10"].lr, 1.2, LOWEST / 10)


def test_where_a_sweep_begins_does_not_move_what_it_finds() -> None:
    def read(low: float) -> list[float | None]:
        curve = fit_curve(sweep_over(bowl, lrs=make_lrs(low, 10.0, 200)))
        return [find(curve).lr for find in ESTIMATORS.values()]

    for one, other in zip(read(1e-6), read(1e-8), strict=True):
        assert other is not None and within(one, 1.1, other)


def test_noise_moves_the_medians_over_many_seeds_by_less_than_a_third() -> None:
    summary = summarise_over(*[bowl] * 40, noise=0.1)
    found = summary.estimators
    assert [seeds.num_seeds for seeds in found.values()] == [40, 40, 40]
    assert within(found["steepest"].lr, 1.3, STEEPEST)
    assert within(found["valley"].lr, 1.3, math.sqrt(FIRST * LOWEST))
    assert within(found["minimum/10"].lr, 1.3, LOWEST / 10)


def test_a_nan_right_behind_the_minimum_changes_nothing_before_it() -> None:
    found = estimate(lambda lr: math.nan if lr > 1.2 * LOWEST else bowl(lr))
    assert within(found["steepest"].lr, 1.05, STEEPEST)
    assert within(found["minimum/10"].lr, 1.25, LOWEST / 10)


def test_the_size_of_the_blow_up_does_not_move_the_minimum() -> None:
    known = estimate(bowl)["minimum/10"].lr
    assert known is not None
    assert within(estimate(lambda lr: 1e9 if lr > 2 else bowl(lr))["minimum/10"].lr, 1.1, known)


def test_a_sweep_that_never_diverges_has_a_steepest_fall_but_no_minimum() -> None:
    found = estimate(fall)
    assert within(found["steepest"].lr, 1.05, STEEPEST)
    for name in ("valley", "minimum/10"):
        assert found[name].lr is None and "raise `high`" in found[name].reason


def test_a_fall_that_is_steepest_at_the_sweeps_end_gives_nothing() -> None:
    found = estimate(lambda lr: bowl(lr, steepest=1.0, blow_up=99.0))
    assert all(value.lr is None and "raise `high`" in value.reason for value in found.values())


def test_a_sweep_that_starts_within_the_fall_has_no_valley() -> None:
    found = fit_curve(sweep_over(bowl, lrs=make_lrs(1e-3, 10.0, 200)))
    assert find_steepest(found).reason == find_valley(found).reason
    assert "lower `low`" in find_valley(found).reason
    assert within(find_minimum_tenth(found).lr, 1.2, LOWEST / 10)


@pytest.mark.parametrize("losses", [[], [math.nan], [2.3, 2.4, math.inf], [2.3, 900.0]])
def test_a_sweep_that_diverges_at_once_gives_nothing(losses: list[float]) -> None:
    curve = fit_curve(follow_sweep(0, LRS, losses))
    for find in ESTIMATORS.values():
        assert find(curve).lr is None and "the loss diverges after" in find(curve).reason


@pytest.mark.parametrize(
    ("curve", "noise"),
    [(lambda lr: 2.3, 0.0), (lambda lr: 2.3, 0.2), (lambda lr: 2.3 + math.log10(lr / 1e-6), 0.0)],
    ids=["flat", "noise", "rise"],
)
def test_a_curve_that_does_not_fall_gives_nothing(curve: Curve, noise: float) -> None:
    for seed in range(20):
        fitted = fit_curve(sweep_over(curve, seed, noise))
        for find in ESTIMATORS.values():
            assert find(fitted).lr is None and "to stand out from its noise" in find(fitted).reason


# Over the seeds


def test_an_estimators_median_and_spread_are_those_of_the_seeds_in_log_lr() -> None:
    places = (-4.0, -3.5, -2.5)
    summary = summarise_over(*(lambda lr, x=x: bowl(lr, steepest=x) for x in places))
    found = summary.estimators["steepest"]
    assert within(found.lr, 1.05, 10**-3.5)
    assert found.factor == pytest.approx(10**1.5, rel=0.1)
    assert found.geometric_sd == pytest.approx(10 ** np.std(places, ddof=1), rel=0.1)
    assert (found.num_seeds, found.reason) == (3, "")


def test_one_seed_has_no_spread() -> None:
    found = summarise_over(bowl).estimators["valley"]
    assert found.lr is not None and (found.factor, found.geometric_sd) == (None, None)


def test_an_estimator_that_most_seeds_do_not_give_has_no_median() -> None:
    found = summarise_over(bowl, fall, fall).estimators
    assert found["steepest"].num_seeds == 3 and found["steepest"].lr is not None
    assert (found["valley"].lr, found["valley"].num_seeds) == (None, 1)
    assert "raise `high`" in found["valley"].reason


def test_estimators_that_agree_suggest_the_middle_one() -> None:
    summary = summarise_over(bowl, bowl)
    assert summary.suggestion == sorted(summary.medians.values())[1]
    assert summary.disagreement is not None and summary.disagreement <= 10
    assert summary.verdict.startswith(f"suggestion: max_lr {summary.suggestion:.2e}; ")


def test_estimators_more_than_a_decade_apart_suggest_nothing_and_say_so() -> None:
    def two_falls(lr: float) -> float:
        """The steep one at 1e-5, a long shallow one down to 0.1."""
        return bowl(lr, steepest=-5.0) - 0.1 * max(0.0, math.log10(lr / 1e-5))

    summary = summarise_over(two_falls)
    assert summary.disagreement is not None and summary.disagreement > 10
    assert summary.suggestion is None
    assert summary.verdict.startswith("no suggestion: the estimators disagree by a factor of ")
    assert "more than 10: steepest 1." in summary.verdict and "minimum/10" in summary.verdict


def test_a_single_estimator_suggests_nothing() -> None:
    summary = summarise_over(fall)
    assert (summary.disagreement, summary.suggestion) == (None, None)
    rule = "no suggestion: two estimators or more must give a value"
    assert summary.verdict.startswith(f"{rule}, got steepest ")


@pytest.mark.parametrize(
    ("medians", "include", "proposed"),
    [
        ([1e-3], [1e-3], (1e-4, 1e-2)),
        ([5e-4, 2e-3, 1e-3], [1e-3], (5e-5, 2e-2)),
        ([5.21e-4], [5.21e-4], (5.2e-5, 5.3e-3)),  # outwards
        ([1e-3], [1e-3, 0.5, 2.31e-6], (2.3e-6, 0.5)),
        ([50.0], [1.0], (1.0, 100.0)),  # the schema's bound
    ],
)
def test_the_proposed_range_is_a_decade_around_all_medians_and_includes_the_given_values(
    medians: list[float], include: list[float], proposed: tuple[float, float]
) -> None:
    assert propose_range(medians, include) == proposed


def test_learning_rates_are_evenly_spaced_in_log() -> None:
    lrs = make_lrs(1e-4, 1.0, 21)
    assert (lrs[0], lrs[-1], len(lrs)) == (1e-4, 1.0, 21)
    assert np.diff(np.log10(lrs)) == pytest.approx(0.2)


# The sweep


def make_small(**changes: Any) -> TrainConfig:
    """Four steps an epoch of 8 images or fewer."""
    return make_config(**{**FEW_IMAGES, **changes})


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


def test_a_sweep_at_one_learning_rate_is_the_constant_training_bit_by_bit(
    few: TrainVal, fp32: Numerics
) -> None:
    config = make_small(schedule="constant", max_lr=0.02, label_smoothing=0.1, momentum=0.8)
    trained = Trainer(config, few, fp32)
    swept = Trainer(config.model_copy(update={"max_lr": 5.0}), few, fp32)
    results = list(trained)
    losses = list(swept.sweep([0.02] * trained.total_steps))
    assert torch.equal(weights(swept), weights(trained))
    sizes = [8, 8, 8, 6]
    assert np.average(losses[:4], weights=sizes) == pytest.approx(results[0].train_loss, rel=1e-6)
    assert np.average(losses[4:], weights=sizes) == pytest.approx(results[1].train_loss, rel=1e-6)


def test_sgds_first_step_is_as_long_as_its_learning_rate_says(
    few: TrainVal, fp32: Numerics
) -> None:
    def step(lr: float) -> torch.Tensor:
        trainer = Trainer(make_small(schedule="constant"), few, fp32)
        before = weights(trainer)
        next(trainer.sweep([lr]))
        return weights(trainer) - before

    assert torch.allclose(step(0.5), 50 * step(0.01), rtol=1e-3, atol=1e-5)


def test_every_image_is_seen_once_before_any_is_seen_again(few: TrainVal, fp32: Numerics) -> None:
    trainer = Trainer(make_small(schedule="constant"), few, fp32)
    seen: list[torch.Tensor] = []
    draw_order = trainer._batches.draw_order

    def spy() -> torch.Tensor:
        seen.append(draw_order())
        return seen[-1]

    trainer._batches.draw_order = spy  # type: ignore[method-assign]
    list(trainer.sweep([1e-4] * 8))
    one, other = seen
    assert one.sort().values.tolist() == other.sort().values.tolist() == list(range(30))
    assert one.tolist() != other.tolist()


def test_a_blow_up_is_yielded_and_not_raised(few: TrainVal, fp32: Numerics) -> None:
    trainer = Trainer(make_small(schedule="constant"), few, fp32)
    assert not math.isfinite(list(trainer.sweep([1e30] * 3))[-1])


def test_sweeps_repeat_bit_by_bit_differ_by_seed_and_leave_trainings_alone(
    few: TrainVal, fp32: Numerics
) -> None:
    config = make_small(schedule="constant", epochs=1, seed=3)
    before, steps = train_here(config, few, fp32), []
    one = list(run_sweeps(config, few, fp32, LRS[90:94], 2, lambda: steps.append(1)))
    assert list(run_sweeps(config, few, fp32, LRS[90:94], 2)) == one
    assert train_here(config, few, fp32) == before
    assert [sweep.seed for sweep in one] == [3, 4] and one[0].losses != one[1].losses
    assert len(steps) == 8


def test_a_steep_fall_to_a_low_loss_is_no_divergence() -> None:
    """Behind it the smoothed level, the end of a line, is below any loss."""
    losses = [2.3, 2.3, 2.3, 1.2, 0.1, 0.02]
    sweep = follow_sweep(0, make_lrs(1e-4, 1e-3, 6), losses)
    assert sweep.diverged_at is None and list(sweep.losses) == losses


def test_the_sweeps_of_all_seeds_have_one_captured_step(
    few: TrainVal, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a second one would be captured, and hold its memory."""
    made: list[int] = []

    class CountedStep(CapturedStep):
        def __init__(self, *args: Any) -> None:
            made.append(1)
            super().__init__(*args)

    monkeypatch.setattr(step_module, "_idle", {})
    monkeypatch.setattr(step_module, "CapturedStep", CountedStep)
    captured = fp32.model_copy(update={"execution": "captured"})
    config = make_small(schedule="constant", epochs=1)
    assert len(list(run_sweeps(config, few, captured, LRS[90:94], 3))) == 3
    assert len(made) == 1


# Files, MLflow


SPACE = """\
# A comment that must survive.
space: mini
source: a test
published: {accuracy: 0.5, measured: nothing}
corrects: [Nothing.]
baseline:
  model: s8
  optimizer: adam
  schedule: constant
  max_lr: 2.0e-3
  batch_size: 10
  epochs: 2
  train_size: 30
  val_size: 10
search:
  max_lr: {low: 1.0e-3, high: 1.0e-2, log: true}  # a guess
  dropout: {low: 0.0, high: 0.4}
points:
  - {max_lr: 5.0e-3}
budget:
  full: &
  cpu: &
""".replace(
    "&", "{trials: 4, rungs: [1, 2], reduction_factor: 2, sampler: {kind: random}, seed: 0}"
)


@pytest.fixture
def mini(workplace: Path) -> Path:
    path = workplace / "mini.yaml"
    path.write_text(SPACE)
    return path


def report_on(space: Path, numerics: Numerics, *curves: Curve) -> dict[str, Any]:
    """The report of a test with a seed for each of these curves."""
    recipe, info = load_space(str(space)), load_train_val(SHAPES, 10, 0).info
    sweeps = [sweep_over(curve, seed, 0.05) for seed, curve in enumerate(curves)]
    return make_report("lr-range-mini", recipe, info, numerics, sweeps, "python -m tune_cifar")


def test_seeds_beyond_the_largest_are_refused_before_the_first_sweep(
    few: TrainVal, fp32: Numerics
) -> None:
    config = make_config(schedule="constant", seed=2**31 - 2, **FEW_IMAGES)
    steps: list[None] = []
    sweeps = run_sweeps(config, few, fp32, LRS[90:94], 3, lambda: steps.append(None))
    rule = r"`seeds` <= 2 \(from seed 2147483646 on\) must hold, got 3\."
    with pytest.raises(ConfigError, match=rule):
        next(sweeps)
    assert steps == []


def test_more_steps_than_memory_would_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`steps` <= 100000 must hold, got 9999999999999\."):
        make_lrs(1e-6, 1.0, 9_999_999_999_999)


@pytest.mark.slow
def test_the_saved_document_is_enough_to_draw_the_same_figure(
    mini: Path, fp32: Numerics, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "folder"
    save_report(report_on(mini, fp32, bowl, fall, lambda lr: math.nan), folder)
    document = json.loads((folder / "sweeps.json").read_text())
    assert TrainConfig(**document["config"]).fingerprint == document["fingerprint"]
    assert Numerics(**document["numerics"]) == fp32 and document["data"]["name"] == "shapes"
    assert len(document["sweeps"]) == 3
    for sweep in document["sweeps"]:
        assert len(sweep["losses"]) == len(sweep["smoothed"])
    save_lr_range(document, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (folder / "curve.png").read_bytes()


def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence(mini: Path, fp32: Numerics) -> None:
    with pytest.raises(ConfigError, match="the test's files cannot be written: Not a directory"):
        save_report(report_on(mini, fp32, bowl), mini / "folder")


@pytest.mark.slow
def test_mlflow_gets_a_run_with_knobs_medians_losses_and_files_and_a_broken_one_is_closed(
    mini: Path, fp32: Numerics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    report, store = report_on(mini, fp32, bowl, bowl), tmp_path / "store"
    save_report(report, tmp_path / "found")
    uri = f"sqlite:///{store}/mlflow.db"
    upload_lr_range(uri, store, report, tmp_path / "found")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("mini (shapes)")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("lr-range-mini", "FINISHED")
    assert run.data.tags["kind"] == "lr_range" and run.data.tags["verdict"] == report["verdict"]
    params = run.data.params
    assert params["optimizer"] == "adam" and not {"max_lr", "nesterov"} & set(params)
    assert run.data.metrics["lr_minimum_over_10"] == report["estimators"]["minimum/10"]["lr"]
    points = client.get_metric_history(run.info.run_id, "loss_seed_1")
    losses = dict(enumerate(report["sweeps"][1]["losses"], 1))
    assert {point.step: point.value for point in points} == losses
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"curve.png", "sweeps.json"}

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlflow.MlflowClient.log_artifacts", fail)
    problem = "^lr-range-mini: uploading the run to MLflow.* OSError: .*No space left"
    with pytest.raises(TrackingError, match=problem):
        upload_lr_range(uri, store, report, tmp_path / "found")
    statuses = [run.info.status for run in client.search_runs([experiment.experiment_id])]
    assert sorted(statuses) == ["FAILED", "FINISHED"]


def test_two_tests_of_one_second_get_two_folders(tmp_path: Path) -> None:
    wanted = tmp_path / "lr_range" / "s10-cpu-20260102-030405"
    made = [make_report_folder(wanted).name for _ in range(3)]
    assert made == [wanted.name, f"{wanted.name}-2", f"{wanted.name}-3"]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="the test's folder cannot be made: Not a directory"):
        make_report_folder(tmp_path / "file" / "x" / "y")


# The command


def sweep_words(space: Path, *more: str) -> list[str]:
    """A sweep of half a second whose estimators agree; its MLflow store cannot be reached."""
    recipe = ["--space", str(space), "--data", "shapes", "--precision", "fp32"]
    sweep = ["--seeds", "1", "--low", "1e-5", "--steps", "30"]
    unreachable = f"sqlite:///{space.parent}/no/such/folder/mlflow.db"
    return ["lr-range", *recipe, *sweep, "--tracking-uri", unreachable, *more]


@pytest.mark.slow
def test_the_command_shows_saves_and_writes_exactly_one_line(mini: Path) -> None:
    answer = invoke(*sweep_words(mini, "--write", "--yes"))
    assert answer.exit_code == 0, answer.output
    text = " ".join(answer.stdout.split())
    assert (
        "NOT CIFAR-10" in text
        and "1 x 30 steps from lr 1e-05 to 10: s8, adam, momentum 0.9, batches of 10" in text
    )
    assert (
        "seed 0: " in text and "suggestion: max_lr " in text and "baseline: max_lr 2.00e-03" in text
    )
    assert text.count("unable to open database file. MLflow lacks the test; ") == 1
    (folder,) = (mini.parent / "runs" / "lr_range").iterdir()
    assert folder.name.startswith("mini-full-") and f"curve: {folder}/curve.png" in text
    assert {path.name for path in folder.iterdir()} == {"curve.png", "sweeps.json"}
    document = json.loads((folder / "sweeps.json").read_text())
    assert document["tier"] == "full" and document["command"].startswith(
        "python -m tune_cifar lr-range"
    )
    before, after = SPACE.splitlines(), mini.read_text().splitlines()
    assert [index for index, line in enumerate(after) if line != before[index]] == [
        before.index("search:") + 1
    ]
    written = read_space(mini).search["max_lr"]
    lrs = [found["lr"] for found in document["estimators"].values()]
    assert isinstance(written, Range) and written.log
    assert written.low <= min(lrs) / 10 and max(lrs) * 10 <= written.high


@pytest.mark.slow
def test_without_a_terminal_the_diff_is_shown_and_nothing_is_written(
    mini: Path, tmp_path: Path
) -> None:
    answer = invoke(*sweep_words(mini, "--write", "--json", "--out", str(tmp_path / "found")))
    assert answer.exit_code == 0, answer.output
    document = json.loads(answer.stdout)
    assert set(document["estimators"]) == set(ESTIMATORS) and document["suggestion"] is not None
    assert (
        document["folder"] == str(tmp_path / "found")
        and (tmp_path / "found" / "curve.png").exists()
    )
    proposal = document["proposal"]
    assert proposal["written"] is False and mini.read_text() == SPACE
    assert (
        "\n-  max_lr: {low: 1.0e-3, high: 1.0e-2, log: true}  # a guess\n+  max_lr: {low: "
        in proposal["diff"]
    )
    assert "not written: there is no terminal to ask at; --yes writes it" in answer.stderr
    assert "NOT CIFAR-10 (shapes): this range says nothing about CIFAR-10." in answer.stderr
    sentence = refuse(ConfigError, *sweep_words(mini, "--out", str(tmp_path / "found")))
    assert sentence == f"--out: a folder without another test must be given, got {tmp_path}/found."


@pytest.mark.slow
def test_nothing_is_written_when_there_is_no_suggestion(mini: Path) -> None:
    sentence = refuse(
        ConfigError, *sweep_words(mini, "--write", "--yes", "--low", "1e-9", "--high", "1e-8")
    )
    assert sentence.startswith("--write: the estimators must agree, got no suggestion: ")
    assert mini.read_text() == SPACE and list(
        (mini.parent / "runs" / "lr_range").glob("*/curve.png")
    )


class Terminal(io.StringIO):
    """A keyboard at which somebody has typed this."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("typed", "is_written"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_at_a_terminal_the_user_is_asked(
    mini: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch, typed: str, is_written: bool
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    monkeypatch.setattr(sys, "stderr", Terminal())
    report = report_on(mini, fp32, bowl)
    proposal = _propose(
        str(mini), report, yes=False, as_json=False, console=Console(file=io.StringIO())
    )
    assert proposal["written"] is is_written and (mini.read_text() != SPACE) is is_written


def test_nobody_is_asked_where_the_question_cannot_be_seen(
    mini: Path, fp32: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `lr-range ... 2>> log` at a terminal: the command would wait for ever."""
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    report, out = report_on(mini, fp32, bowl), io.StringIO()
    proposal = _propose(str(mini), report, False, False, Console(file=out, width=500))
    assert not proposal["written"] and "there is no terminal to ask at" in out.getvalue()


def test_a_range_that_stands_there_already_is_not_written_again(mini: Path, fp32: Numerics) -> None:
    report, out = report_on(mini, fp32, bowl), io.StringIO()
    assert _propose(str(mini), report, True, False, Console(file=io.StringIO()))["written"]
    before = mini.stat().st_mtime_ns
    again = _propose(str(mini), report, True, False, Console(file=out, width=500))
    assert (again["diff"], again["written"]) == ("", False) and mini.stat().st_mtime_ns == before
    assert "max_lr has the proposed range already" in out.getvalue()


def test_what_could_not_be_written_is_refused_before_anything_is_trained(mini: Path) -> None:
    mini.write_text(
        SPACE.replace("  max_lr: {low", "  weight_decay: {low").replace(
            "- {max_lr: 5", "- {weight_decay: 5"
        )
    )
    mini.write_text(
        mini.read_text().replace("  max_lr: 2.0e-3", "  max_lr: 2.0e-3\n  weight_decay: 2.0e-3")
    )
    assert (
        "max_lr must be searched between low and high, got a knob that is not searched."
        in refuse(SpaceError, *sweep_words(mini, "--write"))
    )
    assert not os.path.lexists(mini.parent / "runs")


def test_the_packages_own_spaces_are_not_changed_but_named(
    mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_cifar.space.select.PACKAGED", mini.parent)
    sentence = refuse(SpaceError, *sweep_words(mini, "--write"))
    assert sentence.startswith("mini.yaml: the package's own spaces are not changed. Copy the file")
    assert sentence.endswith("mini.yaml search_spaces/).")
    assert not os.path.lexists(mini.parent / "runs")


def test_writing_keeps_mode_byte_order_mark_and_link_and_leaves_nothing_else(mini: Path) -> None:
    mini.write_bytes(b"\xef\xbb\xbf" + SPACE.encode())
    mini.chmod(0o640)
    link = mini.parent / "links" / "mini.yaml"
    link.parent.mkdir()
    link.symlink_to(mini)
    _write(read_space(link), SPACE + "# more\r\n")
    assert link.is_symlink()
    assert mini.read_bytes() == b"\xef\xbb\xbf" + SPACE.encode() + b"# more\r\n"
    assert mini.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in sorted(mini.parent.iterdir())] == ["links", "mini.yaml"]


def test_a_file_that_has_changed_or_is_gone_is_not_overwritten(mini: Path) -> None:
    file = read_space(mini)
    mini.write_text(SPACE + "# edited\n")
    with pytest.raises(SpaceError, match=r"^mini.yaml: the file has changed since it was read\."):
        _write(file, SPACE)
    assert mini.read_text() == SPACE + "# edited\n"
    mini.unlink()
    rule = "the file must be writable, got 'No such file or directory'"
    with pytest.raises(SpaceError, match=rf"^mini.yaml: {rule}\.$"):
        _write(file, SPACE)
    assert list(mini.parent.iterdir()) == []


def test_a_full_disk_leaves_the_file_as_it_was(mini: Path) -> None:
    file, rule = read_space(mini), "the file must be writable, got '.*'"
    with limit_file_size(len(SPACE) // 2), pytest.raises(SpaceError, match=f"mini.yaml: {rule}"):
        _write(file, SPACE + "# more\n")
    assert mini.read_text() == SPACE
    assert list(mini.parent.iterdir()) == [mini]


def test_yes_belongs_to_write(mini: Path) -> None:
    assert invoke(*sweep_words(mini, "--yes")).exit_code == 2
