"""What Ray Tune calls, passed on to the driver: searcher, scheduler and stopper, each thin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

# Before ray: it sets what ray reads when it is imported.
from tune_cifar.search.worker import unpack_epochs  # isort: split

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper
from ray.tune.utils.object_cache import _ObjectCache

from tune_cifar.errors import DiskFullError, RecordError, TuneCifarError
from tune_cifar.search.cluster import LiveNodes
from tune_cifar.search.driver import SearchDriver, must_run_alone
from tune_cifar.search.remote import RemoteTrials, classify_death


def guard(driver: SearchDriver, action: Callable[[], Any], otherwise: Any) -> Any:
    """Call the action; an exception ends the search and is raised at its end.

    Tune would wrap the exception or attribute it to a trial. An OSError is the run store's: what
    only shows the search raises none (`Shown`).
    """
    fault: Exception
    try:
        return action()
    except OSError as exc:
        place = exc.filename or driver.record.state.folder
        problem = f"{place}: cannot write to the run store: {exc.strerror}"
        fault = RecordError(f"{problem}. Make room, then give `resume=True`.")
    except Exception as exc:
        fault = exc
    driver.fault = driver.fault or fault
    return otherwise


class TuneSearcher(Searcher):  # type: ignore[misc]
    """Passes Tune's requests for a trial on to the driver."""

    def __init__(
        self, driver: SearchDriver, fixed: dict[str, Any], remote: RemoteTrials | None = None
    ) -> None:
        super().__init__()
        self._driver = driver
        self._fixed = fixed
        self._remote = remote

    def suggest(self, trial_id: str) -> dict[str, Any] | Literal["FINISHED"] | None:
        return guard(self._driver, self._suggest, Searcher.FINISHED)  # type: ignore[no-any-return]

    def _suggest(self) -> dict[str, Any] | Literal["FINISHED"] | None:
        """Return a trial, None when there is none now, FINISHED when no more will start."""
        has_slot = self._remote is None or self._remote.has_slot
        # Without a slot a waiting trial waits on, and the end of all is still seen.
        trial = self._driver.ask() if has_slot else None
        if trial is None:
            return Searcher.FINISHED if self._driver.is_exhausted else None
        folder = self._driver.record.state.trial_folder(trial.number)
        folder.mkdir(parents=True, exist_ok=True)
        # Of a GPU that has no other trial all the memory.
        more = {"gpus": 1.0} if self._fixed["gpus"] and must_run_alone(trial) else {}
        return {
            "trial": trial.number,
            "config": trial.full_config.model_dump(mode="json"),
            "stages": [tuple(stage) for stage in self._driver.list_remaining_stages(trial)],
            "rungs": self._driver.rungs,
            "folder": str(folder),
            **self._fixed,
            **more,
            **(self._remote.make_config(trial) if self._remote else {}),
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: the scheduler has reported to the driver already."""


class WorkerCache(_ObjectCache):  # type: ignore[misc]
    """Keeps every free worker of a cluster for the next trial of its node, until the search's end.

    Tune's own cache ends a worker when a trial waits at this moment and none for this worker's
    node: a new one takes seconds to start.
    """

    def cache_object(self, key: Any, obj: Any) -> bool:
        self._cached_objects[key].append(obj)
        self._num_cached_objects += 1
        return True

    def flush_cached_objects(self, force_all: bool = False) -> Iterator[Any]:
        return super().flush_cached_objects(force_all) if force_all else iter(())


class TuneScheduler(FIFOScheduler):  # type: ignore[misc]
    """Passes every message of a worker on to the driver, before Tune uses it."""

    def __init__(self, driver: SearchDriver, remote: RemoteTrials | None = None) -> None:
        super().__init__()
        self._driver = driver
        self._remote = remote

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """On a cluster keep free workers, and tell attempts apart that wait for one."""
        if self._remote is not None:
            controller = tune_controller._tune_controller  # which has no worker yet
            if not isinstance(controller._actor_cache, WorkerCache):
                controller._actor_cache = WorkerCache()
            self._remote.add(trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        goes_on = guard(self._driver, lambda: self._on_result(result), False)
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)

    def _on_result(self, message: dict[str, Any]) -> bool:
        """Pass a worker's message on to the driver; return whether the trial goes on."""
        number, outcome, text = message["trial"], message["outcome"], message["text"]
        if self._remote is not None and not self._remote.take(message):
            return False
        if outcome == "epochs":
            reports = (self._driver.report(number, *epoch) for epoch in unpack_epochs(text))
            return all(reports)  # none after the epoch that ends the trial
        if outcome == "paused":
            self._driver.pause(number)
        elif outcome == "diverged":
            self._driver.end(number, "diverged", text)
        elif outcome == "out of memory":
            self._driver.retry(number, "out of memory", text)
        elif outcome == "disk full":
            raise DiskFullError(f"{text} Then give `resume=True`.")
        elif outcome in ("unlike", "no room") and self._remote is not None:
            self._remote.leave_out(message)
        elif outcome == "superseded":  # `take` has found that no newer attempt has begun
            self._driver.retry(number, "worker died", f"the worker stopped: {text}")
        elif self._remote is None or not self._remote.retry_elsewhere(number, text):
            self._driver.fail(number, text)
        return False

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Retry a trial whose worker died: a crash, or killed, perhaps by Ray as memory ran out."""
        error, number = _read_error(trial), trial.config["trial"]
        text = f"the worker process of the trial died\n{error[:2000]}".rstrip()
        # Of an older attempt, or of a trial that `watch` has queued already, it is no news.
        newest = self._driver.attempts[number]
        attempt = trial.config.get("cluster", {}).get("attempt", newest)
        if attempt == newest and number in self._driver.running:
            fault = classify_death(error)
            guard(self._driver, lambda: self._driver.retry(number, fault, text), None)


def _read_error(trial: Any) -> str:
    """Return Ray's message on a trial's dead worker; Tune's own `get_error` finds none."""
    with suppress(OSError, TypeError):
        return Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    return ""


class TuneStopper(Stopper):  # type: ignore[misc]
    """Ends the search, in the middle of an epoch if need be, when the driver requires it."""

    def __init__(self, driver: SearchDriver, remote: RemoteTrials | None) -> None:
        self._driver = driver
        self._remote = remote
        self._nodes = LiveNodes()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._remote is not None:
            guard(self._driver, self._remote.watch, None)
            # Attempts that wait for a node that is gone would keep Tune waiting.
            return self._driver.is_cut or self._driver.is_exhausted
        guard(self._driver, self._check_ray, None)
        return self._driver.is_cut

    def _check_ray(self) -> None:
        """End a search whose own Ray has ended: Tune would wait for its workers forever."""
        if not self._nodes.poll():
            hint = "Make sure that memory does not run out, then give `resume=True`."
            raise TuneCifarError(f"ray: its processes on this machine have ended. {hint}")
