"""Finished episodes on disk, one file each, before they become a dataset.

An episode file is written whole or not at all, so an interrupted collection loses only what was in flight.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from dtvla.data.video import encode_clip

FPS = 20  # LIBERO's control rate
CAMERA_KEYS = {"agentview": "observation.images.image", "wrist": "observation.images.wrist_image"}
HISTOGRAM_STRIDE = 4  # every fourth pixel either way is plenty for the statistics of pictures


@dataclass(frozen=True)
class EpisodeSource:
    """Where an episode comes from, and what it took.

    Attributes:
        episode_index: place among the planned episodes.
        init_state, seed: where the expert began, and of its noise; None for a replayed recording.
        attempt: which of the expert's tries succeeded, from 0; ``seed`` follows from index and attempt.
        failures: one entry (seed, steps, reason) per earlier try.
        seconds: worker time by phase, failed tries included.
        file, demo: the recording that was replayed; None for the expert.
        noops: actions of the recording that were left out.
        success: whether the task was solved after the last frame.
        dropped: why the episode is left out of the dataset; None when it is in.
    """

    episode_index: int
    suite: str
    task_id: int
    instruction: str
    init_state: int | None = None
    seed: int | None = None
    steps: int = 0
    attempt: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    file: str | None = None
    demo: str | None = None
    noops: int = 0
    success: bool = True
    dropped: str | None = None


@dataclass(frozen=True)
class StagedEpisode:
    """One successful episode of F frames in its final form.

    Attributes:
        source: provenance.
        state_F8: float32, end-effector position (m), axis-angle (rad), finger positions (m).
        action_F7: float32, the action to imitate at each frame, robot units.
        thoughts: F texts, without tags; empty where there is none.
        clips: per camera the encoded mp4 file.
        histograms: per camera int64 (3, 256), counts of colour values on a pixel grid.
    """

    source: EpisodeSource
    state_F8: np.ndarray
    action_F7: np.ndarray
    thoughts: list[str]
    clips: dict[str, bytes]
    histograms: dict[str, np.ndarray]

    @classmethod
    def encode(
        cls,
        source: EpisodeSource,
        state_F8: np.ndarray,
        action_F7: np.ndarray,
        thoughts: list[str],
        pictures: dict[str, np.ndarray],
    ) -> StagedEpisode:
        """Compress the pictures (per camera uint8 (F, H, W, 3)) of a finished episode.

        Raises:
            ValueError: the parts differ in length, or a number is not finite.
        """
        lengths = {len(state_F8), len(action_F7), len(thoughts), *(len(frames) for frames in pictures.values())}
        if len(lengths) != 1:
            raise ValueError(f"episode {source.episode_index}: parts of different lengths {sorted(lengths)}")
        if not (np.isfinite(state_F8).all() and np.isfinite(action_F7).all()):
            raise ValueError(f"episode {source.episode_index}: a state or action is not finite")
        return cls(
            source=source,
            state_F8=np.asarray(state_F8, dtype=np.float32),
            action_F7=np.asarray(action_F7, dtype=np.float32),
            thoughts=list(thoughts),
            clips={camera: encode_clip(frames, FPS) for camera, frames in pictures.items()},
            histograms={camera: _histogram(frames) for camera, frames in pictures.items()},
        )

    def save(self, path: Path) -> None:
        """Write the episode to ``path``, whole or not at all."""
        texts = sorted(set(self.thoughts))
        header = {"source": asdict(self.source), "texts": texts, "cameras": list(self.clips)}
        arrays = {
            "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
            "state": self.state_F8,
            "action": self.action_F7,
            "text_index": np.array([texts.index(thought) for thought in self.thoughts], dtype=np.int32),
        }
        for camera, clip in self.clips.items():
            arrays[f"clip_{camera}"] = np.frombuffer(clip, dtype=np.uint8)
            arrays[f"histogram_{camera}"] = self.histograms[camera]
        with _whole_file(path) as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> StagedEpisode:
        """Read an episode file.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                header = json.loads(archive["header"].tobytes())
                return cls(
                    source=EpisodeSource(**header["source"]),
                    state_F8=archive["state"],
                    action_F7=archive["action"],
                    thoughts=[header["texts"][i] for i in archive["text_index"]],
                    clips={camera: archive[f"clip_{camera}"].tobytes() for camera in header["cameras"]},
                    histograms={camera: archive[f"histogram_{camera}"] for camera in header["cameras"]},
                )
        except (zipfile.BadZipFile, KeyError, EOFError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: damaged episode file ({error})") from error


def episode_path(folder: Path, episode_index: int) -> Path:
    """Where a finished episode is staged."""
    return folder / f"episode_{episode_index:06d}.npz"


def dropped_path(folder: Path, episode_index: int) -> Path:
    """Where it is noted that an episode was performed and does not belong into the dataset."""
    return folder / f"episode_{episode_index:06d}.json"


def save_dropped(source: EpisodeSource, path: Path) -> None:
    """Note a dropped episode, so that it is not performed again."""
    with _whole_file(path) as file:
        file.write(json.dumps(asdict(source)).encode())


def read_source(path: Path) -> EpisodeSource:
    """Only the provenance of a staged or dropped episode; :class:`ValueError` when the file is damaged."""
    try:
        if path.suffix == ".json":
            return EpisodeSource(**json.loads(path.read_bytes()))
        with np.load(path, allow_pickle=False) as archive:
            return EpisodeSource(**json.loads(archive["header"].tobytes())["source"])
    except (zipfile.BadZipFile, KeyError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged episode file ({error})") from error


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file to a temporary name, flush it to the disk, then rename it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _histogram(frames_FHWC: np.ndarray) -> np.ndarray:
    grid = frames_FHWC[:, ::HISTOGRAM_STRIDE, ::HISTOGRAM_STRIDE]
    return np.stack([np.bincount(grid[..., channel].ravel(), minlength=256) for channel in range(3)])
