"""A search: Ray Tune runs the trials on warm workers, Optuna proposes, asynchronous successive halving stops.

`SearchDriver` (driver.py) decides and records; it knows nothing of Ray. Three thin adapters hand Tune's calls to it:
a Searcher (what to try next), a Scheduler (what a result means), a Stopper (when all is over). `TrialWorker` steps the
training generator inside a worker. The record is written before anything else happens; everything shown later reads it.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

# Read by Ray when it is imported: no output of its own, no token file, no joining of somebody else's cluster, workers
# stay in the folder they were started from, and no snapshots (the record is the truth).
RAY_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",
}
os.environ.update({name: os.environ.get(name, value) for name, value in RAY_ENVIRONMENT.items()})

import psutil
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from tune_cifar.data import DataSource, load_train_val
from tune_cifar.driver import SearchDriver
from tune_cifar.engine import Trainer
from tune_cifar.errors import ConfigError, Diverged
from tune_cifar.fidelity import expected_epochs
from tune_cifar.numerics import count_gpus, resolve_numerics
from tune_cifar.record import Event, Record, SearchState, check_is_new, search_folder
from tune_cifar.schema import EpochResult, Numerics, TrainConfig
from tune_cifar.space import SearchSpace
from tune_cifar.tracking import Shipper, make_tracking_uri
from tune_cifar.train import Listener, make_header, train_trial


@dataclass(frozen=True)
class SearchRequest:
    """What the user asked for beyond the space: runtime options, none of which changes a recipe.

    `None` leaves the choice to the program.
    """

    source: DataSource
    storage: Path
    command: str
    name: str | None = None
    seed: int | None = None
    device: str = "auto"
    precision: str = "auto"
    deterministic: bool = False
    cpus_per_trial: int = 1
    gpus_per_trial: float | None = None
    max_concurrent: int | None = None
    tracking_uri: str | None = None

    @property
    def default_tier(self) -> str:
        """`full` where a GPU may be used, else `cpu`."""
        return "full" if count_gpus(self.device) else "cpu"


@dataclass(frozen=True)
class Resources:
    """What one trial occupies and how many run at once. Ray's resources are logical: they place, they do not limit."""

    cpus_per_trial: int
    gpus_per_trial: float
    max_concurrent: int
    num_gpus: int


@dataclass(frozen=True)
class SearchPlan:
    """Everything settled before the first trial.

    Attributes:
        epoch_seconds: of the baseline, from measured training steps.
        epochs_per_trial: expected under the rungs.
    """

    space: SearchSpace
    request: SearchRequest
    name: str
    numerics: Numerics
    resources: Resources
    epoch_seconds: float
    epochs_per_trial: float

    def describe(self) -> str:
        """What will fit into the time, in one sentence or two."""
        budget, numerics = self.space.budget, self.numerics
        workers = self.resources.max_concurrent
        text = (
            f"search {self.name}: {budget.describe()}; {workers} at once on {numerics.device_name}, "
            f"{numerics.precision}, {numerics.threads} thread{'s' if numerics.threads > 1 else ''} each. "
            f"An epoch of the baseline takes about {self.epoch_seconds:.2g} s"
        )
        if budget.max_time_seconds is None:
            return text + "."
        num_epochs = budget.max_time_seconds * workers / self.epoch_seconds
        num_trials = min(budget.trials, int(num_epochs / self.epochs_per_trial))
        return text + f": the time is enough for about {num_trials} trials."


def resolve_resources(request: SearchRequest, numerics: Numerics, num_gpus: int) -> Resources:
    """Check what was asked for against the machine; by default as many trials at once as fit.

    Raises:
        ConfigError: when one trial would not fit the machine.
    """
    cores, cpus = len(psutil.Process().cpu_affinity() or [0]), request.cpus_per_trial
    if not 1 <= cpus <= cores:
        raise ConfigError(f"--cpus-per-trial: 1 to {cores} (the cores here) must hold, got {cpus}.")
    gpus = request.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if numerics.device == "cuda" else 0.0
    if gpus and numerics.device == "cpu":
        raise ConfigError(f"--gpus-per-trial: 0 must hold on a CPU, got {gpus:g}. A GPU must be there to be shared.")
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise ConfigError(f"--gpus-per-trial: a fraction up to 1 or a whole number must be given, got {gpus:g}.")
    if gpus > num_gpus:
        raise ConfigError(f"--gpus-per-trial: at most {num_gpus} (the GPUs here) must hold, got {gpus:g}.")
    if request.max_concurrent is not None and request.max_concurrent < 1:
        raise ConfigError(f"--max-concurrent: a number >= 1 must be given, got {request.max_concurrent}.")
    fits = cores // cpus
    if gpus:
        fits = min(fits, int(num_gpus / gpus) if gpus >= 1 else num_gpus * int(1 / gpus))
    return Resources(cpus, gpus, min(fits, request.max_concurrent or fits), num_gpus)


def prepare_search(space: SearchSpace, request: SearchRequest) -> SearchPlan:
    """Settle name, numerics and resources, start the workers' cluster and measure 20 training steps meanwhile.

    Raises:
        RecordError: when the name is taken.
        ConfigError, DataError: when an option does not fit the machine or the data are not there.
    """
    name = request.name or f"{space.name}-{space.tier}-{datetime.now():%Y%m%d-%H%M%S}"
    check_is_new(search_folder(request.storage, name))
    num_gpus = count_gpus(request.device)
    numerics = resolve_numerics(request.device, request.precision, request.cpus_per_trial, request.deterministic)
    resources = resolve_resources(request, numerics, num_gpus)
    with ThreadPoolExecutor(1) as pool:
        measured = pool.submit(estimate_epoch_seconds, space.baseline, request.source, numerics)
        start_ray(resources)
        epoch_seconds = measured.result()
    epochs_per_trial = expected_epochs(space.budget.rungs, space.budget.reduction_factor)
    return SearchPlan(space, request, name, numerics, resources, epoch_seconds, epochs_per_trial)


def estimate_epoch_seconds(config: TrainConfig, source: DataSource, numerics: Numerics, num_steps: int = 20) -> float:
    """Seconds of one epoch, from the median of measured training steps; evaluation is counted as forward passes.

    A forward pass costs about a third of a training step per image (one of forward, backward by inputs, backward by
    weights).
    """
    data = load_train_val(source, config.train_size, config.val_size)
    step_seconds = Trainer(config, data, numerics).measure_step_seconds(num_steps)
    return step_seconds * (config.num_steps_per_epoch + config.val_size / config.batch_size / 3)


class TrialWorker(tune.Trainable):  # type: ignore[misc]
    """Steps `train_trial` in a warm worker process: imports, data and threads stay over all its trials."""

    def setup(self, config: dict[str, Any]) -> None:
        """Called by Ray when the worker starts, with the first trial."""
        self._results: Iterator[EpochResult] | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called by Ray with every further trial; nothing heavy here, so that `step` can tell of any fault."""
        self._trial = new_config
        self._results = None
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch. Divergence and exceptions are results: Ray would run the trial again on an exception.

        Returns:
            trial, outcome (epoch, diverged, failed) and text: an EpochResult in JSON (Tune flattens nested values),
            or what happened in words.
        """
        number = self._trial["trial"]
        try:
            if self._results is None:
                self._results = self._make_results()
            result = next(self._results)
        except Diverged as exc:
            return {"trial": number, "outcome": "diverged", "text": str(exc)}
        except Exception:
            return {"trial": number, "outcome": "failed", "text": traceback.format_exc()}
        return {"trial": number, "outcome": "epoch", "text": result.model_dump_json()}

    def _make_results(self) -> Iterator[EpochResult]:
        config = TrainConfig(**self._trial["config"])
        name, folder = self._trial["source"]
        source = DataSource(name, Path(folder) if folder else None)
        data = load_train_val(source, config.train_size, config.val_size)
        return train_trial(config, data, Numerics(**self._trial["numerics"]), Path(self._trial["folder"]))


class _Searcher(Searcher):  # type: ignore[misc]
    """Tune asks the driver what to try next."""

    def __init__(self, driver: SearchDriver, fixed: dict[str, Any]) -> None:
        super().__init__()
        self._driver = driver
        self._fixed = fixed

    def suggest(self, trial_id: str) -> dict[str, Any] | Literal["FINISHED"]:
        trial = self._driver.ask()
        if trial is None:
            finished: Literal["FINISHED"] = Searcher.FINISHED
            return finished
        folder = self._driver.record.state.trial_folder(trial.number)
        folder.mkdir(parents=True, exist_ok=True)
        dump = trial.config.model_dump(mode="json")
        return {"trial": trial.number, "config": dump, "folder": str(folder), **self._fixed}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the scheduler has told the driver already."""


class _Scheduler(FIFOScheduler):  # type: ignore[misc]
    """Tune hands every result to the driver before anything else sees it."""

    def __init__(self, driver: SearchDriver) -> None:
        super().__init__()
        self._driver = driver

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        goes_on = False
        if result["outcome"] == "epoch":
            goes_on = self._driver.report(result["trial"], EpochResult.model_validate_json(result["text"]))
        elif result["outcome"] == "diverged":
            self._driver.end(result["trial"], "diverged", result["text"])
        else:
            self._driver.fail(result["trial"], result["text"])
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """The worker itself died (killed, out of memory): the trial failed, the search goes on."""
        self._driver.fail(trial.config["trial"], f"worker process died\n{trial.get_error()!r}")


class _TimeIsUp(Stopper):  # type: ignore[misc]
    """Ends everything when the driver's time is over, in the middle of an epoch if need be."""

    def __init__(self, driver: SearchDriver) -> None:
        self._driver = driver

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._driver.is_over_time


def start_ray(resources: Resources) -> None:
    """A silent local cluster of this process, without dashboard. Never joins another."""
    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=resources.cpus_per_trial * resources.max_concurrent,
            num_gpus=resources.num_gpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="CRITICAL",
        )


def run_search(plan: SearchPlan, listener: Listener | None = None) -> tuple[SearchState, list[str]]:
    """Run a prepared search to its end: record first, then MLflow from the record.

    Args:
        listener: hears of every event after it is on disk, in this thread.

    Returns:
        the search as recorded, and a sentence for everything that MLflow did not take.

    Raises:
        RecordError: when the name is taken or the record cannot be written.
    """
    space, request = plan.space, plan.request
    info = load_train_val(request.source, space.baseline.train_size, space.baseline.val_size).info
    seed = space.budget.seed if request.seed is None else request.seed
    header = make_header("search", plan.name, space, seed, info, plan.numerics, request.command)
    with Record.create(search_folder(request.storage, plan.name), header) as record:
        uri = make_tracking_uri(request.storage, request.tracking_uri)
        shipper = Shipper(uri, request.storage, record.state)

        def hear(state: SearchState, event: Event) -> None:
            shipper.hear(state, event)
            if listener is not None:
                listener(state, event)

        driver = SearchDriver(record, space, hear)
        try:
            _run_tune(driver, plan)
        finally:
            driver.finish()
            faults = shipper.close()
        return record.state, faults


def _run_tune(driver: SearchDriver, plan: SearchPlan) -> None:
    """Let Tune run the driver's trials until none is left, the time is over or Ctrl-C."""
    source, resources = plan.request.source, plan.resources
    fixed = {
        "source": (source.name, str(source.folder) if source.folder else None),
        "numerics": plan.numerics.model_dump(mode="json"),
    }
    start_ray(resources)
    # Tune insists on an experiment folder of its own; nothing in it is ever read.
    with tempfile.TemporaryDirectory(prefix="tune_cifar-") as scratch:
        tune.Tuner(
            tune.with_resources(TrialWorker, {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial}),
            tune_config=tune.TuneConfig(
                search_alg=_Searcher(driver, fixed),
                scheduler=_Scheduler(driver),
                num_samples=plan.space.budget.trials,
                max_concurrent_trials=resources.max_concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                stop=_TimeIsUp(driver),
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
