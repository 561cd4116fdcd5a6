"""The uninterrupted search that the end-to-end tests compare with."""

from __future__ import annotations

import pytest

from tests.faults.lab import Lab, check_complete
from tune_cifar.record.state import SearchState


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> SearchState:
    """The search of SPACE without any fault; once per run of the tests."""
    lab = Lab(tmp_path_factory.mktemp("reference"))
    lab.finish()
    check_complete(lab)
    return lab.state
