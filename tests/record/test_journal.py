"""The record: what was acknowledged comes back bit for bit; damage is cut off or refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.builders import (
    CONFIG,
    EVENTS,
    STAGE_ACCS,
    make_header,
    make_result,
    make_resume,
    make_staged_trial,
    make_start,
    make_trial,
    write_record,
)
from tune_cifar.errors import ConfigError, RecordError, RenamedError
from tune_cifar.record.events import (
    Candidate,
    Confirmation,
    EpochReported,
    Event,
    Header,
    Learned,
    SearchEnded,
    TrialEnded,
    TrialRetried,
    TrialStarted,
)
from tune_cifar.record.journal import Record, check_is_new, check_name, is_live, read_state
from tune_cifar.record.state import describe_counts
from tune_cifar.record.store import search_folder, searches_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A search with six trials in every state, not finished."""
    return write_record(tmp_path, make_header(), EVENTS).folder


def make_line(seq: int, kind: str, body: Any, crc: str | None = None) -> bytes:
    """A line by the documented format, not by the package's own code."""
    line = {"body": body, "kind": kind, "seq": seq}
    if crc is None:
        canonical = json.dumps(line, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        crc = f"{zlib.crc32(canonical.encode()):08x}"
    return json.dumps({"seq": seq, "crc": crc, "kind": kind, "body": body}).encode() + b"\n"


def append_bytes(folder: Path, line: bytes) -> bytes:
    """Write past the Record, as a fault would; the whole file afterwards."""
    path = folder / "record.jsonl"
    path.write_bytes(path.read_bytes() + line)
    return path.read_bytes()


def test_reading_gives_the_state_the_writer_had(folder: Path, tmp_path: Path) -> None:
    written = write_record(tmp_path, make_header("s7-2"), EVENTS)
    assert read_state(written.folder) == written
    with Record.open(written.folder) as record:
        assert record.state == written
    assert written.header == make_header("s7-2")
    assert [event.trial for event in EVENTS if isinstance(event, TrialStarted)] == list(
        written.trials
    )


def test_a_searchs_fidelity_is_its_budgets_and_everything_else_is_one_schedule() -> None:
    budget = {"trials": 1, "fidelity": "cycles"}
    assert make_header(budget=budget).fidelity == "cycles"
    assert make_header().fidelity == "epochs", "from before there were any"
    assert make_header(kind="confirm", budget=budget).fidelity == "epochs"


@pytest.mark.parametrize("predicted", [None, 38.25])
def test_a_header_has_a_prediction_unless_it_is_from_before_there_were_any(
    folder: Path, predicted: float | None
) -> None:
    body = make_header().model_dump(mode="json", exclude={"predicted_epochs"})
    if predicted is not None:
        body["predicted_epochs"] = predicted
    (folder / "record.jsonl").write_bytes(make_line(1, "header", body))
    assert read_state(folder).header == make_header(predicted_epochs=predicted)


def test_a_header_from_before_inactive_knobs_were_left_out_says_so() -> None:
    header = make_header(is_conditional=True)
    old = header.model_dump(exclude={"is_conditional"})
    assert header.is_conditional and not Header(**old).is_conditional


def test_an_inactive_knob_of_a_trial_has_no_value(tmp_path: Path) -> None:
    constant = make_start(0, CONFIG.model_copy(update={"schedule": "constant"}))
    trials = write_record(tmp_path, make_header(), [constant, make_start(1)]).trials
    found = [
        [trial.find_value(knob) for knob in ("max_lr", "pct_start")] for trial in trials.values()
    ]
    assert found == [[CONFIG.max_lr, None], [CONFIG.max_lr, CONFIG.pct_start]]


def test_a_trial_has_all_that_its_events_report(folder: Path) -> None:
    trial = read_state(folder).trials[3]
    assert (trial.number, trial.run_id) == (3, "s7-1:3")
    assert (trial.origin, trial.status) == ("sampler", "failed")
    assert (trial.config, trial.params) == (CONFIG, {"max_lr": 0.1})
    assert trial.fingerprint == CONFIG.fingerprint
    assert [result.epoch for result in trial.epochs] == [1, 2]
    assert (trial.epochs_done, trial.val_acc, trial.score) == (2, 0.6, None)
    assert (trial.reason, trial.weights_file) == ("it failed", None)
    assert trial.error_file == "trials/0003/error.txt"


def test_ended_seq_is_the_line_of_the_end(folder: Path) -> None:
    lines = (folder / "record.jsonl").read_bytes().splitlines()
    for trial in read_state(folder).trials.values():
        if trial.ended_seq is not None:
            line = json.loads(lines[trial.ended_seq - 1])
            assert (line["kind"], line["seq"]) == ("end", trial.ended_seq)
            assert line["body"]["trial"] == trial.number


def test_every_line_is_written_as_documented(folder: Path) -> None:
    content = (folder / "record.jsonl").read_bytes()
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        fields = json.loads(line)
        assert fields == json.loads(make_line(number, fields["kind"], fields["body"]))
        assert list(fields) == ["seq", "crc", "kind", "body"]
        assert line.endswith(b"\n")


def test_a_record_grows_only_at_its_end(folder: Path) -> None:
    before = (folder / "record.jsonl").read_bytes()
    with Record.open(folder) as record:
        record.append(EpochReported(trial=5, result=make_result(2)))
    after = (folder / "record.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == before.count(b"\n") + 1


finite = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | finite
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=30)
@given(
    params=st.dictionaries(st.text(st.characters(codec="utf-8")), plain, max_size=4),
    loss=finite,
    lr=finite,
)
def test_numbers_and_texts_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, params: dict[str, Any], loss: float, lr: float
) -> None:
    result = make_result(1, train_loss=loss, lr=lr)
    events: list[Event] = [make_start(0, params=params), EpochReported(trial=0, result=result)]
    written = write_record(tmp_path_factory.mktemp("runs"), make_header(), events)
    trial = read_state(written.folder).trials[0]
    assert repr(trial.params) == repr(params)  # repr tells -0.0 from 0.0 and 1 from 1.0
    assert repr(trial.epochs[0]) == repr(result)


def test_a_tuple_is_a_list_for_the_writer_too(tmp_path: Path) -> None:
    written = write_record(
        tmp_path, make_header(), [make_start(0, params={"a": (1, 2), "b": {3: 4}})]
    )
    assert written.trials[0].params == {"a": [1, 2], "b": {"3": 4}}
    assert read_state(written.folder) == written


def test_the_scores_of_learned_trials_are_by_numbers_again(tmp_path: Path) -> None:
    """JSON has text for them, and a record that could not be read was refused when written."""
    learned = Learned(run_id="x:1", params={}, status="stopped", scores={1: 0.5, 3: 0.7})
    written = write_record(tmp_path, make_header(learned=[learned]), [])
    assert written.header.learned[0].scores == {1: 0.5, 3: 0.7}
    assert read_state(written.folder) == written
    with pytest.raises(ValidationError):
        Learned.model_validate({**learned.model_dump(), "scores": [0.5]})


def test_the_state_keeps_no_reference_to_the_callers_objects(tmp_path: Path) -> None:
    params = {"max_lr": 0.1}
    with Record.create(search_folder(tmp_path, "s7-1"), make_header()) as record:
        record.append(make_start(0, params=params))
        params["max_lr"] = 9.0
        assert record.state.trials[0].params == {"max_lr": 0.1}


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), {1, 2}, Path("a"), "\udcff"]
)
def test_an_event_that_is_not_plain_json_leaves_no_trace(folder: Path, value: Any) -> None:
    before = (folder / "record.jsonl").read_bytes()
    with Record.open(folder) as record:
        with pytest.raises(RecordError, match=r"^event 'trial' must be JSON of finite numbers: "):
            record.append(make_start(6, params={"a": value}))
        assert (folder / "record.jsonl").read_bytes() == before
        assert record.state == read_state(folder)
        record.append(make_start(6))
    assert 6 in read_state(folder).trials


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_cannot_be_built(number: float) -> None:
    with pytest.raises(ValidationError):
        make_result(1, train_loss=number)


def test_a_torn_last_line_is_cut_and_reported_wherever_it_is_torn(folder: Path) -> None:
    path = folder / "record.jsonl"
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    expected = read_state(folder)
    expected.trials[5].epochs.pop()
    del expected.trials[5].scores[1]
    del expected.arrivals[1][5]
    expected.num_events -= 1
    for end in [start + 1, *range(start + 10, len(whole) - 1, 60), len(whole) - 2, len(whole) - 1]:
        path.write_bytes(whole[:end])
        assert read_state(folder) == expected
        assert path.read_bytes() == whole[:end]
        with Record.open(folder) as record:
            repaired, record.state.repaired = record.state.repaired, None
            torn = f"{folder}: line {len(EVENTS) + 1} was torn"
            assert repaired == f"{torn}; {end - start} bytes were cut."
            assert record.state == expected
            assert path.read_bytes() == whole[:start]
            record.append(EpochReported(trial=5, result=make_result(1, 0.35)))
        assert path.read_bytes() == whole


def test_nothing_is_reported_when_nothing_was_torn(folder: Path) -> None:
    before = (folder / "record.jsonl").read_bytes()
    with Record.open(folder) as record:
        assert record.state.repaired is None
    assert (folder / "record.jsonl").read_bytes() == before


BAD_LINES = {
    "zeros": b"\0" * 40,
    "blank": b"",
    "not JSON": b'{"seq": 15,',
    "not UTF-8": b'{"seq": "\xff"}',
    "not an object": b"[1, 2]",
    "a key missing": b'{"seq": 15, "crc": "0", "kind": "epoch"}',
    "nested without end": b"[" * 100_000,
    "NaN": make_line(15, "epoch", {"trial": 5}, crc="00000000").replace(b"5}", b"NaN}").strip(),
    "wrong CRC": make_line(
        15, "epoch", {"trial": 5, "result": make_result(2).model_dump()}, crc="00000000"
    ).strip(),
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=list(BAD_LINES))
def test_a_damaged_last_line_is_cut_but_refused_in_the_middle(folder: Path, line: bytes) -> None:
    good, expected = (folder / "record.jsonl").read_bytes(), read_state(folder)
    append_bytes(folder, line + b"\n")
    assert read_state(folder) == expected
    with Record.open(folder) as record:
        assert record.state.repaired is not None
    assert (folder / "record.jsonl").read_bytes() == good
    last = make_line(len(EVENTS) + 3, "finish", {"reason": "all trials", "wall_seconds": 1.0})
    for rest in (last, b'{"seq'):
        (folder / "record.jsonl").write_bytes(good)
        damaged = append_bytes(folder, line + b"\n" + rest)
        rule = (
            rf"jsonl:{len(EVENTS) + 2}: damaged line, not JSON that fits its CRC. Restore the file"
        )
        with pytest.raises(RecordError, match=rule):
            read_state(folder)
        with pytest.raises(RecordError, match=rule):
            Record.open(folder)
        assert (folder / "record.jsonl").read_bytes() == damaged


@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_means_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Anything that changes the state must be noticed; 1e-05 and 1E-05 mean the same."""
    runs = tmp_path_factory.mktemp("runs")
    events = [
        *make_trial(0, [0.1, 0.2, 0.7], "complete"),
        SearchEnded(reason="all trials", wall_seconds=1e-05),
    ]
    written = write_record(runs, make_header(), events)
    path = written.folder / "record.jsonl"
    content = bytearray(path.read_bytes())
    last_newline = content.rindex(b"\n", 0, -1)  # without it the last two lines are one torn line
    content[data.draw(st.integers(0, last_newline - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        found = read_state(written.folder)
    except RecordError as exc:
        assert "record.jsonl" in str(exc)
    else:
        assert found == written


def test_a_lost_doubled_or_swapped_line_is_refused_with_its_number(folder: Path) -> None:
    path = folder / "record.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lost = lines[:3] + lines[4:]
    doubled = [*lines[:4], lines[3], *lines[4:]]
    swapped = [*lines[:3], lines[4], lines[3], *lines[5:]]
    for wrong, number, seq in ((lost, 4, 5), (doubled, 5, 4), (swapped, 4, 5)):
        path.write_bytes(b"".join(wrong))
        with pytest.raises(
            RecordError, match=rf"record.jsonl:{number}: event: seq must be {number}, got {seq}\."
        ):
            Record.open(folder)


def test_an_event_of_a_newer_version_is_refused_and_not_cut(folder: Path) -> None:
    content = append_bytes(folder, make_line(len(EVENTS) + 2, "note", {"text": "hello"}))
    rule = (
        rf"jsonl:{len(EVENTS) + 2}: event: kind must be one of header, .*got 'note'. A newer tune_c"
    )
    for read in (Record.open, read_state):
        with pytest.raises(RecordError, match=rule):
            read(folder)
    assert (folder / "record.jsonl").read_bytes() == content


def test_a_field_of_a_newer_version_is_refused_with_its_name(folder: Path) -> None:
    append_bytes(
        folder,
        make_line(len(EVENTS) + 2, "finish", {"reason": "", "wall_seconds": 1.0, "colour": "red"}),
    )
    with pytest.raises(
        RecordError, match=r"event 'finish': colour is not a known name\. A newer tune_cifar"
    ):
        Record.open(folder)


def start_with(**knobs: Any) -> TrialStarted:
    """The start of trial 6 with these knobs, not checked."""
    start = make_start(6)
    return start.model_copy(update={"config": start.config | knobs})


def test_a_recorded_configuration_that_breaks_a_rule_is_refused_with_its_line(folder: Path) -> None:
    body = start_with(max_lr=-1.0).model_dump()
    append_bytes(folder, make_line(len(EVENTS) + 2, "trial", body))
    with pytest.raises(
        RecordError, match=rf"record.jsonl:{len(EVENTS) + 2}: configuration: max_lr > 0 must hold"
    ):
        Record.open(folder)


def test_events_that_contradict_each_other_are_refused_with_the_line(folder: Path) -> None:
    body = EpochReported(trial=0, result=make_result(4)).model_dump()
    append_bytes(folder, make_line(len(EVENTS) + 2, "epoch", body))
    with pytest.raises(
        RecordError,
        match=rf"jsonl:{len(EVENTS) + 2}: s7-1:0: the trial has ended \(complete\): no 'epoch' may",
    ):
        Record.open(folder)


@pytest.mark.parametrize(
    "content", [b"", b'{"seq": 1, "crc"', b"\n", b"\0" * 100], ids=["empty", "torn", "blank", "0"]
)
def test_a_record_without_a_whole_header_is_refused(folder: Path, content: bytes) -> None:
    (folder / "record.jsonl").write_bytes(content)
    for read in (Record.open, read_state):
        with pytest.raises(
            RecordError,
            match=r"record.jsonl: not even a complete header. Delete the folder: nothing ran\.",
        ):
            read(folder)
    assert (folder / "record.jsonl").read_bytes() == content


def test_a_record_that_starts_with_another_event_is_refused(folder: Path) -> None:
    (folder / "record.jsonl").write_bytes(make_line(1, "trial", make_start(0).model_dump()))
    with pytest.raises(
        RecordError,
        match=r"record.jsonl:1: the header of search 's7-1' must come first, got TrialStarted",
    ):
        read_state(folder)


def test_a_renamed_folder_is_refused_with_the_name_to_give_back(folder: Path) -> None:
    other = folder.rename(folder.with_name("s7-9"))
    for read in (read_state, Record.open):
        with pytest.raises(RenamedError) as caught:
            read(other)
        rule = "search s7-1 in a renamed folder; run ids, MLflow and reports have that name"
        assert str(caught.value) == f"{other}: {rule}. Rename the folder back to s7-1."
    assert read_state(other.rename(folder)).header.name == "s7-1"


def test_a_copied_folder_is_refused_as_a_copy_and_the_original_is_read(folder: Path) -> None:
    copy = folder.with_name("s7-1 (copy)")
    shutil.copytree(folder, copy)
    with pytest.raises(RenamedError, match=r"a copy of search s7-1, which .* Delete the copy, or"):
        read_state(copy)
    assert read_state(folder).header.name == "s7-1"


def test_an_unknown_search_is_refused(folder: Path) -> None:
    for read in (Record.open, read_state):
        with pytest.raises(
            RecordError, match=r"s7-2: cannot open its record: No such file or directory\."
        ):
            read(folder.with_name("s7-2"))


def report(number: int, epoch: int) -> EpochReported:
    """An epoch with a validation accuracy."""
    return EpochReported(trial=number, result=make_result(epoch))


def end(number: int, status: Any, score: float | None = None) -> TrialEnded:
    """The end of a trial."""
    return TrialEnded(trial=number, status=status, score=score, reason="")


BROKEN_RULES: dict[str, tuple[Event, str]] = {
    "header twice": (make_header(), "s7-1: the record has a header already, got a second"),
    "start twice": (make_start(5), "s7-1:5: the trial has started already"),
    "epoch of an unknown trial": (report(9, 1), "s7-1: trial 9 must start first, got 'epoch'"),
    "end of an unknown trial": (end(9, "failed"), "s7-1: trial 9 must start first, got 'end'"),
    "epoch after the end": (report(1, 2), r"s7-1:1: the trial has ended \(stopped\): no 'epoch'"),
    "end twice": (
        end(2, "failed"),
        r"s7-1:2: the trial has ended \(diverged\): no 'end' may follow",
    ),
    "epoch twice": (report(5, 1), "s7-1:5: epoch 2 of 3 must come next, got epoch 1"),
    "epoch left out": (report(5, 3), "s7-1:5: epoch 2 of 3 must come next, got epoch 3"),
    "complete too early": (
        end(5, "complete", 0.35),
        "s7-1:5: a complete trial must have trained 3 epochs, got 1 of 3",
    ),
    "score of a stopped trial": (
        end(5, "stopped", 0.35),
        "s7-1:5: a stopped trial's score must be None, got 0.35",
    ),
    "score of a failed trial": (
        end(5, "failed", 0.1),
        "s7-1:5: a failed trial's score must be None, got 0.1",
    ),
    "score of a diverged trial": (
        end(5, "diverged"),
        "s7-1:5: a diverged trial's score must be 0.1, got None",
    ),
}


@pytest.mark.parametrize(("event", "rule"), BROKEN_RULES.values(), ids=list(BROKEN_RULES))
def test_an_event_that_may_not_follow_leaves_no_trace(
    folder: Path, event: Event, rule: str
) -> None:
    before, state = (folder / "record.jsonl").read_bytes(), read_state(folder)
    with Record.open(folder) as record:
        with pytest.raises(RecordError, match=f"^{rule}"):
            record.append(event)
        assert record.state == state
        assert (folder / "record.jsonl").read_bytes() == before
        record.append(report(5, 2))
    assert read_state(folder).trials[5].epochs_done == 2


def test_a_trial_reports_no_epoch_beyond_its_last(folder: Path) -> None:
    with Record.open(folder) as record:
        record.append(report(5, 2))
        record.append(report(5, 3))
        with pytest.raises(RecordError, match="epoch 4 of 3 must come next, got epoch 4"):
            record.append(report(5, 4))


def test_a_complete_trial_has_the_accuracy_of_its_last_epoch_as_score(folder: Path) -> None:
    with Record.open(folder) as record:
        record.append(report(5, 2))
        record.append(EpochReported(trial=5, result=make_result(3, 0.625)))
        with pytest.raises(RecordError, match=r"a complete trial's score must be 0\.625, got 0\.5"):
            record.append(end(5, "complete", 0.5))
        record.append(end(5, "complete", 0.625))
    assert read_state(folder).trials[5].score == 0.625


def test_a_configuration_that_breaks_a_rule_leaves_no_trace(folder: Path) -> None:
    before = (folder / "record.jsonl").read_bytes()
    with Record.open(folder) as record:
        with pytest.raises(ConfigError, match="batch_size >= 2 must hold"):
            record.append(start_with(batch_size=1))
        assert (folder / "record.jsonl").read_bytes() == before
        assert record.state == read_state(folder)


def test_nothing_but_a_resume_follows_the_end_of_a_search(folder: Path) -> None:
    finish = SearchEnded(reason="time limit", wall_seconds=12.5)
    with Record.open(folder) as record:
        record.append(finish)
        for event in (make_start(6), report(5, 2), end(5, "failed"), finish):
            with pytest.raises(
                RecordError, match="s7-1: the search has ended: only 'resume' may follow, got"
            ):
                record.append(event)
    assert read_state(folder).finished == finish


def test_negative_trial_numbers_are_refused() -> None:
    with pytest.raises(ValidationError):
        make_start(-1)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../other/record.jsonl", "trials/../../x", "", ".", "a//b", "a\\b"]
)
def test_a_file_of_a_trial_lies_inside_the_folder_of_its_search(path: str) -> None:
    for name in ("error_file", "weights_file"):
        with pytest.raises(ValidationError):
            TrialEnded.model_validate(
                {"trial": 0, "status": "failed", "score": None, "reason": "", name: path}
            )


@pytest.mark.parametrize(
    "text", ["2026-01-31T12:00:00", "2026-01-31T12:00:00+01:00", "yesterday", "2026-01-31"]
)
def test_the_time_of_creation_is_utc(text: str) -> None:
    with pytest.raises(ValidationError):
        make_header(created=text)


def test_append_after_close_is_refused(folder: Path) -> None:
    record = Record.open(folder)
    record.close()
    record.close()
    with pytest.raises(RecordError, match="the record is closed: no event may follow"):
        record.append(make_start(6))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a search in use does not wait a second for it."""
    monkeypatch.setattr("tune_cifar.record.journal.LOCK_SECONDS", 0.02)


@pytest.mark.usefixtures("impatient")
def test_a_search_has_one_driver_and_any_number_of_readers(folder: Path) -> None:
    with Record.open(folder) as record:
        with pytest.raises(RecordError, match=r"s7-1: in use by .*Wait, or stop it\.$"):
            Record.open(folder)
        record.append(make_start(6))
        assert read_state(folder) == record.state
    Record.open(folder).close()


@pytest.mark.usefixtures("impatient")
def test_a_new_search_is_held_by_its_creator(tmp_path: Path) -> None:
    with (
        Record.create(search_folder(tmp_path, "s7-1"), make_header()) as record,
        pytest.raises(RecordError),
    ):
        Record.open(record.state.folder)


@pytest.mark.usefixtures("impatient")
def test_a_search_in_use_is_refused_with_the_name_of_its_owner(folder: Path) -> None:
    with Record.open(folder):
        assert is_live(folder)
        since = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d UTC"
        owner = rf"in use by process {os.getpid()} on \S+ since {since}\. Wait, or stop it"
        with pytest.raises(RecordError, match=owner):
            Record.open(folder)
        (folder / "owner.json").write_text("torn {")
        with pytest.raises(RecordError, match=r"in use by another process\. Wait"):
            Record.open(folder)
    assert not is_live(folder)


def test_a_search_whose_folder_takes_no_owner_is_refused(folder: Path) -> None:
    (folder / "owner.json").mkdir()
    with pytest.raises(RecordError, match=r"s7-1: cannot write its record: Is a directory\."):
        Record.open(folder)
    assert not is_live(folder)


def test_a_closed_search_has_no_owner(folder: Path) -> None:
    with Record.open(folder) as record:
        assert (folder / "owner.json").exists()
        record.close()
        assert not (folder / "owner.json").exists()


# What flock answers on NFS without its lock service, on Lustre without `flock`, and some FUSE.
NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP]


@pytest.fixture(params=NO_LOCKS, ids=errno.errorcode.get)
def without_locks(
    folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> str:
    """No flock works once the search is written; returns the system's words."""

    def refuse(*args: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    return os.strerror(request.param)


def write_owner(folder: Path, **changes: Any) -> None:
    """Write an owner of this process, now, as a driver does."""
    since = datetime.now(UTC).isoformat()
    owner = {"pid": os.getpid(), "host": platform.node(), "since": since}
    (folder / "owner.json").write_text(json.dumps(owner | changes))


def test_without_locks_no_search_is_recorded_and_the_reason_is_said(
    folder: Path, tmp_path: Path, without_locks: str
) -> None:
    other = search_folder(tmp_path, "s7-2")
    rule = f"the file system must have locks (flock), got '{without_locks}'"
    for refuse, place in (
        (lambda: Record.open(folder), folder),
        (lambda: Record.create(other, make_header("s7-2")), other),
        (lambda: Record.create_numbered(other, make_header("s7-2")), other),
    ):
        with pytest.raises(RecordError) as caught:
            refuse()
        assert str(caught.value) == f"{place}: {rule}. Give a folder elsewhere as `storage`."
    assert [path.name for path in other.parent.iterdir()] == ["s7-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["searches"]


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_search_is_live_only_while_its_owner_is(folder: Path) -> None:
    assert not is_live(folder), "it has no owner"
    (folder / "owner.json").write_text("torn {")
    assert not is_live(folder)
    write_owner(folder)
    assert is_live(folder)
    with pytest.raises(RecordError, match=rf"in use by process {os.getpid()} on "):
        Record.open(folder)
    write_owner(folder, since="2000-01-01T00:00:00+00:00")
    assert not is_live(folder), "another process has the number now"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_owner(folder, pid=ended.pid)
    assert not is_live(folder)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_an_owner_on_another_host_is_live_while_it_writes(folder: Path) -> None:
    write_owner(folder, host="elsewhere", pid=1)
    assert is_live(folder)
    with pytest.raises(RecordError, match="in use by process 1 on elsewhere since "):
        Record.open(folder)
    silent = time.time() - 3700
    os.utime(folder / "record.jsonl", (silent, silent))
    assert not is_live(folder)


def test_is_live_does_not_keep_a_driver_out(folder: Path) -> None:
    with (folder / "record.jsonl").open("rb") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        timer = threading.Timer(0.2, lambda: fcntl.flock(look, fcntl.LOCK_UN))
        timer.start()
        Record.open(folder).close()
        timer.join()


def test_a_refused_record_is_not_left_locked(folder: Path) -> None:
    path = folder / "record.jsonl"
    good = path.read_bytes()
    path.write_bytes(good.replace(b"sgd", b"SGD", 1))
    with pytest.raises(RecordError):
        Record.open(folder)
    path.write_bytes(good)
    Record.open(folder).close()


def test_a_taken_name_is_refused_and_its_record_untouched(folder: Path, tmp_path: Path) -> None:
    before = (folder / "record.jsonl").read_bytes()
    for refuse in (lambda: check_is_new(folder), lambda: Record.create(folder, make_header())):
        with pytest.raises(RecordError, match="s7-1: a search of this name exists already"):
            refuse()
    assert (folder / "record.jsonl").read_bytes() == before
    check_is_new(search_folder(tmp_path, "s7-2"))


def test_a_folder_that_cannot_be_looked_up_does_not_count_as_existing(tmp_path: Path) -> None:
    check_is_new(tmp_path / ("x" * 300))  # the system refuses to look up so long a name


def test_a_storage_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RecordError, match="s7-1: cannot create the search: Not a directory"):
        Record.create(search_folder(tmp_path / "runs", "s7-1"), make_header())


CREATE = """
import sys, time
from pathlib import Path
from tune_cifar.errors import RecordError
from tune_cifar.record.events import Header
from tune_cifar.record.journal import Record
from tune_cifar.record.store import search_folder
storage = Path(sys.argv[1])
header = Header.model_validate_json(sys.argv[3])
(storage / f"ready-{sys.argv[2]}").touch()
while not (storage / "go").exists():
    time.sleep(0.0001)
try:
    record = Record.create(search_folder(storage, "s7-1"), header)
except RecordError as exc:
    print("lost")
else:
    print("won")
    time.sleep(0.5)
"""


def start_creators(script: str, storage: Path) -> list[subprocess.Popen[str]]:
    """Start four processes that create a record at once, each with its number as the command."""
    processes = []
    for number in map(str, range(4)):
        header = make_header(command=number).model_dump_json()
        words = [sys.executable, "-c", script, str(storage), number, header]
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
    wait_for(lambda: len(list(storage.glob("ready-*"))) == len(processes))
    (storage / "go").touch()
    return processes


def test_of_processes_that_create_one_name_exactly_one_wins(tmp_path: Path) -> None:
    processes = start_creators(CREATE, tmp_path)
    outcomes = [process.communicate(timeout=600)[0].strip() for process in processes]
    assert sorted(outcomes) == ["lost", "lost", "lost", "won"]
    assert read_state(search_folder(tmp_path, "s7-1")).header.command == str(outcomes.index("won"))


def test_of_processes_that_take_one_name_nobody_chose_each_gets_a_record(tmp_path: Path) -> None:
    script = CREATE.replace("Record.create(", "Record.create_numbered(")
    processes = start_creators(script, tmp_path)
    assert {process.communicate(timeout=600)[0] for process in processes} == {"won\n"}
    names = ["s7-1", "s7-1-2", "s7-1-3", "s7-1-4"]
    headers = [read_state(search_folder(tmp_path, name)).header for name in names]
    assert [header.name for header in headers] == names
    assert {header.command for header in headers} == {"0", "1", "2", "3"}


def wait_for(is_true: Callable[[], bool], seconds: float = 600.0) -> None:
    """Poll a condition of another process."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


WRITE = """
import sys
from pathlib import Path
from tests.builders import make_header, make_start
from tune_cifar.record.journal import Record
from tune_cifar.record.store import search_folder
with Record.create(search_folder(Path(sys.argv[1]), "s7-1"), make_header()) as record:
    for number in range(100_000):
        record.append(make_start(number))
        print(number, flush=True)
"""


def test_everything_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(50):
        assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    acknowledged = 50 + len(process.communicate()[0].split())
    with Record.open(search_folder(tmp_path, "s7-1")) as record:
        found = len(record.state.trials)
        assert acknowledged <= found <= acknowledged + 1
        record.append(make_start(found))


def test_every_append_is_synced_and_so_is_every_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        fsync(handle)
        synced.append(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", note)
    storage = tmp_path / "runs"
    with Record.create(search_folder(storage, "s7-1"), make_header()) as record:
        folder, path = record.state.folder, record.state.folder / "record.jsonl"
        assert {p.stat().st_ino for p in (storage, folder.parent, folder, path)} <= set(synced)
        synced.clear()
        for count, event in enumerate(make_trial(0, [0.1, 0.2], "stopped"), start=1):
            record.append(event)
            assert synced == [path.stat().st_ino] * count


def test_a_full_disk_closes_the_record_and_what_was_half_written_is_cut(folder: Path) -> None:
    path = folder / "record.jsonl"
    size, before = path.stat().st_size, read_state(folder)
    record = Record.open(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        with pytest.raises(RecordError, match="cannot write the event: File too large"):
            record.append(make_start(6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == size + 20
    assert record.state == before
    with pytest.raises(RecordError, match="the record is closed"):
        record.append(make_start(6))
    with Record.open(folder) as record:
        assert record.state.repaired is not None
        record.append(make_start(6))
    assert 6 in read_state(folder).trials


class InterruptedFile(FileIO):
    """A file whose writes meet Ctrl-C half-way."""

    def write(self, line: Any) -> int:
        super().write(line[:30])
        raise KeyboardInterrupt


def test_ctrl_c_inside_an_append_cannot_spoil_the_record(folder: Path) -> None:
    before = read_state(folder)
    record = Record.open(folder)
    record.file.close()
    record.file = InterruptedFile(folder / "record.jsonl", "ab")
    with pytest.raises(KeyboardInterrupt):
        record.append(make_start(6))
    assert record.state == before
    with pytest.raises(RecordError, match="the record is closed"):
        record.append(SearchEnded(reason="interrupted", wall_seconds=1.0))
    with Record.open(folder) as record:
        assert record.state.repaired is not None
        record.append(SearchEnded(reason="interrupted", wall_seconds=1.0))


def test_best_is_the_complete_trial_of_highest_score_and_of_equals_the_first(
    tmp_path: Path,
) -> None:
    events = [
        *make_trial(0, [0.3, 0.5, 0.7], "complete"),
        *make_trial(2, [0.3, 0.5, 0.8], "complete"),
        *make_trial(1, [0.3, 0.5, 0.8], "complete"),
        *make_trial(3, [0.9, 0.9], "stopped"),
    ]
    state = write_record(tmp_path, make_header(), events)
    assert state.best is state.trials[1]
    assert state.baseline_score == 0.7


def test_without_a_complete_trial_there_is_no_best_and_no_baseline_score(tmp_path: Path) -> None:
    events = [*make_trial(0, [0.3], "failed"), *make_trial(1, [], "diverged")]
    state = write_record(tmp_path, make_header(), events)
    assert state.best is None
    assert state.baseline_score is None


def test_a_complete_trial_without_validation_images_has_no_score_and_does_not_compete(
    tmp_path: Path,
) -> None:
    config = CONFIG.model_copy(update={"train_size": 50_000, "val_size": 0, "epochs": 1})
    state = write_record(tmp_path, make_header(), make_trial(0, [None], "complete", config))
    assert state.trials[0].status == "complete"
    assert (state.trials[0].score, state.trials[0].val_acc, state.best) == (None, None, None)
    assert state.arrivals == {}


def test_a_trial_with_stages_has_its_stage_and_every_epoch_it_trained(tmp_path: Path) -> None:
    events = [
        *make_staged_trial(0, STAGE_ACCS, "complete"),
        *make_staged_trial(1, {1: [0.4], 2: [0.3]}, None),
    ]
    events += [*make_staged_trial(2, {1: [0.3]}, "stopped"), *make_staged_trial(3, {}, "stopped")]
    state = write_record(tmp_path, make_header(), events)
    assert read_state(state.folder) == state
    complete, running, stopped, early = (state.trials[number] for number in range(4))
    trained = [(length, result.epoch) for length, result in complete.trained_epochs]
    assert trained == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
    accs = [result.val_acc for _, result in complete.trained_epochs]
    assert accs == [0.5, 0.2, 0.6, 0.1, 0.3, 0.7]
    assert (complete.config, complete.score) == (CONFIG, 0.7)
    assert complete.fingerprint == CONFIG.fingerprint
    assert (running.stage, running.config, len(running.epochs)) == (2, CONFIG.shorten(2), 1)
    assert (running.epochs_done, running.val_acc, running.scores) == (2, 0.3, {1: 0.4})
    assert (stopped.config.epochs, stopped.fingerprint) == (1, CONFIG.shorten(1).fingerprint)
    assert (early.stage, early.config, early.trained_epochs) == (None, CONFIG, [])
    assert early.fingerprint == CONFIG.fingerprint
    assert state.arrivals == {1: {0: 0.5, 1: 0.4, 2: 0.3}, 2: {0: 0.6}, 3: {0: 0.7}}


def test_a_trial_that_ends_between_two_stages_ended_in_the_longer(tmp_path: Path) -> None:
    state = write_record(
        tmp_path, make_header(), make_staged_trial(0, {1: [0.5]}, "diverged", cycle=2)
    )
    trial = state.trials[0]
    assert (trial.stage, trial.config.epochs, trial.epochs) == (2, 2, [])
    assert trial.finished_stages[0][0] == 1
    assert (trial.val_acc, trial.score) == (0.5, 0.1)
    assert trial.fingerprint == CONFIG.shorten(2).fingerprint
    assert read_state(state.folder) == state


def report_in(stage: int | None, epoch: int, acc: float = 0.5, replicate: int = 0) -> EpochReported:
    """An epoch of trial 0 in a stage of this length."""
    result = make_result(epoch, acc)
    return EpochReported(trial=0, result=result, cycle=stage, replicate=replicate)


def end_in(stage: int | None, status: Any, **changes: Any) -> TrialEnded:
    """The end of trial 0 in a stage of this length."""
    values = {"score": 0.5 if status == "complete" else None, "reason": "", **changes}
    return TrialEnded(trial=0, status=status, cycle=stage, **values)


REPLICATED = {"trials": 4, "rungs": [1, 3], "replicates": 3}
# A stage of one epoch, and the longest one under two seeds of three.
TWO_OF_THREE = [
    make_start(0),
    report_in(1, 1),
    *(report_in(3, epoch, acc) for epoch, acc in enumerate((0.1, 0.2, 0.6), 1)),
    *(report_in(3, epoch, acc, 1) for epoch, acc in enumerate((0.1, 0.2, 0.7), 1)),
]


def test_the_score_of_a_trial_with_replicates_is_their_mean(tmp_path: Path) -> None:
    events: list[Event] = [*TWO_OF_THREE, *(report_in(3, epoch, 0.8, 2) for epoch in (1, 2, 3))]
    state = write_record(tmp_path, make_header(budget=REPLICATED), events)
    trial = state.trials[0]
    assert trial.scores == {1: 0.5, 3: trial.find_score("complete")}
    assert trial.scores[3] == pytest.approx(0.7) and state.arrivals[3] == {0: trial.scores[3]}
    with Record.open(state.folder) as record:
        record.append(end_in(3, "complete", replicate=2, score=trial.scores[3]))
        ended = record.state.trials[0]
    assert (ended.status, ended.score, ended.accuracy) == ("complete", trial.scores[3], ended.score)
    assert (ended.val_acc, ended.epochs_done) == (0.8, 10)
    assert ended.config == CONFIG.shorten(3, 2) and ended.config.seed == CONFIG.seed + 2
    assert ended.fingerprint == ended.config.fingerprint != CONFIG.fingerprint
    assert read_state(state.folder).trials[0] == ended


def test_a_trial_may_diverge_in_a_replicate(tmp_path: Path) -> None:
    events = [*TWO_OF_THREE, end_in(3, "diverged", replicate=2, score=0.1)]
    trial = write_record(tmp_path, make_header(budget=REPLICATED), events).trials[0]
    assert (trial.replicate, trial.epochs, trial.score) == (2, [], 0.1)
    assert trial.config.seed == CONFIG.seed + 2


BROKEN_REPLICATES: dict[str, tuple[int, Event, str]] = {
    "one left out": (8, report_in(3, 1, 0.5, 3), "replicate 2 of 3 must come next, .* got 3 after"),
    "before the last one's end": (
        7,
        report_in(3, 1, 0.5, 2),
        "replicate 2 of 3 must come next, after all 3 epochs of the last one, got 2 after 2",
    ),
    "of a shorter stage": (2, report_in(1, 1, 0.5, 1), "a new stage must come after all 1 epochs"),
    "in a new stage": (2, report_in(3, 1, 0.5, 1), "a new stage must come after all 1 epochs"),
    "complete too early": (
        8,
        end_in(3, "complete", replicate=1, score=0.65),
        "a complete trial must have 3 replicates, got 2",
    ),
}


@pytest.mark.parametrize(
    ("num_events", "event", "rule"), BROKEN_REPLICATES.values(), ids=list(BROKEN_REPLICATES)
)
def test_a_replicate_that_may_not_follow_is_refused(
    tmp_path: Path, num_events: int, event: Event, rule: str
) -> None:
    state = write_record(tmp_path, make_header(budget=REPLICATED), TWO_OF_THREE[:num_events])
    with Record.open(state.folder) as record:
        with pytest.raises(RecordError, match=f"^s7-1:0: .*{rule}"):
            record.append(event)
        assert record.state == state


UNNAMED = "must name its `cycle`: the trial is in a stage of 2 epochs"
TOO_EARLY = "a new stage must come after all 2 epochs of the last one and have more, at most 3"
BROKEN_STAGES: dict[str, tuple[dict[int, list[float]], Event, str]] = {
    "not begun at 1": ({}, report_in(2, 2), "epoch 1 of 2 must come next, got epoch 2"),
    "beyond its end": ({1: [0.5]}, report_in(1, 2), "epoch 2 of 1 must come next, got epoch 2"),
    "before the last one's end": (
        {2: [0.5]},
        report_in(3, 1),
        f"{TOO_EARLY}, got one of 3 after 1",
    ),
    "shorter": ({2: [0.5, 0.5]}, report_in(1, 1), f"{TOO_EARLY}, got one of 1 after 2"),
    "longer than the trial": ({2: [0.5, 0.5]}, report_in(4, 1), f"{TOO_EARLY}, got one of 4"),
    "unnamed": ({2: [0.5]}, report_in(None, 2), f"'epoch' {UNNAMED}"),
    "unnamed end": ({2: [0.5]}, end_in(None, "failed"), f"'end' {UNNAMED}"),
    "complete too early": (
        {2: [0.5, 0.5]},
        end_in(2, "complete"),
        "a complete trial must have trained 3 epochs, got 2 of 2",
    ),
    "complete in a new one": (
        {2: [0.5, 0.5]},
        end_in(3, "complete"),
        "a complete trial must have trained 3 epochs, got 0 of 3",
    ),
}


@pytest.mark.parametrize(
    ("stages", "event", "rule"), BROKEN_STAGES.values(), ids=list(BROKEN_STAGES)
)
def test_a_stage_that_may_not_follow_is_refused_and_leaves_no_trace(
    tmp_path: Path, stages: dict[int, list[float]], event: Event, rule: str
) -> None:
    state = write_record(tmp_path, make_header(), make_staged_trial(0, stages, None))
    with Record.open(state.folder) as record:
        with pytest.raises(RecordError, match=f"^s7-1:0: {rule}"):
            record.append(event)
        assert record.state == state


def test_no_stage_follows_a_training_without_stages(tmp_path: Path) -> None:
    state = write_record(tmp_path, make_header(), make_trial(0, [0.5], None))
    rule = "a new stage must come after all 0 epochs .* got one of 3 after 1"
    with Record.open(state.folder) as record, pytest.raises(RecordError, match=rule):
        record.append(report_in(3, 1))


def make_confirmation(**changes: Any) -> Confirmation:
    """Two candidates under three seeds."""
    dump = CONFIG.model_dump(mode="json")
    candidates = [
        Candidate(run_id="s7-1:0", score=0.7, config=dump),
        Candidate(run_id="s7-1:4", score=None, config={}),
    ]
    values: dict[str, Any] = {
        "search": "s7-1",
        "candidates": candidates,
        "seeds": [1, 2, 5],
        "final": False,
    }
    return Confirmation(**{**values, **changes})


def test_a_confirmation_names_its_trials_seed_after_seed() -> None:
    confirmation = make_confirmation()
    found = [confirmation.find(number) for number in range(confirmation.num_trials)]
    order = [(run_id, seed) for seed in (1, 2, 5) for run_id in ("s7-1:0", "s7-1:4")]
    assert [(candidate.run_id, seed) for candidate, seed in found] == order


@pytest.mark.parametrize("changes", [{"candidates": []}, {"seeds": []}])
def test_a_confirmation_of_nothing_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="at least 1 item"):
        make_confirmation(**changes)


def test_a_confirmation_comes_back_with_its_header_and_older_headers_have_none(
    tmp_path: Path,
) -> None:
    header = make_header("s7-1-confirm", kind="confirm", confirmation=make_confirmation())
    state = write_record(
        tmp_path,
        header,
        [make_start(0, origin="confirm", params={"candidate": "s7-1:0", "seed": 1})],
    )
    assert read_state(state.folder).header == header == state.header
    body = make_header("s7-2").model_dump()
    del body["confirmation"]
    older = searches_folder(tmp_path) / "s7-2"
    older.mkdir()
    (older / "record.jsonl").write_bytes(make_line(1, "header", body))
    assert read_state(older).header == make_header("s7-2")


def test_counts_name_every_status(folder: Path) -> None:
    expected = {"running": 1, "complete": 2, "stopped": 1, "diverged": 1, "failed": 1}
    assert read_state(folder).counts == expected
    described = "1 running, 2 complete, 1 stopped, 1 diverged, 1 failed"
    assert sorted(describe_counts(expected).split(", ")) == sorted(described.split(", "))
    assert describe_counts({"running": 0, "complete": 3}) == "3 complete"


def test_arrivals_hold_every_score_in_the_order_it_was_reported(tmp_path: Path) -> None:
    events: list[Event] = [make_start(0), make_start(1)]
    for number, epoch, acc in ((1, 1, 0.4), (0, 1, 0.5), (0, 2, 0.75)):
        events.append(EpochReported(trial=number, result=make_result(epoch, acc)))
    state = write_record(tmp_path, make_header(), events)
    arrivals = [list(scores.items()) for scores in state.arrivals.values()]
    assert arrivals == [[(1, 0.4), (0, 0.5)], [(0, 0.75)]]


def test_a_resume_reopens_an_ended_search_and_says_how_many_trials_it_is_to_have(
    folder: Path,
) -> None:
    with Record.open(folder) as record:
        assert record.state.num_trials == 4
        record.append(SearchEnded(reason="time limit", wall_seconds=1.0))
        assert record.state.is_finished
        record.append(make_resume())
        assert not record.state.is_finished and record.state.num_trials == 9
        record.append(report(5, 2))
    assert read_state(folder).resumes == [make_resume()]


def test_a_trial_knows_the_last_driver_that_it_ran_under(folder: Path) -> None:
    with Record.open(folder) as record:
        record.append(make_resume())
        record.append(make_start(6))
    state = read_state(folder)
    for number, trial in state.trials.items():
        assert trial.driver == (state.header if number < 5 else make_resume())


def test_an_interrupted_search_is_ended_but_not_finished(folder: Path) -> None:
    with Record.open(folder) as record:
        record.append(SearchEnded(reason="interrupted", wall_seconds=1.0))
    state = read_state(folder)
    assert state.finished is not None and not state.is_finished
    assert state.trials[5].status == "running"


def test_a_retried_trial_continues_and_has_the_reason(folder: Path) -> None:
    retry = TrialRetried(trial=5, fault="worker died", text="killed")
    with Record.open(folder) as record:
        record.append(retry)
        record.append(report(5, 2))
        rule = r"s7-1:1: the trial has ended \(stopped\): no 'retry' may follow"
        with pytest.raises(RecordError, match=rule):
            record.append(TrialRetried(trial=1, fault="worker died", text=""))
    assert read_state(folder).trials[5].retries == [retry]


def test_times_of_a_trial_come_back(tmp_path: Path) -> None:
    start, end_time = "2026-02-01T12:00:00+00:00", "2026-02-01T12:00:09.5+00:00"
    ended = TrialEnded(trial=0, status="failed", reason="", time=end_time)
    state = write_record(tmp_path, make_header(), [make_start(0, time=start), ended])
    assert (state.trials[0].started, state.trials[0].ended) == (start, end_time)


def test_a_trial_without_epochs_has_no_accuracy(folder: Path) -> None:
    assert read_state(folder).trials[2].val_acc is None


def test_a_trials_folder_lies_in_its_searchs_and_that_in_the_run_store(
    folder: Path, tmp_path: Path
) -> None:
    state = read_state(folder)
    assert state.trial_folder(7) == folder / "trials" / "0007"
    assert state.storage == tmp_path


@pytest.mark.parametrize("name", ["a", "s10-cpu-1", "A.b_c-9", "0", "x" * 64])
def test_good_names_are_folders_of_the_storage(tmp_path: Path, name: str) -> None:
    assert check_name(name) == name
    assert search_folder(tmp_path, name) == tmp_path / "searches" / name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "-a", "a/b", "a\\b", "a b", "a\n", "/a", "é", "x" * 65, "a:1"]
)
def test_bad_names_are_refused_everywhere(tmp_path: Path, name: str) -> None:
    for refuse in (check_name, lambda bad: search_folder(tmp_path, bad)):
        with pytest.raises(RecordError, match="a search's name must have 1 to 64"):
            refuse(name)
    with pytest.raises(ValidationError):
        make_header(name)


@given(name=st.text() | st.text("./\\-a"))
def test_no_name_leads_out_of_the_storage(name: str) -> None:
    storage = Path("/storage")
    try:
        folder = search_folder(storage, name)
    except RecordError:
        return
    assert Path(os.path.normpath(folder)) == folder
    assert folder.parent == searches_folder(storage)


def test_ten_thousand_events_replay_in_two_seconds(tmp_path: Path) -> None:
    folder = search_folder(tmp_path, "s7-1")
    folder.mkdir(parents=True)
    config = CONFIG.model_copy(update={"epochs": 24})
    events: list[Event] = [make_header()]
    for number in range(385):
        events += make_trial(number, [0.1 + epoch / 7 for epoch in range(24)], "complete", config)
    kinds = {Header: "header", TrialStarted: "trial", EpochReported: "epoch", TrialEnded: "end"}
    lines = [
        make_line(seq, kinds[type(event)], event.model_dump())
        for seq, event in enumerate(events, 1)
    ]
    (folder / "record.jsonl").write_bytes(b"".join(lines))
    start = time.process_time()
    state = read_state(folder)
    assert time.process_time() - start < 2.0
    assert state.num_events == len(events) > 10_000


def test_the_journal_imports_nothing_heavy() -> None:
    code = (
        "import sys, tune_cifar.record.journal\n"
        "heavy = {'torch', 'ray', 'mlflow', 'optuna', 'pandas', 'numpy', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
