"""The queue that fills README's table of systems: one training after another, stopped at any time, gone on with later.

    python benchmarks/rows.py run [--space s8] [--seeds 5] [--max-time 30m] [--data DIR]    # `make rows`; days
    python benchmarks/rows.py show [--write]                                                # the table; into README

For each space, in steps that only drive the public commands, so that each resumes as they do:

1. baseline: for every seed one `train` on all 50,000 images, then `reproduce --test` of it
2. search: `search --tier full`
3. confirm: `confirm` of its best 3 beside the baseline, under every seed
4. best: the best confirmed recipe, trained and tested as the baseline was: what `confirm --final` trains, less the
   baseline's trainings, which are there from step 1; and each stands in the table as soon as it is tested

What the ledger of test openings has, by fingerprint, is not trained again, whichever command trained it. Every opening
becomes a line of analysis/ROWS.csv, all of it from records and the ledger. A training of steps 1 and 4 takes all cores
where there is no GPU.

`--data shapes` tries the queue on the stand-in, with names, a ledger and a table of its own; README stays as it is.
`--tier`, `--set` and other spaces (smoke) are for that alone. All paths are seen from the repository.
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
from rows_table import SYSTEMS, load_table, make_row, render_table, write_readme, write_table

from tune_cifar.errors import ConfigError, RecordError, TuneCifarError
from tune_cifar.record.store import find_storage
from tune_cifar.space.rules import parse_duration
from tune_cifar.space.select import parse_setting

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SPACES = ("s8", "s7", "s6", "s10", "s10_postact")  # in this order
say = partial(print, flush=True)


def collect_rows(queue: Queue, steps: Iterable[Step]) -> None:
    """Append what the ledger has of these steps and the table has not; README follows."""
    rows = load_table(queue.table)
    known = {(row["space"], row["part"], row["fingerprint"]) for row in rows}
    num_known = len(rows)
    for step in steps:
        config = None if step.seed is None else find_config(queue, step)
        if config is not None and (step.space, step.part, config.fingerprint) not in known:
            opening = queue.find_opening(config)
            rows += (
                [] if opening is None else [make_row(step.space, step.part, opening, queue.storage)]
            )
    if len(rows) > num_known:
        write_table(queue.table, rows)
        if not queue.is_synthetic:
            write_readme(README, rows)


class Runner:
    """Runs one command at a time and hands it every signal that the queue gets, once: it has a session of its own, so a
    terminal's Ctrl-C does not reach it.

    Attributes:
        stopped: why nothing more is to be run, `interrupted` or `time is up`; empty while there is no reason.
    """

    def __init__(self, max_seconds: float) -> None:
        self.stopped = ""
        self._num_stops = 0
        self._deadline = time.monotonic() + max_seconds
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup, and a shell's &, leave it
                signal.signal(number, lambda *_: self._stop("interrupted"))

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        self._num_stops += 1

    def _watch_time(self) -> None:
        if not self.stopped and time.monotonic() >= self._deadline:
            self._stop("time is up")

    def run(self, words: list[str]) -> int:
        """Run a command of tune_cifar; its exit status, 130 where it is not even begun."""
        self._watch_time()
        if self.stopped:
            return 130
        say(f"$ python -m tune_cifar {shlex.join(words)}")
        process = subprocess.Popen(
            [sys.executable, "-m", "tune_cifar", *words], start_new_session=True
        )
        num_told = 0
        while process.poll() is None:
            self._watch_time()
            if num_told < self._num_stops:
                process.terminate()  # as Ctrl-C to every command; SIGINT may be ignored, which is inherited
                num_told += 1
            time.sleep(0.2)
        return process.returncode


def say_plan(queue: Queue, steps: Iterable[Step]) -> None:
    """A line per space: how many of its steps are where."""
    say("the plan:")
    for space, of_space in itertools.groupby(steps, lambda step: step.space):
        parts = []
        for part, of_part in itertools.groupby(of_space, lambda step: step.part):
            stages = Counter(find_stage(queue, step) for step in of_part)
            counts = [
                f"{count} {stage}" if part in ("baseline", "best") else stage
                for stage, count in stages.items()
            ]
            parts.append(f"{part} {', '.join(counts)}")
        say(f"  {space}: {'; '.join(parts)}")


def run(queue: Queue, steps: Sequence[Step], max_seconds: float) -> int:
    """Take the steps that are left, one after another; returns the exit status."""
    runner = Runner(max_seconds)
    collect_rows(queue, steps)
    say_plan(queue, steps)
    for number, step in enumerate(steps, 1):
        stage, name = find_stage(queue, step), queue.name(step)
        if stage in OVER:
            continue
        if stage == "failed":
            way_out = f"See `failures --search {name}`, then `searches delete {name}`."
            raise RecordError(
                f"{name}: a training must go on or have ended well, got a failed one. {way_out}"
            )
        hours = estimate_hours(queue, [other for other in steps if other.space == step.space])
        left = "" if hours is None else f"; the row of {step.space} takes about {hours:.1f} h more"
        say(f"\nstep {number} of {len(steps)}: {name}{left}")
        for words in find_commands(queue, step):
            status = runner.run(words)
            collect_rows(queue, steps)
            if runner.stopped or status != 0:
                why = runner.stopped or (
                    "interrupted" if status == 130 else f"{name} failed, for what is said above"
                )
                given = shlex.join(word for word in sys.argv[1:] if word != "run")
                say(
                    f"\n{why}; go on with:\n  make rows"
                    + (f" ARGS={shlex.quote(given)}" if given else "")
                )
                return {"time is up": 0, "interrupted": 130}.get(why, 1)
    say(f"\nnothing is left to do; every tested training stands in {queue.table}")
    return 0


def make_queue(arguments: argparse.Namespace) -> Queue:
    """The options, checked.

    Raises:
        ConfigError: without a seed, and for what is for the stand-in alone.
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
        raise ConfigError(f"--seeds: a number >= 1 must be given, got {queue.seeds}.")
    if not queue.is_synthetic and (
        not {*arguments.space} <= SYSTEMS.keys() or pins or queue.tier != "full"
    ):
        got = f"--space {' '.join(arguments.space) or 'all'}, --tier {queue.tier} and {len(pins)} --set"
        raise ConfigError(
            f"rows: {', '.join(SYSTEMS)} in tier full must be trained as they are, got {got}."
        )
    return queue


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "show"])
    parser.add_argument(
        "--space", action="append", default=[], help="only this one; may be given again"
    )
    parser.add_argument("--seeds", type=int, default=5, help="from 1")
    parser.add_argument(
        "--max-time", metavar="30m", help="of this launch; what runs is ended in order then"
    )
    parser.add_argument("--data", help="CIFAR-10's folder, or shapes")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on with a search although code has changed",
    )
    parser.add_argument("--tier", default="full", help="on the stand-in")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KNOB=VALUE", help="on the stand-in"
    )
    parser.add_argument("--write", action="store_true", help="show: put the table into README")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    os.chdir(ROOT)  # the ledger of CIFAR-10 is found from here
    try:
        queue = make_queue(arguments)
        max_seconds = parse_duration(arguments.max_time) if arguments.max_time else math.inf
        if queue.is_synthetic:
            say("STAND-IN DATA, NOT CIFAR-10")
        if arguments.action == "run":
            sys.exit(run(queue, queue.list_steps(arguments.space or SPACES), max_seconds))
        rows = load_table(queue.table)
        if arguments.write and not queue.is_synthetic:
            write_readme(README, rows)
        say(render_table(rows, arguments.space or SYSTEMS))
    except TuneCifarError as exc:
        sys.exit(f"error {exc}")


if __name__ == "__main__":
    main()
