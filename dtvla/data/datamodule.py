"""LightningDataModule over a demonstration dataset: held-out episodes, cached pictures, exactly resumable batches."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from dtvla.data.collate import collate
from dtvla.data.demonstrations import Demonstrations
from dtvla.data.frame_cache import FrameCache
from dtvla.data.frame_reader import FrameReader, PixelSource
from dtvla.data.grouping import Cut
from dtvla.data.hub import locate
from dtvla.data.images import Augmentation
from dtvla.data.lengths import SequenceLengths
from dtvla.data.sampler import BatchKey, MixtureSampler, TrainSampler, ValidationSampler
from dtvla.errors import UserError
from dtvla.kinds import check_kinds
from dtvla.policy.layout import Batch

if TYPE_CHECKING:
    from dtvla.policy.policy import Processor

FRAMES = ("all", "thoughts")
AUGMENTATION_STREAM, DROPOUT_STREAM = 1, 2  # keep the two random draws of a step apart


class BatchDataset(Dataset[list[Batch]]):
    """Makes this rank's passes over the batch of a :class:`~dtvla.data.sampler.BatchKey`.

    Everything random follows from (seed, step, place in the batch).
    """

    def __init__(
        self,
        demonstrations: Demonstrations,
        pictures: PixelSource,
        processor: Processor,
        lengths: SequenceLengths,
        cut: Cut,
        *,
        seed: int,
        augmentation: Augmentation | None = None,
        reasoning_dropout: float = 0.0,
        acts: bool = True,
    ) -> None:
        """Normalise all actions once.

        Args:
            demonstrations: the frames.
            pictures: their pixels, ready to read.
            processor: the policy's layout and normaliser.
            lengths: of the frames' sequences.
            cut: into ranks and passes.
            seed: of augmentation and dropout.
            augmentation: of the main camera; None for pictures as in control.
            reasoning_dropout: share of samples that are shown without their thought.
            acts: whether sequences go on behind the thought, as ``lengths`` has it.
        """
        self._demonstrations, self._pictures = demonstrations, pictures
        self._layout, self._images = processor.layout, processor.images
        self._actions_FD = processor.normalizer.normalize(torch.from_numpy(demonstrations.action_FD))
        self._lengths, self._cut = lengths, cut
        self._seed, self._augmentation, self._dropout = seed, augmentation, reasoning_dropout
        self._acts = acts

    def __getitem__(self, key: BatchKey) -> list[Batch]:
        """This rank's passes, each a batch."""
        draws_B = np.random.default_rng([self._seed, DROPOUT_STREAM, key.step]).random(len(key.frames_B))
        bare_B = draws_B < self._dropout
        passes = self._cut.passes(self._lengths(key.frames_B, bare_B))
        return [self._pass(key, places, bare_B) for places in passes]

    def _pass(self, key: BatchKey, places: np.ndarray, bare_B: np.ndarray) -> Batch:
        frames_B = key.frames_B[places]
        pixels_BNCHW = self._pictures[frames_B]
        if self._augmentation is None:
            pixels_BNCHW = self._images.center(pixels_BNCHW)
        else:
            seeds = [(self._seed, AUGMENTATION_STREAM, key.step, int(place)) for place in places]
            pixels_BNCHW = self._augmentation(pixels_BNCHW, seeds)
        chunks_BS = self._demonstrations.chunk_indices(frames_B, self._layout.chunk)
        return collate(
            self._layout,
            pixels_BNCHW,
            [self._demonstrations.instruction(frame) for frame in frames_B],
            [None if bare_B[place] else self._demonstrations.thought(key.frames_B[place]) for place in places],
            self._actions_FD[torch.from_numpy(chunks_BS)],
            self._cut.pack_tokens,
            self._acts,
        )


class DemonstrationDataModule(LightningDataModule):
    """Training batches without end, validation on held-out episodes.

    Use: construct, read :attr:`demonstrations` to build the policy, :meth:`attach` its processor, then fit. A loader
    yields lists: one optimiser step's batch, cut into the forward passes of this rank. Batches are numbered;
    :meth:`attach` with ``start_step`` continues a run at its next batch.
    """

    def __init__(
        self,
        root: str | Path | Sequence[str | Path],
        *,
        weights: Sequence[float] | None = None,
        cache: bool = True,
        cache_dir: str | Path,
        download_dir: str | Path = ".",
        batch_size: int = 8,
        num_workers: int = 0,
        val_fraction: float = 0.0,
        seed: int = 429,
        thoughts: bool = True,
        thought_tokenizer: str | Path | None = None,
        augment: bool | Augmentation = True,
        reasoning_dropout: float = 0.0,
        long_thoughts: str = "error",
        frames: str = "all",
        carry_thoughts: bool = False,
    ) -> None:
        """Remember the settings; nothing is read yet.

        Args:
            root: dataset folder or hub id, or several.
            weights: share of each of several datasets in the samples; None: each frame counts the same.
            cache: whether pictures are decoded once and kept; else they are decoded when they are needed.
            cache_dir: where decoded pictures are kept.
            download_dir: where hub datasets are kept.
            batch_size: samples of an optimiser step, over all ranks.
            num_workers: loader processes; 0 makes batches in the training process. Batches do not depend on it.
            val_fraction: share of episodes held out.
            seed: of split, order, augmentation and dropout.
            thoughts: whether samples carry their thought; the dataset must then have them.
            thought_tokenizer: see :class:`~dtvla.data.demonstrations.Demonstrations`.
            augment: True for the published augmentation, False for none, or other strengths.
            reasoning_dropout: share of training samples shown without their thought.
            long_thoughts: see :class:`~dtvla.data.lengths.SequenceLengths`.
            frames: which are samples: ``all``, or those with ``thoughts`` alone.
            carry_thoughts: see :class:`~dtvla.data.demonstrations.Demonstrations`; before frames are chosen.

        Raises:
            UserError: a setting out of range.
        """
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise UserError(f"data.batch_size, data.num_workers: found {batch_size}, {num_workers}; use >= 1 and >= 0")
        if not 0 <= reasoning_dropout <= 1:
            raise UserError(f"data.reasoning_dropout: found {reasoning_dropout}; use a share from 0 to 1")
        check_kinds("data", {"carry_thoughts": bool}, {"carry_thoughts": carry_thoughts})
        if frames not in FRAMES:
            raise UserError(f"data.frames: {frames!r} is unknown; use {' or '.join(FRAMES)}")
        if not thoughts and (carry_thoughts or frames != "all"):
            raise UserError(
                f"data.thoughts: false, but data.frames={frames}, data.carry_thoughts={carry_thoughts} need thoughts; "
                "set data.thoughts=true"
            )
        self.roots = [root] if isinstance(root, str | Path) else list(root)
        self.weights, self.cache, self.thought_tokenizer = weights, cache, thought_tokenizer
        self.cache_dir, self.download_dir = Path(cache_dir), Path(download_dir)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.val_fraction, self.thoughts, self.reasoning_dropout = val_fraction, thoughts, reasoning_dropout
        self.augmentation = Augmentation() if augment is True else augment or None
        self.long_thoughts, self.frames, self.carry_thoughts = long_thoughts, frames, carry_thoughts
        self.start_step = 0
        self._cut, self._acts = Cut(), True
        self._demonstrations: Demonstrations | None = None
        self._processor: Processor | None = None

    @property
    def demonstrations(self) -> Demonstrations:
        """The dataset, opened on first use; :class:`UserError` when it can't be."""
        if self._demonstrations is None:
            roots = [locate(root, self.download_dir) for root in self.roots]
            self._demonstrations = Demonstrations(
                roots,
                thoughts=self.thoughts,
                thought_tokenizer=self.thought_tokenizer,
                carry_thoughts=self.carry_thoughts,
            )
        return self._demonstrations

    @property
    def train_frames(self) -> np.ndarray:
        """Frame indices of the training episodes, as far as they are samples."""
        return self._samples(self.demonstrations.split(self.val_fraction, self.seed)[0])

    @property
    def val_frames(self) -> np.ndarray:
        """Frame indices of the held-out episodes, as far as they are samples."""
        return self._samples(self.demonstrations.split(self.val_fraction, self.seed)[1])

    def attach(
        self,
        processor: Processor,
        start_step: int = 0,
        *,
        micro_batch_size: int | None = None,
        pack_tokens: int | None = None,
        acts: bool = True,
    ) -> list[str]:
        """Set what training needs to know of the policy.

        Args:
            processor: of the policy.
            start_step: number of the first training batch to make.
            micro_batch_size: samples of a forward pass; None for a rank's whole share of a batch.
            pack_tokens: length of packed rows, in place of ``micro_batch_size``.
            acts: whether sequences go on behind the thought, see :meth:`~dtvla.policy.layout.Layout.encode`.

        Returns:
            Remarks for the user on the data.

        Raises:
            UserError: an impossible size, a text longer than the policy admits, actions unlike its statistics, or a
                dataset that has no sample to train on or to validate with.
        """
        self._processor, self.start_step = processor, start_step
        self._cut, self._acts = Cut(micro_batch_size, pack_tokens), acts
        self._check_samples()
        self._lengths = SequenceLengths(self.demonstrations, processor.layout, self.long_thoughts, acts)
        if pack_tokens is not None and self._lengths.longest() > pack_tokens:
            longest = self._lengths.longest()
            raise UserError(f"algorithm.pack_tokens: {pack_tokens}, but the longest sample has {longest}; raise it")
        own = processor.normalizer.statistics.digest() == self.demonstrations.statistics.digest()
        source = str(self.demonstrations.statistics_file or self.demonstrations.root) if own else "model.checkpoint"
        remarks = processor.normalizer.check_fit(self.demonstrations.action_FD, source) if acts else []
        if self._lengths.truncated:
            limit, frames = processor.layout.max_thought_tokens, self._lengths.truncated
            remarks.append(f"thoughts cut to {limit} tokens: {frames} frames")
        return remarks

    def prepare_data(self) -> None:
        """Decode the pictures that the processor needs, unless the cache has them; without one, look at the files."""
        self.pictures.build()

    def setup(self, stage: str | None = None) -> None:
        """Open the dataset (Lightning calls this on every process)."""
        _ = self.demonstrations

    def train_dataloader(self) -> DataLoader[list[Batch]]:
        """Endless batches from ``start_step`` on.

        Raises:
            UserError: the batch can't be shared evenly by all ranks.
        """
        cut = self._cut_for_rank()
        if self.batch_size % cut.ranks:
            raise UserError(
                f"data.batch_size: {self.batch_size} samples can't be shared evenly by {cut.ranks} processes; "
                f"use a multiple of {cut.ranks}"
            )
        dataset = self._dataset(cut, augmentation=self.augmentation, reasoning_dropout=self.reasoning_dropout)
        return self._loader(dataset, self._train_sampler())

    def val_dataloader(self) -> DataLoader[list[Batch]]:
        """The held-out frames once, as they are: no augmentation, no dropout."""
        cut = self._cut_for_rank().padded(self._lengths.longest())
        sampler = ValidationSampler(self.val_frames, self.batch_size, self.seed, least=cut.ranks)
        return self._loader(self._dataset(cut), sampler)

    def _train_sampler(self) -> Sampler[BatchKey]:
        frames_F = self.train_frames
        if self.weights is None:
            return TrainSampler(frames_F, self.batch_size, self.seed, self.start_step)
        return MixtureSampler(self._by_dataset(frames_F), self.weights, self.batch_size, self.seed, self.start_step)

    def _samples(self, frames_F: np.ndarray) -> np.ndarray:
        return frames_F if self.frames == "all" else frames_F[self.demonstrations.thinks_F[frames_F]]

    def _by_dataset(self, frames_F: np.ndarray) -> list[np.ndarray]:
        """Ascending frame indices, apart for every dataset."""
        bounds = [part.stop for part in self.demonstrations.parts[:-1]]
        return np.split(frames_F, np.searchsorted(frames_F, bounds))

    def _check_samples(self) -> None:
        """Refuse a dataset that :attr:`frames` leaves nothing of."""
        sides = {"train on": self.train_frames} | ({"validate with": self.val_frames} if self.val_fraction else {})
        for purpose, frames_F in sides.items():
            for root, own_F in zip(self.demonstrations.roots, self._by_dataset(frames_F), strict=True):
                if not len(own_F):
                    raise UserError(
                        f"data.frames: {self.frames}, but none of the frames of {root} to {purpose} has a thought; "
                        "annotate more episodes, or set data.carry_thoughts=true or another data.val_fraction"
                    )

    def _cut_for_rank(self) -> Cut:
        trainer = self.trainer
        return self._cut if trainer is None else replace(self._cut, ranks=trainer.world_size, rank=trainer.global_rank)

    @property
    def processor(self) -> Processor:
        """The policy's processor; set by :meth:`attach`."""
        if self._processor is None:
            raise RuntimeError("attach the policy's processor before asking for batches")
        return self._processor

    @property
    def pictures(self) -> PixelSource:
        """Model pixels by frame, before augmentation and centre crop."""
        images = self.processor.images
        if self.cache:
            return FrameCache(self.demonstrations, images, self.cache_dir)
        return FrameReader(self.demonstrations, images)

    def _dataset(self, cut: Cut, **options: Any) -> BatchDataset:
        options |= {"seed": self.seed, "acts": self._acts}
        return BatchDataset(self.demonstrations, self.pictures, self.processor, self._lengths, cut, **options)

    def _loader(self, dataset: BatchDataset, sampler: Sampler[BatchKey]) -> DataLoader[list[Batch]]:
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
