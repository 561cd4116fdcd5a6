"""Numerics are chosen, refused, compared and applied; the machine is described beside them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from tune_cifar.errors import ConfigError
from tune_cifar.record.environment import describe_environment
from tune_cifar.schema import Numerics
from tune_cifar.train.numerics import (
    apply_numerics,
    autocast,
    compare_numerics,
    count_cores,
    count_gpus,
    memory_format,
    resolve_numerics,
    restore_numerics,
)

HAS_GPU = torch.cuda.is_available()
needs_no_gpu = pytest.mark.skipif(HAS_GPU, reason="this machine has a CUDA device")
CPUS_RULE = f"`cpus_per_trial` must be 1 to {count_cores()} (the cores here)"


@pytest.fixture
def flags() -> Iterator[None]:
    """Restore torch's process-wide settings after a test."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def read_cpu_flags() -> set[str]:
    """Read the processor's flags as the Linux kernel names them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        pytest.skip("no /proc/cpuinfo here")
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return set(lines[0].split()) if lines else set()


def test_auto_takes_bf16_exactly_where_the_processor_multiplies_it() -> None:
    can = bool({"amx_bf16", "avx512_bf16"} & read_cpu_flags())
    assert resolve_numerics("cpu", "auto").precision == ("bf16" if can else "fp32")


@needs_no_gpu
def test_auto_takes_the_cpu_where_no_gpu_is() -> None:
    assert resolve_numerics("auto", "fp32") == resolve_numerics("cpu", "fp32")
    assert count_gpus("auto") == 0


@pytest.mark.gpu
def test_auto_takes_the_gpu_where_one_is() -> None:
    found = resolve_numerics()
    assert (found.device, found.memory_format) == ("cuda", "channels_last")
    assert found.capability.startswith("sm_") and count_gpus("auto") >= 1


@pytest.mark.parametrize(
    ("precision", "layout"), [("fp32", "contiguous"), ("bf16", "channels_last")]
)
def test_memory_format_on_a_cpu_follows_the_precision(precision: str, layout: str) -> None:
    numerics = resolve_numerics("cpu", precision, threads=1)
    assert (numerics.precision, numerics.memory_format, numerics.threads) == (precision, layout, 1)
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    assert memory_format(numerics) is formats[layout]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"device": "gpu"}, "`device` must be auto, cpu or cuda, got 'gpu'."),
        ({"precision": "fp16"}, "`precision` must be auto, fp32 or bf16, got 'fp16'."),
        ({"execution": "graph"}, "`execution` must be eager or captured, got 'graph'."),
        (
            {"device": "cpu", "execution": "captured"},
            "`execution='captured'` needs a CUDA device, but the training runs on the CPU. "
            "Leave it out.",
        ),
        ({"threads": 0}, f"{CPUS_RULE}, got 0."),
        ({"threads": 4096}, f"{CPUS_RULE}, got 4096."),
    ],
)
def test_unknown_settings_are_refused_in_one_sentence(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_numerics(**changes)
    assert str(caught.value) == sentence


@needs_no_gpu
def test_cuda_without_a_gpu_is_refused_with_a_remedy(fp32: Numerics) -> None:
    problem = r"but this machine has none\. Use `device='cpu'`\."
    with pytest.raises(ConfigError, match=f"`device='cuda'` needs a CUDA device, {problem}"):
        resolve_numerics("cuda")
    with pytest.raises(ConfigError, match=f"the recorded device is cuda, {problem}"):
        apply_numerics(fp32.model_copy(update={"device": "cuda"}))


def test_versions_are_those_of_the_libraries_that_compute(fp32: Numerics) -> None:
    libraries = {"torch", "numpy", "albumentations", "opencv-python-headless"}
    assert set(fp32.versions) == {"python"} | libraries
    assert fp32.versions["torch"] == version("torch")


def test_numerics_come_back_equal_through_json(fp32: Numerics) -> None:
    assert compare_numerics(fp32, Numerics(**json.loads(fp32.model_dump_json()))) == []


def test_recorded_numerics_are_restored_where_they_can_be(fp32: Numerics) -> None:
    changes = {
        "precision": "bf16",
        "execution": "captured",
        "threads": 2,
        "memory_format": "contiguous",
        "device_name": "elsewhere",
        "versions": {"torch": "1.0"},
    }
    here = restore_numerics(fp32.model_copy(update=changes))
    assert (here.precision, here.threads, here.memory_format) == ("bf16", 2, "contiguous")
    assert (here.versions, here.device_name) == (fp32.versions, fp32.device_name)
    assert here.execution == "eager"


OTHER_VALUES: dict[str, Any] = {
    "execution": "captured",
    "device": "cuda",
    "device_name": "another processor",
    "capability": "another",
    "precision": "bf16",
    "memory_format": "channels_last",
    "threads": 7,
    "deterministic": True,
}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_comparison_names_what_differs_before_and_now(fp32: Numerics, name: str) -> None:
    value = OTHER_VALUES[name]
    other = fp32.model_copy(update={name: value})
    assert compare_numerics(fp32, other) == [f"{name}: {getattr(fp32, name)} -> {value}"]


def test_comparison_covers_every_field(fp32: Numerics) -> None:
    assert set(OTHER_VALUES) == set(Numerics.model_fields) - {"versions"}


def test_comparison_names_changed_new_and_gone_libraries(fp32: Numerics) -> None:
    before = fp32.model_copy(update={"versions": {"torch": "2.11", "numpy": "2.0"}})
    now = fp32.model_copy(update={"versions": {"torch": "2.15", "albumentations": "2.0"}})
    assert compare_numerics(before, now) == [
        "torch: 2.11 -> 2.15",
        "numpy: 2.0 -> absent",
        "albumentations: absent -> 2.0",
    ]


@pytest.mark.usefixtures("flags")
def test_applying_sets_the_flags_and_the_next_application_restores_them(fp32: Numerics) -> None:
    apply_numerics(fp32.model_copy(update={"threads": 2, "deterministic": True}))
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    apply_numerics(fp32)
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_autocast_multiplies_in_the_recorded_precision(precision: str, dtype: torch.dtype) -> None:
    with autocast(resolve_numerics("cpu", precision)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_environment_is_text_and_names_versions_machine_and_commit() -> None:
    facts = describe_environment()
    assert all(isinstance(value, str) and value for value in facts.values())
    assert facts["torch"] == version("torch") and facts["cores"] == str(os.cpu_count())
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        assert "git_commit" not in facts
        return
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=root, text=True)
    assert facts["git_commit"].removesuffix("+changes") == head.strip()
