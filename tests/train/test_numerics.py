"""Numerics are chosen, refused, compared and applied; the machine is described beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import ROOT
from tune_cifar.errors import ConfigError
from tune_cifar.record.environment import describe_environment
from tune_cifar.schema import Numerics
from tune_cifar.train.numerics import (
    CPU_VARIABLES,
    CUDA_VARIABLES,
    apply_numerics,
    autocast,
    check_openmp,
    compare_numerics,
    count_cores,
    count_gpus,
    describe_unrecorded,
    find_settings,
    memory_format,
    repeats_bits,
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
    found = resolve_numerics("auto", "fp32")
    assert found == resolve_numerics("cpu", "fp32") and count_gpus("auto") == 0
    assert found.execution == "eager" and repeats_bits(found)


@pytest.mark.gpu
def test_auto_takes_the_gpu_where_one_is() -> None:
    found = resolve_numerics()
    assert (found.device, found.memory_format) == ("cuda", "channels_last")
    assert found.execution == "captured" and not repeats_bits(found)
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
        ({"precision": "fp16"}, "`precision` must be auto, fp32, tf32 or bf16, got 'fp16'."),
        (
            {"device": "cpu", "precision": "tf32"},
            "`precision='tf32'` needs a CUDA device, but the training runs on the CPU. "
            "Use `precision='fp32'`.",
        ),
        (
            {"execution": "graph"},
            "`execution` must be auto, eager, captured or compiled, got 'graph'.",
        ),
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


@pytest.mark.parametrize(
    ("variable", "lowered"),
    [
        ("OMP_THREAD_LIMIT=1", True),
        ("OMP_THREAD_LIMIT=2", False),
        ("OMP_DYNAMIC=TRUE", True),
        ("OMP_DYNAMIC=false", False),
        ("OMP_MAX_ACTIVE_LEVELS=0", True),
        ("OMP_MAX_ACTIVE_LEVELS=1", False),
    ],
)
def test_threads_that_openmp_would_take_away_are_refused(variable: str, lowered: bool) -> None:
    """oneDNN waits for them for ever."""
    name, _, value = variable.partition("=")
    check_openmp(1, {name: value})
    if not lowered:
        check_openmp(2, {name: value})
        return
    with pytest.raises(ConfigError) as caught:
        check_openmp(2, {name: value})
    sentence = f"{name} must allow the 2 threads of `cpus_per_trial`, got {value}. Unset it."
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


def test_tf32_of_a_gpu_is_fp32_on_a_cpu(fp32: Numerics) -> None:
    recorded = fp32.model_copy(update={"device": "cuda", "precision": "tf32"})
    here = restore_numerics(recorded, "cpu")
    assert (here.device, here.precision) == ("cpu", "fp32")
    assert "precision: tf32 -> fp32" in compare_numerics(recorded, here)


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
    assert set(OTHER_VALUES) == set(Numerics.model_fields) - {"versions", "settings"}


def test_comparison_names_changed_new_and_gone_libraries(fp32: Numerics) -> None:
    before = fp32.model_copy(update={"versions": {"torch": "2.11", "numpy": "2.0"}})
    now = fp32.model_copy(update={"versions": {"torch": "2.15", "albumentations": "2.0"}})
    assert compare_numerics(before, now) == [
        "torch: 2.11 -> 2.15",
        "numpy: 2.0 -> absent",
        "albumentations: absent -> 2.0",
    ]


def test_comparison_names_every_variable_that_differs(fp32: Numerics) -> None:
    before = fp32.model_copy(update={"settings": {"MKL_CBWR": "AVX2", "OMP_DYNAMIC": "TRUE"}})
    now = fp32.model_copy(update={"settings": {"MKL_CBWR": "AVX", "ONEDNN_MAX_CPU_ISA": "AVX2"}})
    assert compare_numerics(before, now) == [
        "MKL_CBWR: AVX2 -> AVX",
        "OMP_DYNAMIC: TRUE -> not set",
        "ONEDNN_MAX_CPU_ISA: not set -> AVX2",
    ]


def test_variables_that_were_not_recorded_do_not_differ(fp32: Numerics) -> None:
    old = fp32.model_copy(update={"settings": None})
    now = fp32.model_copy(update={"settings": {"MKL_CBWR": "AVX2"}})
    assert compare_numerics(old, now) == []
    assert describe_unrecorded(old, now, is_identical=True) == []
    (note,) = describe_unrecorded(old, now, is_identical=False)
    assert note.endswith("were not recorded; set here: MKL_CBWR=AVX2")
    assert describe_unrecorded(now, now, is_identical=False) == []


def test_an_old_record_of_a_gpu_is_said_to_be_tf32(fp32: Numerics) -> None:
    values = {**fp32.model_dump(exclude={"settings"}), "device": "cuda"}
    old = Numerics(**values)
    (note,) = describe_unrecorded(old, old, is_identical=True)
    assert "recorded as fp32" in note and "TF32" in note


def test_only_variables_that_change_bits_on_the_device_are_settings() -> None:
    environment = {"MKL_CBWR": "AVX2", "NVIDIA_TF32_OVERRIDE": "0", "HOME": "/", "OMP_DYNAMIC": ""}
    assert find_settings(False, environment) == {"MKL_CBWR": "AVX2"}
    assert find_settings(True, environment) == {"NVIDIA_TF32_OVERRIDE": "0"}
    assert not set(CPU_VARIABLES) & set(CUDA_VARIABLES)


@pytest.mark.parametrize("name", CPU_VARIABLES)
def test_each_such_variable_makes_other_numerics(fp32: Numerics, name: str) -> None:
    here = fp32.model_copy(update={"settings": find_settings(False, {name: "1"})})
    assert f"{name}: not set -> 1" in compare_numerics(
        fp32.model_copy(update={"settings": {}}), here
    )


def test_onednns_variables_have_their_present_names() -> None:
    """Of several names that one counts which oneDNN reads."""
    environment = {"DNNL_MAX_CPU_ISA": "SSE41", "MKLDNN_DEFAULT_FPMATH_MODE": "ANY"}
    expected = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ONEDNN_DEFAULT_FPMATH_MODE": "ANY"}
    assert find_settings(False, environment) == expected
    environment |= {"MKLDNN_MAX_CPU_ISA": "AVX2"}
    assert find_settings(False, environment) == expected | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    environment |= {"ONEDNN_MAX_CPU_ISA": "AVX"}
    assert find_settings(False, environment) == expected | {"ONEDNN_MAX_CPU_ISA": "AVX"}


# Flags of torch that change bits, as a user's own code may have set them.
FLAGS = [
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cudnn.fp32_precision = 'ieee'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.cudnn.enabled = False",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.enabled = False",
    "torch.backends.mkldnn.deterministic = True",
    "torch.backends.mkldnn.set_flags(_fp32_precision='bf16')",
    "torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.set_float32_matmul_precision('medium')",
]


def read_flags() -> dict[str, Any]:
    backends: Any = torch.backends
    return {
        "TF32 convolutions": (backends.cudnn.allow_tf32, backends.cudnn.conv.fp32_precision),
        "TF32 products": backends.cuda.matmul.allow_tf32,
        "products": (torch.get_float32_matmul_precision(), backends.mkldnn.matmul.fp32_precision),
        "convolutions": backends.mkldnn.conv.fp32_precision,
        "enabled": (backends.cudnn.enabled, backends.mkldnn.enabled),
        "deterministic": backends.mkldnn.deterministic,
    }


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("flag", FLAGS)
def test_a_training_in_fp32_or_tf32_is_one_whatever_flags_others_set(
    fp32: Numerics, flag: str
) -> None:
    """What torch calculates with; that a GPU then does so needs a GPU."""
    for precision, is_tf32 in (("fp32", False), ("tf32", True)):
        exec(flag)
        apply_numerics(fp32.model_copy(update={"precision": precision}))
        assert read_flags() == {
            "TF32 convolutions": (is_tf32, "tf32" if is_tf32 else "none"),
            "TF32 products": False,
            "products": ("highest", "ieee"),
            "convolutions": "none",
            "enabled": (True, True),
            "deterministic": False,
        }


@pytest.mark.gpu
@pytest.mark.usefixtures("flags")
def test_fp32_convolutions_on_a_gpu_are_exact_and_tf32_ones_are_not() -> None:
    images, weights = torch.rand(8, 64, 16, 16), torch.rand(64, 64, 3, 3)
    exact = torch.nn.functional.conv2d(images.double(), weights.double())
    errors = {}
    for precision in ("fp32", "tf32"):
        apply_numerics(resolve_numerics("cuda", precision))
        found = torch.nn.functional.conv2d(images.cuda(), weights.cuda()).cpu()
        errors[precision] = float(((found - exact) / exact).abs().max())
    assert errors["fp32"] < 1e-5 < errors["tf32"]


# Two steps of a training, in a process whose environment and flags are given; with 1 to N threads.
# OMP_WAIT_POLICY lets threads sleep while they wait, which changes no bit. Where tests share cores,
# two threads wait for each other most of the time: only those have two whose variable may tell.
CHILD = """\
import hashlib, itertools, json, sys
import torch
from tests.builders import SHAPES, make_config
from tune_cifar.data.load import load_train_val
from tune_cifar.train.numerics import resolve_numerics
from tune_cifar.train.trainer import Trainer
exec(sys.argv[1])
data, found = load_train_val(SHAPES, 16, 8), {}
for threads, precision in itertools.product(range(1, int(sys.argv[2]) + 1), ("fp32", "bf16")):
    config = make_config(train_size=16, val_size=8, batch_size=8, epochs=1, pct_start=0.6)
    numerics = resolve_numerics("cpu", precision, threads)
    trainer = Trainer(config, data, numerics)
    results = [result.train_loss for result in trainer]
    state = trainer.model.state_dict().values()
    weights = b"".join(tensor.contiguous().numpy().tobytes() for tensor in state)
    digest = hashlib.sha256(weights + json.dumps(results).encode()).hexdigest()
    found[f"{precision} {threads}"] = [digest, numerics.model_dump_json()]
print(json.dumps(found))
"""


def train_in_a_process(
    environment: dict[str, str], code: str = "", threads: int = 1
) -> dict[str, list[str]]:
    words = [sys.executable, "-c", CHILD, code, str(min(threads, count_cores()))]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", **environment}
    answer = subprocess.run(words, capture_output=True, text=True, check=True, env=variables)
    found: dict[str, list[str]] = json.loads(answer.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def plain() -> dict[str, list[str]]:
    """Bits and Numerics of the trainings in the environment of the tests."""
    return train_in_a_process({}, threads=2)


# Some that are recorded, one of each kind; then those that are not, which must change nothing.
VARIABLES = [
    pytest.param("ONEDNN_MAX_CPU_ISA=AVX2", marks=pytest.mark.faults),
    pytest.param("DNNL_MAX_CPU_ISA=SSE41", marks=pytest.mark.faults),
    pytest.param("MKLDNN_MAX_CPU_ISA=AVX2", marks=pytest.mark.faults),
    "ATEN_CPU_CAPABILITY=avx2",
    "OMP_NUM_THREADS=2 OMP_NESTED=TRUE OMP_SCHEDULE=dynamic MKL_NUM_THREADS=2 MKL_DYNAMIC=TRUE "
    "OPENBLAS_NUM_THREADS=2 OPENBLAS_CORETYPE=Haswell NPY_DISABLE_CPU_FEATURES=X86_V4 "
    "OPENCV_CPU_DISABLE=AVX2 OPENCV_IPP=disabled FBGEMM_NO_ASMJIT=1 "
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1",
]


@pytest.mark.slow
@pytest.mark.xdist_group("plain numerics")
@pytest.mark.parametrize("variables", VARIABLES, ids=lambda variables: variables.split("=")[0])
def test_a_variable_changes_no_bits_or_the_numerics_too(
    plain: dict[str, list[str]], variables: str
) -> None:
    environment = dict(variable.split("=") for variable in variables.split())
    threads = 2 if "OMP_NUM_THREADS" in environment else 1
    for name, (digest, numerics) in train_in_a_process(environment, threads=threads).items():
        assert digest == plain[name][0] or numerics != plain[name][1], name


@pytest.mark.slow
@pytest.mark.xdist_group("plain numerics")
def test_flags_that_others_set_change_no_bits(plain: dict[str, list[str]]) -> None:
    flags = [*FLAGS, "torch.set_flush_denormal(True)"]
    # The older interface refuses to set what the newer one has set.
    code = "\n".join(flag for flag in flags if "fp32_precision = 'ieee'" not in flag)
    assert train_in_a_process({}, code, threads=2) == plain


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
    assert facts["torch"] == version("torch")
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        assert "git_commit" not in facts
        return
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=root, text=True)
    assert facts["git_commit"].removesuffix("+changes") == head.strip()
