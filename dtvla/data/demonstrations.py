"""Reads a LeRobot v3.0 dataset of demonstrations: the frame table in memory, pictures left on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dtvla.data.normalization import Statistics
from dtvla.data.staging import CAMERA_KEYS
from dtvla.errors import UserError

COLUMNS = ("observation.state", "action", "task_index", "episode_index", "frame_index")


@dataclass(frozen=True)
class VideoSpan:
    """Frames of one episode inside a video file.

    Attributes:
        path: the file.
        first: position of the episode's first frame in the file.
        frames: dataset rows [start, stop) that these pictures belong to.
    """

    path: Path
    first: int
    frames: tuple[int, int]


class Demonstrations:
    """A dataset folder, checked when it is opened.

    Attributes:
        root: the folder.
        fps: frames a second.
        instructions: task texts; ``task_index_F`` points into them.
        state_FD: float32 proprioception of every frame F, in dataset order.
        action_FD: float32 actions in robot units.
        task_index_F: int64.
        starts_E, stops_E: first frame and end of every episode E.
    """

    def __init__(self, root: Path | str, *, thoughts: bool = True) -> None:
        """Open a dataset and check that it is whole.

        Args:
            root: the dataset's folder.
            thoughts: whether the column ``reasoning`` is needed.

        Raises:
            UserError: missing, not LeRobot v3.0, truncated, or without the needed columns.
        """
        self.root = Path(root)
        self.info = _read_info(self.root)
        self.fps = int(self.info["fps"])
        self._episodes = _read_episodes(self.root, self.info)
        self.instructions = _read_tasks(self.root)
        self._check_features(thoughts)
        lengths = np.array([row["length"] for row in self._episodes], dtype=np.int64)
        self.stops_E = np.cumsum(lengths)
        self.starts_E = self.stops_E - lengths
        self._read_frames(thoughts)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.action_FD)

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(self._episodes)

    @property
    def has_thoughts(self) -> bool:
        """Whether thoughts were read."""
        return self._thoughts is not None

    def instruction(self, frame: int) -> str:
        """What is to be done in the episode of this frame."""
        return self.instructions[self.task_index_F[frame]]

    def thought(self, frame: int) -> str | None:
        """The thought at this frame without tags, None where there is none."""
        if self._thoughts is None:
            return None
        return self._thoughts[self._thought_index_F[frame]] or None

    def texts(self) -> list[str]:
        """Every distinct instruction and thought, in a fixed order: what a tokenizer is trained on."""
        return sorted({*self.instructions, *(self._thoughts or [])} - {""})

    @cached_property
    def statistics(self) -> Statistics:
        """``meta/norm_stats.json`` where the dataset has one, otherwise computed over all frames."""
        path = self.root / "meta/norm_stats.json"
        return Statistics.load(path) if path.exists() else Statistics.from_frames(self.state_FD, self.action_FD)

    @cached_property
    def sources(self) -> list[dict[str, Any]]:
        """Per episode suite, task_id, init_state and seed, where the dataset tells (ours do); otherwise empty."""
        path = self.root / "meta/episodes_source.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @cached_property
    def fingerprint(self) -> str:
        """sha256 that changes with the content: metadata, episode table, and names and sizes of all data files."""
        digest = hashlib.sha256((self.root / "meta/info.json").read_bytes())
        for path in sorted((self.root / "meta/episodes").rglob("*.parquet")):
            digest.update(path.read_bytes())
        for folder in ("data", "videos"):
            for path in sorted((self.root / folder).rglob("*.*")):
                digest.update(f"{path.relative_to(self.root)} {path.stat().st_size}\n".encode())
        return digest.hexdigest()

    def split(self, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Whole episodes for training and validation, a pure function of the seed.

        Returns:
            Sorted frame indices of both parts. With a positive fraction at least one episode is held out.

        Raises:
            UserError: the fraction is outside [0, 1), or one part would be empty.
        """
        if not 0 <= val_fraction < 1:
            raise UserError(f"data.val_fraction: found {val_fraction}; use 0 <= fraction < 1")
        held_out = max(1, round(val_fraction * self.episodes)) if val_fraction else 0
        if held_out >= self.episodes:
            raise UserError(
                f"data.val_fraction: {val_fraction} of {self.episodes} episodes leaves none to train on; "
                "lower it or collect more episodes"
            )
        order = np.random.default_rng([seed, self.episodes]).permutation(self.episodes)
        return self.frames_of(np.sort(order[held_out:])), self.frames_of(np.sort(order[:held_out]))

    def frames_of(self, episodes: np.ndarray) -> np.ndarray:
        """Frame indices of these episodes, in order."""
        spans = [np.arange(self.starts_E[e], self.stops_E[e]) for e in episodes]
        return np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)

    def chunk_indices(self, frames_B: np.ndarray, steps: int) -> np.ndarray:
        """Frames whose actions form the chunks (B, S): t .. t+S-1, the episode's last action repeated at its end."""
        last_B = self.stops_E[np.searchsorted(self.stops_E, frames_B, side="right")] - 1
        return np.minimum(frames_B[:, None] + np.arange(steps), last_B[:, None])

    def camera_key(self, camera: str) -> str:
        """Dataset key of a camera; :class:`UserError` when the dataset does not have it."""
        key = CAMERA_KEYS.get(camera, camera)
        videos = [name for name, feature in self.info["features"].items() if feature["dtype"] == "video"]
        if key not in videos:
            raise UserError(f"{self.root}: no video {key!r} for camera {camera!r}; it has {videos}")
        return key

    def video_spans(self, camera: str) -> list[VideoSpan]:
        """Where the pictures of every episode are, in dataset order."""
        key, spans = self.camera_key(camera), []
        for row, start, stop in zip(self._episodes, self.starts_E, self.stops_E, strict=True):
            relative = self.info["video_path"].format(
                video_key=key,
                chunk_index=row[f"videos/{key}/chunk_index"],
                file_index=row[f"videos/{key}/file_index"],
            )
            first = round(row[f"videos/{key}/from_timestamp"] * self.fps)
            spans.append(VideoSpan(self.root / relative, first, (int(start), int(stop))))
        return spans

    def _check_features(self, thoughts: bool) -> None:
        features = self.info["features"]
        missing = [name for name in COLUMNS if name not in features]
        if missing:
            raise UserError(f"{self.root}: columns {missing} are missing; this is no robot dataset that dtvla can use")
        if thoughts and "reasoning" not in features:
            raise UserError(
                f"{self.root}: no column 'reasoning', but the model thinks; "
                "use a dataset with thoughts (`python -m dtvla.collect` records them) or train with cot=none"
            )
        if thoughts and features["reasoning"]["dtype"] != "string":
            raise UserError(
                f"{self.root}: column 'reasoning' holds {features['reasoning']['dtype']}, expected text; "
                "decode its token ids to strings first"
            )

    def _read_frames(self, thoughts: bool) -> None:
        columns = [*COLUMNS, "reasoning"] if thoughts else list(COLUMNS)
        files = sorted({(row["data/chunk_index"], row["data/file_index"]) for row in self._episodes})
        paths = [self.root / self.info["data_path"].format(chunk_index=c, file_index=f) for c, f in files]
        table = pa.concat_tables([_read_parquet(path, columns) for path in paths])
        expected = int(self.stops_E[-1])
        if len(table) != expected or len(table) != int(self.info["total_frames"]):
            raise UserError(
                f"{self.root / 'data'}: {len(table)} frames, but the metadata says {expected}; "
                "the dataset is truncated, copy or collect it again"
            )
        self.state_FD = _matrix(table["observation.state"])
        self.action_FD = _matrix(table["action"])
        self.task_index_F = table["task_index"].to_numpy()
        episode_index_F = table["episode_index"].to_numpy()
        numbers_E = np.array([row["episode_index"] for row in self._episodes])
        if not np.array_equal(episode_index_F, np.repeat(numbers_E, self.stops_E - self.starts_E)):
            raise UserError(f"{self.root / 'data'}: frames are not in the order of the episodes; collect it again")
        broken = ~(np.isfinite(self.action_FD).all(1) & np.isfinite(self.state_FD).all(1))
        if broken.any():
            raise UserError(
                f"{self.root}: episode {episode_index_F[broken.argmax()]} has a state or action that is not finite; "
                "remove the episode"
            )
        self._thoughts: list[str] | None = None
        if thoughts:
            encoded = table["reasoning"].combine_chunks().fill_null("").dictionary_encode()
            self._thoughts = encoded.dictionary.to_pylist()
            self._thought_index_F = encoded.indices.to_numpy()
            if not any(self._thoughts):
                raise UserError(f"{self.root}: column 'reasoning' is empty; use a dataset with thoughts or cot=none")


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of equally long lists as a float32 matrix."""
    return np.stack(column.to_numpy(zero_copy_only=False)).astype(np.float32)


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta/info.json"
    if not root.is_dir():
        if Path(f"{root}.partial").is_dir():
            raise UserError(f"{root}: its collection is not finished; run the same `python -m dtvla.collect` again")
        raise UserError(f"{root}: no such dataset; make it with `python -m dtvla.collect` or set data.root")
    try:
        info = json.loads(path.read_text())
        version = str(info["codebase_version"])
    except FileNotFoundError:
        raise UserError(f"{root}: no LeRobot dataset (meta/info.json is missing); set data.root to one") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; copy or collect the dataset again") from None
    if version.startswith("v2"):
        raise UserError(
            f"{root}: LeRobot format {version}, needed v3.0; convert it with "
            f"`python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=local/{root.name} --root={root} "
            "--push-to-hub=false`"
        )
    if not version.startswith("v3"):
        raise UserError(f"{root}: LeRobot format {version}, needed v3.0; use a dataset of that format")
    return dict(info)


def _read_episodes(root: Path, info: dict[str, Any]) -> list[dict[str, Any]]:
    files = sorted((root / "meta/episodes").rglob("*.parquet"))
    if not files:
        raise UserError(f"{root / 'meta/episodes'}: no episode table; copy or collect the dataset again")
    rows: list[dict[str, Any]] = []
    for path in files:
        table = _read_parquet(path, None)
        rows += table.select([name for name in table.column_names if not name.startswith("stats/")]).to_pylist()
    rows.sort(key=lambda row: int(row["episode_index"]))
    if len(rows) != int(info["total_episodes"]) or not rows:
        raise UserError(
            f"{root / 'meta/episodes'}: {len(rows)} episodes, but info.json says {info['total_episodes']}; "
            "the dataset is truncated, copy or collect it again"
        )
    return rows


def _read_tasks(root: Path) -> list[str]:
    rows = _read_parquet(root / "meta/tasks.parquet", None).to_pylist()
    name = "task" if rows and "task" in rows[0] else "__index_level_0__"
    return [str(row[name]) for row in sorted(rows, key=lambda row: int(row["task_index"]))]


def _read_parquet(path: Path, columns: list[str] | None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; copy or collect the dataset again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); copy or collect the dataset again") from None
