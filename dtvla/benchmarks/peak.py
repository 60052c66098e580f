"""How much memory a piece of work needs at most, beside what is there already."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc


def give_back_freed() -> None:
    """Let this process return the memory of tensors to the system as soon as they are freed (glibc)."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)


class Meter:
    """Reads torch's allocator on a GPU, the process on a CPU (Linux).

    There it should be a fresh process that began with :func:`give_back_freed`.
    """

    def __init__(self, device: torch.device) -> None:
        """Count from what is there now."""
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            ctypes.CDLL(None).malloc_trim(0)
        self.restart()
        self._before = self._highest()

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the highest resident size so far := the present one

    def peak(self) -> int:
        """Most bytes since the last start, beside those of the first."""
        return self._highest() - self._before

    def _highest(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
