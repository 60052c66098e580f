"""How the samples of one optimiser step are spread over ranks and cut into forward passes.

The cut decides about memory and speed only: every sample is in exactly one pass, and the gradient of a step is a sum
over all of its samples. Each rank makes the same number of passes, because sharded weights are gathered by all ranks
together. Everything here is a pure function of the lengths, so ranks agree without talking.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dtvla.errors import UserError


@dataclass(frozen=True)
class Cut:
    """How a step is cut; at most one of the two sizes is given, none makes one pass of everything.

    Attributes:
        micro_batch_size: samples of a pass on one rank. Samples of like length go together, for little padding.
        pack_tokens: length of a packed row; a pass is one row, filled with whole samples.
        ranks: processes that train together.
        rank: this one, from 0.
    """

    micro_batch_size: int | None = None
    pack_tokens: int | None = None
    ranks: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible sizes."""
        for name in ("micro_batch_size", "pack_tokens"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UserError(f"algorithm.{name}: {size} is below 1; use null for the whole batch")
        if self.micro_batch_size is not None and self.pack_tokens is not None:
            raise UserError("algorithm.micro_batch_size, algorithm.pack_tokens: both are given; set one to null")

    def passes(self, lengths_B: np.ndarray) -> list[np.ndarray]:
        """This rank's passes over a batch: positions in the batch.

        Args:
            lengths_B: tokens of every sample of the whole batch: at least as many samples as ranks, for packed rows a
                multiple of the ranks.

        Raises:
            UserError: fewer samples than ranks, or a sample does not fit into a packed row.
        """
        if len(lengths_B) < self.ranks:
            raise UserError(
                f"data.batch_size: a batch of {len(lengths_B)} samples for {self.ranks} ranks; give each at least one"
            )
        groups = self._even(lengths_B) if self.pack_tokens is None else self._packed(lengths_B, self.pack_tokens)
        return groups[self.rank :: self.ranks]

    def padded(self, longest: int) -> Cut:
        """A cut into padded passes of about the same size, for batches that are not a multiple of the ranks.

        Args:
            longest: tokens of the longest sample.
        """
        if self.pack_tokens is None:
            return self
        return replace(self, pack_tokens=None, micro_batch_size=max(1, self.pack_tokens // longest))

    def _even(self, lengths_B: np.ndarray) -> list[np.ndarray]:
        """Groups of like size and length; ranks work on neighbours at the same time."""
        samples = len(lengths_B)
        most = samples if self.micro_batch_size is None else self.micro_batch_size * self.ranks
        rounds = min(-(-samples // most), samples // self.ranks)
        order_B = np.argsort(-lengths_B, kind="stable")  # the longest first: memory that suffices once does to the end
        return np.array_split(order_B, rounds * self.ranks)

    def _packed(self, lengths_B: np.ndarray, room: int) -> list[np.ndarray]:
        """Rows by first fit, the longest samples first; then the fullest are split until all ranks have as many."""
        if lengths_B.max() > room:
            raise UserError(
                f"algorithm.pack_tokens: {room}, but a sample has {lengths_B.max()} tokens; give at least as many"
            )
        rows, left = list[list[int]](), list[int]()
        for sample in np.argsort(-lengths_B, kind="stable").tolist():
            row = next((index for index, free in enumerate(left) if free >= lengths_B[sample]), len(rows))
            if row == len(rows):
                rows.append([])
                left.append(room)
            rows[row].append(sample)
            left[row] -= int(lengths_B[sample])
        while len(rows) % self.ranks:
            rows.sort(key=len, reverse=True)
            longest = rows.pop(0)
            rows += [longest[::2], longest[1::2]]
        return [np.array(row) for row in rows]
