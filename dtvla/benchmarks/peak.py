"""How much memory a piece of work needs at most, beside what is there already."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc


class Meter:
    """Reads torch's allocator on a GPU, the process on a CPU (Linux), which should be a fresh one."""

    def __init__(self, device: torch.device) -> None:
        """Count from what is there now."""
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            libc = ctypes.CDLL(None)
            libc.mallopt(MMAP_THRESHOLD, 2**16)  # freed tensors go back to the system
            libc.malloc_trim(0)
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
