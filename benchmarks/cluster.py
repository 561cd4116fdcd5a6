"""What a cluster costs: seconds per empty trial, the run store's actor, and its files.

    python benchmarks/cluster.py overhead --out FILE [--nodes 1 2 4] [--trials 100 1000]
                                          [--rounds 3] [--sampler random]
    python benchmarks/cluster.py show --out FILE
    python benchmarks/cluster.py files [--megabytes 1 79] [--rounds 3]

All nodes are network namespaces of this machine (tests/faults/netcluster.py): root is needed, and
nothing else should run. A trial is almost empty, twelve small steps. `overhead` goes on where it
was stopped and writes, for each search, the seconds from its first trial's end to its last's and
those in which a trial trained.

`show` prints the seconds between two trials' ends, and those for each trial in which a node with
one core does not train: of the driver, of Ray and of the files. Beside the actor's way and the
direct one it has the same search without a cluster, with as many trials at once (left out where
there are fewer cores).
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
from collections import defaultdict
from datetime import datetime
from pathlib import Path

from pairs import describe_machine
from ruamel.yaml import YAML
from trainings import Row, append_row, read_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.faults.netcluster import ADDRESS, NetCluster, find_problem  # noqa: E402
from tune_cifar.record.journal import read_state  # noqa: E402
from tune_cifar.record.store import search_folder  # noqa: E402
from tune_cifar.search.trial_files import FileServer  # noqa: E402

# Eleven steps or more: a searched warm-up may be a tenth of them and needs more than one.
TINY = ("train_size=24", "val_size=10", "batch_size=2", "epochs=1")


def write_space(folder: Path, sampler: str) -> Path:
    """Write space smoke with a sampler of this kind; return the file."""
    yaml = YAML(typ="safe")
    space = yaml.load(ROOT / "search_spaces" / "smoke.yaml")
    for tier in space["budget"].values():
        startup = {} if sampler == "random" else {"startup": tier["sampler"]["startup"]}
        tier["sampler"] = {"kind": sampler, **startup}
    path = folder / "smoke.yaml"
    yaml.dump(space, path)
    return path


def run_search(folder: Path, space: Path, num_trials: int, *more: str) -> Row:
    """Run a search of almost empty trials; return its seconds and those of training.

    The start is left out, up to the first trial's end.
    """
    words = [sys.executable, "-m", "tune_cifar", "search", "--space", str(space), "--tier", "cpu"]
    words += ["--data", "shapes", "--name", "x", "--trials", str(num_trials)]
    words += [word for setting in TINY for word in ("--set", setting)]
    environment = os.environ | {"TUNE_CIFAR_RUNS": str(folder), "PYTHONPATH": str(ROOT)}
    subprocess.run([*words, *more], check=True, env=environment, stdout=subprocess.DEVNULL)
    state = read_state(search_folder(folder, "x"))
    assert state.finished is not None and len(state.trials) == num_trials
    later = sorted(state.trials.values(), key=lambda trial: trial.ended or "")
    ends = [datetime.fromisoformat(trial.ended or "") for trial in (later[0], later[-1])]
    trained = sum(epoch.epoch_seconds for trial in later[1:] for epoch in trial.epochs)
    return {"seconds": (ends[1] - ends[0]).total_seconds(), "trained": trained}


def run_way(way: str, num_nodes: int, num_trials: int, sampler: str) -> Row:
    """Run a search, `no cluster` with as many trials at once; return what `run_search` does."""
    with tempfile.TemporaryDirectory(prefix="tc-bench-") as name:
        runs, space = Path(name, "runs"), write_space(Path(name), sampler)
        runs.mkdir()
        if way == "no cluster":
            return run_search(runs, space, num_trials, "--max-concurrent", str(num_nodes))
        with NetCluster(Path(name, "net"), [runs] if way == "actor" else []) as net:
            for _ in range(num_nodes):
                net.add()
            return run_search(runs, space, num_trials, "--address", ADDRESS)


def measure_overhead(given: argparse.Namespace) -> None:
    """Run the searches that the file lacks, round after round."""
    rounds = range(given.rounds)
    for i, nodes, trials in itertools.product(rounds, given.nodes, given.trials):
        for way in ["actor", "direct"] + ["no cluster"] * (nodes <= (os.cpu_count() or 1)):
            key = {"way": way, "nodes": nodes, "trials": trials, "sampler": given.sampler}
            if not any({**key, "round": i}.items() <= row.items() for row in read_rows(given.out)):
                row = {**key, "round": i, **run_way(way, nodes, trials, given.sampler)}
                append_row(given.out, row | describe_machine())
                print(row, flush=True)


def show(given: argparse.Namespace) -> None:
    """Print the table, medians and ranges over the rounds."""
    found = defaultdict[tuple[str, int, int, str], list[tuple[float, float]]](list)
    for row in read_rows(given.out):
        key = row["sampler"], row["trials"], row["nodes"], row["way"]
        apart = row["seconds"] / (row["trials"] - 1)
        idle = (row["nodes"] * row["seconds"] - row["trained"]) / (row["trials"] - 1)
        found[key].append((apart, idle))
    print("| sampler | trials | nodes | way | s between two ends | s without training | n |")
    print("|---|---|---|---|---|---|---|")
    for key, pairs in sorted(found.items()):
        cells = [
            f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
            for values in zip(*pairs, strict=True)
        ]
        print(f"| {' | '.join(map(str, (*key, *cells, len(pairs))))} |")


def measure_files(sizes: list[int], rounds: int) -> None:
    """Print the seconds of a file's way to the run store and back, through Ray."""
    import tune_cifar.search.worker  # noqa: F401  (a token of its own, not one in the home folder)

    # isort: split

    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="tc-bench-") as name:
        actor = ray.remote(FileServer).options(num_cpus=0).remote(name, None)
        for size in sizes:
            content = os.urandom(size * 10**6)
            times = {"put": list[float](), "fetch": list[float]()}
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
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=("overhead", "show", "files"))
    parser.add_argument("--out", type=Path, default=Path("cluster.jsonl"))
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 79])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.what == "files":
        measure_files(given.megabytes, given.rounds)
    elif given.what == "show":
        show(given)
    elif problem := find_problem():
        raise SystemExit(f"no network namespaces here: {problem}")
    else:
        measure_overhead(given)


if __name__ == "__main__":
    main()
