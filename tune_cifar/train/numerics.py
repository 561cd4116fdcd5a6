"""What changes bits outside the recipe: probed once, recorded, restored.

Two trainings of one config are bitwise equal on a CPU when their `Numerics` are equal, and on one GPU when they are
also `deterministic`.
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

# Read by cuBLAS when CUDA starts: a fixed workspace makes its kernels choose the same summation order every time.
DETERMINISTIC_CUBLAS = ":4096:8"


def resolve_numerics(
    device: str = "auto",
    precision: str = "auto",
    threads: int = 1,
    deterministic: bool = False,
    execution: str = "eager",
) -> Numerics:
    """Settle device, precision and memory format on this machine.

    Args:
        device: auto, cpu or cuda; auto takes CUDA where it is.
        precision: auto, fp32 or bf16; auto takes bf16 where the hardware multiplies it (AMX, AVX512-BF16, CUDA
            compute capability >= 8).
        threads: of one training on the CPU.
        deterministic: ask for deterministic kernels; matters on CUDA only.
        execution: eager, or captured: a training step as one CUDA graph.

    Raises:
        ConfigError: for a device, precision, number of cores or execution that this machine does not have.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device: auto, cpu or cuda must be given, got {device!r}.")
    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"--precision: auto, fp32 or bf16 must be given, got {precision!r}.")
    check_cpus(threads)
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError(
            "--device: cuda needs a CUDA device, got a machine without one. Use --device cpu."
        )
    on_cuda = has_cuda and device != "cpu"
    if execution not in ("eager", "captured"):
        raise ConfigError(f"--execution: eager or captured must be given, got {execution!r}.")
    if execution == "captured" and not on_cuda:
        raise ConfigError(
            "--execution: captured needs a CUDA device, got a training on the CPU. Leave it out."
        )
    if precision == "auto":
        precision = "bf16" if _multiplies_bf16(on_cuda) else "fp32"
    return Numerics(
        device="cuda" if on_cuda else "cpu",
        device_name=torch.cuda.get_device_name() if on_cuda else _cpu_name(),
        capability=_cuda_capability() if on_cuda else _cpu_capability(),
        precision=cast(Literal["fp32", "bf16"], precision),
        # fp32 convolutions of small nets on a CPU lose time to channels_last; bf16 ones gain (one thread, AMX).
        memory_format="channels_last" if precision == "bf16" or on_cuda else "contiguous",
        threads=threads,
        deterministic=deterministic,
        execution=cast(Literal["eager", "captured"], execution),
        versions={
            "python": platform.python_version(),
            **{name: find_version(name) for name in COMPUTING_LIBRARIES},
        },
    )


def restore_numerics(recorded: Numerics, device: str | None = None) -> Numerics:
    """The recorded settings on this machine: what can be chosen is restored, what cannot (processor, versions) is this
    machine's own.

    Raises:
        ConfigError: when the recorded device is not here.
    """
    here = resolve_numerics(
        device or recorded.device, recorded.precision, recorded.threads, recorded.deterministic
    )
    execution = recorded.execution if here.device == "cuda" else "eager"
    return here.model_copy(update={"memory_format": recorded.memory_format, "execution": execution})


# The libraries whose versions may change bits.
COMPUTING_LIBRARIES = ("torch", "numpy", "albumentations", "opencv-python-headless")


def check_cpus(num: int) -> None:
    """Refuse more CPU cores for one training than there are.

    Raises:
        ConfigError: when the machine does not have them.
    """
    if not 1 <= num <= count_cores():
        raise ConfigError(
            f"--cpus-per-trial: 1 to {count_cores()} (the cores here) must hold, got {num}."
        )


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(psutil.Process().cpu_affinity() or [0])


def get_memory_mb(numerics: Numerics) -> float:
    """MiB of memory of the GPU, or of the machine."""
    num_bytes = (
        torch.cuda.mem_get_info()[1] if numerics.device == "cuda" else psutil.virtual_memory().total
    )
    return num_bytes / 2**20


def count_gpus(device: str) -> int:
    """CUDA devices that may be used under this --device."""
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
    """Vendor's name with family and model, since virtual machines often hide the exact name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def apply_numerics(numerics: Numerics) -> None:
    """Set this process's torch flags to the recorded ones. Called at the start of every training, since warm workers
    keep flags from the one before.

    Raises:
        ConfigError: when the record asks for CUDA and there is none.
    """
    if numerics.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "numerics: the recorded device is cuda, got a machine without one. Use --device cpu."
        )
    torch.set_num_threads(numerics.threads)
    if numerics.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", DETERMINISTIC_CUBLAS)
    # Setting it imports torch's compiler, two seconds of every process.
    if torch.are_deterministic_algorithms_enabled() != numerics.deterministic:
        torch.use_deterministic_algorithms(numerics.deterministic)
    torch.backends.cudnn.deterministic = numerics.deterministic
    torch.backends.cudnn.benchmark = numerics.device == "cuda" and not numerics.deterministic


def autocast(numerics: Numerics) -> torch.autocast:
    """The context in which forward passes run: bf16 matrix work when the record says so."""
    return torch.autocast(numerics.device, torch.bfloat16, enabled=numerics.precision == "bf16")


def memory_format(numerics: Numerics) -> torch.memory_format:
    """torch's constant for the recorded memory format of images and convolution weights."""
    return (
        torch.channels_last
        if numerics.memory_format == "channels_last"
        else torch.contiguous_format
    )


def compare_numerics(recorded: Numerics, current: Numerics) -> list[str]:
    """What differs, as `name: recorded -> current`; empty when bits must agree."""
    before, now = (
        {**n.model_dump(exclude={"versions"}), **n.versions} for n in (recorded, current)
    )
    return [
        f"{name}: {before.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
