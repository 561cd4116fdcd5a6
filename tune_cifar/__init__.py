"""Hyperparameter search for small images: every recipe corrected, searched fast, judged honestly.

The public API, imported when it is first used: importing the package itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_cifar.cli.notebook import Run, run_search
    from tune_cifar.data.files import find_data
    from tune_cifar.data.load import load_train_val
    from tune_cifar.record.store import load_searches
    from tune_cifar.report.trials import load_curves, load_trials
    from tune_cifar.schema import TrainConfig
    from tune_cifar.search.plan import SearchRequest
    from tune_cifar.search.run import prepare_resume, prepare_search
    from tune_cifar.space.select import load_space
    from tune_cifar.train.numerics import resolve_numerics
    from tune_cifar.train.trainer import Trainer

__all__ = [
    "Run",
    "SearchRequest",
    "TrainConfig",
    "Trainer",
    "find_data",
    "load_curves",
    "load_searches",
    "load_space",
    "load_train_val",
    "load_trials",
    "prepare_resume",
    "prepare_search",
    "resolve_numerics",
    "run_search",
]

_MODULES = {
    "Trainer": "train.trainer",
    "TrainConfig": "schema",
    "find_data": "data.files",
    "load_train_val": "data.load",
    "resolve_numerics": "train.numerics",
    "SearchRequest": "search.plan",
    "prepare_resume": "search.run",
    "prepare_search": "search.run",
    "Run": "cli.notebook",
    "run_search": "cli.notebook",
    "load_space": "space.select",
    "load_trials": "report.trials",
    "load_curves": "report.trials",
    "load_searches": "record.store",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
