"""Writes finished episodes as a LeRobot v3.0 dataset that ``lerobot`` itself loads.

The format is parquet, mp4 and json in a fixed layout; it is written directly, because importing ``lerobot`` costs tens
of seconds and its recorder re-encodes every frame. Tests hold the result against ``lerobot``'s own writer and reader.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dtvla.data.lerobot import write_json
from dtvla.data.staging import CAMERA_KEYS, FPS, StagedEpisode
from dtvla.data.summaries import describe, describe_histogram
from dtvla.data.video import CODEC, ENCODER_OPTIONS, PIXEL_FORMAT, ClipJoiner

FORMAT_VERSION = "v3.0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
FILES_PER_CHUNK = 1000
VIDEO_FILE_MB = 200
DATA_FILE_MB = 100

STATE_NAMES = ["x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"]
ACTION_NAMES = ["dx", "dy", "dz", "drot_x", "drot_y", "drot_z", "gripper"]
INDEX_KEYS = ("frame_index", "episode_index", "index", "task_index")


class DatasetWriter:
    """Assembles a dataset from staged episodes, in the order in which they are added."""

    def __init__(self, root: Path) -> None:
        """Start a dataset in the new folder ``root``."""
        root.mkdir(parents=True, exist_ok=False)
        (root / "data/chunk-000").mkdir(parents=True)
        (root / EPISODES_PATH).parent.mkdir(parents=True)
        self._root = root
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._sources: list[dict[str, Any]] = []
        self._columns: dict[str, list[np.ndarray]] = {}
        self._histograms: dict[str, np.ndarray] = {}
        self._frames = 0
        self._data = pq.ParquetWriter(root / DATA_PATH.format(chunk_index=0, file_index=0), _data_schema())
        self._videos: dict[str, _VideoFiles] = {}

    def add(self, episode: StagedEpisode) -> None:
        """Append one episode."""
        count = len(episode.state_F8)
        index = len(self._episodes)
        task_index = self._tasks.setdefault(episode.source.instruction, len(self._tasks))
        columns: dict[str, np.ndarray] = {
            "observation.state": episode.state_F8,
            "action": episode.action_F7,
            "timestamp": (np.arange(count) / FPS).astype(np.float32),
            "frame_index": np.arange(count),
            "episode_index": np.full(count, index),
            "index": np.arange(self._frames, self._frames + count),
            "task_index": np.full(count, task_index),
        }
        self._data.write_table(_data_table(columns, episode.thoughts))
        row: dict[str, Any] = {
            "episode_index": index,
            "tasks": [episode.source.instruction],
            "length": count,
            "data/chunk_index": 0,
            "data/file_index": 0,
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + count,
        }
        for camera, clip in episode.clips.items():
            key = CAMERA_KEYS[camera]
            files = self._videos.setdefault(key, _VideoFiles(self._root, key))
            row |= files.append(clip, count)
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        row |= self._summaries(columns, episode.histograms)
        self._episodes.append(row)
        self._sources.append(_source_line(index, episode))
        self._frames += count

    def finish(self, collection: Mapping[str, Any]) -> None:
        """Close all files and write the metadata; ``collection`` becomes ``meta/collection.json``."""
        self._data.close()
        for files in self._videos.values():
            files.close()
        pq.write_table(pa.Table.from_pylist(self._episodes), self._root / EPISODES_PATH)
        _write_tasks(self._root / "meta/tasks.parquet", self._tasks)
        everything = {key: np.concatenate(parts) for key, parts in self._columns.items()}
        stats = {key: describe(values) for key, values in everything.items()}
        stats |= {key: describe_histogram(counts) for key, counts in self._histograms.items()}
        write_json(self._root / "meta/stats.json", stats)
        write_json(self._root / "meta/info.json", self._info())
        norm_stats = {"state": everything["observation.state"], "action": everything["action"]}
        write_json(self._root / "meta/norm_stats.json", {k: describe(v, published=True) for k, v in norm_stats.items()})
        lines = "".join(json.dumps(source) + "\n" for source in self._sources)
        (self._root / "meta/episodes_source.jsonl").write_text(lines)
        write_json(self._root / "meta/collection.json", dict(collection))

    def _summaries(self, columns: Mapping[str, np.ndarray], histograms: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Statistics of this episode for its metadata row, and the sums for the whole dataset."""
        stats: dict[str, dict[str, Any]] = {}
        for key, values in columns.items():
            self._columns.setdefault(key, []).append(values)
            stats[key] = describe(values)
        for camera, counts in histograms.items():
            key = CAMERA_KEYS[camera]
            self._histograms[key] = self._histograms.get(key, 0) + counts
            stats[key] = describe_histogram(counts)
        return {f"stats/{key}/{name}": value for key, group in stats.items() for name, value in group.items()}

    def _info(self) -> dict[str, Any]:
        features: dict[str, Any] = {key: files.feature() for key, files in self._videos.items()}
        features["observation.state"] = {"dtype": "float32", "shape": [8], "names": STATE_NAMES}
        features["action"] = {"dtype": "float32", "shape": [7], "names": ACTION_NAMES}
        features["reasoning"] = {"dtype": "string", "shape": [1], "names": None}
        features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
        features |= {key: {"dtype": "int64", "shape": [1], "names": None} for key in INDEX_KEYS}
        return {
            "codebase_version": FORMAT_VERSION,
            "fps": FPS,
            "features": features,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "robot_type": "panda",
            "splits": {"train": f"0:{len(self._episodes)}"},
        }


class _VideoFiles:
    """The video files of one camera: clips are joined until a file is full."""

    def __init__(self, root: Path, key: str) -> None:
        self._root, self._key = root, key
        self._number = 0
        self._joiner = self._open()

    def append(self, clip: bytes, frames: int) -> dict[str, Any]:
        """Add an episode's clip; returns its place as columns of the episode table."""
        if self._joiner.frames and self._joiner.size + len(clip) > VIDEO_FILE_MB * 2**20:
            self._joiner.close()
            self._number += 1
            self._joiner = self._open()
        start = self._joiner.frames
        self._joiner.append(clip, frames)
        chunk, file = divmod(self._number, FILES_PER_CHUNK)
        return {
            f"videos/{self._key}/chunk_index": chunk,
            f"videos/{self._key}/file_index": file,
            f"videos/{self._key}/from_timestamp": start / FPS,
            f"videos/{self._key}/to_timestamp": (start + frames) / FPS,
        }

    def close(self) -> None:
        self._joiner.close()

    def feature(self) -> dict[str, Any]:
        """Entry of ``info.json``."""
        height, width = self._joiner.picture_shape
        return {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": CODEC,
                "video.pix_fmt": PIXEL_FORMAT,
                "video.fps": FPS,
                "video.channels": 3,
                "has_audio": False,
                "video.g": int(ENCODER_OPTIONS["g"]),
                "video.crf": int(ENCODER_OPTIONS["crf"]),
                "video.preset": ENCODER_OPTIONS["preset"],
                "video.video_backend": "pyav",
                "is_depth_map": False,
            },
        }

    def _open(self) -> ClipJoiner:
        chunk, file = divmod(self._number, FILES_PER_CHUNK)
        return ClipJoiner(self._root / VIDEO_PATH.format(video_key=self._key, chunk_index=chunk, file_index=file), FPS)


def _data_schema() -> pa.Schema:
    fields = [("observation.state", pa.list_(pa.float32(), 8)), ("action", pa.list_(pa.float32(), 7))]
    fields += [("reasoning", pa.string()), ("timestamp", pa.float32())]
    return pa.schema(fields + [(key, pa.int64()) for key in INDEX_KEYS])


def _data_table(columns: Mapping[str, np.ndarray], thoughts: list[str]) -> pa.Table:
    arrays: list[pa.Array] = []
    for entry in _data_schema():
        if entry.name == "reasoning":
            arrays.append(pa.array(thoughts, pa.string()))
        elif pa.types.is_fixed_size_list(entry.type):
            flat = pa.array(columns[entry.name].ravel(), pa.float32())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, entry.type.list_size))
        else:
            arrays.append(pa.array(columns[entry.name], entry.type))
    return pa.Table.from_arrays(arrays, schema=_data_schema())


def _write_tasks(path: Path, tasks: Mapping[str, int]) -> None:
    """A pandas frame indexed by the task text, which is how ``lerobot`` reads it."""
    import pandas as pd

    pd.DataFrame({"task_index": list(tasks.values())}, index=pd.Index(list(tasks), name="task")).to_parquet(path)


def _source_line(index: int, episode: StagedEpisode) -> dict[str, Any]:
    source = episode.source
    line = {"episode_index": index, "suite": source.suite, "task_id": source.task_id, "steps": source.steps}
    names = ("file", "demo", "noops", "success") if source.demo else ("init_state", "seed", "attempt", "failures")
    return line | {name: getattr(source, name) for name in names}


def write_dataset(root: Path, episodes: Iterable[StagedEpisode], collection: Mapping[str, Any]) -> None:
    """Write ``episodes`` as a new dataset in the folder ``root``, which must not exist."""
    writer = DatasetWriter(root)
    for episode in episodes:
        writer.add(episode)
    writer.finish(collection)
