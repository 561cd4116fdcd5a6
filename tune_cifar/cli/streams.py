"""stdin, stdout and stderr made safe: none of them can end or spoil a command.

What a command prints either shows what it does or is what it was asked for:

- The commands of SHOWING leave something behind: a record, files, runs in MLflow. What they print
  only shows it. When stdout cannot be written (its reader has gone, the disk is full, it was
  closed, the terminal has gone), one sentence on stderr says so, and the command goes on to its
  end, without output and with the exit status that it would have had.
- What any other command prints is its result, and so is what `--json`, `--csv` and `--help` print.
  A result that could not be written makes an exit status of 0 a 1, with an error on stderr. But a
  reader that has gone, as in `leaderboard | head -3`, has what it wanted: then all is quiet.
- stderr only ever shows: when it cannot be written, it is silent.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDIN, STDOUT, STDERR = 0, 1, 2
# Commands whose output only shows what they do; tests/cli/test_streams.py lists the others.
SHOWING = frozenset(
    (
        *("search", "train", "lr-range", "confirm", "reproduce", "evaluate", "judge", "export"),
        *("report", "preview", "ui", "sync"),
        *("data fetch", "data import", "searches mirror", "searches restore", "searches delete"),
    )
)
# Options that make the output of any command its result.
RESULTS = frozenset(("--json", "--csv", "--help"))


def is_result(words: list[str]) -> bool:
    """Return whether what this command prints on stdout is its result (see above)."""
    shows = words[:1] and (words[0] in SHOWING or " ".join(words[:2]) in SHOWING)
    return not shows or not RESULTS.isdisjoint(words)


class _Output(io.FileIO):
    """An open file that takes everything: after its first fault, what is written is dropped.

    Attributes:
        fault: the first fault, or None.
    """

    def __init__(self, number: int, on_fault: Callable[[OSError], None]) -> None:
        super().__init__(number, "w", closefd=False)
        self.fault: OSError | None = None
        self._on_fault = on_fault

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of it, however long the reader takes; return its number of bytes."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self.fault is None:
                written = super().write(rest)
                if written is None:  # the other end has made a full pipe non-blocking
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
        except OSError as exc:
            self._give_up(exc)
        return size

    def _give_up(self, fault: OSError) -> None:
        """Keep the fault, and lead the descriptor nowhere, for libraries and child processes."""
        self.fault = fault
        _open_nothing(self.fileno(), os.O_WRONLY)
        self._on_fault(fault)


class Streams:
    """The standard streams of this process, in the places of Python's own.

    Args:
        words: the command and its options, as typed.
    """

    def __init__(self, words: Collection[str]) -> None:
        self._is_result = is_result(list(words))
        # One closed at the start would be the next file that is opened, such as a record. A closed
        # output is opened for reading: the first write fails, as into any other broken stream.
        for number in (STDIN, STDOUT, STDERR):
            try:
                os.fstat(number)
            except OSError:
                _open_nothing(number, os.O_RDONLY)
        if sys.stdin is None:
            sys.stdin = os.fdopen(STDIN, encoding="utf-8", closefd=False)
        self._stdout = _Output(STDOUT, self._on_stdout_fault)
        self._stderr = _Output(STDERR, lambda fault: None)
        sys.stdout = _make_text(self._stdout, sys.stdout)
        sys.stderr = self._notes = _make_text(self._stderr, sys.stderr)

    def _on_stdout_fault(self, fault: OSError) -> None:
        if not self._is_result:
            problem = f"stdout cannot be written ({fault.strerror})"
            self._notes.write(f"{problem}: the command goes on to its end without it.\n")

    def settle_status(self, status: int) -> int:
        """Return the exit status of a command that would end with this one."""
        fault = self._stdout.fault
        if status or not self._is_result or fault is None or fault.errno == errno.EPIPE:
            return status
        problem = f"stdout: the output could not be written: {fault.strerror}"
        self._notes.write(f"error {problem}. Make room, or write it elsewhere.\n")
        return 1


def _open_nothing(number: int, flags: int) -> None:
    """Make a descriptor lead to /dev/null."""
    try:
        nothing = os.open(os.devnull, flags)
        if nothing == number:
            os.set_inheritable(number, True)
        else:
            os.dup2(nothing, number)
            os.close(nothing)
    except OSError:  # no /dev/null, or no descriptor left: what is written is dropped all the same
        return


def _make_text(output: _Output, before: TextIO | None) -> io.TextIOWrapper:
    """Make a text stream without a buffer: a signal's handler may print while the command does.

    It can write every text: what the encoding lacks is escaped.
    """
    encoding = before.encoding if before is not None else "utf-8"
    return io.TextIOWrapper(output, encoding, errors="backslashreplace", write_through=True)
