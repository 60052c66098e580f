"""LightningDataModule over a demonstration dataset: held-out episodes, cached pictures, exactly resumable batches."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from dtvla.data.collate import collate
from dtvla.data.demonstrations import Demonstrations
from dtvla.data.frame_cache import FrameCache
from dtvla.data.hub import locate
from dtvla.data.images import Augmentation
from dtvla.data.sampler import BatchKey, TrainSampler, ValidationSampler
from dtvla.errors import UserError
from dtvla.policy.layout import Batch

if TYPE_CHECKING:
    from dtvla.policy.policy import Processor

AUGMENTATION_STREAM, DROPOUT_STREAM = 1, 2  # keep the two random draws of a step apart


class BatchDataset(Dataset[Batch]):
    """Makes the batch of a :class:`~dtvla.data.sampler.BatchKey`; everything random follows from (seed, step)."""

    def __init__(
        self,
        demonstrations: Demonstrations,
        cache: FrameCache,
        processor: Processor,
        *,
        seed: int,
        augmentation: Augmentation | None = None,
        reasoning_dropout: float = 0.0,
    ) -> None:
        """Normalise all actions once.

        Args:
            demonstrations: the frames.
            cache: their pixels, already built.
            processor: the policy's layout and normaliser.
            seed: of augmentation and dropout.
            augmentation: of the main camera; None for none.
            reasoning_dropout: share of samples that are shown without their thought.
        """
        self._demonstrations, self._cache, self._layout = demonstrations, cache, processor.layout
        self._actions_FD = processor.normalizer.normalize(torch.from_numpy(demonstrations.action_FD))
        self._seed, self._augmentation, self._dropout = seed, augmentation, reasoning_dropout

    def __getitem__(self, key: BatchKey) -> Batch:
        """The batch of this key."""
        pixels_BNCHW = self._cache[key.frames_B]
        if self._augmentation is not None:
            seeds = [(self._seed, AUGMENTATION_STREAM, key.step, i) for i in range(len(key.frames_B))]
            pixels_BNCHW = self._augmentation(pixels_BNCHW, seeds)
        thoughts: list[str | None] = [self._demonstrations.thought(frame) for frame in key.frames_B]
        if self._dropout:
            draws_B = np.random.default_rng([self._seed, DROPOUT_STREAM, key.step]).random(len(thoughts))
            thoughts = [None if draw < self._dropout else text for draw, text in zip(draws_B, thoughts, strict=True)]
        chunks_BS = self._demonstrations.chunk_indices(key.frames_B, self._layout.chunk)
        return collate(
            self._layout,
            pixels_BNCHW,
            [self._demonstrations.instruction(frame) for frame in key.frames_B],
            thoughts,
            self._actions_FD[torch.from_numpy(chunks_BS)],
        )


class DemonstrationDataModule(LightningDataModule):
    """Training batches without end, validation on held-out episodes.

    Use: construct, read :attr:`demonstrations` to build the policy, :meth:`attach` its processor, then fit. Batches
    are numbered; :meth:`attach` with ``start_step`` continues a run at its next batch (one step = one micro-batch).
    """

    def __init__(
        self,
        root: str | Path,
        *,
        cache_dir: str | Path,
        download_dir: str | Path = ".",
        batch_size: int = 8,
        num_workers: int = 0,
        val_fraction: float = 0.0,
        seed: int = 429,
        thoughts: bool = True,
        augment: bool | Augmentation = True,
        reasoning_dropout: float = 0.0,
    ) -> None:
        """Remember the settings; nothing is read yet.

        Args:
            root: dataset folder or hub id.
            cache_dir: where decoded pictures are kept.
            download_dir: where hub datasets are kept.
            batch_size: samples per batch and process.
            num_workers: loader processes; 0 makes batches in the training process. Batches do not depend on it.
            val_fraction: share of episodes held out.
            seed: of split, order, augmentation and dropout.
            thoughts: whether samples carry their thought; the dataset must then have them.
            augment: True for the published augmentation, False for none, or other strengths.
            reasoning_dropout: share of training samples shown without their thought.

        Raises:
            UserError: a setting out of range.
        """
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise UserError(f"data.batch_size, data.num_workers: found {batch_size}, {num_workers}; use >= 1 and >= 0")
        if not 0 <= reasoning_dropout <= 1:
            raise UserError(f"data.reasoning_dropout: found {reasoning_dropout}; use a share from 0 to 1")
        self.root, self.cache_dir, self.download_dir = root, Path(cache_dir), Path(download_dir)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.val_fraction, self.thoughts, self.reasoning_dropout = val_fraction, thoughts, reasoning_dropout
        self.augmentation = Augmentation() if augment is True else augment or None
        self.start_step = 0
        self._demonstrations: Demonstrations | None = None
        self._processor: Processor | None = None

    @property
    def demonstrations(self) -> Demonstrations:
        """The dataset, opened on first use; :class:`UserError` when it can't be."""
        if self._demonstrations is None:
            self._demonstrations = Demonstrations(locate(self.root, self.download_dir), thoughts=self.thoughts)
        return self._demonstrations

    @property
    def train_frames(self) -> np.ndarray:
        """Frame indices of the training episodes."""
        return self.demonstrations.split(self.val_fraction, self.seed)[0]

    @property
    def val_frames(self) -> np.ndarray:
        """Frame indices of the held-out episodes."""
        return self.demonstrations.split(self.val_fraction, self.seed)[1]

    def attach(self, processor: Processor, start_step: int = 0) -> None:
        """Set the policy's processor, and the number of the first training batch to make."""
        self._processor, self.start_step = processor, start_step

    def prepare_data(self) -> None:
        """Decode the pictures that the processor needs, unless the cache has them."""
        self._cache().build()

    def setup(self, stage: str | None = None) -> None:
        """Open the dataset (Lightning calls this on every process)."""
        _ = self.demonstrations

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless batches from ``start_step`` on."""
        sampler = TrainSampler(self.train_frames, self.batch_size, self.seed, self.start_step)
        dataset = self._dataset(augmentation=self.augmentation, reasoning_dropout=self.reasoning_dropout)
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The held-out frames once, as they are: no augmentation, no dropout."""
        return self._loader(self._dataset(), ValidationSampler(self.val_frames, self.batch_size, self.seed))

    @property
    def processor(self) -> Processor:
        """The policy's processor; set by :meth:`attach`."""
        if self._processor is None:
            raise RuntimeError("attach the policy's processor before asking for batches")
        return self._processor

    def _cache(self) -> FrameCache:
        return FrameCache(self.demonstrations, self.processor.images, self.cache_dir)

    def _dataset(self, **options: Any) -> BatchDataset:
        return BatchDataset(self.demonstrations, self._cache(), self.processor, seed=self.seed, **options)

    def _loader(self, dataset: BatchDataset, sampler: Sampler[BatchKey]) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,  # one key is one whole batch
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            worker_init_fn=_leave_signals_to_trainer,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _unchanged(batch: Any) -> Any:
    return batch


def _leave_signals_to_trainer(worker: int) -> None:
    """Job schedulers and Ctrl-C signal the whole process group: the trainer saves and then ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
