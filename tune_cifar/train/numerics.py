"""Numerics: what changes the bits of a training outside its recipe. Resolved, recorded, restored.

Two trainings of one config are bitwise equal on a CPU when their `Numerics` are equal, and on one
GPU when they are also `deterministic`.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from tune_cifar.errors import ConfigError
from tune_cifar.record.environment import find_version
from tune_cifar.record.machine import count_cores, find_memory
from tune_cifar.schema import Numerics

# The libraries whose versions may change bits.
COMPUTING_LIBRARIES = ("torch", "numpy", "albumentations", "opencv-python-headless")
# cuBLAS reads it when CUDA starts: with a fixed workspace its kernels keep the order of their sums.
DETERMINISTIC_CUBLAS = ":4096:8"
# Environment variables that change bits. Libraries read them once, at their first operation at the
# latest, so that a process can tell them but not restore them. Not here: what `apply_numerics` sets
# (OMP_NUM_THREADS, MKL_NUM_THREADS, MKL_DYNAMIC) and what `check_openmp` refuses. The experiment is
# in tests/train/test_numerics.py.
CPU_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
    "MKL_DOMAIN_NUM_THREADS",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_CPU_ISA_HINTS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_MKLDNN_MATMUL_MIN_DIM",
    "TORCH_MKLDNN_MATMUL_MIN_SIZE",
)
# oneDNN's own prefix and its former ones, which still count. Of several the first here wins
# (tried with MAX_CPU_ISA, torch 2.15).
ONEDNN_PREFIXES = ("ONEDNN_", "MKLDNN_", "DNNL_")
CUDA_VARIABLES = (
    "CUBLAS_EMULATE_SINGLE_PRECISION",
    "CUBLAS_EMULATION_STRATEGY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "CUDNN_CONV_WSCAP_DBG",
    "CUDNN_ERRATA_JSON_FILE",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_TUNABLEOP_ENABLED",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_CUDNN_USE_HEURISTIC_MODE_B",
    "TORCH_CUDNN_V8_API_DISABLED",
)


def resolve_numerics(
    device: str = "auto",
    precision: str = "auto",
    threads: int = 1,
    deterministic: bool = False,
    execution: str = "auto",
) -> Numerics:
    """Choose device, precision and memory format on this machine.

    Args:
        device: auto, cpu or cuda; auto takes CUDA where there is a GPU.
        precision: auto, fp32, tf32 or bf16; auto takes bf16 where the hardware multiplies it (AMX,
            AVX512-BF16, CUDA compute capability >= 8). tf32, torch's own default on CUDA, rounds
            the factors of fp32 convolutions to 10 bits; fp32 rounds nothing.
        threads: CPU cores of one training, `cpus_per_trial` in messages.
        deterministic: use deterministic kernels; matters on CUDA only.
        execution: auto, eager, captured (a step's gradients come from one CUDA graph) or compiled
            (the same, of kernels that torch.compile makes); auto captures on CUDA.

    Raises:
        ConfigError: an unknown value, or one that this machine cannot provide.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"`device` must be auto, cpu or cuda, got {device!r}.")
    if precision not in ("auto", "fp32", "tf32", "bf16"):
        raise ConfigError(f"`precision` must be auto, fp32, tf32 or bf16, got {precision!r}.")
    check_cpus(threads)
    check_openmp(threads, _read_environment())
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        rule = "`device='cuda'` needs a CUDA device"
        raise ConfigError(f"{rule}, but this machine has none. Use `device='cpu'`.")
    on_cuda = has_cuda and device != "cpu"
    if precision == "tf32" and not on_cuda:
        rule = "`precision='tf32'` needs a CUDA device"
        raise ConfigError(f"{rule}, but the training runs on the CPU. Use `precision='fp32'`.")
    if execution == "auto":
        execution = "captured" if on_cuda else "eager"
    if execution not in get_args(Numerics.model_fields["execution"].annotation):
        rule = "`execution` must be auto, eager, captured or compiled"
        raise ConfigError(f"{rule}, got {execution!r}.")
    if execution != "eager" and not on_cuda:
        rule = f"`execution='{execution}'` needs a CUDA device"
        raise ConfigError(f"{rule}, but the training runs on the CPU. Leave it out.")
    if precision == "auto":
        precision = "bf16" if _multiplies_bf16(on_cuda) else "fp32"
    versions = {name: find_version(name) for name in COMPUTING_LIBRARIES}
    return Numerics(
        device="cuda" if on_cuda else "cpu",
        device_name=torch.cuda.get_device_name() if on_cuda else _cpu_name(),
        capability=_cuda_capability() if on_cuda else _cpu_capability(),
        precision=cast(Literal["fp32", "tf32", "bf16"], precision),
        # On a CPU channels_last slows fp32 convolutions of small networks down and makes bf16 ones
        # faster (one thread, AMX).
        memory_format="channels_last" if precision == "bf16" or on_cuda else "contiguous",
        threads=threads,
        deterministic=deterministic,
        execution=cast(Literal["eager", "captured", "compiled"], execution),
        versions={"python": platform.python_version(), **versions},
        settings=find_settings(on_cuda, _read_environment()),
    )


def find_settings(on_cuda: bool, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are set and change bits of a training on a GPU, or on a CPU."""
    names = CUDA_VARIABLES if on_cuda else CPU_VARIABLES
    settings = {}
    for name in names:
        synonyms = [name.replace(ONEDNN_PREFIXES[0], prefix) for prefix in ONEDNN_PREFIXES]
        found = [environment[synonym] for synonym in synonyms if environment.get(synonym)]
        if found:
            settings[name] = found[0]
    return settings


@functools.cache
def _read_environment() -> dict[str, str]:
    """Return the environment of the first call: a change after it reaches no library."""
    return dict(os.environ)


def restore_numerics(recorded: Numerics, device: str | None = None) -> Numerics:
    """Return the recorded settings on this machine.

    What can be chosen is restored; processor, GPU, versions and environment variables are those of
    this machine. On a CPU fp32 takes the place of tf32.

    Args:
        device: auto, cpu or cuda instead of the recorded device.

    Raises:
        ConfigError: the machine does not have the device, or fewer CPU cores than recorded.
    """
    device = device or recorded.device
    is_tf32 = recorded.precision == "tf32"
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    precision = "fp32" if is_tf32 and on_cpu else recorded.precision
    execution = "eager" if on_cpu else recorded.execution
    how = recorded.threads, recorded.deterministic, execution
    here = resolve_numerics(device, precision, *how)
    return here.model_copy(update={"memory_format": recorded.memory_format})


def check_cpus(num: int) -> None:
    """Refuse a number of CPU cores per training that this machine does not have.

    Raises:
        ConfigError: `num` is less than 1 or more than `count_cores()`.
    """
    if not 1 <= num <= count_cores():
        rule = f"`cpus_per_trial` must be 1 to {count_cores()} (the cores here)"
        raise ConfigError(f"{rule}, got {num}.")


def check_openmp(threads: int, environment: Mapping[str, str]) -> None:
    """Refuse a number of threads that OpenMP would lower: oneDNN waits for the others for ever.

    Raises:
        ConfigError: with the variable.
    """
    limit = environment.get("OMP_THREAD_LIMIT", "")
    is_lowered = {
        "OMP_DYNAMIC": environment.get("OMP_DYNAMIC", "").lower() == "true",
        "OMP_MAX_ACTIVE_LEVELS": environment.get("OMP_MAX_ACTIVE_LEVELS") == "0",
        "OMP_THREAD_LIMIT": limit.isdecimal() and int(limit) < threads,
    }
    for name, is_low in is_lowered.items():
        if threads > 1 and is_low:
            rule = f"{name} must allow the {threads} threads of `cpus_per_trial`"
            raise ConfigError(f"{rule}, got {environment[name]}. Unset it.")


def get_memory_mb(numerics: Numerics) -> float:
    """Return the memory of the GPU, or on a CPU what this process may use of it, in MiB."""
    if numerics.device == "cuda":
        return torch.cuda.mem_get_info()[1] / 2**20
    return find_memory() / 2**20


def count_gpus(device: str) -> int:
    """Return the number of GPUs that trainings with this `device` may use."""
    return 0 if device == "cpu" else torch.cuda.device_count()


def _multiplies_bf16(on_cuda: bool) -> bool:
    if on_cuda:
        return torch.cuda.get_device_capability() >= (8, 0)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _cuda_capability() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _cpu_capability() -> str:
    names = [torch.backends.cpu.get_cpu_capability()]
    names += ["AVX512_BF16"] if torch.cpu._is_avx512_bf16_supported() else []
    names += ["AMX"] if torch.cpu._is_amx_tile_supported() else []
    return "+".join(names)


def _cpu_name() -> str:
    """Return the vendor's name, family and model: virtual machines often hide the exact name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = {}
    for line in text.split("\n\n")[0].splitlines():  # the first core
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    family, model = fields.get("cpu family", "?"), fields.get("model", "?")
    return f"{fields['model name']} (family {family}, model {model})"


def apply_numerics(numerics: Numerics) -> None:
    """Set this process's torch flags: all that change bits, also those that others may have set.

    Every training calls it at its start, since a warm worker keeps the flags of the one before.

    Raises:
        ConfigError: the device is CUDA and this machine has none.
    """
    if numerics.device == "cuda" and not torch.cuda.is_available():
        rule = "numerics: the recorded device is cuda"
        raise ConfigError(f"{rule}, but this machine has none. Use `device='cpu'`.")
    torch.set_num_threads(numerics.threads)
    if numerics.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", DETERMINISTIC_CUBLAS)
    # Setting the flag imports torch's compiler, which takes two seconds.
    if torch.are_deterministic_algorithms_enabled() != numerics.deterministic:
        torch.use_deterministic_algorithms(numerics.deterministic)
    torch.backends.cudnn.deterministic = numerics.deterministic
    # cuDNN would time several kernels for each shape: 4 % faster on an H200, not always the same.
    torch.backends.cudnn.benchmark = False
    _set_precision(numerics.precision)


def _set_precision(precision: str) -> None:
    """Let fp32 be fp32 on a CPU and a GPU; with `tf32` a GPU's convolutions are TF32."""
    backends: Any = torch.backends
    # First those of the newer interface, of which torch's own code still reads only the older one.
    for setting in (backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn):
        setting.fp32_precision = "none"
    backends.mkldnn.set_flags(_enabled=True, _deterministic=False, _fp32_precision="none")
    backends.mkldnn.conv.fp32_precision = "none"
    backends.cudnn.enabled = True
    backends.cudnn.allow_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(False)


def autocast(numerics: Numerics) -> torch.autocast:
    """Return the context for forward passes: matrix products in bf16 if that is the precision."""
    return torch.autocast(numerics.device, torch.bfloat16, enabled=numerics.precision == "bf16")


def memory_format(numerics: Numerics) -> torch.memory_format:
    """Return torch's constant for the memory format of images and convolution weights."""
    is_channels_last = numerics.memory_format == "channels_last"
    return torch.channels_last if is_channels_last else torch.contiguous_format


def repeats_bits(numerics: Numerics) -> bool:
    """Return whether a training under these Numerics has equal bits each time."""
    return numerics.device == "cpu" or numerics.deterministic


def compare_numerics(recorded: Numerics, current: Numerics) -> list[str]:
    """Return the differences as `name: recorded -> current`; none when bits must agree.

    What was not recorded does not differ: see `describe_unrecorded`.
    """
    before = recorded.model_dump(exclude={"versions", "settings"}) | recorded.versions
    now = current.model_dump(exclude={"versions", "settings"}) | current.versions
    changes = [
        f"{name}: {before.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in dict.fromkeys([*before, *now])  # in the order of the fields
        if before.get(name) != now.get(name)
    ]
    if recorded.settings is None or current.settings is None:
        return changes
    for name in dict.fromkeys([*recorded.settings, *current.settings]):
        was, is_now = (each.get(name, "not set") for each in (recorded.settings, current.settings))
        changes += [f"{name}: {was} -> {is_now}"] if was != is_now else []
    return changes


def describe_unrecorded(recorded: Numerics, current: Numerics, is_identical: bool) -> list[str]:
    """Return, a sentence each, what matters and an old record does not say.

    Args:
        is_identical: the bits are equal, so that no variable can have changed them.
    """
    notes: list[str] = []
    if recorded.settings is not None:
        return notes
    if recorded.precision == "tf32":
        notes.append("recorded as fp32, but a GPU's convolutions were TF32: it is precision tf32")
    if not is_identical:
        here = ", ".join(f"{name}={value}" for name, value in (current.settings or {}).items())
        what = "environment variables that change bits"
        notes.append(f"{what} were not recorded; set here: {here or 'none'}")
    return notes
