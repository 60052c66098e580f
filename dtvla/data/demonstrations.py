"""Demonstrations to learn from: one dataset, or several presented as one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtvla.cot.keyframes import GRIPPER, KeyFrameSettings, gripper_events
from dtvla.data.dataset_folder import DatasetFolder
from dtvla.data.normalization import Statistics
from dtvla.data.pictures import PictureSpan
from dtvla.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Demonstrations:
    """All frames F of one or several dataset folders, one folder after the other.

    States, actions and indices are held in memory (about 80 bytes a frame); pictures stay on disk.

    Attributes:
        roots: the folders.
        parts: for each folder the range of its frames.
        fps: frames a second.
        instructions: task texts; ``task_index_F`` points into them.
        state_FD: float32 proprioception of every frame F, in dataset order.
        action_FD: float32 actions in robot units.
        task_index_F: int64.
        thoughts: distinct thoughts without tags, "" for none; ``thought_index_F`` points into them.
        thought_index_F: int64.
        has_thoughts: whether thoughts were read.
        starts_E, stops_E: first frame and end of every episode E.
    """

    def __init__(
        self,
        root: Path | str | Sequence[Path | str],
        *,
        thoughts: bool = True,
        thought_tokenizer: str | Path | PreTrainedTokenizerFast | None = None,
        carry_thoughts: bool = False,
    ) -> None:
        """Open the datasets and check that they are whole and fit together.

        Args:
            root: a dataset's folder, or several.
            thoughts: whether the column ``reasoning`` is needed.
            thought_tokenizer: reads thoughts that are stored as token ids: a tokenizer, or the folder or hub id of
                the checkpoint that has it. Not opened where thoughts are texts.
            carry_thoughts: a frame without a thought has that of the last frame before it that has one, as long as
                the gripper has not been told otherwise since: the thought would contradict it.

        Raises:
            UserError: missing, of another format, truncated, or without the needed columns; or several datasets
                whose frame rates or dimensions differ.
        """
        self.roots = [Path(root)] if isinstance(root, Path | str) else [Path(path) for path in root]
        if not self.roots:
            raise UserError("data.root: an empty list; name at least one dataset")
        options: dict[str, Any] = {"thoughts": thoughts, "thought_tokenizer": thought_tokenizer}
        self._folders = [DatasetFolder(path, **options) for path in self.roots]
        self._check_agreement()
        self.has_thoughts, self.fps = thoughts, self._folders[0].fps
        stops = np.cumsum([len(folder.action_FD) for folder in self._folders]).tolist()
        self.parts = [range(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
        self.state_FD = _joined([folder.state_FD for folder in self._folders])
        self.action_FD = _joined([folder.action_FD for folder in self._folders])
        self.starts_E, self.stops_E = (
            _joined([getattr(f, name) + part.start for f, part in zip(self._folders, self.parts, strict=True)])
            for name in ("starts_E", "stops_E")
        )
        self.instructions, self.task_index_F = _merged([(f.instructions, f.task_index_F) for f in self._folders])
        self.thoughts, self.thought_index_F = _merged([(f.thoughts, f.thought_index_F) for f in self._folders])
        if carry_thoughts:
            self.thought_index_F = self._carried()

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.action_FD)

    @property
    def root(self) -> str:
        """The folders, to name in messages."""
        return ", ".join(str(path) for path in self.roots)

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(self.stops_E)

    def instruction(self, frame: int) -> str:
        """What is to be done in the episode of this frame."""
        return self.instructions[self.task_index_F[frame]]

    def thought(self, frame: int) -> str | None:
        """The thought at this frame without tags, None where there is none."""
        return self.thoughts[self.thought_index_F[frame]] or None

    @property
    def thinks_F(self) -> np.ndarray:
        """bool, which frames have a thought."""
        return np.array([bool(thought) for thought in self.thoughts])[self.thought_index_F]

    def texts(self) -> list[str]:
        """Every distinct instruction and thought, in a fixed order: what a tokenizer is trained on."""
        return sorted({*self.instructions, *self.thoughts} - {""})

    @cached_property
    def statistics(self) -> Statistics:
        """The statistics that belong to these frames.

        A single dataset's own ``meta/norm_stats.json`` where it has one; otherwise computed in one pass over the
        states and actions in memory, all datasets pooled. The quantiles are exact, not estimates of a stream.
        """
        path = self.statistics_file
        return Statistics.from_frames(self.state_FD, self.action_FD) if path is None else Statistics.load(path)

    @property
    def statistics_file(self) -> Path | None:
        """Where :attr:`statistics` are read from; None where they are computed."""
        path = self.roots[0] / "meta/norm_stats.json"
        return path if len(self.roots) == 1 and path.exists() else None

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Per episode suite, task_id, init_state and seed, where the datasets tell (ours do)."""
        return [source for folder in self._folders for source in folder.sources]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 that changes with the content: metadata, episode table, and names and sizes of all data files."""
        parts = [folder.fingerprint for folder in self._folders]
        return parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def split(self, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Whole episodes for training and validation, this share of every dataset, a pure function of the seed.

        Returns:
            Sorted frame indices of both parts. With a positive fraction at least one episode of each dataset is
            held out.

        Raises:
            UserError: the fraction is outside [0, 1), or one part would be empty.
        """
        if not 0 <= val_fraction < 1:
            raise UserError(f"data.val_fraction: found {val_fraction}; use 0 <= fraction < 1")
        train, val, first = [], [], 0
        for folder in self._folders:
            count = len(folder.stops_E)
            held_out = max(1, round(val_fraction * count)) if val_fraction else 0
            if held_out >= count:
                raise UserError(
                    f"data.val_fraction: {val_fraction} of {count} episodes in {folder.root} leaves none to train on; "
                    "lower it or collect more episodes"
                )
            order = first + np.random.default_rng([seed, count]).permutation(count)
            train.append(self.frames_of(np.sort(order[held_out:])))
            val.append(self.frames_of(np.sort(order[:held_out])))
            first += count
        return _joined(train), _joined(val)

    def frames_of(self, episodes: np.ndarray) -> np.ndarray:
        """Frame indices of these episodes, in order."""
        spans = [np.arange(self.starts_E[e], self.stops_E[e]) for e in episodes]
        return np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)

    def chunk_indices(self, frames_B: np.ndarray, steps: int) -> np.ndarray:
        """Frames whose actions form the chunks (B, S): t .. t+S-1, the episode's last action repeated at its end."""
        last_B = self.stops_E[np.searchsorted(self.stops_E, frames_B, side="right")] - 1
        return np.minimum(frames_B[:, None] + np.arange(steps), last_B[:, None])

    def camera_key(self, camera: str) -> str:
        """Dataset key of a camera; :class:`UserError` when a dataset does not have it."""
        return [folder.camera_key(camera) for folder in self._folders][0]

    def picture_spans(self, camera: str) -> list[PictureSpan]:
        """Where the pictures of every episode are, in dataset order."""
        pairs = zip(self._folders, self.parts, strict=True)
        return [span.moved(part.start) for folder, part in pairs for span in folder.picture_spans(camera)]

    def _carried(self) -> np.ndarray:
        """``thought_index_F`` with each thought standing until the next one, or the next command to the gripper."""
        if self.action_FD.shape[1] <= GRIPPER:
            raise UserError(f"data.carry_thoughts: {self.root} has no gripper that ends a thought; set it to false")
        closing_F = self.action_FD[:, GRIPPER] > 0
        starts = [
            start + event
            for start, stop in zip(self.starts_E.tolist(), self.stops_E.tolist(), strict=True)
            for event in (0, *gripper_events(closing_F[start:stop], KeyFrameSettings.debounce))
        ]
        frames_F = np.arange(len(self))
        start_F = np.repeat(starts, np.diff([*starts, len(self)]))
        latest_F = np.maximum.accumulate(np.where(self.thinks_F, frames_F, -1))
        return self.thought_index_F[np.where(latest_F >= start_F, latest_F, frames_F)]

    def _check_agreement(self) -> None:
        first = self._folders[0]
        for other in self._folders[1:]:
            for what, ours, theirs in (
                ("frames a second", first.fps, other.fps),
                ("action dimensions", first.action_FD.shape[1], other.action_FD.shape[1]),
                ("state dimensions", first.state_FD.shape[1], other.state_FD.shape[1]),
            ):
                if ours != theirs:
                    raise UserError(
                        f"data.root: {first.root} has {ours} {what}, {other.root} has {theirs}; "
                        "only datasets of one kind can be mixed"
                    )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _merged(parts: list[tuple[list[str], np.ndarray]]) -> tuple[list[str], np.ndarray]:
    """Lists of texts with indices into them, as one list and index."""
    if len(parts) == 1:
        return parts[0]
    places: dict[str, int] = {}
    indices = []
    for texts, index_F in parts:
        place_R = np.array([places.setdefault(text, len(places)) for text in texts], dtype=np.int64)
        indices.append(place_R[index_F])
    return list(places), np.concatenate(indices)
