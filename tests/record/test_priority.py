"""A nice session gives way to other sessions where the kernel divides the CPU between sessions."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.builders import ROOT

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/autogroup").exists() or not Path("/proc/self/autogroup").read_text(),
    reason="this kernel does not group processes by session",
)
SHOW = "print(open('/proc/self/autogroup').read().split()[-1])"
CALL = f"from tune_cifar.record.priority import make_session_nice; make_session_nice(); {SHOW}"
WORKER = f"from tune_cifar.search.worker import TrialWorker; TrialWorker({{}}); {SHOW}"


CHILD = """
import subprocess
from tune_cifar.record.priority import make_session_nice
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
make_session_nice(child.pid)
print(open(f"/proc/{child.pid}/autogroup").read().split()[-1])
child.kill()
"""


def add(niceness: int) -> str:
    """The niceness of what `nice -n` starts here: pytest itself may have been started so."""
    return str(min(19, os.nice(0) + niceness))


def run_in_a_session(niceness: int, script: str) -> str:
    """Run Python in a session of its own that is nice from its start; return what it prints."""
    command = ["nice", "-n", str(niceness), sys.executable, "-c", script]
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=600, start_new_session=True, cwd=ROOT
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


@pytest.mark.parametrize("script", [CALL, CHILD, pytest.param(WORKER, marks=pytest.mark.slow)])
def test_a_nice_session_is_nice_as_a_whole(script: str) -> None:
    """Itself, another program's that it starts (MLflow's server), a worker's."""
    assert run_in_a_session(7, script) == add(7)
    assert run_in_a_session(0, script) == add(0)


def test_a_session_that_is_already_nicer_stays_so() -> None:
    script = f"open('/proc/self/autogroup', 'w').write('19'); {CALL}"
    assert run_in_a_session(7, script) == "19"


def test_a_session_in_which_only_one_command_is_nice_stays_as_it_is() -> None:
    """A terminal's other commands keep their share."""
    command = ["nice", "-n", "7", sys.executable, "-c", CALL]
    script = f"import subprocess; subprocess.run({command!r}, check=True)"
    assert run_in_a_session(0, script) == add(0)


def test_every_command_does_it_at_its_start(tmp_path: Path) -> None:
    command = ["nice", "-n", "7", sys.executable, "-m", "tune_cifar", "models", "s7"]
    nothing, environment = subprocess.DEVNULL, os.environ | {"PYTHONPATH": str(ROOT)}
    streams = {"stdout": nothing, "stderr": nothing}
    with subprocess.Popen(
        command, start_new_session=True, cwd=tmp_path, env=environment, **streams
    ) as process:
        group, found = Path(f"/proc/{process.pid}/autogroup"), ""
        while process.poll() is None and found != add(7):
            fields = group.read_text().split()
            found = fields[-1] if fields else found
            time.sleep(0.01)
        process.kill()
    assert found == add(7)
