"""What a worker makes of the faults of a training."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.builders import ROOT, make_result
from tune_cifar.errors import DiskFullError
from tune_cifar.schema import EpochResult
from tune_cifar.search.trial_files import CopiedFiles, SharedFiles
from tune_cifar.search.worker import TrialWorker, explain_end
from tune_cifar.train import step as step_module


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
    ],
)
def test_every_words_for_too_little_memory_are_known(fault: Exception) -> None:
    assert explain_end(fault)[0] == "out of memory"


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        KeyError("memory"),
    ],
)
def test_other_faults_are_not_taken_for_it(fault: Exception) -> None:
    outcome, text = explain_end(fault)
    assert outcome == "failed" and type(fault).__name__ in text


@pytest.mark.parametrize(
    ("fault", "outcome"), [(MemoryError(), "out of memory"), (KeyError("x"), "failed")]
)
def test_a_trial_that_ran_out_of_memory_takes_the_idle_steps_with_it(
    fault: Exception, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(worker: TrialWorker) -> None:
        raise fault

    idle: dict[str, str] = {"key": "step"}
    monkeypatch.setattr(step_module, "_idle", idle)
    monkeypatch.setattr(TrialWorker, "_make_results", fail)
    worker = object.__new__(TrialWorker)  # Ray's constructor needs a trial of Ray's
    worker._results = worker._files = None
    worker.reset_config({"trial": 3, "gpus": 0, "rungs": [1]})
    assert worker.step()["outcome"] == outcome
    assert bool(idle) == (outcome == "failed")


@pytest.mark.parametrize(
    ("files", "outcome"), [(SharedFiles, "disk full"), (CopiedFiles, "no room")]
)
def test_a_full_disk_of_a_node_is_told_from_the_run_stores(
    files: type[SharedFiles | CopiedFiles], outcome: str
) -> None:
    def train() -> Iterator[EpochResult]:
        yield make_result(1)
        raise DiskFullError("weights.safetensors: cannot write the file: No space left.")

    worker = object.__new__(TrialWorker)
    worker._files = object.__new__(files)
    results = worker._tell_whose_disk(train())
    assert next(results) == make_result(1)
    with pytest.raises(Exception, match="No space left") as caught:
        next(results)
    assert explain_end(caught.value)[0] == outcome


ENDING = """
import sys
import torch
from tune_cifar.search.worker import end_with_broken_cuda
end_with_broken_cuda()  # without CUDA nothing happens
def synchronize():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = lambda: None
end_with_broken_cuda()
torch.cuda.synchronize = synchronize
try:
    end_with_broken_cuda()
finally:
    print("still here")
"""


def test_a_process_whose_cuda_is_broken_ends_at_once() -> None:
    """A stand-in for CUDA's answer; `test_a_poisoned_worker_is_replaced` has the real one."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "CUDA is broken in this process: CUDA error: an illegal memory access" in done.stderr
