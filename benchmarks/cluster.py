"""What a cluster costs: seconds per empty trial, the run store's actor, and its files.

    python benchmarks/cluster.py overhead --nodes 1 2 4 --trials 100 1000 --rounds 3
    python benchmarks/cluster.py files --megabytes 1 79 --rounds 3

All nodes are network namespaces of this machine (tests/faults/netcluster.py): root is needed, and
nothing else should run. A trial is almost empty, twelve small steps. `overhead` prints the seconds
for each trial in which a node with one core does not train: those of the driver, of Ray and of the
files. Beside the actor's way and the direct one it prints those of the same search without a
cluster, with as many trials at once (left out where there are fewer cores).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.faults.netcluster import ADDRESS, NetCluster, find_problem  # noqa: E402
from tune_cifar.record.journal import read_state  # noqa: E402
from tune_cifar.record.store import search_folder  # noqa: E402
from tune_cifar.search.run_store import RunStore  # noqa: E402

# Eleven steps or more: a searched warm-up may be a tenth of them and needs more than one.
TINY = ("train_size=96", "val_size=10", "batch_size=8", "epochs=1")


def run_search(folder: Path, num_trials: int, at_once: int, *more: str) -> float:
    """Run a search of almost empty trials; return the seconds a trial without training.

    The start is left out, up to the first trial's end.
    """
    words = [sys.executable, "-m", "tune_cifar", "search", "--space", "smoke", "--tier", "cpu"]
    words += ["--data", "shapes", "--name", "x", "--trials", str(num_trials)]
    words += [word for setting in TINY for word in ("--set", setting)]
    environment = os.environ | {"TUNE_CIFAR_RUNS": str(folder), "PYTHONPATH": str(ROOT)}
    subprocess.run([*words, *more], check=True, env=environment, stdout=subprocess.DEVNULL)
    state = read_state(search_folder(folder, "x"))
    assert state.finished is not None and len(state.trials) == num_trials
    later = sorted(state.trials.values(), key=lambda trial: trial.ended or "")
    seconds = _seconds_between(later[0].ended or "", later[-1].ended or "")
    trained = sum(epoch.epoch_seconds for trial in later[1:] for epoch in trial.epochs)
    return (at_once * seconds - trained) / (num_trials - 1)


def _seconds_between(first: str, last: str) -> float:
    from datetime import datetime

    return (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()


def run_way(way: str, num_nodes: int, num_trials: int) -> float:
    """Run a search, `no cluster` with as many trials at once; return what `run_search` does."""
    with tempfile.TemporaryDirectory(prefix="tc-bench-") as name:
        runs = Path(name, "runs")
        runs.mkdir()
        if way == "no cluster":
            return run_search(runs, num_trials, num_nodes, "--max-concurrent", str(num_nodes))
        with NetCluster(Path(name, "net"), [runs] if way == "actor" else []) as net:
            for _ in range(num_nodes):
                net.add()
            return run_search(runs, num_trials, num_nodes, "--address", ADDRESS)


def measure_overhead(nodes: list[int], trials: list[int], rounds: int) -> None:
    """Print the seconds of a trial without training, for each way."""
    for num_nodes, num_trials in itertools.product(nodes, trials):
        ways = ["actor", "direct"] + ["no cluster"] * (num_nodes <= (os.cpu_count() or 1))
        for way in ways:
            seconds = [run_way(way, num_nodes, num_trials) for _ in range(rounds)]
            spread = ", ".join(f"{value:.3f}" for value in seconds)
            median = statistics.median(seconds)
            print(f"{num_nodes} nodes, {num_trials} trials, {way}: {median:.3f} s ({spread})")


def measure_files(sizes: list[int], rounds: int) -> None:
    """Print the seconds of a file's way to the run store and back, through Ray."""
    import tune_cifar.search.worker  # noqa: F401  (a token of its own, not one in the home folder)

    # isort: split

    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="tc-bench-") as name:
        actor = ray.remote(RunStore).options(num_cpus=0).remote(name, None)
        for size in sizes:
            content, times = (
                os.urandom(size * 10**6),
                {"put": list[float](), "fetch": list[float]()},
            )
            for _ in range(rounds):
                begin = time.perf_counter()
                path = "checkpoints/checkpoint-0001.pt"
                assert ray.get(actor.put.remote(size, 1, path, content)) == ""
                middle = time.perf_counter()
                assert ray.get(actor.fetch.remote(size, 1))[path] == content
                times["put"].append(middle - begin)
                times["fetch"].append(time.perf_counter() - middle)
            for what, seconds in times.items():
                spread = ", ".join(f"{value:.3f}" for value in seconds)
                print(f"{what} {size} MB: {statistics.median(seconds):.3f} s ({spread})")
    ray.shutdown()


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("overhead", "files"))
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 79])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.what == "files":
        measure_files(given.megabytes, given.rounds)
        return
    if problem := find_problem():
        raise SystemExit(f"no network namespaces here: {problem}")
    measure_overhead(given.nodes, given.trials, given.rounds)


if __name__ == "__main__":
    main()
