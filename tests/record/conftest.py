"""Fixtures that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders import TRIALS, write_search
from tune_cifar.record.state import SearchState


@pytest.fixture
def state(tmp_path: Path) -> SearchState:
    """An unfinished search with seven trials in every state."""
    return write_search(tmp_path, "s7-1", 1, TRIALS)
