"""A data module that shows one batch for ever: the oldest test of a training loop."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import DataLoader, Sampler

from dtvla.data.datamodule import DemonstrationDataModule
from dtvla.data.sampler import BatchKey
from dtvla.policy.layout import Batch


class OneBatchDataModule(DemonstrationDataModule):
    """The first training batch again and again, without augmentation, thoughts never dropped."""

    def train_dataloader(self) -> DataLoader[list[Batch]]:
        """The same batch without end."""
        return self._loader(self._dataset(self._cut_for_rank()), _FirstOnly(self._train_sampler()))


class _FirstOnly(Sampler[BatchKey]):
    def __init__(self, sampler: Sampler[BatchKey]) -> None:
        self._first = next(iter(sampler))

    def __iter__(self) -> Iterator[BatchKey]:
        while True:
            yield self._first
