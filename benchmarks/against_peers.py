"""Our search against its peers on LCBench: regret at equal epochs, in a simulated clock.

python benchmarks/against_peers.py run --lcbench DIR --out FILE [--methods ours,...] [--seeds 10]
python benchmarks/against_peers.py show FILE [--against ours] [--figure FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from lcbench import NUM_EPOCHS, Lcbench, Noise, Search, Trial, find_chosen, simulate

from tune_cifar.record.journal import Record
from tune_cifar.schema import DataInfo, EpochResult, Numerics, TrainConfig
from tune_cifar.search.driver import SearchDriver
from tune_cifar.space.layout import Budget, SamplerBudget
from tune_cifar.space.select import SearchSpace, load_space
from tune_cifar.train.recorded import make_header

BUDGETS = range(1, 51)
# A proposal is seeded with seed + number: seeds of searches must differ by more than their trials.
SEED_STEP = 10_000
NUMERICS = Numerics(
    device="cpu",
    device_name="simulated",
    capability="none",
    precision="fp32",
    memory_format="contiguous",
    threads=1,
    deterministic=False,
    execution="eager",
    versions={},
)
DATA = DataInfo(name="shapes", digest="none", split_hash="none")


@dataclass(frozen=True)
class LcbenchSpace(SearchSpace):
    """The hyperparameters of LCBench in place of ours; a training's recipe stays the baseline."""

    first: dict[str, Any]
    """Trial 0."""

    @property
    def baseline_params(self) -> dict[str, Any]:
        return self.first

    def config(self, params: dict[str, Any]) -> TrainConfig:
        return self.baseline

    def select_active(self, params: dict[str, Any]) -> dict[str, Any]:
        return params


class Ours:
    """Our driver, with its record in a folder in memory.

    Trial 0, which is never stopped, is a random configuration: a baseline that knows nothing.
    """

    def __init__(self, lcbench: Lcbench, seed: int, folder: Path, **budget: Any) -> None:
        smoke = load_space("smoke", "cpu")
        baseline = smoke.baseline.model_copy(update={"epochs": NUM_EPOCHS})
        values = {"trials": 5000, "reduction_factor": 3, "seed": 0, "fidelity": "epochs", **budget}
        (first,) = lcbench.draw(1, seed + 7)
        fields = {name: getattr(smoke, name) for name in SearchSpace.__dataclass_fields__}
        fields |= {
            "baseline": baseline,
            "distributions": lcbench.distributions,
            "points": (),
            "budget": Budget.model_validate(values),
        }
        space = LcbenchSpace(**fields, first=first)
        header = make_header("search", "x", space, seed, DATA, NUMERICS, "simulated")
        record = Record.create(folder / "x", header)
        self._driver = SearchDriver(record, space, lambda state, event: None)

    def ask(self) -> Trial | None:
        trial = self._driver.ask()
        if trial is None:
            return None
        return Trial(trial.number, trial.params, self._driver.list_remaining_stages(trial))

    def report(self, number: int, stage: int, epoch: int, score: float) -> bool:
        result = EpochResult(
            epoch=epoch,
            step=epoch,
            train_loss=0.0,
            train_acc=0.0,
            val_loss=0.0,
            val_acc=score,
            lr=0.1,
            epoch_seconds=1.0,
            images_per_second=1.0,
            peak_memory_mb=0.0,
        )
        return self._driver.report(number, stage, result)


def ours(kind: str, *rungs: int, startup: int = 20, **more: Any) -> Callable[..., Search]:
    """Return a maker of our search with this sampler and rungs."""
    sampler = SamplerBudget.model_validate(
        {"kind": kind, "startup": startup} if kind in ("tpe", "gp") else {"kind": kind}
    )
    return lambda lcbench, seed, folder: Ours(
        lcbench, seed, folder, rungs=rungs, sampler=sampler, **more
    )


METHODS: dict[str, Callable[..., Search]] = {
    "tpe 6,17,50": ours("tpe", 6, 17, 50),
    "tpe 3,9,27,50": ours("tpe", 3, 9, 27, 50),
    "random 6,17,50": ours("random", 6, 17, 50),
    "random 1,3,9,27,50": ours("random", 1, 3, 9, 27, 50),
    "gp 6,17,50": ours("gp", 6, 17, 50),
    "tpe 50": ours("tpe", 50),
    "tpe 6,17,50 w9": ours("tpe", 6, 17, 50, window=9),
    "gp 6,17,50 w9": ours("gp", 6, 17, 50, window=9),
    "tpe 3,9,27,50 w9": ours("tpe", 3, 9, 27, 50, window=9),
    "gp 3,9,27,50 w9": ours("gp", 3, 9, 27, 50, window=9),
    "gp 3,9,27,50": ours("gp", 3, 9, 27, 50),
    "gp 6,17,50 w9 s10": ours("gp", 6, 17, 50, window=9, startup=10),
    "gp 6,17,50 w9 s5": ours("gp", 6, 17, 50, window=9, startup=5),
    "gp 3,9,27,50 w9 s10": ours("gp", 3, 9, 27, 50, window=9, startup=10),
    "cycles gp 6,17,50 w9 s10": ours("gp", 6, 17, 50, fidelity="cycles", window=9, startup=10),
    "27 old": ours("tpe", 6, 17, 50, startup=9, trials=27),
    "27 random": ours("random", 6, 17, 50, window=9, trials=27),
    "27 tpe": ours("tpe", 6, 17, 50, window=9, startup=9, trials=27),
    "27 gp": ours("gp", 6, 17, 50, window=9, startup=9, trials=27),
    "27 gp s5": ours("gp", 6, 17, 50, window=9, startup=5, trials=27),
    "27 cycles random": ours("random", 6, 17, 50, window=9, trials=27, fidelity="cycles"),
    "27 cycles tpe": ours("tpe", 6, 17, 50, window=9, startup=9, trials=27, fidelity="cycles"),
    "27 cycles gp": ours("gp", 6, 17, 50, window=9, startup=9, trials=27, fidelity="cycles"),
    "27 cycles gp s5": ours("gp", 6, 17, 50, window=9, startup=5, trials=27, fidelity="cycles"),
    "random 6,17,50 w9": ours("random", 6, 17, 50, window=9),
    "random 1,3,9,27,50 w9": ours("random", 1, 3, 9, 27, 50, window=9),
    "cycles tpe 6,17,50": ours("tpe", 6, 17, 50, fidelity="cycles"),
    "cycles tpe 6,17,50 w9": ours("tpe", 6, 17, 50, fidelity="cycles", window=9),
    "cycles gp 6,17,50 w9": ours("gp", 6, 17, 50, fidelity="cycles", window=9),
    "cycles gp 6,17,50": ours("gp", 6, 17, 50, fidelity="cycles"),
    "cycles random 6,17,50 w9": ours("random", 6, 17, 50, fidelity="cycles", window=9),
}


def run_task(task: tuple[str, str, int, Path, float, int]) -> dict[str, Any]:
    method, data_set, seed, folder, noise, budget = task
    started = time.perf_counter()
    lcbench = Lcbench(folder)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        search = METHODS[method](lcbench, SEED_STEP * seed, Path(name))
        median, best = REFERENCE[data_set]
        found = simulate(
            search, lcbench, data_set, budget * NUM_EPOCHS, Noise(noise * (best - median), seed)
        )
        regrets = []
        for num in range(1, budget + 1):
            chosen = find_chosen(found, num * NUM_EPOCHS)
            regrets.append(
                100.0 if chosen is None else round(100 * (best - chosen) / (best - median), 3)
            )
    return {
        "method": method,
        "data_set": data_set,
        "seed": seed,
        "regrets": regrets,
        "complete": len(found),
        "seconds": round(time.perf_counter() - started, 2),
    }


REFERENCE: dict[str, tuple[float, float]] = {}


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser()
    parser.add_argument("--lcbench", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=";".join(METHODS))
    parser.add_argument("--seeds", default="0:3")
    parser.add_argument("--sets", type=int, default=34)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--tag", default="")
    a = parser.parse_args()
    lcbench = Lcbench(a.lcbench)
    cache = Path("/tmp/reference.json")
    if not cache.exists():
        cache.write_text(json.dumps({d: lcbench.measure_reference(d) for d in lcbench.data_sets}))
    REFERENCE.update(json.loads(cache.read_text()))
    low, high = map(int, a.seeds.split(":"))
    tasks = [
        (m, d, s, a.lcbench, a.noise, a.budget)
        for s in range(low, high)
        for d in lcbench.data_sets[:: 34 // a.sets]
        for m in a.methods.split(";")
    ]
    with multiprocessing.get_context("fork").Pool(2) as pool, a.out.open("a") as out:
        for row in pool.imap_unordered(run_task, tasks):
            row["method"] += a.tag
            out.write(json.dumps(row) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
