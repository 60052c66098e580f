"""Continuous actions as tokens: uniform bins over [-1, 1], one token per step and dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DecodeMode = Literal["fixed", "published"]


@dataclass(frozen=True)
class ActionBins:
    """Bins between ``count`` edges spread evenly over [-1, 1], and the ids that stand for them.

    Value x has bin k = the smallest k whose edge is >= x, and id = last_id - k: the ids run downwards, as in pi0-FAST
    and DeepThinkVLA, whose band ends ``skip`` ids below the end of the base vocabulary. Bin 0 holds -1 alone.

    The published decoder returns the centre of the interval *above* the bin's own, one bin too high on average. Mode
    ``fixed`` returns the centre of the bin itself, so encoding followed by decoding moves a value by half a bin at
    most; checkpoints trained on the published labels gain from it too, because the labels are the same.

    Attributes:
        count: number of edges, bins and ids (2048 published).
        first_id: the lowest id of the band.
        mode: how an id is turned into a value.
    """

    count: int
    first_id: int
    mode: DecodeMode = "fixed"

    def __post_init__(self) -> None:
        """Refuse a band without an interval, and unknown modes."""
        if self.count < 2:
            raise ValueError(f"action bins: at least 2 are needed, got {self.count}")
        if self.mode not in ("fixed", "published"):
            raise ValueError(f"action bins: mode {self.mode!r} is neither 'fixed' nor 'published'")

    @classmethod
    def at_end_of(cls, base_size: int, count: int, skip: int = 0, mode: DecodeMode = "fixed") -> ActionBins:
        """The band that ends ``skip`` ids before the end of a base vocabulary of ``base_size`` ids."""
        return cls(count=count, first_id=base_size - skip - count, mode=mode)

    @property
    def last_id(self) -> int:
        """The highest id of the band: bin 0, value -1."""
        return self.first_id + self.count - 1

    @property
    def width(self) -> float:
        """Width of one bin in normalised units."""
        return 2.0 / (self.count - 1)

    def encode(self, actions: Tensor) -> Tensor:
        """Turn values of any shape (clamped to [-1, 1]) into int64 ids of the same shape."""
        edges_K = torch.linspace(-1.0, 1.0, self.count, dtype=torch.float64, device=actions.device)
        return self.last_id - torch.bucketize(actions.double().clamp(-1.0, 1.0), edges_K, right=False)

    def decode(self, ids: Tensor) -> Tensor:
        """Turn ids of any shape into float32 values; ids outside the band count as its nearest end."""
        return self.value(self.last_id - ids)

    def value(self, bins: Tensor) -> Tensor:
        """Value in [-1, 1] (float32) that bin indices of any shape decode to."""
        interval = bins if self.mode == "published" else bins - 1
        return ((interval.clamp(0, self.count - 2).double() + 0.5) * self.width - 1.0).float()

    def most_likely(self, logits_K: Tensor) -> Tensor:
        """Most likely bins (...) of logits (..., count) in the order of the bins.

        Of equal ones, which bfloat16 has often, the highest: its id is the lowest, which the published code takes.
        """
        return self.count - 1 - logits_K.flip(-1).argmax(-1)

    def band(self, logits_V: Tensor) -> Tensor:
        """Columns (..., count) of logits (..., vocabulary) in the order of the bins: column k is bin k."""
        return logits_V[..., self.first_id : self.last_id + 1].flip(-1)
