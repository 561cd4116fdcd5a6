"""A process that runs one command after another, so that they share imports and a Ray cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.builders import ROOT, invoke

# How the variables begin that tests change: where run stores and data lie.
OURS = ("TUNE_CIFAR_", "XDG_")


class Answer(NamedTuple):
    """What a command left."""

    status: int
    stdout: str
    stderr: str
    error: str
    """The exception that ended it, or None, as text."""


class Shell:
    """Commands for a process; each runs in our working folder, with our values of OURS."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, *words: str) -> Answer:
        """Run a command to its end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        variables = {name: os.environ[name] for name in os.environ if name.startswith(OURS)}
        request = [str(Path.cwd()), variables, words]
        self._process.stdin.write(f"{json.dumps(request)}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process ended while it ran {words}"
        return Answer(*json.loads(line))


@contextmanager
def open_shell() -> Iterator[Shell]:
    """Start the process; its end is waited for."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.shell"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield Shell(process)


def main() -> None:
    """Answer each line with a line; what else is printed to stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        folder, variables, words = json.loads(line)
        os.chdir(folder)
        os.environ.update(variables)
        result = invoke(*words)
        found = (result.exit_code, result.stdout, result.stderr, repr(result.exception))
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
