"""What the measurements on a GPU make of parts that fail."""

from __future__ import annotations

import queue
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from packing import wait_for
from session import DEFAULT_CHOICE, choose

FASTER: dict[str, Any] = {
    "s10 captured": {"step_ms": 2.0},
    "s10 compiled": {"step_ms": 1.0, "first_s": 20.0},
}


def test_faster_compiled_steps_are_taken_unless_graphs_were_wrong() -> None:
    assert choose(DEFAULT_CHOICE, "variants", FASTER) == {"execution": "compiled"}
    eager = choose(DEFAULT_CHOICE, "equal", {"is_equal": False})
    assert eager == {"execution": "eager"}
    assert choose(eager, "variants", FASTER) == eager


@pytest.mark.timeout(60)
def test_trainings_in_threads_that_died_are_not_waited_for() -> None:
    """A thread has no exit code; what a finished one has counted is still read."""
    counts: queue.Queue[float] = queue.Queue()
    workers = [threading.Thread(target=counts.put, args=(2.5,)), threading.Thread(target=int)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wait_for(counts, workers) == 2.5
    with pytest.raises(SystemExit, match="a training died"):
        wait_for(counts, workers)
