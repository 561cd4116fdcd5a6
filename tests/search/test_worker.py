"""What a worker makes of the faults of a training."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.builders import ROOT
from tune_cifar.search.worker import explain_end


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
