"""Fifteen minutes on a GPU in three parts: every check that waits for one.

    python benchmarks/session.py PART [--seconds S] [--skip STEP ...] [--dry]

Each step is a process of its own under the smaller of its limit and what is left of S; the chosen
search takes what is left. A step's result is a line of $OUT/steps.jsonl as soon as it comes, and
the table is printed last. A step that fails is recorded with its last lines, and the next one
begins. The execution that later parts take lies in CHOICE. Images are the real ones where all five
files are in TUNE_CIFAR_DATA, else `shapes` of the same sizes; every result says which. `--dry` runs
every step at a tiny size on a CPU, keeps its choices under $OUT, and exits 1 if a step failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

Facts = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
CHOICE = Path("/tmp/kit/choice.json")
DEFAULT_CHOICE: Facts = {"execution": "captured"}
# GPU tests that need neither Ray nor MLflow nor albumentations, and those that do.
TEST_FILES = ("train/test_step", "train/test_trainer", "train/test_numerics", "models/test_dropout")
SEARCH_TEST_FILES = ("search/test_plan", "search/test_run", "augment/test_parity")
TEST_OPTIONS = "-q -m gpu -o filterwarnings= -p no:benchmark -p no:xdist -p no:cacheprovider"
LIMIT_EXIT, DRY_LIMIT = 124, 600
# Seconds that a search takes beside its --max-time: it starts, ends its trials and reports.
SEARCH_MARGIN = 30
# Enough for what measures steps.
FEW: dict[str, Any] = {"train_size": 10_240, "val_size": 1000}


class Session(NamedTuple):
    """What all steps know."""

    out: Path
    is_dry: bool
    choice: Facts
    seconds: float
    """That this step may take."""

    @property
    def device(self) -> str:
        """Where the steps train."""
        return "cpu" if self.is_dry else "cuda"


def find_source() -> Any:
    """Return the real images where all their files are, else `shapes`."""
    from tune_cifar.data.files import DataSource, find_data

    folder = Path(os.environ.get("TUNE_CIFAR_DATA", "")) / "cifar-10-batches-py"
    is_whole = all((folder / f"data_batch_{number}").exists() for number in range(1, 6))
    return find_data(None) if is_whole else DataSource("shapes", None)


def make_trainer(
    session: Session, space: str, execution: str, deterministic: bool = False, **changes: Any
) -> Any:
    """Make a Trainer of the space's baseline in its full tier, with changes."""
    from tune_cifar.data.load import load_train_val
    from tune_cifar.schema import TrainConfig
    from tune_cifar.space.select import load_space
    from tune_cifar.train.numerics import resolve_numerics
    from tune_cifar.train.trainer import Trainer

    if session.is_dry:
        space = "s7"  # the smallest network
        changes |= {"train_size": 48, "val_size": 20, "batch_size": 16, "pct_start": 0.5}
        changes["epochs"] = min(2, changes.get("epochs", 2))
    config = TrainConfig(**{**load_space(space, "full").baseline.model_dump(), **changes})
    data = load_train_val(find_source(), config.train_size, config.val_size)
    numerics = resolve_numerics(session.device, deterministic=deterministic)
    numerics = numerics.model_copy(update={"execution": execution})
    return Trainer(config, data, numerics)


def synchronize(session: Session) -> None:
    """Wait for the GPU."""
    import torch

    if not session.is_dry:
        torch.cuda.synchronize()


# Part 1


def probe(session: Session) -> Facts:
    """Look at the machine: card, versions, speeds of disk, copy and launch."""
    import torch

    def ask(*words: str) -> str:
        try:
            return subprocess.run(words, capture_output=True, text=True, timeout=10).stdout.strip()
        except OSError as exc:
            return str(exc)

    facts: Facts = {
        "card": ask("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "mps": shutil.which("nvidia-cuda-mps-control"),
    }
    num_bytes = 10**6 if session.is_dry else 105 * 10**6
    with tempfile.NamedTemporaryFile(dir=session.out) as file:
        start = time.perf_counter()
        file.write(bytes(num_bytes))
        file.flush()
        os.fsync(file.fileno())
        facts["fsync_s"] = time.perf_counter() - start
    images = torch.zeros(num_bytes * 138 // 105, dtype=torch.uint8)
    images.to(session.device)
    synchronize(session)
    start = time.perf_counter()
    images.to(session.device)
    synchronize(session)
    facts["copy_s"] = time.perf_counter() - start
    small = torch.zeros(1, device=session.device)
    start = time.perf_counter()
    for _ in range(1000):
        small.add_(1)
    synchronize(session)
    facts["launch_us"] = 1000 * (time.perf_counter() - start)
    return facts


def capture(session: Session) -> Facts:
    """Capture a step of s10 at batch size 512 and replay it."""
    trainer = make_trainer(session, "s10", "captured", **FEW)
    batches = trainer._repeat_batches()
    start = time.perf_counter()
    losses = run_steps(trainer, batches, 5)
    synchronize(session)
    return {"seconds": time.perf_counter() - start, "losses": losses}


def run_steps(trainer: Any, batches: Any, num_steps: int) -> list[float]:
    """Train so many steps; return their losses."""
    from tune_cifar.train.optim import schedule_steps

    trainer._step.model.train()
    schedule = schedule_steps(trainer.config)
    found = []
    for _ in range(num_steps):
        loss, _ = trainer._train_step(*next(batches), next(schedule))
        found.append(loss.clone())
    return [loss.item() for loss in found]


def equal(session: Session) -> Facts:
    """Compare the losses of 20 steps, eager and captured, without dropout."""
    facts: Facts = {}
    for space in ("s10", "s7"):
        losses = []
        for execution in ("eager", "captured"):
            sizes = {**FEW, "dropout": 0.0, "epochs": 8}
            trainer = make_trainer(session, space, execution, deterministic=True, **sizes)
            num_steps = 4 if session.is_dry else 20
            losses.append(run_steps(trainer, trainer._repeat_batches(), num_steps))
        gaps = [abs(one / other - 1) for one, other in zip(*losses, strict=True)]
        facts[space] = {"largest_gap": max(gaps), "is_equal": losses[0] == losses[1]}
    facts["is_equal"] = all(facts[space]["is_equal"] for space in ("s10", "s7"))
    return facts


def tests(session: Session) -> Facts:
    """Run the GPU tests that training's packages suffice for; without a GPU collect them."""
    return run_tests(session, TEST_FILES)


def search_tests(session: Session) -> Facts:
    """Run the other GPU tests."""
    return run_tests(session, SEARCH_TEST_FILES)


def run_tests(session: Session, names: tuple[str, ...]) -> Facts:
    """Run the GPU tests of these files.

    Raises:
        RuntimeError: with pytest's last lines, if one failed.
    """
    files = [f"tests/{name}.py" for name in names]
    more = ["--collect-only"] if session.is_dry else ["--timeout=60", "--durations=8"]
    words = [sys.executable, "-m", "pytest", *TEST_OPTIONS.split(), *more, *files]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise RuntimeError("\n".join(lines[-40:]) + done.stderr[-2000:])
    return {"summary": lines[-1], "slowest": [line for line in lines if " call " in line]}


# Space, batch size, execution, deterministic kernels alone; the most telling first.
CELLS = [
    (space, batch_size, execution, deterministic)
    for space, batch_size in (("s10", 512), ("s10", 128), ("s7", 128))
    for execution, deterministic in (("eager", False), ("captured", False), ("captured", True))
]


def steps(session: Session) -> Facts:
    """Time the steps of CELLS, each in a process of its own."""
    cells = CELLS[:2] if session.is_dry else CELLS
    facts: Facts = {}
    for space, batch_size, execution, deterministic in cells:
        name = f"{space} {batch_size} {execution}{' deterministic' if deterministic else ''}"
        how = (space, str(batch_size), execution, str(int(deterministic)))
        try:
            facts[name] = run_process(session, "cell", 60, *how)
        except RuntimeError as exc:
            facts[name] = {"error": str(exc)[-300:]}
        print(f"  {name}: {facts[name]}", file=sys.stderr, flush=True)
    return facts


def cell(
    session: Session, space: str, batch_size: str, execution: str, deterministic: str
) -> Facts:
    """Time the first step and the median of 50 of one cell."""
    sizes = {"train_size": 45_000, "batch_size": int(batch_size)}
    start = time.perf_counter()
    trainer = make_trainer(session, space, execution, deterministic == "1", **sizes)
    batches = trainer._repeat_batches()
    run_steps(trainer, batches, 1)
    first = time.perf_counter() - start
    run_steps(trainer, batches, 2 if session.is_dry else 10)
    return {"first_s": first, "step_ms": 1000 * time_steps(session, trainer, batches)}


def time_steps(session: Session, trainer: Any, batches: Any) -> float:
    """Return the median seconds of 50 steps, by the device's own clock."""
    import torch

    from tune_cifar.train.optim import schedule_steps

    settings = next(schedule_steps(trainer.config))
    num_steps = 3 if session.is_dry else 50
    if session.is_dry:
        seconds = []
        for _ in range(num_steps):
            start = time.perf_counter()
            trainer._train_step(*next(batches), settings)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)
    make: Any = torch.cuda.Event
    events = [make(enable_timing=True) for _ in range(num_steps + 1)]
    events[0].record()
    for event in events[1:]:
        trainer._train_step(*next(batches), settings)
        event.record()
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]
    return statistics.median(seconds)


def profile(session: Session) -> Facts:
    """Write the longest kernels of 5 eager steps of s10 and s7."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    facts: Facts = {}
    for space in ("s10", "s7"):
        trainer = make_trainer(session, space, "eager", **FEW)
        batches = trainer._repeat_batches()
        run_steps(trainer, batches, 3)
        kinds = [ProfilerActivity.CPU] + ([] if session.is_dry else [ProfilerActivity.CUDA])
        with watch(activities=kinds) as found:
            run_steps(trainer, batches, 2 if session.is_dry else 5)
        key = "self_cpu_time_total" if session.is_dry else "self_device_time_total"
        table = found.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=70)
        (session.out / f"profile-{space}.txt").write_text(table)
        facts[space] = f"profile-{space}.txt"
    return facts


# Part 2


def data(session: Session) -> Facts:
    """Load and prove the images."""
    from tune_cifar.data.load import load_train_val

    start = time.perf_counter()
    info = load_train_val(find_source(), 45_000, 5000).info
    return {"name": info.name, "digest": info.digest, "seconds": time.perf_counter() - start}


def s10(session: Session) -> Facts:
    """Train s10 whole, under two seeds; then on all images, for the time alone."""
    how = session.choice["execution"]
    make_trainer(session, "s10", how, **FEW).measure_step_seconds(4)
    facts: Facts = {"execution": how}
    for seed in (0, 1):
        facts[f"seed {seed}"] = train_whole(session, "s10", how, 24, seed=seed)
    facts["50,000"] = train_whole(session, "s10", how, 24, train_size=50_000, val_size=0)
    return facts


def train_whole(session: Session, space: str, execution: str, epochs: int, **changes: Any) -> Facts:
    """Train the baseline; return seconds, epochs/s and validation accuracies."""
    sizes = {"train_size": 45_000, "val_size": 5000, **changes, "epochs": epochs}
    start = time.perf_counter()
    trainer = make_trainer(session, space, execution, **sizes)
    made = time.perf_counter() - start
    accs = [result.val_acc for result in trainer]
    synchronize(session)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "made_s": made,
        "epochs_per_s": len(accs) / (seconds - made),
        "val_acc": accs,
        "peak_mb": trainer.peak_memory_mb,
    }


def s7(session: Session) -> Facts:
    """Train s7 for 6 epochs."""
    return train_whole(session, "s7", session.choice["execution"], 6)


def resume(session: Session) -> Facts:
    """Compare a training with one that goes on from its checkpoint."""
    from tune_cifar.train.checkpoint import load_checkpoint, save_checkpoint

    sizes = {"train_size": 10_240, "val_size": 1000, "epochs": 2 if session.is_dry else 4}
    how = session.choice["execution"]
    whole, other, resumed = (
        make_trainer(session, "s10", how, deterministic=True, **sizes) for _ in range(3)
    )
    wanted = [result.train_loss for result in whole]
    next(iter(other))
    path = session.out / "checkpoint.pt"
    save_checkpoint(path, other.state_dict())
    resumed.load_state_dict(load_checkpoint(path))
    path.unlink()
    found = [result.train_loss for result in resumed]
    return {"is_equal": found == wanted[1:], "losses": [wanted, found]}


# Space, kind, numbers of trainings at once, under MPS or not; the most telling first. On an H200
# processes without MPS take turns: 2 and 3 of s10 and 3 of s7 train no faster than one.
PACKINGS = [
    ("s7", "processes", (1,), False),
    ("s7", "processes", (3, 6), True),
    ("s10", "processes", (1,), False),
    ("s10", "processes", (2,), True),
    ("s7", "streams", (3, 6), False),
]


def packing(session: Session) -> Facts:
    """Count the epochs of trainings at once, as processes, under MPS and as threads."""
    facts: Facts = {}
    if session.is_dry:
        pack(session, facts, "s7", "processes", (1,))
        return facts
    control = shutil.which("nvidia-cuda-mps-control")
    for space, kind, numbers, under_mps in PACKINGS:
        if not under_mps:
            pack(session, facts, space, kind, numbers)
        elif control is not None:
            with start_mps(control, facts) as environment:
                pack(session, facts, space, kind, numbers, " under MPS", environment)
    return facts


@contextmanager
def start_mps(control: str, facts: Facts) -> Iterator[dict[str, str]]:
    """Run NVIDIA's server that lets processes share a GPU; yield its clients' variables."""
    names = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
    more = dict.fromkeys(names, "/tmp/mps")
    Path("/tmp/mps").mkdir(exist_ok=True)
    try:
        subprocess.run([control, "-d"], env=os.environ | more, timeout=5, check=True)
        yield more
    except subprocess.SubprocessError as exc:
        facts["MPS"] = str(exc)
        yield {}
    finally:
        with suppress(subprocess.SubprocessError):
            subprocess.run([control], input="quit\n", text=True, env=os.environ | more, timeout=10)


def pack(
    session: Session,
    facts: Facts,
    space: str,
    kind: str,
    numbers: tuple[int, ...],
    note: str = "",
    environment: dict[str, str] | None = None,
) -> None:
    """Add what `packing.py` finds for numbers of trainings, each by itself, to the facts."""
    found = session.out / "packing.json"
    script = str(ROOT / "benchmarks" / "packing.py")
    words = [sys.executable, script, "--space", space, "--kinds", kind, "--rounds", "1"]
    words += ["--execution", session.choice["execution"], "--json", str(found)]
    words += ["--seconds", "0.5", "--tiny"] if session.is_dry else ["--seconds", "4"]
    more = dict(environment or {})
    if find_source().name == "shapes":
        more["TUNE_CIFAR_DATA"] = "shapes"
    for number in numbers:
        name = f"{space}{note} {kind}-{number}"
        command = [*words, "--at-once", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | more)
        if done.returncode:
            facts[name] = {"error": done.stderr[-1500:]}
            if session.is_dry:
                raise RuntimeError(done.stderr)
        else:
            ((figures,),) = (each.values() for each in json.loads(found.read_text())["rounds"])
            facts[name] = figures["epochs_per_second"]
        print(f"  {name}: {facts[name]}", file=sys.stderr, flush=True)
    found.unlink(missing_ok=True)


# Part 3


def plain_search(session: Session) -> Facts:
    """Search s10 for 80 s as a user does who gives no option."""
    return search(session, "plain", 80)


def chosen_search(session: Session) -> Facts:
    """Search 100 trials with what the parts before have chosen, as long as there is time."""
    words = ["--execution", session.choice["execution"]]
    seconds = int(session.seconds) - SEARCH_MARGIN
    return search(session, "chosen", seconds, *([] if session.is_dry else words))


def search(session: Session, name: str, max_seconds: int, *words: str) -> Facts:
    """Run a search with nvidia-smi beside it; return its trials and the GPU's use."""
    from tune_cifar.record.journal import read_state
    from tune_cifar.record.store import search_folder

    storage = session.out / "runs" if session.is_dry else Path("/tmp/runs")
    command = [sys.executable, "-m", "tune_cifar", "search", "--storage", str(storage)]
    command += ["--name", name, *words]
    if session.is_dry:
        command += ["--space", "smoke", "--trials", "2", "--data", "shapes"]
        command += ["--set=train_size=60", "--set=val_size=20", "--set=batch_size=5"]
    else:
        source = find_source().name
        command += ["--space", "s10", "--tier", "full", "--max-time", f"{max_seconds}s"]
        command += ["--data", "shapes"] if source == "shapes" else []
    start = time.perf_counter()
    with (session.out / f"search-{name}.txt").open("w+") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log)
        uses = [] if session.is_dry else watch_gpu(running)
        status = running.wait()
        seconds = time.perf_counter() - start
        log.seek(0)
        if status:
            raise RuntimeError(log.read()[-2000:])
    folder = search_folder(storage, name)
    with tarfile.open(session.out / f"record-{name}.tar.xz", "w:xz") as packed:
        for file in folder.glob("*.json*"):
            packed.add(file, file.name)
    state = read_state(folder)
    num_epochs = sum(trial.epochs_done for trial in state.trials.values())
    return {
        "seconds": seconds,
        "trials": len(state.trials),
        "ended": state.counts["complete"] + state.counts["stopped"],
        "epochs": num_epochs,
        "trials_per_hour": 3600 * state.counts["complete"] / seconds,
        "best": state.best and state.best.score,
        "driver": running.pid,
        **describe_use(uses),
    }


def watch_gpu(running: Any) -> list[tuple[float, float, str]]:
    """Ask nvidia-smi every second: percent of time with a kernel, MiB in use, and whose."""
    words = ["nvidia-smi", "--format=csv,noheader,nounits"]
    uses = []
    while running.poll() is None:
        gpu = subprocess.run(
            [*words, "--query-gpu=utilization.gpu,memory.used"], capture_output=True, text=True
        )
        whose = subprocess.run(
            [*words, "--query-compute-apps=pid,used_memory"], capture_output=True, text=True
        )
        with suppress(ValueError):
            percent, memory = map(float, gpu.stdout.split(","))
            uses.append((percent, memory, whose.stdout.strip()))
        time.sleep(1)
    return uses


def describe_use(uses: list[tuple[float, float, str]]) -> Facts:
    """Return the GPU's use from the first kernel to the last, and its processes at the fullest."""
    busy = [index for index, (percent, _, _) in enumerate(uses) if percent]
    if not busy:
        return {}
    used = uses[busy[0] : busy[-1] + 1]
    _, memory, whose = max(used, key=lambda use: use[1])
    percents = [percent for percent, _, _ in used]
    mean = statistics.mean(percents)
    return {"busy_percent": mean, "percents": percents, "memory_mb": memory, "processes": whose}


def reproduce(session: Session) -> Facts:
    """Reproduce the best trial of the last search."""
    storage = session.out / "runs" if session.is_dry else Path("/tmp/runs")
    command = [sys.executable, "-m", "tune_cifar", "reproduce", "--best", "--search", "chosen"]
    command += ["--storage", str(storage)]
    if session.is_dry or find_source().name == "shapes":
        command += ["--data", "shapes"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    text = (done.stdout + done.stderr)[-2500:]
    if done.returncode:
        raise RuntimeError(text)
    return {"seconds": time.perf_counter() - start, "text": text}


# Space, batch size and execution of cells that tell what torch.compile wins.
VARIANTS = [
    (space, batch_size, execution)
    for space, batch_size in (("s10", 512), ("s7", 128))
    for execution in ("captured", "compiled")
]


def variants(session: Session) -> Facts:
    """Time captured and compiled steps; the first one compiles."""
    facts: Facts = {}
    for space, batch_size, execution in VARIANTS[:2] if session.is_dry else VARIANTS:
        title = f"{space} {execution}"
        try:
            facts[title] = run_process(session, "cell", 60, space, str(batch_size), execution, "0")
        except RuntimeError as exc:
            facts[title] = {"error": str(exc)[-600:]}
        print(f"  {title}: {facts[title]}", file=sys.stderr, flush=True)
    if session.is_dry and any("error" in found for found in facts.values()):
        raise RuntimeError(str(facts))
    return facts


# What runs the steps


class Step(NamedTuple):
    """A function of this file and the seconds that it may take."""

    run: Callable[[Session], Facts]
    limit: int


PARTS: dict[int, list[Step]] = {
    1: [
        Step(probe, 20),
        Step(capture, 60),
        Step(equal, 40),
        Step(tests, 60),
        Step(steps, 110),
        Step(profile, 25),
    ],
    2: [Step(data, 40), Step(s10, 90), Step(s7, 25), Step(resume, 20), Step(packing, 140)],
    3: [
        Step(plain_search, 120),
        Step(variants, 110),
        Step(search_tests, 120),
        Step(chosen_search, 400),
        Step(reproduce, 60),
    ],
}


def run_process(session: Session, step: str, limit: float, *words: str) -> Facts:
    """Run a step of this file in a process; return its facts.

    Raises:
        RuntimeError: with its last lines, or that it ran out of time.
    """
    if session.is_dry:  # a slow CPU is no fault
        limit = DRY_LIMIT
    command = ["timeout", "-k", "5", f"{limit:.0f}", sys.executable, __file__, "--step", step]
    command += words
    command += ["--dry"] if session.is_dry else []
    command += ["--choice", json.dumps(session.choice), "--seconds", f"{limit:.0f}"]
    environment = os.environ | {"OUT": str(session.out)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == LIMIT_EXIT:
        raise RuntimeError(f"more than {limit:.0f} s\n{done.stderr[-1500:]}")
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def choose(choice: Facts, name: str, facts: Facts | None) -> Facts:
    """Return what later steps take, after this one; facts are None if it failed."""
    if facts is None or (name == "equal" and not facts["is_equal"]):
        wrong = name in ("capture", "equal", "tests")
        return {**choice, "execution": "eager"} if wrong else choice
    if choice["execution"] == "eager":  # the graphs were wrong, and a compiled step is one
        return choice
    if name == "variants" and "step_ms" in facts["s10 compiled"]:
        captured, compiled = facts["s10 captured"], facts["s10 compiled"]
        gain = captured.get("step_ms", 0.0) / compiled["step_ms"]
        if gain > 1.2 and compiled["first_s"] < 40:
            return {**choice, "execution": "compiled"}
    return choice


def run_part(number: int, out: Path, seconds: float, skip: list[str], is_dry: bool) -> bool:
    """Run the steps of a part; return whether all ended well."""
    end, rows = time.monotonic() + (math.inf if is_dry else seconds), []
    place = out / "choice.json" if is_dry else CHOICE
    choice = json.loads(place.read_text()) if place.exists() else DEFAULT_CHOICE
    source = find_source().name
    for step in PARTS[number]:
        name = step.run.__name__.replace("_", "-")
        if name in skip:
            continue
        left, start = end - time.monotonic(), time.monotonic()
        facts, error = None, ""
        if left < 3:
            error = "no time was left"
        else:
            limit = min(step.limit, left)
            session = Session(out, is_dry, choice, limit)
            try:
                facts = run_process(session, step.run.__name__, limit)
            except RuntimeError as exc:
                error = str(exc)
        took = time.monotonic() - start
        row = {"part": number, "step": name, "seconds": round(took, 1), "data": source}
        row |= {"choice": choice} | ({"facts": facts} if facts is not None else {"error": error})
        with (out / "steps.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        choice = choose(choice, name, facts)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(choice))
        rows.append((name, took, error))
    print(f"\npart {number} on {source}, choice {choice}")
    for name, took, error in rows:
        print(f"{name:14} {took:6.1f} s  {error.splitlines()[0] if error else 'fine'}")
    return not any(error for _, _, error in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("part", nargs="?", type=int, choices=tuple(PARTS))
    what.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0, help="of the part")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STEP")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--choice", type=json.loads, default=DEFAULT_CHOICE, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="session-"))
    if arguments.step:
        session = Session(out, arguments.dry, arguments.choice, arguments.seconds)
        try:
            step, *words = arguments.step
            print(json.dumps(globals()[step](session, *words)))
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        return
    is_fine = run_part(arguments.part, out, arguments.seconds, arguments.skip, arguments.dry)
    sys.exit(0 if is_fine or not arguments.dry else 1)


if __name__ == "__main__":
    main()
