"""How much memory a piece of work needs at most, beside what is there already."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of torch's allocator on a GPU, of the process on a CPU (Linux), which should be a fresh one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 2**16)  # freed tensors go back to the system
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size so far := the present one
    before = _highest()
    work()
    return _highest() - before


def _highest() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
