"""The search that all end-to-end faults are done to, uninterrupted: once per run of the tests."""

from __future__ import annotations

import pytest

from tests.faults.lab import Lab, check_whole
from tune_cifar.record.state import SearchState


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> SearchState:
    """The search of all these tests, uninterrupted."""
    lab = Lab(tmp_path_factory.mktemp("reference"))
    lab.finish()
    check_whole(lab)
    return lab.state
