"""Limits that a benchmark's ratios are held to."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A limit on a ratio: at least or at most ``limit``."""

    ratio: str
    least: bool
    limit: float

    def verdict(self, value: float) -> dict[str, Any]:
        """Whether ``value`` meets it."""
        met = value >= self.limit if self.least else value <= self.limit
        return {"ratio": self.ratio, "at_least" if self.least else "at_most": self.limit, "value": value, "met": met}
