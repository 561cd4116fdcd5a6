"""Hyperparameter search for CIFAR-10: every recipe corrected, searched fast, judged honestly.

The public API, imported when it is first used: importing the package itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_cifar.engine import Trainer
    from tune_cifar.plan import SearchRequest
    from tune_cifar.results import load_curves, load_searches, load_trials
    from tune_cifar.schema import TrainConfig
    from tune_cifar.search import prepare_resume, prepare_search, run_search
    from tune_cifar.space import load_space

__all__ = [
    "SearchRequest",
    "TrainConfig",
    "Trainer",
    "load_curves",
    "load_searches",
    "load_space",
    "load_trials",
    "prepare_resume",
    "prepare_search",
    "run_search",
]

_ROOMS = {
    "Trainer": "engine",
    "TrainConfig": "schema",
    "SearchRequest": "plan",
    "prepare_resume": "search",
    "prepare_search": "search",
    "run_search": "search",
    "load_space": "space",
    "load_trials": "results",
    "load_curves": "results",
    "load_searches": "results",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
