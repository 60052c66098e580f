"""LeRobot v2.0 and v2.1: one parquet file and one video per camera for each episode, metadata as JSON lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtvla.data.lerobot import Contents, Episode, read_lines, video_keys
from dtvla.errors import UserError

EPISODES, TASKS = "meta/episodes.jsonl", "meta/tasks.jsonl"
CHUNK = 1000  # episodes a folder, where info.json does not say


def read(root: Path, info: Mapping[str, Any]) -> Contents:
    """Read the metadata; :class:`UserError` when a file is absent or damaged."""
    chunk_size, keys = int(info.get("chunks_size", CHUNK)), video_keys(info)
    try:
        episodes = [
            _episode(root, info, keys, int(row["episode_index"]), int(row["length"]), chunk_size)
            for row in read_lines(root / EPISODES)
        ]
        tasks = {int(row["task_index"]): str(row["task"]) for row in read_lines(root / TASKS)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{root / 'meta'}: a row or a path template is damaged ({error!r}); copy it again") from None
    return Contents(sorted(episodes, key=lambda episode: episode.number), tasks, [root / EPISODES, root / TASKS])


def _episode(root: Path, info: Mapping[str, Any], keys: list[str], number: int, length: int, chunk: int) -> Episode:
    place = {"episode_chunk": number // chunk, "episode_index": number}
    videos = {key: (root / info["video_path"].format(video_key=key, **place), 0) for key in keys}
    return Episode(number, length, root / info["data_path"].format(**place), videos)
