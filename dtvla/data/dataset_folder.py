"""One LeRobot dataset (v2.0, v2.1 or v3.0), read and checked when it is opened; pictures are left on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtvla.data import lerobot_v2, lerobot_v3
from dtvla.data.lerobot import Contents, read_info, read_lines, read_parquet
from dtvla.data.pictures import PictureSpan
from dtvla.data.staging import CAMERA_KEYS
from dtvla.data.thoughts import COLUMN, ThoughtColumn
from dtvla.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COLUMNS = ("observation.state", "action", "task_index", "episode_index")
FORMATS = {"v2.": lerobot_v2.read, "v3.": lerobot_v3.read}


class DatasetFolder:
    """The frames of one dataset.

    Attributes:
        root: the folder.
        info: its ``meta/info.json``.
        fps: frames a second.
        instructions, task_index_F, thoughts, thought_index_F, state_FD, action_FD, starts_E, stops_E: as in
            :class:`~dtvla.data.demonstrations.Demonstrations`.
    """

    def __init__(
        self, root: Path | str, *, thoughts: bool, thought_tokenizer: str | Path | PreTrainedTokenizerFast | None
    ) -> None:
        """Open a dataset; the arguments and errors are those of :class:`~dtvla.data.demonstrations.Demonstrations`."""
        self.root = Path(root)
        self.info = read_info(self.root)
        self.fps = float(self.info["fps"])
        self._contents = _read_contents(self.root, self.info)
        self._check_features(thoughts)
        lengths_E = np.array([episode.length for episode in self._contents.episodes], dtype=np.int64)
        self.stops_E = np.cumsum(lengths_E)
        self.starts_E = self.stops_E - lengths_E
        self.thoughts, self.thought_index_F = [""], np.zeros(self.stops_E[-1], dtype=np.int64)
        reasoning = ThoughtColumn(self.root, thought_tokenizer) if thoughts else None
        table = pa.concat_tables(self._tables(reasoning))
        if len(table) != int(self.info["total_frames"]):
            raise UserError(
                f"{self.root / 'data'}: {len(table)} frames, but info.json says {self.info['total_frames']}; "
                "the dataset is truncated, copy or collect it again"
            )
        self.state_FD = self._matrix(table, "observation.state")
        self.action_FD = self._matrix(table, "action")
        self._check_rows(table["episode_index"].to_numpy())
        self.instructions, self.task_index_F = self._tasks(table["task_index"].to_numpy())
        if reasoning is not None:
            self.thoughts, self.thought_index_F = reasoning.finish()

    @cached_property
    def sources(self) -> list[dict[str, Any]]:
        """Per episode suite, task_id, init_state and seed, where the dataset tells (ours do); otherwise empty."""
        path = self.root / "meta/episodes_source.jsonl"
        found = read_lines(path) if path.exists() else []
        if found and len(found) != len(self.starts_E):
            raise UserError(f"{path}: it has {len(found)} of {len(self.starts_E)} episodes; copy the dataset again")
        return found

    @cached_property
    def fingerprint(self) -> str:
        """sha256 that changes with the content: metadata, episode table, and names and sizes of all data files."""
        digest = hashlib.sha256((self.root / "meta/info.json").read_bytes())
        for path in self._contents.tables:
            digest.update(path.read_bytes())
        for folder in ("data", "videos"):
            for path in sorted((self.root / folder).rglob("*.*")):
                digest.update(f"{path.relative_to(self.root)} {path.stat().st_size}\n".encode())
        return digest.hexdigest()

    def camera_key(self, camera: str) -> str:
        """Dataset key of a camera; :class:`UserError` when the dataset does not have it."""
        key = CAMERA_KEYS.get(camera, camera)
        known = [name for name, feature in self.info["features"].items() if feature["dtype"] in ("video", "image")]
        if key not in known:
            raise UserError(f"{self.root}: no pictures {key!r} for camera {camera!r}; name one of {known}")
        return key

    def picture_spans(self, camera: str) -> Iterator[PictureSpan]:
        """Where the pictures of every episode are, in dataset order."""
        key = self.camera_key(camera)
        in_table = self.info["features"][key]["dtype"] == "image"
        file_start, file = 0, None
        for episode, start, stop in zip(self._contents.episodes, self.starts_E, self.stops_E, strict=True):
            if episode.data != file:
                file_start, file = start, episode.data
            path, first = (episode.data, int(start - file_start)) if in_table else episode.videos[key]
            yield PictureSpan(path, key if in_table else None, first, (int(start), int(stop)), episode.number)

    def _check_features(self, thoughts: bool) -> None:
        features = self.info["features"]
        missing = [name for name in COLUMNS if name not in features]
        if missing:
            raise UserError(f"{self.root}: columns {missing} are missing; this is no robot dataset that dtvla can use")
        if thoughts and COLUMN not in features:
            raise UserError(
                f"{self.root}: no column {COLUMN!r}, but the model thinks; "
                "use a dataset with thoughts (`python -m dtvla.collect` records them) or "
                "train with data.thoughts=false, cot=none"
            )

    def _tables(self, reasoning: ThoughtColumn | None) -> list[pa.Table]:
        """The rows of every data file; thoughts go to ``reasoning`` file by file, their token ids are large."""
        tables = []
        columns = [*COLUMNS, COLUMN] if reasoning else list(COLUMNS)
        for path, group in groupby(self._contents.episodes, key=lambda episode: episode.data):
            episodes, table = list(group), read_parquet(path, columns)
            expected = sum(episode.length for episode in episodes)
            if len(table) != expected:
                raise UserError(
                    f"{path}: {len(table)} frames, but the metadata says {expected} (from episode "
                    f"{episodes[0].number} on); the dataset is truncated, copy or collect it again"
                )
            if reasoning:
                reasoning.add(table[COLUMN])
            tables.append(table.select(list(COLUMNS)))
        return tables

    def _check_rows(self, episode_index_F: np.ndarray) -> None:
        """Refuse rows in another order than the episodes, and numbers that are not finite."""
        numbers_E = np.array([episode.number for episode in self._contents.episodes])
        if not np.array_equal(episode_index_F, np.repeat(numbers_E, self.stops_E - self.starts_E)):
            raise UserError(f"{self.root / 'data'}: frames are not in the order of the episodes; collect it again")
        broken_F = ~(np.isfinite(self.action_FD).all(1) & np.isfinite(self.state_FD).all(1))
        if broken_F.any():
            raise UserError(
                f"{self.root}: episode {episode_index_F[broken_F.argmax()]} has a state or action that is not finite; "
                "remove the episode"
            )

    def _tasks(self, task_index_F: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Instructions in the order of their numbers, and every frame's place among them."""
        tasks = self._contents.tasks
        numbers = np.array(sorted(tasks), dtype=np.int64)
        unknown = sorted(set(np.unique(task_index_F).tolist()) - set(tasks))
        if unknown:
            raise UserError(
                f"{self.root}: task_index {unknown[0]} has no text in the task list; copy the dataset again"
            )
        return [tasks[number] for number in numbers.tolist()], np.searchsorted(numbers, task_index_F)

    def _matrix(self, table: pa.Table, name: str) -> np.ndarray:
        """A column of equally long lists as a float32 matrix."""
        column = table[name].combine_chunks()
        lengths_F = pc.list_value_length(column) if hasattr(column.type, "value_type") else pa.array([], pa.int32())
        lengths = pc.unique(lengths_F).to_pylist()
        if len(lengths) != 1 or not lengths[0]:
            raise UserError(f"{self.root}: column {name!r} is not one vector of numbers per frame; collect it again")
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        return flat.reshape(-1, lengths[0])


def _read_contents(root: Path, info: dict[str, Any]) -> Contents:
    version = str(info["codebase_version"])
    read = FORMATS.get(version[:3])
    if read is None:
        raise UserError(f"{root}: LeRobot format {version}; dtvla reads v2.0 to v3.0, convert it with lerobot's tools")
    contents = read(root, info)
    count = len(contents.episodes)
    if count != int(info["total_episodes"]) or not count:
        raise UserError(
            f"{contents.tables[0].parent}: {count} episodes, but info.json says {info['total_episodes']}; "
            "the dataset is truncated, copy or collect it again"
        )
    return contents
