"""Which frames make which batch: a pure function of (seed, step), so that a run resumes at the exact sample.

A batch is the batch of all ranks together, so neither their number nor that of loader workers changes the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from dtvla.errors import UserError

BLOCK = 1000  # weighted parts have their exact shares, to a thousandth, in every so many samples


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
    return _chain((seed,), np.arange(step * batch_size, (step + 1) * batch_size), count)


def _chain(seed: tuple[int, ...], numbers_B: np.ndarray, count: int) -> np.ndarray:
    epochs, offsets = np.divmod(numbers_B, count)
    return np.array([_permutation((*seed, int(e)), count)[o] for e, o in zip(epochs, offsets, strict=True)])


@lru_cache(maxsize=64)
def _permutation(seed: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(list(seed)).permutation(count)


class TrainSampler(Sampler[BatchKey]):
    """Endless training batches from ``start_step`` on."""

    def __init__(self, frames_F: np.ndarray, batch_size: int, seed: int, start_step: int = 0) -> None:
        """Sample from the frame indices ``frames_F``, each once per epoch."""
        self._frames_F, self._batch_size, self._seed, self._start = frames_F, batch_size, seed, start_step

    def __iter__(self) -> Iterator[BatchKey]:
        step = self._start
        while True:
            yield BatchKey(step, self._frames(step))
            step += 1

    def _frames(self, step: int) -> np.ndarray:
        return self._frames_F[batch_positions(self._seed, step, self._batch_size, len(self._frames_F))]


class MixtureSampler(TrainSampler):
    """Endless training batches in which each part has a share of its own, whatever its size.

    Every :data:`BLOCK` samples hold each part as often as its weight says, in random order; the samples of a part
    follow a chain of permutations of their own, so a part's frames are all shown before one is shown again.
    """

    def __init__(
        self, parts: Sequence[np.ndarray], weights: Sequence[float], batch_size: int, seed: int, start_step: int = 0
    ) -> None:
        """Sample from the frame indices of each part.

        Raises:
            UserError: as many weights as parts are needed, each positive, none below a thousandth of their sum.
        """
        super().__init__(np.concatenate(parts), batch_size, seed, start_step)
        self._parts = list(parts)
        shares = np.asarray(weights, dtype=np.float64)
        if len(shares) != len(parts) or not (np.isfinite(shares).all() and (shares > 0).all()):
            raise UserError(f"data.weights: found {list(weights)}; give {len(parts)} positive numbers, one per dataset")
        exact = shares / shares.sum() * BLOCK
        self._quota = np.floor(exact).astype(int)
        most_cut = np.argsort(-(exact - self._quota), kind="stable")
        self._quota[most_cut[: BLOCK - self._quota.sum()]] += 1
        if (self._quota == 0).any():
            raise UserError(f"data.weights: {list(weights)} has one below a thousandth of the sum; leave that part out")

    def _frames(self, step: int) -> np.ndarray:
        numbers_B = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        return np.array([self._frame(*divmod(int(number), BLOCK)) for number in numbers_B])

    def _frame(self, block: int, offset: int) -> int:
        order = np.repeat(np.arange(len(self._parts)), self._quota)[_permutation((self._seed, 0, block), BLOCK)]
        part = int(order[offset])
        number = block * self._quota[part] + int((order[:offset] == part).sum())
        frames_F = self._parts[part]
        return int(frames_F[_chain((self._seed, 1, part), np.array([number]), len(frames_F))[0]])


class ValidationSampler(Sampler[BatchKey]):
    """Every held-out frame once, in a fixed random order (so that the first batches alone are a fair sample)."""

    def __init__(self, frames_F: np.ndarray, batch_size: int, seed: int, least: int = 1) -> None:
        """Order the frame indices ``frames_F`` by ``seed``; a last batch below ``least`` joins the one before it."""
        order = np.random.default_rng([seed, len(frames_F)]).permutation(len(frames_F))
        starts = list(range(0, len(order), batch_size))
        if len(starts) > 1 and len(order) - starts[-1] < least:
            starts.pop()
        self._batches = [frames_F[part] for part in np.split(order, starts[1:])] if starts else []

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[BatchKey]:
        for step, frames_B in enumerate(self._batches):
            yield BatchKey(step, frames_B)
