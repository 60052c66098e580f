"""The stopwatch: sides take turns, phases are marked, the device is waited for, medians and quartiles are kept."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Mark = Callable[[str], None]
Side = Callable[[Mark], object]
TOTAL = "total"


@dataclass
class Timing:
    """Seconds that one thing took, one value per round, in order."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The 25th and the 75th percentile, by linear interpolation."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Median, quartiles and every value, in seconds."""
        low, high = self.quartiles
        return {"median_s": self.median, "q1_s": low, "q3_s": high, "seconds": self.seconds}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    sides: Mapping[str, Side], *, repeats: int, warmup: int, device: torch.device, on_round: Callable[[], None]
) -> dict[str, dict[str, Timing]]:
    """Time several sides in turns, so that a machine that slows down or speeds up does so for all of them.

    In every round each side runs once; the round begins with another side each time. Python's garbage collector runs
    between the rounds only.

    Args:
        sides: what to run. A side is given ``mark``, and calls ``mark("read")`` when its phase of that name has ended.
        repeats: rounds that count.
        warmup: rounds before them that do not.
        device: waited for at every mark and at the end.
        on_round: called after every round, warm-up included.

    Returns:
        For each side the time of every phase, and of the whole under :data:`TOTAL`.
    """
    names = list(sides)
    measured: dict[str, dict[str, Timing]] = {name: {} for name in names}
    for round_ in range(warmup + repeats):
        first = round_ % len(names)
        gc.collect()
        gc.disable()
        try:
            for name in names[first:] + names[:first]:
                phases = _run(sides[name], device)
                for phase, seconds in phases.items() if round_ >= warmup else ():
                    measured[name].setdefault(phase, Timing()).seconds.append(seconds)
        finally:
            gc.enable()
        on_round()
    return measured


def _run(side: Side, device: torch.device) -> dict[str, float]:
    """One run: seconds of its phases and of the whole."""
    phases: dict[str, float] = {}
    synchronize(device)
    started = last = time.perf_counter()

    def mark(phase: str) -> None:
        nonlocal last
        synchronize(device)
        now = time.perf_counter()
        phases[phase], last = now - last, now

    side(mark)
    synchronize(device)
    return phases | {TOTAL: time.perf_counter() - started}
