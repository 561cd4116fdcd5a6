"""What a search and a training show while they run and at their end."""

from __future__ import annotations

import re
import time
from io import FileIO, StringIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.builders import (
    CONFIG,
    NUMERICS,
    SHAPES,
    STAGE_ACCS,
    make_budget,
    make_config,
    make_header,
    make_result,
    make_resume,
    make_space,
    make_staged_trial,
    make_start,
    make_trial,
)
from tune_cifar.cli.live import SearchView, SweepView, TrainingView, run_plan
from tune_cifar.cli.notebook import _NotebookView
from tune_cifar.cli.summary import print_search_summary, print_synthetic_banner
from tune_cifar.data.load import TrainVal
from tune_cifar.errors import ConfigError
from tune_cifar.record.events import EpochReported, Event, NodeChanged, SearchEnded, TrialEnded
from tune_cifar.record.state import INTERRUPTED, TIME_LIMIT, SearchState
from tune_cifar.report.format import format_percent, format_seconds, format_value
from tune_cifar.schema import DataInfo, Numerics
from tune_cifar.search import cluster
from tune_cifar.search.cost import Cost
from tune_cifar.search.forecast import START_SECONDS, forecast_search
from tune_cifar.search.plan import Resources, SearchPlan, SearchRequest
from tune_cifar.train.lr_range import Sweep
from tune_cifar.train.trainer import Trainer

SHAPES_INFO = DataInfo(name="shapes", digest="d2", split_hash="h2")


def make_state(events: list[Event], **header: Any) -> SearchState:
    """A search in memory, as its events tell it."""
    state = SearchState(Path("/runs/searches/s7-1"), make_header(**header))
    for event in events:
        state.apply(event)
    return state


def make_console(width: int = 100, **options: Any) -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, width=width, **options), text


def make_view(
    console: Console,
    max_seconds: float | None = None,
    num_trials: int = 6,
    rungs: tuple[int, ...] = (3,),
) -> SearchView:
    """Of trials of 3 epochs at 2 s an epoch until known better, two at once."""
    return SearchView(
        console, make_budget(rungs, trials=num_trials, max_time_seconds=max_seconds), 2, 2.0
    )


def tell(view: SearchView, events: list[Event], **header: Any) -> SearchState:
    """Let the view hear of events one by one, as the driver does."""
    state = make_state([], **header)
    for event in events:
        state.apply(event)
        view.on_event(state, event)
    return state


def summarise(
    events: list[Event],
    faults: list[str] | None = None,
    dropped: list[str] | None = None,
    reason: str = "all trials",
    **kw: Any,
) -> str:
    """The end of a search without a terminal, `kw` being the header's changes."""
    console, text = make_console()
    state = make_state([*events, SearchEnded(reason=reason, wall_seconds=61.2)], **kw)
    print_search_summary(
        console, state, faults or [], dropped or [], " --data shapes", " --storage '/my runs'"
    )
    return text.getvalue()


def test_search_prints_one_plain_line_per_event_without_a_terminal() -> None:
    console, text = make_console()
    events = [*make_trial(0, [0.3, 0.5, 0.7], "complete"), *make_trial(1, [0.2], "stopped")]
    with make_view(console) as view:
        tell(view, events)
    lines = text.getvalue().splitlines()
    assert "\x1b" not in text.getvalue() and len(lines) == len(events)
    assert lines[0] == "[0:00:00] trial 0 starts (baseline): max_lr 0.1"
    assert lines[1] == "[0:00:00] trial 0 epoch 1/3: val_acc 30.00 %"
    best = "best so far 70.00 % (trial 0), about 0:00:18 to go"
    assert lines[4] == f"[0:00:00] trial 0 complete (it complete); {best}"
    assert lines[-1].startswith(
        "[0:00:00] trial 1 stopped (it stopped); best so far 70.00 % (trial 0), about "
    )


def test_a_failure_whose_reason_holds_brackets_is_shown_as_it_is() -> None:
    console, text = make_console(width=60)
    reason = "OSError: [/no/tag] [Errno 28] " + "a long story " * 10
    ended = TrialEnded(trial=0, status="failed", reason=reason)
    with make_view(console) as view:
        tell(view, [make_start(0), ended])
    assert text.getvalue().splitlines()[-1] == f"[0:00:00] trial 0 failed ({reason})"


def test_time_left_before_the_first_epoch_is_the_estimate() -> None:
    view = make_view(make_console()[0])
    assert view.eta_seconds() == START_SECONDS + 6 * 3 * 2.0 / 2


def test_time_left_follows_the_price_of_real_epochs() -> None:
    view = make_view(make_console()[0])
    tell(view, [make_start(0), EpochReported(trial=0, result=make_result(1, epoch_seconds=10.0))])
    assert (
        view.eta_seconds() == 90.0
    )  # one worker has 2 + 3 + 3 epochs before it, the other 3 + 3 + 3


def test_time_left_is_what_the_simulation_says_of_the_present_state() -> None:
    view = make_view(make_console()[0], num_trials=100, rungs=(1, 3))
    assert view.eta_seconds() == pytest.approx(
        forecast_search(view._budget, 2, 2.0).seconds.mean, rel=0.1
    )
    state = tell(
        view,
        [
            *make_staged_trial(0, {1: [0.5], 3: [0.1, 0.2, 0.3]}, "complete"),
            *make_staged_trial(1, {1: [0.4]}, None),
        ],
    )
    more = forecast_search(view._budget, 2, 2.0, state, start_seconds=0.0).seconds.mean
    assert view.eta_seconds() == pytest.approx(more, rel=0.1)


@pytest.mark.parametrize("accs", [[0.1], [0.1, 0.2, 0.3]])
@pytest.mark.parametrize("num_trials", [1, 2, 4])
def test_time_left_is_zero_when_all_trials_have_ended(
    num_trials: int, accs: list[float | None]
) -> None:
    view = make_view(make_console()[0], num_trials=num_trials)
    status = "complete" if len(accs) == 3 else "stopped"
    tell(
        view, [event for number in range(num_trials) for event in make_trial(number, accs, status)]
    )
    assert view.eta_seconds() == 0


@settings(max_examples=50)
@given(
    elapsed=st.floats(0, 200),
    max_seconds=st.floats(1, 100),
    lengths=st.lists(st.integers(0, 3), max_size=6),
    running=st.booleans(),
    epoch_seconds=st.floats(0.01, 1e4),
)
def test_time_left_never_exceeds_what_the_limit_leaves(
    elapsed: float, max_seconds: float, lengths: list[int], running: bool, epoch_seconds: float
) -> None:
    events: list[Event] = []
    for number, length in enumerate(lengths):
        events.append(make_start(number))
        results = [
            make_result(epoch, epoch_seconds=epoch_seconds) for epoch in range(1, length + 1)
        ]
        events += [EpochReported(trial=number, result=result) for result in results]
        if not running:
            events.append(TrialEnded(trial=number, status="stopped", reason="rung"))
    view = make_view(make_console()[0], max_seconds)
    tell(view, events)
    view._start = time.monotonic() - elapsed
    assert 0 <= view.eta_seconds() <= max(0.0, max_seconds - elapsed)


def strip_codes(text: str) -> str:
    """A terminal's text without its control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def render(events: list[Event], width: int = 120, **header: Any) -> str:
    """The live display of a terminal, without its control codes."""
    console, text = make_console(width, force_terminal=True, height=40)
    view = make_view(console)
    view._state = None if not events else make_state(events, **header)
    console.print(view._render())
    return strip_codes(text.getvalue())


def test_live_table_says_that_it_waits_before_the_first_trial_and_before_the_first_epoch() -> None:
    assert render([]).strip() == "waiting for the first worker ..."
    text = render([make_start(0), make_start(1)])
    assert (
        "2/6 trials: 2 running" in text
        and "the workers are starting" in text
        and "to go" not in text
    )


def test_live_table_shows_trials_best_gain_and_time() -> None:
    trials = [
        make_trial(0, [0.3, 0.5, 0.7], "complete"),
        make_trial(1, [0.4, 0.6, 0.75], "complete"),
    ]
    config = CONFIG.model_copy(update={"max_lr": 0.0123456})
    lines = render([*trials[0], *trials[1], *make_trial(2, [0.35], None, config)]).splitlines()
    assert lines[0].split() == ["trial", "status", "epoch", "val_acc", "max_lr"]
    assert lines[1].split() == ["2", "running", "1/3", "35.00", "%", "0.0123"]
    assert lines[2].split() == ["1", "complete", "3/3", "75.00", "%", "0.1"]
    assert lines[3].split() == ["0", "(baseline)", "complete", "3/3", "70.00", "%", "0.1"]
    assert (
        lines[4] == "3/6 trials: 1 running, 2 complete   best 75.00 % (trial 1), "
        "+5.00 points over the baseline"
    )
    assert re.fullmatch(r"0:00:0\d gone, about 0:00:1\d to go", lines[5]) and len(lines) == 6


def test_live_table_counts_the_epochs_of_the_cycle_that_a_trial_is_in() -> None:
    events = [
        *make_staged_trial(0, STAGE_ACCS, "complete"),
        *make_staged_trial(1, {1: [0.4], 2: [0.3]}, None),
        *make_staged_trial(2, {1: [0.3]}, "stopped"),
        make_start(3),
    ]
    budget = {"trials": 6, "rungs": [1, 2, 3], "fidelity": "cycles"}
    rows = [line.split() for line in render(events, budget=budget).splitlines()]
    assert [row[:3] for row in rows[1:4]] == [
        ["3", "running", "0/1"],
        ["1", "running", "1/2"],
        ["2", "stopped", "1/1"],
    ]
    assert rows[4][:4] == ["0", "(baseline)", "complete", "3/3"]


def test_search_prints_the_epochs_of_a_cycle_beside_its_length() -> None:
    console, text = make_console()
    with make_view(console) as view:
        tell(view, make_staged_trial(0, STAGE_ACCS, None))
    epochs = [line.split("epoch ")[1].split(":")[0] for line in text.getvalue().splitlines()[1:]]
    assert epochs == ["1/1", "1/2", "2/2", "1/3", "2/3", "3/3"]


@pytest.mark.parametrize(
    ("courses", "left"), [({1: [0.5]}, 5), ({1: [0.5], 2: [0.2]}, 4), (STAGE_ACCS, 0)]
)
def test_time_left_counts_every_cycle_that_is_still_to_come(
    courses: dict[int, list[float]], left: int
) -> None:
    view = make_view(make_console()[0], num_trials=1, rungs=(1, 2, 3))
    tell(view, make_staged_trial(0, courses, None))
    assert view.eta_seconds() == 2.0 * left


def test_live_table_stays_small_and_shows_what_runs_first() -> None:
    events = [
        event
        for number in range(40)
        for event in make_trial(number, [0.1], "stopped" if number else None)
    ]
    lines = render(
        events,
        distributions=dict.fromkeys(("max_lr", "dropout", "gamma", "hflip_p", "gray_p"), "{}"),
    )
    rows = lines.splitlines()
    assert rows[1].split()[:3] == ["0", "(baseline)", "running"] and rows[2].split()[0] == "39"
    assert len(rows) == 1 + 14 + 2 and "gray_p" not in rows[0]


def test_live_display_is_not_disturbed_by_trials_that_start_while_it_draws() -> None:
    """The record grows in one thread while another draws: the view keeps dicts of its own."""
    plan: Any = SimpleNamespace(
        cost=SimpleNamespace(epoch_seconds=2.0),
        space=SimpleNamespace(budget=make_budget((3,))),
        resources=SimpleNamespace(max_concurrent=2),
    )
    views = [make_view(make_console()[0]), _NotebookView(plan, lambda headline, rows: None)]
    for view in views:
        state = tell(view, [make_start(0)])
        seen = view._state
        state.apply(make_start(1))
        state.apply(NodeChanged(node="n", status="joined", address="10.0.0.1", numerics=None))
        assert seen is not None and list(seen.trials) == [0] and list(state.trials) == [0, 1]
        assert list(seen.nodes) == [] and list(state.nodes) == ["n"]


def test_summary_tells_counts_best_knobs_and_the_gain_beside_its_noise() -> None:
    text = summarise(
        [*make_trial(0, [0.3, 0.5, 0.6], "complete"), *make_trial(1, [0.4, 0.6, 0.8], "complete")]
    )
    assert "s7-1 ended after 0:01:01 (all trials): 2 trials, 2 complete" in text
    assert "best: trial 1, val_acc 80.00 % after 3 epochs" in text
    assert re.search(r"max_lr +0\.1 +0\.1 *\n", text)
    # sqrt(2 x 0.8 x 0.2 / 100) = 5.66 points
    gain = (
        "gain over the baseline (60.00 %): +20.00 points, beyond twice the 5.66 points "
        "that 100 validation images"
    )
    assert (
        gain in text
        and "one seed, best of 2: an upper guess until it is confirmed over seeds" in text
    )
    assert "NOT CIFAR-10" not in text and "fixed for" not in text and "failed" not in text


def test_summary_says_when_the_gain_is_within_the_noise_and_when_there_is_none() -> None:
    one = make_trial(0, [0.3, 0.5, 0.6], "complete")
    assert "+3.00 points, within twice the 6.83 points" in summarise(
        [*one, *make_trial(1, [0, 0, 0.63], "complete")]
    )
    text = summarise([*one, *make_trial(1, [0.1, 0.1, 0.5], "complete")])
    assert "No trial beat the baseline (60.00 %): there is no gain." in text
    text = summarise(
        [*make_trial(0, [0.3], "stopped"), *make_trial(1, [0.1, 0.1, 0.5], "complete")]
    )
    assert "The baseline is not complete: the gain is unknown." in text


def test_summary_of_a_search_without_a_complete_trial_says_so() -> None:
    text = summarise([*make_trial(0, [0.3], "stopped")], reason=TIME_LIMIT)
    assert (
        "No trial reached its last epoch: there is no score to compare. Give it more --max-time."
        in text
    )
    assert "reproduce --best" not in text
    text = summarise([*make_trial(0, [0.3], None)], reason=INTERRUPTED)
    assert "there is no score to compare.\n" in text and "--resume" in text


def test_summary_tells_pins_drops_failures_and_tracking_faults_as_they_are() -> None:
    events = [
        *make_trial(0, [0.3, 0.5, 0.6], "complete"),
        *make_trial(1, [], "failed"),
        *make_trial(2, [0.1], "failed"),
    ]
    fault = "MLflow upload incomplete, 2 left over: [/x] [SQL: select]. The record is complete."
    pinned = {"dropout": 0.1, "schedule": "constant"}
    text = summarise(events, [fault, fault], ["pct_start", "div_factor"], pinned=pinned)
    assert "3 trials, 1 complete, 2 failed" in text
    assert "fixed for all trials: dropout = 0.1, schedule = constant\n" in text
    assert "not searched, without effect under --set: pct_start, div_factor\n" in text
    folder = "/runs/searches/s7-1/trials"
    assert f"2 failed; tracebacks:\n  {folder}/0001/error.txt\n  {folder}/0002/error.txt\n" in text
    assert text.count(fault) == 1


def test_summary_of_the_stand_in_says_what_it_is() -> None:
    text = summarise(make_trial(0, [0.3, 0.5, 0.6], "complete"), data=SHAPES_INFO)
    assert "NOT CIFAR-10 (shapes): these accuracies say nothing about CIFAR-10." in text


def test_summary_shows_trained_beside_predicted_epochs() -> None:
    events = [*make_trial(0, [0.3, 0.5, 0.6], "complete"), *make_trial(1, [0.4], "stopped")]
    text = summarise(events, predicted_epochs=5.2)
    assert "trial-epochs: 4 trained, 5 predicted (error +30 %)\n" in text
    assert "trial-epochs: 4 trained, 4 predicted (error -5 %)\n" in summarise(
        events, predicted_epochs=3.8
    )
    assert "trial-epochs" not in summarise(events), "an older record has no prediction"
    assert "trial-epochs" not in summarise([make_start(0)], predicted_epochs=5.0), (
        "nothing was trained"
    )


@pytest.mark.parametrize(
    ("trials", "limit", "reason", "is_told"),
    [
        (4, None, "all trials", True),
        (9, None, "all trials", False),
        (4, 60.0, "all trials", False),
        (4, None, "time limit", False),
        (4, None, "interrupted", False),
    ],
)
def test_a_resumed_search_tells_of_its_prediction_only_if_it_was_the_predicted_one(
    trials: int, limit: float | None, reason: str, is_told: bool
) -> None:
    budget = {"trials": 4, "rungs": [1, 2, 3], "max_time_seconds": limit}
    first = [
        *make_trial(0, [0.3, 0.5, 0.6], "complete"),
        SearchEnded(reason="interrupted", wall_seconds=1.0),
    ]
    again = [
        make_resume(trials),
        *make_trial(1, [0.4], "stopped"),
        SearchEnded(reason=reason, wall_seconds=1.0),
    ]
    console, text = make_console()
    print_search_summary(
        console, make_state([*first, *again], budget=budget, predicted_epochs=4.0), [], []
    )
    assert ("trial-epochs: 4 trained, 4 predicted (error +0 %)" in text.getvalue()) is is_told
    assert f"s7-1 ended after 0:00:01 of its last launch ({reason}): " in text.getvalue()


def test_summarys_next_commands_repeat_the_options_and_are_never_broken() -> None:
    console, text = make_console(width=40, force_terminal=True, no_color=True)
    end = SearchEnded(reason="all trials", wall_seconds=61.2)
    state = make_state([*make_trial(0, [0.3, 0.5, 0.6], "complete"), end])
    print_search_summary(console, state, [], [], " --data shapes", " --storage '/my runs'")
    assert text.getvalue().splitlines()[-4:] == [
        "next:",
        "  python -m tune_cifar reproduce --best --search s7-1 --data shapes --storage '/my runs'",
        "  python -m tune_cifar leaderboard --search s7-1 --storage '/my runs'",
        "  python -m tune_cifar ui --storage '/my runs'",
    ]


TYPED = (
    "python -m tune_cifar search --space s7 --tracking-uri 'postgresql://***@host/db' --trials 9 "
    "--mirror=s3://my/runs --gpus-per-trial 0.5 --address auto --allow-mixed --keep-weights 10 "
    "--set epochs=3 --data shapes --max-concurrent=2 --max-time 8m"
)
REPEATED = (
    " --tracking-uri 'postgresql://***@host/db' --mirror=s3://my/runs --gpus-per-trial 0.5 "
    "--address auto --allow-mixed --keep-weights 10 --data shapes --max-concurrent=2"
)


@pytest.mark.parametrize(
    ("first", "then", "repeated"),
    [
        (TYPED, None, REPEATED),
        (TYPED, "python -m tune_cifar search --name s7-1 --resume --address x:1", " --address x:1"),
        (TYPED, "python -m tune_cifar search --name s7-1 --resume", ""),
        ("run_search('it\\'s mine --address auto')", None, ""),
    ],
    ids=["begun", "resumed with another", "resumed with none", "begun in Python"],
)
def test_the_command_to_continue_repeats_where_the_last_launch_ran_and_what_it_kept(
    first: str, then: str | None, repeated: str
) -> None:
    console, text = make_console()
    end = SearchEnded(reason=INTERRUPTED, wall_seconds=1.0)
    events: list[Event] = [*make_trial(0, [0.3], None), end]
    if then is not None:
        events += [make_resume().model_copy(update={"command": then}), end]
    state = make_state(events, command=first)
    print_search_summary(console, state, [], [], "", " --storage /runs")
    command = f"python -m tune_cifar search --name s7-1 --resume --storage /runs{repeated}"
    assert f"continue it with:\n  {command}\n" in text.getvalue()


def test_a_summary_needs_no_end_in_the_record() -> None:
    """A second Ctrl-C may leave none."""
    console, text = make_console()
    print_search_summary(console, make_state(make_trial(0, [0.3], None)), [], [])
    assert "s7-1 ended: 1 trials, 1 running\n" in text.getvalue()
    assert "continue it with:\n  python -m tune_cifar search --name s7-1" in text.getvalue()


def test_what_is_settled_is_said_before_it_runs(tmp_path: Path) -> None:
    """By the command and from Python; another search keeps this one from running."""
    request = SearchRequest(SHAPES, tmp_path, "test")
    what = (make_space(), request, "x", SHAPES_INFO, NUMERICS, Resources(1, 0.0, 1, 0))
    plan = SearchPlan(*what, Cost(1.0, 700.0, 24_000.0), notes=("3 trials are learned.",))
    console, text = make_console(width=400)
    with cluster._in_use, pytest.raises(ConfigError, match="one search at a time"):
        run_plan(plan, console)
    assert text.getvalue() == f"3 trials are learned.\n{plan.describe()}\n"


def test_summarys_next_commands_need_no_data_option_for_synthetic_data() -> None:
    console, text = make_console()
    end = SearchEnded(reason="all trials", wall_seconds=61.2)
    print_search_summary(
        console,
        make_state([*make_trial(0, [0.3, 0.5, 0.6], "complete"), end], data=SHAPES_INFO),
        [],
        [],
    )
    assert "  python -m tune_cifar reproduce --best --search s7-1\n" in text.getvalue()


def test_summary_breaks_prose_between_words_on_a_terminal_only() -> None:
    console, text = make_console(width=40, force_terminal=True, no_color=True)
    events = [
        *make_trial(0, [0.3, 0.5, 0.6], "complete"),
        *make_trial(1, [0.4, 0.6, 0.8], "complete"),
    ]
    print_search_summary(
        console, make_state([*events, SearchEnded(reason="r", wall_seconds=1.0)]), [], []
    )
    prose = strip_codes(text.getvalue()).split("next:")[0].splitlines()
    assert max(map(len, prose)) <= 40
    words = " ".join(line.strip() for line in prose)
    assert "an upper guess until it is confirmed over seeds" in words


@pytest.mark.parametrize("width", [80, 200])
def test_banner_of_the_stand_in_is_a_box_with_the_way_to_the_real_data(width: int) -> None:
    console, text = make_console(width)
    print_synthetic_banner(console, "shapes")
    assert (
        "NOT CIFAR-10" in text.getvalue() and "python -m tune_cifar data fetch" in text.getvalue()
    )
    assert text.getvalue().count("\n") >= 7 and "[bold]" not in text.getvalue()
    console, text = make_console(width)
    print_synthetic_banner(console, "cifar10")
    assert text.getvalue() == ""


def test_training_prints_one_line_per_epoch_with_the_time_that_is_left(
    shapes: TrainVal, fp32: Numerics
) -> None:
    console, text = make_console()
    with TrainingView(console, shapes.info) as view:
        view.watch(Trainer(make_config(epochs=4), shapes, fp32))
        view.say(make_result(1, epoch_seconds=20.0), "  agrees")
    assert text.getvalue() == (
        "epoch 1: train_loss 1.5000, train_acc 40.00 %, val_acc 50.00 %, lr 0.1, "
        "250 images/s, 0:01:00 left (shapes)  "
        "agrees\n"
    )


def test_training_shows_a_bar_over_the_trainers_steps_on_a_terminal(
    shapes: TrainVal, fp32: Numerics
) -> None:
    console, text = make_console(force_terminal=True, no_color=True)
    trainer = Trainer(make_config(), shapes, fp32)
    with TrainingView(console, shapes.info) as view:
        view.watch(trainer)
        next(iter(trainer))
        view._progress.refresh()
    shown = strip_codes(text.getvalue())
    assert "epoch 2/2" in shown and "4/8 steps" in shown


def test_an_lr_range_test_shows_a_line_per_sweep_with_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console, text = make_console()
    clock = iter([0.0, 0.0, 10.0, 16.0])
    monkeypatch.setattr("tune_cifar.cli.live.time.monotonic", lambda: next(clock))
    with SweepView(console, num_seeds=2, num_steps=8) as view:
        for _ in range(5):
            view.step()
        view.say(Sweep(0, (1e-3,) * 4, (2.0,) * 4, 0.1234))
        for _ in range(8):
            view.step()
        view.say(Sweep(1, (1e-3,) * 8, (2.0,) * 8, None))
    assert text.getvalue().splitlines() == [
        "seed 0: 4 losses until it diverged at lr 0.123, 0:00:16 left",
        "seed 1: 8 losses to its end, 0:00:00 left",
    ]


def test_an_lr_range_test_shows_a_bar_over_the_steps_of_all_seeds_on_a_terminal() -> None:
    console, text = make_console(force_terminal=True, no_color=True)
    with SweepView(console, num_seeds=3, num_steps=10) as view:
        view.step()
        view._progress.refresh()
        assert "1/30 steps" in strip_codes(text.getvalue())
        view.say(Sweep(0, (1e-3,), (2.0,), 0.1))
        view._progress.refresh()
    assert "1/21 steps" in strip_codes(text.getvalue())


def test_a_display_that_cannot_be_written_says_so_once_and_ends_nothing(
    shapes: TrainVal, fp32: Numerics, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every method of every view, the live ones too, on a disk without room."""
    with TextIOWrapper(FileIO("/dev/full", "w"), write_through=True) as full:
        for options in ({}, {"force_terminal": True}):
            console = Console(file=full, width=100, **options)  # type: ignore[arg-type]
            with make_view(console) as search:
                tell(search, make_trial(0, [0.3, 0.5, 0.7], "complete"))
                search.stop()
            with TrainingView(console, SHAPES_INFO) as training:
                training.watch(Trainer(make_config(), shapes, fp32))
                training.say(make_result(1))
            with SweepView(console, num_seeds=1, num_steps=2) as sweeping:
                sweeping.step()
                sweeping.say(Sweep(0, (1e-3,), (2.0,), None))
    fault = "The display failed, and the command goes on (OSError: [Errno 28] No space left on "
    assert capsys.readouterr().err.count(fault) == 6


def test_formats_are_for_people() -> None:
    assert (format_seconds(0.4), format_seconds(3725.6)) == ("0:00:00", "1:02:06")
    assert (format_percent(None), format_percent(0.12345)) == ("-", "12.35 %")
    assert (format_value(0.000123456), format_value(128), format_value("sgd")) == (
        "0.000123",
        "128",
        "sgd",
    )
