"""Numerics: what changes the bits of a training outside its recipe. Resolved, recorded, restored.

Two trainings of one config are bitwise equal on a CPU when their `Numerics` are equal, and on one
GPU when they are also `deterministic`.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Literal, cast

import psutil
import torch

from tune_cifar.errors import ConfigError
from tune_cifar.record.environment import find_version
from tune_cifar.schema import Numerics

# The libraries whose versions may change bits.
COMPUTING_LIBRARIES = ("torch", "numpy", "albumentations", "opencv-python-headless")
# cuBLAS reads it when CUDA starts: with a fixed workspace its kernels keep the order of their sums.
DETERMINISTIC_CUBLAS = ":4096:8"


def resolve_numerics(
    device: str = "auto",
    precision: str = "auto",
    threads: int = 1,
    deterministic: bool = False,
    execution: str = "eager",
) -> Numerics:
    """Choose device, precision and memory format on this machine.

    Args:
        device: auto, cpu or cuda; auto takes CUDA where there is a GPU.
        precision: auto, fp32 or bf16; auto takes bf16 where the hardware multiplies it (AMX,
            AVX512-BF16, CUDA compute capability >= 8).
        threads: CPU cores of one training, `cpus_per_trial` in messages.
        deterministic: use deterministic kernels; matters on CUDA only.
        execution: eager, or captured: a training step as one CUDA graph.

    Raises:
        ConfigError: an unknown value, or one that this machine cannot provide.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"`device` must be auto, cpu or cuda, got {device!r}.")
    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"`precision` must be auto, fp32 or bf16, got {precision!r}.")
    check_cpus(threads)
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        rule = "`device='cuda'` needs a CUDA device"
        raise ConfigError(f"{rule}, but this machine has none. Use `device='cpu'`.")
    on_cuda = has_cuda and device != "cpu"
    if execution not in ("eager", "captured"):
        raise ConfigError(f"`execution` must be eager or captured, got {execution!r}.")
    if execution == "captured" and not on_cuda:
        rule = "`execution='captured'` needs a CUDA device"
        raise ConfigError(f"{rule}, but the training runs on the CPU. Leave it out.")
    if precision == "auto":
        precision = "bf16" if _multiplies_bf16(on_cuda) else "fp32"
    versions = {name: find_version(name) for name in COMPUTING_LIBRARIES}
    return Numerics(
        device="cuda" if on_cuda else "cpu",
        device_name=torch.cuda.get_device_name() if on_cuda else _cpu_name(),
        capability=_cuda_capability() if on_cuda else _cpu_capability(),
        precision=cast(Literal["fp32", "bf16"], precision),
        # On a CPU channels_last slows fp32 convolutions of small networks down and makes bf16 ones
        # faster (one thread, AMX).
        memory_format="channels_last" if precision == "bf16" or on_cuda else "contiguous",
        threads=threads,
        deterministic=deterministic,
        execution=cast(Literal["eager", "captured"], execution),
        versions={"python": platform.python_version(), **versions},
    )


def restore_numerics(recorded: Numerics, device: str | None = None) -> Numerics:
    """Return the recorded settings on this machine.

    What can be chosen is restored; processor, GPU and versions are those of this machine.

    Args:
        device: auto, cpu or cuda instead of the recorded device.

    Raises:
        ConfigError: the machine does not have the device, or fewer CPU cores than recorded.
    """
    device = device or recorded.device
    here = resolve_numerics(device, recorded.precision, recorded.threads, recorded.deterministic)
    execution = recorded.execution if here.device == "cuda" else "eager"
    return here.model_copy(update={"memory_format": recorded.memory_format, "execution": execution})


def check_cpus(num: int) -> None:
    """Refuse a number of CPU cores per training that this machine does not have.

    Raises:
        ConfigError: `num` is less than 1 or more than `count_cores()`.
    """
    if not 1 <= num <= count_cores():
        rule = f"`cpus_per_trial` must be 1 to {count_cores()} (the cores here)"
        raise ConfigError(f"{rule}, got {num}.")


def count_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(psutil.Process().cpu_affinity() or [0])


def get_memory_mb(numerics: Numerics) -> float:
    """Return the memory of the GPU, or of the machine on a CPU, in MiB."""
    if numerics.device == "cuda":
        return torch.cuda.mem_get_info()[1] / 2**20
    return float(psutil.virtual_memory().total) / 2**20


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
    """Set this process's torch flags.

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
    torch.backends.cudnn.benchmark = numerics.device == "cuda" and not numerics.deterministic


def autocast(numerics: Numerics) -> torch.autocast:
    """Return the context for forward passes: matrix products in bf16 if that is the precision."""
    return torch.autocast(numerics.device, torch.bfloat16, enabled=numerics.precision == "bf16")


def memory_format(numerics: Numerics) -> torch.memory_format:
    """Return torch's constant for the memory format of images and convolution weights."""
    is_channels_last = numerics.memory_format == "channels_last"
    return torch.channels_last if is_channels_last else torch.contiguous_format


def compare_numerics(recorded: Numerics, current: Numerics) -> list[str]:
    """Return the differences as `name: recorded -> current`; none when bits must agree."""
    before = recorded.model_dump(exclude={"versions"}) | recorded.versions
    now = current.model_dump(exclude={"versions"}) | current.versions
    return [
        f"{name}: {before.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in dict.fromkeys([*before, *now])  # in the order of the fields
        if before.get(name) != now.get(name)
    ]
