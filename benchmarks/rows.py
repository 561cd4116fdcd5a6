"""A queue of trainings for the table of systems in docs/method.md; it can be stopped and resumed.

    python benchmarks/rows.py run [--space s8] [--seeds 5] [--max-time 30m] [--data DIR]
    python benchmarks/rows.py show [--write]

`run` (`make rows`) takes days. `show` prints the table; `--write` puts it into the page.

For each space, in steps that call the public commands only and resume as these do:

1. baseline: for every seed `train` on all 50,000 images, then `reproduce --test` of it
2. search: `search --tier full`; without a GPU `--tier night`, a third of the epochs
3. confirm: `confirm` of its best 3 beside the baseline, under every seed; without a GPU with a
   quarter of the epochs
4. best: the best confirmed recipe, trained and tested as the baseline was. `confirm --final` trains
   the same; here each training appears in the table as soon as it is tested.

A training whose fingerprint is in the log of test evaluations (the run store's, or its committed
copy in analysis/, which `run` keeps) is not repeated, whichever command trained it. Every test
evaluation becomes a line of analysis/ROWS.csv, made from the records and the log alone. Ended
searches and confirmations are copied to analysis/rows/, without weights, and taken from there where
the run store lacks them: a row goes on in a fresh clone. Without a GPU a training of steps 1 and 4
uses all cores.

`--data shapes` tries the queue on synthetic data, with its own names, log and table; the page
stays as it is. `--tier`, `--set` and other spaces (smoke) are for that alone. Paths are relative
to the repository.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from rows_steps import OVER, Queue, Step, estimate_hours, find_commands, find_config, find_stage
from rows_table import SYSTEMS, load_table, make_row, render_table, write_page, write_table

from tune_cifar.errors import ConfigError, RecordError, TuneCifarError
from tune_cifar.record.store import find_storage
from tune_cifar.space.rules import parse_duration
from tune_cifar.space.select import parse_setting
from tune_cifar.train.numerics import count_gpus

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "method.md"
SPACES = ("s8", "s7", "s6", "s10", "s10_postact")  # in this order
say = partial(print, flush=True)


def collect_rows(queue: Queue, steps: Iterable[Step]) -> None:
    """Append the test evaluations of these steps that the table lacks; then update the page.

    The committed records are brought up to date as well, on CIFAR-10 the committed test log too.
    """
    steps = list(steps)
    queue.exchange_records(steps)
    if not queue.is_synthetic:
        queue.copy_test_log()
    rows = load_table(queue.table)
    known = {(row["space"], row["part"], row["fingerprint"]) for row in rows}
    num_known = len(rows)
    for step in steps:
        config = None if step.seed is None else find_config(queue, step)
        if config is None or (step.space, step.part, config.fingerprint) in known:
            continue
        evaluation = queue.find_test_evaluation(config)
        if evaluation is not None:
            rows.append(make_row(step.space, step.part, evaluation, queue.storage))
    if len(rows) > num_known:
        write_table(queue.table, rows)
        if not queue.is_synthetic:
            write_page(PAGE, rows)


class Runner:
    """Runs one command at a time and passes every signal of the queue on to it, once.

    The command has its own session, so that a terminal's Ctrl-C reaches the queue alone.

    Attributes:
        stopped: why no more commands may run, `interrupted` or `time is up`; else empty.
    """

    def __init__(self, max_seconds: float) -> None:
        self.stopped = ""
        self._num_stops = 0
        self._deadline = time.monotonic() + max_seconds
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup and a shell's & ignore some
                signal.signal(number, lambda *_: self._stop("interrupted"))

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        self._num_stops += 1

    def _watch_time(self) -> None:
        if not self.stopped and time.monotonic() >= self._deadline:
            self._stop("time is up")

    def run(self, words: list[str]) -> int:
        """Run a command of tune_cifar; returns its exit status, 130 if it was not started."""
        self._watch_time()
        if self.stopped:
            return 130
        say(f"$ python -m tune_cifar {shlex.join(words)}")
        command = [sys.executable, "-m", "tune_cifar", *words]
        process = subprocess.Popen(command, start_new_session=True)
        num_sent = 0
        while process.poll() is None:
            self._watch_time()
            if num_sent < self._num_stops:
                # Every command ends as with Ctrl-C. SIGINT may be ignored, which is inherited.
                process.terminate()
                num_sent += 1
            time.sleep(0.2)
        return process.returncode


def say_plan(queue: Queue, steps: Iterable[Step]) -> None:
    """Print a line per space: how many of its steps are at which stage."""
    say("the plan:")
    for space, of_space in itertools.groupby(steps, lambda step: step.space):
        parts = []
        for part, of_part in itertools.groupby(of_space, lambda step: step.part):
            counts = Counter(find_stage(queue, step) for step in of_part)
            if part in ("baseline", "best"):
                stages = [f"{count} {stage}" for stage, count in counts.items()]
            else:
                stages = list(counts)
            parts.append(f"{part} {', '.join(stages)}")
        say(f"  {space}: {'; '.join(parts)}")


def run(queue: Queue, steps: Sequence[Step], max_seconds: float) -> int:
    """Run the remaining steps one after another; returns the exit status."""
    runner = Runner(max_seconds)
    collect_rows(queue, steps)
    say_plan(queue, steps)
    for number, step in enumerate(steps, 1):
        stage, name = find_stage(queue, step), queue.name(step)
        if stage in OVER:
            continue
        if stage == "failed":
            way_out = f"See `failures --search {name}`, then `searches delete {name}`."
            raise RecordError(f"{name}: the training has failed. {way_out}")
        hours = estimate_hours(queue, [other for other in steps if other.space == step.space])
        left = "" if hours is None else f"; the row of {step.space} takes about {hours:.1f} h more"
        say(f"\nstep {number} of {len(steps)}: {name}{left}")
        for words in find_commands(queue, step):
            status = runner.run(words)
            collect_rows(queue, steps)
            if runner.stopped or status != 0:
                failed = f"{name} failed, see above"
                why = runner.stopped or ("interrupted" if status == 130 else failed)
                given = shlex.join(word for word in sys.argv[1:] if word != "run")
                arguments = f" ARGS={shlex.quote(given)}" if given else ""
                say(f"\n{why}; resume with:\n  make rows{arguments}")
                return {"time is up": 0, "interrupted": 130}.get(why, 1)
    say(f"\nnothing is left to do; every tested training is in {queue.table}")
    return 0


def make_queue(arguments: argparse.Namespace) -> Queue:
    """Check the options and make the queue.

    Raises:
        ConfigError: without a seed, or for options that are for synthetic data alone.
    """
    pins = dict(parse_setting(setting) for setting in arguments.set)
    queue = Queue(
        find_storage(None),
        arguments.seeds,
        arguments.data,
        arguments.tier,
        pins,
        arguments.accept_changes,
    )
    if queue.seeds < 1:
        raise ConfigError(f"--seeds >= 1 must hold, got {queue.seeds}.")
    is_as_published = {*arguments.space} <= SYSTEMS.keys() and not pins and queue.tier == "full"
    if not queue.is_synthetic and not is_as_published:
        spaces = " ".join(arguments.space) or "all"
        got = f"--space {spaces}, --tier {queue.tier} and {len(pins)} --set"
        rule = f"spaces must be {', '.join(SYSTEMS)}, in tier full and without --set"
        raise ConfigError(f"on CIFAR-10 {rule}, got {got}.")
    return queue


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "show"])
    parser.add_argument(
        "--space", action="append", default=[], help="only this one; may be given again"
    )
    seeds = 5 if count_gpus("auto") else 3
    parser.add_argument("--seeds", type=int, default=seeds, help="from 1; 5 with a GPU, else 3")
    parser.add_argument(
        "--max-time", metavar="30m", help="time limit; the running command is then interrupted"
    )
    parser.add_argument("--data", help="CIFAR-10's folder, or shapes")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume a search although code has changed",
    )
    parser.add_argument("--tier", default="full", help="on synthetic data")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KNOB=VALUE", help="on synthetic data"
    )
    parser.add_argument("--write", action="store_true", help="show: put the table into the page")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    os.chdir(ROOT)  # analysis/ is found from here
    try:
        queue = make_queue(arguments)
        max_seconds = parse_duration(arguments.max_time) if arguments.max_time else math.inf
        if queue.is_synthetic:
            say("SYNTHETIC DATA, NOT CIFAR-10")
        if arguments.action == "run":
            sys.exit(run(queue, queue.list_steps(arguments.space or SPACES), max_seconds))
        rows = load_table(queue.table)
        if arguments.write and not queue.is_synthetic:
            write_page(PAGE, rows)
        say(render_table(rows, arguments.space or SYSTEMS))
    except TuneCifarError as exc:
        sys.exit(f"error {exc}")


if __name__ == "__main__":
    main()
