"""The rest of the faults injected into complete searches: `make test-faults`."""

from __future__ import annotations

import http.server
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from tests.builders import find_free_port, make_hostile, write_payload
from tests.faults import SPACE
from tests.faults.disks import mount_small_disk
from tests.faults.lab import (
    RESTORED,
    Lab,
    check_complete,
    check_equal,
    count_epochs,
    interrupt,
    kill,
    serve_mlflow,
    wait_until_it_answers,
)
from tune_cifar.record.events import Header, TrialRetried, encode_event
from tune_cifar.record.state import SearchState
from tune_cifar.search.driver import RETRIES

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


def has_epochs(wanted: int, state: SearchState) -> bool:
    return count_epochs(state) >= wanted


def test_workers_killed_again_and_again_cost_only_time(
    tmp_path: Path, reference: SearchState
) -> None:
    """No trial fails, even if all these deaths are of its own workers."""
    lab = Lab(tmp_path)
    process = lab.search()
    for wanted in (2 + 3 * kills for kills in range(RETRIES["worker died"])):
        lab.wait_for(process, partial(has_epochs, wanted))
        for worker in lab.list_workers()[:1]:
            worker.kill()
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert any(isinstance(event, TrialRetried) for event in lab.list_events())
    check_complete(lab)
    check_equal(lab.state, reference)


def test_a_worker_killed_in_the_middle_of_a_checkpoint_write_costs_only_time(
    tmp_path: Path, reference: SearchState
) -> None:
    """Often the last of its trial, when the weights are written and the checkpoint is not."""
    lab = Lab(tmp_path)
    process = lab.search()
    lab.wait_for(process, lambda state: count_epochs(state) >= 2)
    workers = lab.list_workers()
    while not list(lab.record.parent.glob("trials/*/checkpoints/*.tmp")):
        assert process.poll() is None
    for worker in workers:
        worker.kill()
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert any(isinstance(event, TrialRetried) for event in lab.list_events())
    check_complete(lab)
    check_equal(lab.state, reference)


def test_a_search_starts_without_its_mlflow_server_and_uploads_once_it_answers(
    tmp_path: Path, reference: SearchState
) -> None:
    port = find_free_port()
    lab = Lab(tmp_path, options=("--tracking-uri", f"http://127.0.0.1:{port}"))
    process = lab.search()
    lab.wait_for(process, lambda state: count_epochs(state) >= 2)
    with serve_mlflow(lab.storage, port):
        wait_until_it_answers(port)
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text
        if "sync --search x" in text:
            lab.run("sync", "--search", "x", *lab.options)
    check_complete(lab)
    check_equal(lab.state, reference)


@contextmanager
def serve_badly(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[int]:
    """Run an HTTP server that answers every request so; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("fault", ["answers 500", "hangs 30 s"])
def test_a_search_ends_the_same_beside_a_bad_mlflow_server(
    tmp_path: Path, reference: SearchState, fault: str
) -> None:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        if fault == "hangs 30 s":
            time.sleep(30)
        handler.send_error(500)

    with serve_badly(answer) as port:
        lab = Lab(tmp_path, options=("--tracking-uri", f"http://user:secret@127.0.0.1:{port}"))
        text = lab.finish()
    assert "The record is complete" in text and "sync --search x" in text
    assert "secret" not in text and b"secret" not in lab.record.read_bytes()
    check_equal(lab.state, reference)
    assert ": 0 trials uploaded" not in lab.run("sync", "--search", "x")
    check_complete(lab)


def test_a_full_disk_under_the_database_alone_leaves_the_search_intact(
    tmp_path: Path, reference: SearchState
) -> None:
    with mount_small_disk(tmp_path / "disk", num_kb=256) as disk:
        lab = Lab(tmp_path / "lab", options=("--tracking-uri", f"sqlite:///{disk}/mlflow.db"))
        text = lab.finish()
        assert "The record is complete" in text and "sync --search x" in text
        check_equal(lab.state, reference)
        lab.run("sync", "--search", "x")
        check_complete(lab)


@pytest.mark.parametrize("damage", ["emptied", "truncated", "one bit flipped", "hostile"])
def test_a_trial_whose_newest_checkpoint_is_damaged_is_resumed_to_the_same_curve(
    tmp_path: Path, reference: SearchState, damage: str
) -> None:
    lab = Lab(tmp_path)
    process = lab.search()
    lab.wait_for(process, lambda state: count_epochs(state) >= 3)
    interrupt(process)
    process.communicate(timeout=600)
    paths = list(lab.record.parent.glob("trials/*/checkpoints/*.pt"))
    assert paths
    for path in paths:
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        damaged = {"emptied": b"", "truncated": content[:-100], "one bit flipped": flipped}
        if damage == "hostile":  # with the right checksum
            write_payload(path, make_hostile(tmp_path / "ran"))
        else:
            path.write_bytes(damaged[damage])
    text = lab.finish()
    if damage != "hostile":
        assert text.count("the checksum does not match") == len(paths)
    assert not (tmp_path / "ran").exists()
    check_complete(lab)
    check_equal(lab.state, reference)


def test_a_record_that_is_emptied_is_refused_with_the_way_out(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    process = lab.search()
    lab.wait_for(process, lambda state: count_epochs(state) >= 1)
    kill(process)
    lab.record.write_bytes(b"")
    text = lab.run("search", "--resume", "--name", "x", "--data", "shapes", status=1)
    assert "not even a complete header. Delete the folder: nothing ran." in text


def test_a_search_in_which_every_trial_diverges_says_so(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    explode = ("schedule=constant", "max_lr=5.0", "weight_decay=1.0", "epochs=30")
    words = [word for setting in explode for word in ("--set", setting)]
    search = ("search", "--space", "faulty", "--name", "x", "--data", "shapes")
    text = lab.run(*search, "--trials", "3", *words)
    assert lab.state.counts["diverged"] == 3 and "No trial reached its last epoch" in text
    check_complete(lab)


def plant(folder: Path, code: str, num: int) -> dict[str, str]:
    """Make every worker run this code when it starts; returns the environment that does so.

    In the code `counter` is a file that holds `num`.
    """
    start = "import sys\nif any('default_worker' in word for word in sys.orig_argv):\n"
    lines = [
        "import os, pathlib, torch",
        "counter = pathlib.Path(os.environ['FAULTS_LEFT'])",
        *code.strip().splitlines(),
    ]
    (folder / "sitecustomize.py").write_text(start + "".join(f"    {line}\n" for line in lines))
    (folder / "left").write_text(str(num))
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {"PYTHONPATH": path, "FAULTS_LEFT": str(folder / "left")}


# The loss of the num-th training step is NaN.
NAN_LOSS = """
nll_loss = torch.nn.functional.nll_loss
def compute(log_probs, labels, **options):
    loss = nll_loss(log_probs, labels, **options)
    if log_probs.requires_grad:
        left = int(counter.read_text()) - 1
        counter.write_text(str(left))
        if left == 0:
            return loss * float("nan")
    return loss
torch.nn.functional.nll_loss = compute
"""


@pytest.mark.parametrize(
    ("num", "where", "num_epochs"),
    [(1, "epoch 1, step 1", 0), (21, "epoch 1, step 1", 1), (140, "epoch 4, step 80", 6)],
    ids=["first step", "second stage", "last epoch"],
)
def test_a_nan_ends_its_trial_as_diverged_and_the_search_goes_on(
    tmp_path: Path, num: int, where: str, num_epochs: int
) -> None:
    """In stages of one, two and four epochs of 20 steps."""
    lab = Lab(tmp_path, plant(tmp_path, NAN_LOSS, num), ("--max-concurrent", "1"))
    text = lab.finish()
    first = lab.state.trials[0]
    assert (first.status, first.epochs_done, first.retries) == ("diverged", num_epochs, [])
    assert f"the loss must be finite, got nan or inf at {where}." in first.reason
    counts = lab.state.counts
    assert counts["diverged"] == 1 and counts["complete"] + counts["stopped"] == 7
    assert "diverged" in text
    check_complete(lab)


@pytest.mark.parametrize("damage", ["absent", "truncated", "another md5"])
def test_a_search_on_damaged_data_is_refused_before_its_first_trial(
    tmp_path: Path, damage: str
) -> None:
    lab = Lab(tmp_path)
    batches = tmp_path / "cifar" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    size = {"absent": None, "truncated": 100, "another md5": 31_035_704}[damage]
    for number in range(1, 6):
        if size is not None:
            (batches / f"data_batch_{number}").write_bytes(bytes(size))
    words = ("search", "--space", "smoke", "--name", "x", "--data", str(tmp_path / "cifar"))
    text = lab.run(*words, status=1)
    assert "data fetch" in text and not lab.record.exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("  max_lr: 0.05", "  max_lr: 0.05\n  max_lr: 0.1"), "max_lr"),
        (("  max_lr: 0.05", "  max_lrr: 0.05"), "Did you mean max_lr?"),
        (("  max_lr: 0.05", "\tmax_lr: 0.05"), "tab"),
        (("  max_lr: 0.05", "  max_lr: &a 0.05"), "no anchor may be used"),
        (("  max_lr: 0.05", "  max_lr: fast"), "valid number"),
        (("space: faulty", "# " + 5_000_000 * "x" + "\nspace: faulty"), "bytes"),
    ],
    ids=["duplicate", "unknown", "tab", "anchor", "type", "5 MB"],
)
def test_a_search_of_a_broken_space_is_refused_in_a_sentence(
    tmp_path: Path, change: tuple[str, str], sentence: str
) -> None:
    lab = Lab(tmp_path)
    (tmp_path / "search_spaces" / "faulty.yaml").write_text(SPACE.replace(*change))
    text = lab.run("search", "--space", "faulty", "--name", "x", "--data", "shapes", status=1)
    assert "faulty.yaml" in text and sentence in text and not lab.record.exists()


# The first convolution fails in the first num training steps.
OUT_OF_MEMORY = """
forward = torch.nn.Conv2d.forward
def fail(self, images):
    left = int(counter.read_text())
    if left and self.training:
        counter.write_text(str(left - 1))
        raise {exception}
    return forward(self, images)
torch.nn.Conv2d.forward = fail
"""


ON_GPU = 'torch.OutOfMemoryError("CUDA out of memory.")'
ON_CPU = (
    'RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 10 bytes.")'
)


@pytest.mark.parametrize(
    ("exception", "num", "status"),
    [
        (ON_GPU, 1, "complete"),
        (ON_GPU, 2, "failed"),
        (ON_CPU, 1, "complete"),
        ("MemoryError()", 1, "complete"),
    ],
)
def test_a_trial_out_of_memory_is_reported_and_retried_alone(
    tmp_path: Path, exception: str, num: int, status: str
) -> None:
    variables = plant(tmp_path, OUT_OF_MEMORY.format(exception=exception), num)
    lab = Lab(tmp_path, variables, ("--max-concurrent", "1"))
    lab.finish()
    trial = lab.state.trials[0]
    assert [retry.fault for retry in trial.retries] == ["out of memory"]
    assert trial.status == status
    assert exception.split("(")[0].split(".")[-1] in lab.run("failures", "--search", "x")


def test_a_worker_that_ray_kills_to_save_memory_is_reported_as_out_of_memory(
    tmp_path: Path,
) -> None:
    """Ray's monitor kills it, since 1 % of the machine's memory is the limit."""
    variables = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "250"}
    lab = Lab(tmp_path, variables, ("--trials", "1"))
    lab.finish()
    trial = lab.state.trials[0]
    assert [retry.fault for retry in trial.retries] == ["out of memory"]
    assert (trial.status, trial.reason) == ("failed", "out of memory, 2 times")
    assert "low on memory" in lab.run("failures", "--search", "x")


def test_of_two_searches_started_at_once_with_one_name_one_is_refused(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    both = [lab.search() for _ in range(2)]
    texts = [process.communicate(timeout=600)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], texts
    refused = texts[[process.returncode for process in both].index(1)]
    assert "a search of this name exists already" in refused and "Traceback" not in refused
    check_complete(lab)


def test_a_second_driver_of_a_running_search_is_refused_with_the_first_ones_process(
    tmp_path: Path,
) -> None:
    lab = Lab(tmp_path)
    process = lab.search()
    lab.wait_for(process, lambda state: count_epochs(state) >= 1)
    text = lab.run("search", "--resume", "--name", "x", "--data", "shapes", status=1)
    assert f"in use by process {process.pid} on" in text
    process.communicate(timeout=600)
    assert process.returncode == 0
    check_complete(lab)


def test_two_searches_at_once_share_a_new_mlflow_database(tmp_path: Path) -> None:
    labs = [Lab(tmp_path, options=("--trials", "3")) for _ in range(2)]
    search = ("search", "--space", "faulty", "--data", "shapes", "--trials", "3")
    words = (*search, "--max-concurrent", "1", "--name")
    both = [lab.start(*words, name) for lab, name in zip(labs, ("x", "y"), strict=True)]
    texts = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert not any("MLflow upload" in text for text in texts), texts
    runs = labs[0].list_runs()
    assert len(runs) == 8 and all(run.info.status != "RUNNING" for run in runs)
    assert {run.data.tags["search"] for run in runs} == {"x", "y"}


def test_a_clock_set_back_an_hour_between_stop_and_resume_changes_nothing(
    tmp_path: Path, reference: SearchState
) -> None:
    """Every time in the record is moved an hour into the future instead."""
    lab = Lab(tmp_path)
    process = lab.search()
    lab.wait_for(process, lambda state: count_epochs(state) >= 3)
    interrupt(process, signal.SIGTERM)
    process.communicate(timeout=600)
    lines = []
    for number, event in enumerate(lab.list_events(), 1):
        name = "created" if isinstance(event, Header) else "time"
        if (text := getattr(event, name, None)) is not None:
            later = (datetime.fromisoformat(text) + timedelta(hours=1)).isoformat()
            event = event.model_copy(update={name: later})
        lines.append(encode_event(number, event)[0])
    lab.record.write_bytes(b"".join(lines))
    (lab.storage / "mlflow.db").unlink()  # its runs carry the search's time of creation
    assert RESTORED.search(lab.finish())
    check_complete(lab)
    check_equal(lab.state, reference)
