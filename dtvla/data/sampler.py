"""Which frames make which batch: a pure function of (seed, step), so that a run resumes at the exact sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class BatchKey:
    """One batch to be made.

    Attributes:
        step: number of the batch, from 0.
        frames_B: dataset indices of its samples.
    """

    step: int
    frames_B: np.ndarray


def batch_positions(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """Positions (B,) of the samples of a batch, below ``count``.

    Samples follow an endless chain of permutations, one per epoch, each determined by (seed, epoch); batch ``step``
    takes the next B of them, so an epoch's last batch continues into the next epoch and none is short.
    """
    epochs, offsets = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
    return np.array([_permutation(seed, int(e), count)[o] for e, o in zip(epochs, offsets, strict=True)])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


class TrainSampler(Sampler[BatchKey]):
    """Endless training batches from ``start_step`` on."""

    def __init__(self, frames_F: np.ndarray, batch_size: int, seed: int, start_step: int = 0) -> None:
        """Sample from the frame indices ``frames_F``."""
        self._frames_F, self._batch_size, self._seed, self._start = frames_F, batch_size, seed, start_step

    def __iter__(self) -> Iterator[BatchKey]:
        step = self._start
        while True:
            positions_B = batch_positions(self._seed, step, self._batch_size, len(self._frames_F))
            yield BatchKey(step, self._frames_F[positions_B])
            step += 1


class ValidationSampler(Sampler[BatchKey]):
    """Every held-out frame once, in a fixed random order (so that the first batches alone are a fair sample)."""

    def __init__(self, frames_F: np.ndarray, batch_size: int, seed: int) -> None:
        """Order the frame indices ``frames_F`` by ``seed``."""
        order = np.random.default_rng([seed, len(frames_F)]).permutation(len(frames_F))
        self._batches = [frames_F[order[i : i + batch_size]] for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[BatchKey]:
        for step, frames_B in enumerate(self._batches):
            yield BatchKey(step, frames_B)
