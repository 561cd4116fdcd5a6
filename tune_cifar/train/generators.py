"""Seeds by purpose, and the global random generators, which a network of the user's own may use."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch


def derive_seed(seed: int, purpose: str) -> int:
    """Return a 63-bit seed for one purpose, such as init, order, augment or dropout.

    The random streams of different purposes are unrelated.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def seed_globals(seed: int, purpose: str) -> Iterator[None]:
    """Seed torch's, numpy's and Python's global generators; what they had comes back at the end.

    Of torch that is the CPU's generator.
    """
    of_numpy, of_python = np.random.get_state(), random.getstate()
    derived = derive_seed(seed, purpose)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived)
            np.random.seed(derived % 2**32)
            random.seed(derived)
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


class GlobalGenerators:
    """The state of torch's, numpy's and Python's global generators in one training.

    As a context it is put in their place, and what they had before comes back at the end: so
    torch's own Dropout draws the same in every training of a seed, whatever ran before.

    Args:
        seed: of the training.
        device: of the training. A GPU's generator belongs to the state, no other GPU's does.

    Attributes:
        state: of tensors and plain containers, for a checkpoint.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        before = self._read()
        torch.default_generator.manual_seed(derive_seed(seed, "global"))
        if device.type == "cuda":
            torch.cuda.manual_seed(derive_seed(seed, "global"))
        np.random.seed(derive_seed(seed, "numpy") % 2**32)
        random.seed(derive_seed(seed, "python"))
        self.state = self._read()
        self._write(before)

    def __enter__(self) -> None:
        self._before = self._read()
        self._write(self.state)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.state = self._read()
        self._write(self._before)

    def _read(self) -> dict[str, Any]:
        kind, words, *rest = np.random.get_state()
        version, numbers, gauss = random.getstate()
        on_cuda = self._device.type == "cuda"
        return {
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(self._device)] if on_cuda else [],
            "numpy": [str(kind), torch.from_numpy(np.asarray(words).astype(np.int64)), *rest],
            "python": [version, list(numbers), gauss],
        }

    def _write(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        if self._device.type == "cuda":  # checkpoints of before hold more, of the other GPUs
            torch.cuda.set_rng_state(state["cuda"][0], self._device)
        kind, words, *rest = state["numpy"]
        np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
